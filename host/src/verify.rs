//! The matrix that shows a backend right: every element type, quantization, mode and kind of shape, each checked in
//! full.
//!
//! A case is one fused operation on random inputs. It is right if
//! - every element is what the [reference](fused_collective_core::reference) allows, whatever the outputs held before;
//! - all ranks' outputs are the same bits, and so are a repeated run's;
//! - `residual_out` is the same bits in one-shot and in two-shot;
//! - no input has changed, and no tensor that the operation has no business with was read (they are full of NaN) or
//!   written (they still are).
//!
//! Each rank runs [`run`] with its end of the group and of the backend; all of them go through the same steps and
//! reach the same verdicts.

use std::{fmt, time::Duration};

use fused_collective_core::{dtype::DType, fusion::Norm};
use serde::{Deserialize, Serialize};

use crate::{
    bench::{
        Error, Variant, variants,
        verify::{POISON, Verified, digest, gather_verdicts, poison, verify, write_inputs},
    },
    collective::{Collective, Problem, Tensor},
    rendezvous::Group,
    report::progress::Progress,
    settings::{BackendChoice, QuantMode},
};

/// Everything that the command line says about a verification. Its lists hold at least one value and no value twice,
/// and every operation of its [problems](Settings::problems) is valid.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Token counts, from 0.
    pub num_tokens: Vec<u64>,
    /// Elements of a token.
    pub hidden_dims: Vec<u64>,
    /// Seed of the random inputs.
    pub seed: u64,
    /// Longest wait for a peer, in seconds; finite and above 0.
    pub deadline_seconds: f64,
    /// The backend asked for.
    pub backend: BackendChoice,
    /// Ranks asked for; `None` leaves it to the launcher or to the backend.
    pub nproc_per_node: Option<u32>,
}

impl Default for Settings {
    /// The whole matrix.
    fn default() -> Self {
        Settings {
            num_tokens: vec![0, 1, 2, 3, 17, 128, 1000, 2048],
            hidden_dims: vec![48, 2880, 4096, 7168, 8192, 16_384],
            seed: 0,
            deadline_seconds: 10.0,
            backend: BackendChoice::Auto,
            nproc_per_node: None,
        }
    }
}

impl Settings {
    /// The shapes of the matrix that take seconds: no tokens, one, few that no number of ranks divides, some; a hidden
    /// size that fills no warp, one that is no power of two, a usual one.
    pub fn quick() -> Self {
        Settings { num_tokens: vec![0, 1, 17, 128], hidden_dims: vec![48, 2880, 8192], ..Settings::default() }
    }

    /// Longest wait for a peer.
    pub fn deadline(&self) -> Duration {
        Duration::from_secs_f64(self.deadline_seconds)
    }

    /// Every problem of the matrix.
    pub fn problems(&self) -> impl Iterator<Item = Problem> + '_ {
        self.sections().flat_map(|section| self.problems_of(section))
    }

    /// Cases: each problem is solved in one-shot and in two-shot.
    pub fn count(&self) -> u64 {
        2 * self.problems().count() as u64
    }

    fn sections(&self) -> impl Iterator<Item = Section> + '_ {
        DType::ALL.into_iter().flat_map(move |dtype| {
            QuantMode::ALL.into_iter().flat_map(move |quant_mode| {
                self.hidden_dims.iter().map(move |&hidden| Section { dtype, quant_mode, hidden })
            })
        })
    }

    fn problems_of(&self, section: Section) -> impl Iterator<Item = Problem> + '_ {
        let Section { dtype, quant_mode, hidden } = section;
        [true, false].into_iter().flat_map(move |residual| {
            self.num_tokens.iter().map(move |&tokens| Problem {
                dtype,
                tokens,
                hidden,
                residual,
                norm: Norm::default(),
                quantization: quant_mode.quantization(),
                scale: quant_mode.scale(),
            })
        })
    }
}

/// Cases that are told of in one line.
#[derive(Clone, Copy, Debug)]
struct Section {
    dtype: DType,
    quant_mode: QuantMode,
    hidden: u64,
}

impl fmt::Display for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Section { dtype, quant_mode, hidden } = self;
        write!(f, "{:<8}  {:<4}  hidden {hidden:>5}", dtype.name(), quant_mode.name())
    }
}

/// How cases went.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tally {
    /// Cases that are right.
    pub verified: u64,
    /// Cases that are not.
    pub failed: u64,
    /// The largest error of any output of those that are right, in units in the last place of its type.
    pub max_error_ulp: f64,
}

impl Tally {
    fn add(&mut self, other: Tally) {
        self.verified += other.verified;
        self.failed += other.failed;
        self.max_error_ulp = self.max_error_ulp.max(other.max_error_ulp);
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tally { verified, failed, max_error_ulp } = self;
        write!(f, "{:>3} cases, largest error {max_error_ulp:.2} ulp", verified + failed)?;
        if *failed > 0 { write!(f, ", {failed} FAILED") } else { Ok(()) }
    }
}

/// Runs the matrix of `settings`. `tell` gets a line for every case that fails, as it does, and one for every element
/// type, quantization and hidden size.
///
/// # Errors
/// The group or the backend failed. A case that is wrong is no error but a failure in the tally.
pub fn run(
    settings: &Settings,
    group: &Group,
    backend: &mut dyn Collective,
    progress: &Progress,
    mut tell: impl FnMut(&str),
) -> Result<Tally, Error> {
    let mut total = Tally::default();
    for section in settings.sections() {
        let mut tally = Tally::default();
        for problem in settings.problems_of(section) {
            let residual = if problem.residual { "with residual" } else { "without residual" };
            let title = format!(
                "{} {}, hidden {}, {} tokens, {residual}",
                section.dtype, section.quant_mode, problem.hidden, problem.tokens
            );
            progress.doing(title.clone());
            // The group's errors say all there is to say; the backend's do not say what it was doing.
            let verdicts = verify_modes(settings, section.quant_mode, &problem, group, backend, progress)
                .map_err(|error| match error {
                    Error::Collective(error) => Error::Failed(format!("{title}: {error}")),
                    error => error,
                })?;
            for (name, verdict) in verdicts {
                match verdict {
                    Ok(error) => tally.add(Tally { verified: 1, failed: 0, max_error_ulp: error }),
                    Err(why) => {
                        tally.failed += 1;
                        tell(&format!("FAILED {title}, {name}: {why}"));
                    }
                }
            }
        }
        tell(&format!("{section}  {tally}"));
        total.add(tally);
    }
    Ok(total)
}

/// The largest error of a case in units in the last place, or why it is wrong.
type Verdict = Result<f64, String>;

/// Solves one problem in each mode: the variants' names and how they did.
fn verify_modes(
    settings: &Settings,
    quant_mode: QuantMode,
    problem: &Problem,
    group: &Group,
    backend: &mut dyn Collective,
    progress: &Progress,
) -> Result<Vec<(String, Verdict)>, Error> {
    backend.prepare(problem)?;
    write_inputs(backend, problem, settings.seed, group.rank())?;
    for tensor in SCRATCH {
        poison(backend, problem, tensor)?;
    }
    let inputs = input_digests(backend)?;
    // The digest of one-shot's `residual_out`, if that is right.
    let mut one_shot = None;
    let mut verdicts = Vec::new();
    // With no all-reduce to build separate operations from, there are the fused variants alone.
    for variant in variants(quant_mode, problem.residual, true, &[]) {
        let verdict = verify(backend, group, problem, &variant, settings.seed)?;
        let untouched = gather_verdicts(group, check_untouched(backend, &variant, inputs)?)?;
        let verdict = verdict.and_then(|Verified { max_error_ulp, residual_digest }| {
            untouched?;
            if *one_shot.get_or_insert(residual_digest) == residual_digest {
                Ok(max_error_ulp)
            } else {
                Err("residual_out is not the same bits as one-shot's".to_owned())
            }
        });
        verdicts.push((variant.name, verdict));
        progress.step();
    }
    Ok(verdicts)
}

/// What only separate operations use.
const SCRATCH: [Tensor; 4] = [Tensor::Reduced, Tensor::WideA, Tensor::WideB, Tensor::PerToken];

/// Digests of what no operation may change. A residual that the problem does not have is one of them.
fn input_digests(backend: &mut dyn Collective) -> Result<[u64; 3], Error> {
    let mut digest_of = |tensor| backend.read(tensor).map(|bytes| digest(&bytes));
    Ok([digest_of(Tensor::Input)?, digest_of(Tensor::Residual)?, digest_of(Tensor::Gamma)?])
}

/// Whether a run of `variant` has left alone what is not its own, on this rank.
fn check_untouched(
    backend: &mut dyn Collective,
    variant: &Variant,
    inputs: [u64; 3],
) -> Result<Result<(), String>, Error> {
    let names = ["the input", "the residual", "gamma"];
    let changed = names.into_iter().zip(inputs.into_iter().zip(input_digests(backend)?));
    for (name, (before, after)) in changed {
        if before != after {
            return Ok(Err(format!("{name} was changed")));
        }
    }
    let norm = (!variant.writes_norm).then_some(Tensor::NormOut);
    for tensor in SCRATCH.into_iter().chain(norm) {
        if let Some(at) = backend.read(tensor)?.iter().position(|&byte| byte != POISON) {
            return Ok(Err(format!("{tensor:?} is not the operation's, and byte {at} of it was written")));
        }
    }
    Ok(Ok(()))
}
