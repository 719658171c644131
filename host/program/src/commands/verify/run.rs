//! The matrix that shows a backend right: every element type, quantization, mode and kind of shape, each checked in
//! full.
//!
//! A case is one fused operation on random inputs. It is right if
//! - every element is what the [reference](fused_collective_core::reference) allows, whatever the outputs held before;
//! - all ranks' outputs are the same bits, and so are a repeated run's;
//! - `residual_out` is the same bits in one-shot and in two-shot, and whatever the quantization;
//! - no input has changed, and no tensor that the operation has no business with was read (they are full of NaN) or
//!   written (they still are), nor any byte before or after a tensor or in the workspace's slots.
//!
//! The reference is slow, and each shape needs it once: what a later case gives for a token is right as well if it is
//! the same bits, or if its codes and scales are `core`'s own quantization of a norm that was found right. Only what
//! is neither is held against the reference again.
//!
//! Each rank runs [`run`] with its [`Place`]; all of them go through the same steps and reach the same verdicts. No
//! rank waits for another for longer than a slice of a check takes, however large the problem.

use std::{borrow::Cow, fmt, ops::Range, time::Duration};

use fused_collective::{cpu::Plain, group::rendezvous::Group};

use crate::{
    backend::{
        collective::Collective,
        guards::first_other,
        problem::{Problem, Tensor},
    },
    check::{
        inputs::Numbers,
        variants::{Variant, variants},
        verify::{
            Judge, Outputs, POISON, check_padding, largest_error, poison, row, row_of_sum, spread, values,
            write_inputs,
        },
    },
    job::{
        options::BackendChoice,
        ranks::{Error, gather_verdicts},
    },
    quant_mode::QuantMode,
    report::progress::Progress,
};
use fused_collective_core::{
    dtype::{DType, bf16, f16},
    fusion::Norm,
    quant::{Quantization, quantize_row},
};
use serde::{Deserialize, Serialize};

/// Elements of an activation that are checked between two points where all ranks meet: about a second's work of one
/// processor.
const SLICE_ELEMENTS: u64 = 4 << 20;

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
    /// Whether every other row of the inputs holds NaN, infinities, subnormal numbers, zeros or the largest numbers.
    pub special: bool,
    /// Longest wait for a peer, in seconds; finite and above 0.
    pub deadline_seconds: f64,
    /// The backend asked for.
    pub backend: BackendChoice,
    /// Whether every `f32` goes through the conversions that the backend has of its own.
    pub conversions: bool,
    /// Whether ranks are kept from operations, to see what the others say.
    pub faults: bool,
    /// How often each operation is run with dependents that read its outputs as early as they may.
    pub dependents: u64,
    /// Ranks of a group, one size after the other; none leaves it to the launcher or to the backend.
    pub nproc_per_node: Vec<u32>,
    /// Groups of that size that do the same at the same time.
    pub groups: u32,
    /// Whether ranks may share a GPU.
    pub oversubscribe: bool,
}

impl Default for Settings {
    /// The whole matrix.
    fn default() -> Self {
        Settings {
            num_tokens: vec![0, 1, 2, 3, 17, 128, 1000, 2048],
            hidden_dims: vec![48, 2880, 4096, 7168, 8192, 16_384],
            seed: 0,
            special: false,
            deadline_seconds: 10.0,
            backend: BackendChoice::Auto,
            conversions: true,
            faults: false,
            dependents: 0,
            nproc_per_node: Vec::new(),
            groups: 1,
            oversubscribe: false,
        }
    }
}

impl Settings {
    /// The shapes of the matrix that take seconds: no tokens, one, few that no number of ranks divides, some; a hidden
    /// size that fills no warp, one that is no power of two, a usual one.
    pub fn quick() -> Self {
        Settings {
            num_tokens: vec![0, 1, 17, 128],
            hidden_dims: vec![48, 2880, 8192],
            conversions: false,
            ..Settings::default()
        }
    }

    /// What the tensors hold.
    pub fn numbers(&self) -> Numbers {
        Numbers { seed: self.seed, special: self.special }
    }

    /// Longest wait for a peer.
    pub fn deadline(&self) -> Duration {
        Duration::from_secs_f64(self.deadline_seconds)
    }

    /// Every problem of the matrix.
    pub fn problems(&self) -> impl Iterator<Item = Problem> + '_ {
        self.sections().flat_map(move |section| {
            section.shapes(self).flat_map(|shape| QuantMode::ALL.map(|quant_mode| shape.problem(quant_mode)))
        })
    }

    /// Cases of one group: each problem is solved in one-shot, in two-shot, and with a sharded residual if it has one.
    pub fn count(&self) -> u64 {
        self.problems().map(|problem| 2 + u64::from(problem.sharded)).sum()
    }

    fn sections(&self) -> impl Iterator<Item = Section> + '_ {
        DType::ALL
            .into_iter()
            .flat_map(move |dtype| self.hidden_dims.iter().map(move |&hidden| Section { dtype, hidden }))
    }
}

/// Cases that are told of together, in a line for each quantization.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Section {
    pub(crate) dtype: DType,
    pub(crate) hidden: u64,
}

impl Section {
    fn shapes(self, settings: &Settings) -> impl Iterator<Item = Shape> + '_ {
        [true, false].into_iter().flat_map(move |residual| {
            settings.num_tokens.iter().map(move |&tokens| Shape { section: self, tokens, residual })
        })
    }

    fn line(self, quant_mode: QuantMode, tally: Tally) -> String {
        let Section { dtype, hidden } = self;
        format!("{:<8}  {:<4}  hidden {hidden:>5}  {tally}", dtype.name(), quant_mode.name())
    }
}

/// What problems have in common that differ by their quantization: inputs, sums and norms.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) section: Section,
    pub(crate) tokens: u64,
    pub(crate) residual: bool,
}

impl Shape {
    pub(crate) fn problem(self, quant_mode: QuantMode) -> Problem {
        Problem {
            dtype: self.section.dtype,
            tokens: self.tokens,
            hidden: self.section.hidden,
            residual: self.residual,
            sharded: self.residual,
            norm: Norm::default(),
            quantization: quant_mode.quantization(),
            scale: quant_mode.scale(),
        }
    }

    pub(crate) fn title(self, quant_mode: QuantMode) -> String {
        let Shape { section: Section { dtype, hidden }, tokens, residual } = self;
        let residual = if residual { "with residual" } else { "without residual" };
        format!("{dtype} {quant_mode}, hidden {hidden}, {tokens} tokens, {residual}")
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
    /// Counts what `other` counts too.
    pub fn add(&mut self, other: Tally) {
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

/// Where a rank stands in a verification.
pub struct Place<'a> {
    /// All ranks of the job. They keep step.
    pub world: &'a Group,
    /// This rank's group and its end of the backend; `None` for a rank that is left over.
    pub own: Option<(&'a Group, &'a mut dyn Collective)>,
}

impl<'a> Place<'a> {
    pub(crate) fn group(&self) -> Option<&'a Group> {
        self.own.as_ref().map(|(group, _)| *group)
    }
}

/// Runs the matrix of `settings`: every group all of it. `tell` gets a line for every case that fails, as it does, and
/// one for every element type, quantization and hidden size.
///
/// # Errors
/// A group or the backend failed. A case that is wrong is no error but a failure in the tally.
pub fn run(
    settings: &Settings,
    place: &mut Place<'_>,
    progress: &Progress,
    mut tell: impl FnMut(&str),
) -> Result<Tally, Error> {
    let mut total = Tally::default();
    for section in settings.sections() {
        let mut tallies = [Tally::default(); QuantMode::ALL.len()];
        for shape in section.shapes(settings) {
            // One-shot's outputs without a quantization, once they are found right.
            let mut base = None;
            for (quant_mode, tally) in QuantMode::ALL.into_iter().zip(&mut tallies) {
                let title = shape.title(quant_mode);
                progress.doing(title.clone());
                // The group's errors say all there is to say; the backend's do not say what it was doing.
                let verdicts = verify_modes(settings, shape, quant_mode, place, &mut base, progress)
                    .map_err(|error| match error {
                        Error::Collective(error) => Error::Failed(format!("{title}: {error}")),
                        error => error,
                    })?;
                count(
                    settings,
                    &title,
                    gather_groups(place.world, place.group(), &verdicts)?,
                    tally,
                    &mut tell,
                );
            }
        }
        let audited = audit(place)?;
        let mut found = gather_groups(place.world, place.group(), &audited)?;
        found.retain(|(_, _, verdict)| verdict.is_err());
        let title = format!("{} hidden {}, after all cases", section.dtype, section.hidden);
        count(settings, &title, found, &mut tallies[0], &mut tell);
        for (quant_mode, tally) in QuantMode::ALL.into_iter().zip(tallies) {
            tell(&section.line(quant_mode, tally));
            total.add(tally);
        }
    }
    Ok(total)
}

/// Counts what groups `found`, and tells of what is wrong.
pub(crate) fn count(
    settings: &Settings,
    title: &str,
    found: Vec<(usize, String, Verdict)>,
    tally: &mut Tally,
    tell: &mut impl FnMut(&str),
) {
    for (group, name, verdict) in found {
        match verdict {
            Ok(error) => tally.add(Tally { verified: 1, failed: 0, max_error_ulp: error }),
            Err(why) => {
                tally.failed += 1;
                let of_group = if settings.groups > 1 { format!("group {group}, ") } else { String::new() };
                tell(&format!("FAILED {of_group}{title}, {name}: {why}"));
            }
        }
    }
}

/// The largest error of a case in units in the last place, or why it is wrong.
pub(crate) type Verdict = Result<f64, String>;
/// The names of a problem's variants, and how they did.
pub(crate) type Verdicts = Vec<(String, Verdict)>;

/// A thorough look for stray writes, while no rank runs anything. Nothing on a rank that has no group.
fn audit(place: &mut Place<'_>) -> Result<Verdicts, Error> {
    let Some((group, backend)) = &mut place.own else { return Ok(Vec::new()) };
    let stray = backend.find_stray_write(true)?;
    let own = stray.map_or(Ok(0.0), |what| Err(format!("{what} was written")));
    let verdict = gather_verdicts(group, own)?.map(|_| 0.0);
    Ok(vec![("no tensor's memory".to_owned(), verdict)])
}

/// What all groups found, with the number of each. Every rank of the job calls this with its group's `verdicts`.
pub(crate) fn gather_groups(
    world: &Group,
    own: Option<&Group>,
    verdicts: &Verdicts,
) -> Result<Vec<(usize, String, Verdict)>, Error> {
    // All ranks of a group have the same: its first one speaks.
    let speaks = own.is_some_and(|group| group.rank() == 0);
    let own = if speaks { verdicts.as_slice() } else { &[] };
    let bytes = serde_json::to_vec(own).map_err(|error| Error::Failed(error.to_string()))?;
    let mut all = Vec::new();
    let mut group = 0;
    for (rank, bytes) in world.all_gather(&bytes)?.iter().enumerate() {
        let found: Verdicts = serde_json::from_slice(bytes).map_err(|error| {
            Error::Failed(format!("rank {rank} sent verdicts that cannot be read: {error}"))
        })?;
        let speaks = !found.is_empty();
        all.extend(found.into_iter().map(|(name, verdict)| (group, name, verdict)));
        group += usize::from(speaks);
    }
    Ok(all)
}

/// Outputs that the reference allows.
struct Base {
    outputs: Outputs,
    max_error_ulp: f64,
}

impl Base {
    /// Whether token `index` of `outputs`, whose sum is its row `sum`, is right because this one's is: the same bits, or the
    /// quantization of them.
    fn explains<E: Plain>(
        &self,
        problem: &Problem,
        outputs: &Outputs,
        [index, sum]: [u64; 2],
        scratch: &mut Scratch,
    ) -> bool {
        let hidden = problem.hidden as usize;
        let rows_of = |bytes: &[u8]| row::<E>(bytes, index, hidden);
        if rows_of(&self.outputs.residual_out) != row::<E>(&outputs.residual_out, sum, hidden) {
            return false;
        }
        let norm = rows_of(&self.outputs.norm_out);
        if problem.quantization == Quantization::None {
            return norm == rows_of(&outputs.norm_out);
        }
        scratch.quantize(problem, &norm, index).is_some_and(|(codes, scales)| {
            let layout = problem.quantization.scale_layout();
            let cols = problem.quantization.scale_cols(problem.hidden);
            let same_scales = layout.is_none_or(|layout| {
                (0..layout.cols_padded(cols)).all(|col| {
                    let in_scratch = layout.offset(index % SCRATCH_TOKENS, col, cols) as usize;
                    scales[in_scratch] == outputs.scale_out[layout.offset(index, col, cols) as usize]
                })
            });
            codes == values(problem, outputs, index) && same_scales
        })
    }
}

/// Tokens of the tensor that [`Scratch`] quantizes into: as many as a tile of swizzled scales has.
const SCRATCH_TOKENS: u64 = 128;

/// Room for the quantization of one row.
#[derive(Default)]
struct Scratch {
    codes: Vec<u8>,
    scales: Vec<u8>,
}

impl Scratch {
    /// `core`'s codes of row `index`, and a tensor of scales that holds its own in the row of its place in a tile.
    fn quantize<E: Plain>(&mut self, problem: &Problem, norm: &[E], index: u64) -> Option<(&[u8], &[u8])> {
        let quantization = problem.quantization;
        self.codes.resize(quantization.value_bytes_per_row(problem.hidden) as usize, 0);
        self.scales.resize(quantization.scale_bytes(SCRATCH_TOKENS, problem.hidden)? as usize, 0);
        let (row, rows) = (index % SCRATCH_TOKENS, SCRATCH_TOKENS);
        quantize_row(quantization, norm, row, rows, problem.scale, &mut self.codes, &mut self.scales).ok()?;
        Some((&self.codes, &self.scales))
    }
}

/// Solves one problem in each mode: the variants' names and how they did. Nothing on a rank that has no group.
fn verify_modes(
    settings: &Settings,
    shape: Shape,
    quant_mode: QuantMode,
    place: &mut Place<'_>,
    base: &mut Option<Base>,
    progress: &Progress,
) -> Result<Verdicts, Error> {
    let problem = shape.problem(quant_mode);
    let mut case = match &mut place.own {
        Some((group, backend)) => Some(Case::prepare(settings, problem, group, &mut **backend)?),
        None => None,
    };
    // No operation waits for a rank that still writes its inputs.
    place.world.barrier()?;
    let elements = problem.tokens * problem.hidden;
    let slices = elements.div_ceil(SLICE_ELEMENTS).max(1);
    let mut verdicts = Vec::new();
    // With no all-reduce to build separate operations from, there are the fused variants alone.
    for variant in variants(quant_mode, problem.residual, problem.sharded, true, &[]) {
        let mut run = match &mut case {
            Some(case) => Some(case.run(variant)?),
            None => None,
        };
        for slice in 0..slices {
            if let (Some(case), Some(run)) = (&case, &mut run) {
                let tokens = [slice, slice + 1].map(|slice| problem.tokens * slice / slices);
                run.check(case, base.as_ref(), tokens[0]..tokens[1]);
            }
            place.world.barrier()?;
        }
        if let (Some(case), Some(run)) = (&mut case, run) {
            verdicts.push(run.conclude(case, base)?);
        }
        progress.step();
    }
    Ok(verdicts)
}

/// A problem whose inputs are in place.
struct Case<'a> {
    settings: &'a Settings,
    problem: Problem,
    group: &'a Group,
    backend: &'a mut dyn Collective,
    /// What no operation may change. A residual that the problem does not have is among it.
    inputs: [(&'static str, Tensor, Vec<u8>); 4],
}

/// What only separate operations use.
const SCRATCH: [Tensor; 4] = [Tensor::Reduced, Tensor::WideA, Tensor::WideB, Tensor::PerToken];

impl<'a> Case<'a> {
    fn prepare(
        settings: &'a Settings,
        problem: Problem,
        group: &'a Group,
        backend: &'a mut dyn Collective,
    ) -> Result<Self, Error> {
        backend.prepare(&problem)?;
        write_inputs(backend, &problem, settings.numbers(), group)?;
        for tensor in SCRATCH {
            poison(backend, &problem, tensor)?;
        }
        let mut read = |name, tensor| backend.read(tensor).map(|bytes| (name, tensor, bytes));
        let inputs = [
            read("the input", Tensor::Input)?,
            read("the residual", Tensor::Residual)?,
            read("the sharded residual", Tensor::ResidualShard)?,
            read("gamma", Tensor::Gamma)?,
        ];
        Ok(Case { settings, problem, group, backend, inputs })
    }

    /// Runs `variant` twice, and sees to it that it touched nothing else.
    fn run(&mut self, variant: Variant) -> Result<Run, Error> {
        let outputs = Outputs::of(self.backend, &self.problem, &variant)?;
        let again = Outputs::of(self.backend, &self.problem, &variant)?;
        let repeats =
            if again == outputs { Ok(0.0) } else { Err("a repeated run gave other bits".to_owned()) };
        drop(again);
        let untouched = self.check_untouched(&variant)?;
        Ok(Run { variant, outputs, verdict: Ok(0.0), after: repeats.and(untouched) })
    }

    /// Whether a run of `variant` has left alone what is not its own, on this rank. No rank runs anything meanwhile.
    fn check_untouched(&mut self, variant: &Variant) -> Result<Verdict, Error> {
        for (name, tensor, before) in &self.inputs {
            if self.backend.read(*tensor)? != *before {
                return Ok(Err(format!("{name} was changed")));
            }
        }
        let norm = (!variant.writes_norm).then_some(Tensor::NormOut);
        let other_sum = if variant.sharded { Tensor::ResidualOut } else { Tensor::ResidualShardOut };
        for tensor in SCRATCH.into_iter().chain(norm).chain([other_sum]) {
            if let Some(at) = first_other(&self.backend.read(tensor)?, POISON) {
                return Ok(Err(format!(
                    "{tensor:?} is not the operation's, and byte {at} of it was written"
                )));
            }
        }
        let stray = self.backend.find_stray_write(false)?;
        Ok(stray.map_or(Ok(0.0), |what| Err(format!("{what} is no tensor's, and was written"))))
    }
}

/// What the sum that `variant` leaves on this rank must be if `sum` is all of it: the rows that it has, and past them what
/// was there before.
fn held_rows<'a>(case: &Case<'_>, variant: &Variant, sum: &'a [u8]) -> Cow<'a, [u8]> {
    if !variant.sharded {
        return Cow::Borrowed(sum);
    }
    let (rank, world_size) = (case.group.rank() as usize, case.group.world_size() as usize);
    let rows = sum.chunks(case.problem.row_bytes() as usize).skip(rank).step_by(world_size);
    let mut held: Vec<u8> = rows.flatten().copied().collect();
    held.resize(sum.len(), POISON);
    Cow::Owned(held)
}

/// A run of a variant, and what is known of it on this rank.
struct Run {
    variant: Variant,
    outputs: Outputs,
    /// Of the tokens so far: the largest error, or the first mistake.
    verdict: Verdict,
    /// The same of everything else, which counts if the tokens are right.
    after: Verdict,
}

impl Run {
    /// Checks this rank's share of `tokens`.
    fn check(&mut self, case: &Case<'_>, base: Option<&Base>, tokens: Range<u64>) {
        let Ok(so_far) = self.verdict else { return };
        let found = match case.problem.dtype {
            DType::F32 => self.check_typed::<f32>(case, base, tokens),
            DType::F16 => self.check_typed::<f16>(case, base, tokens),
            DType::Bf16 => self.check_typed::<bf16>(case, base, tokens),
        };
        self.verdict = found.map(|error| error.max(so_far));
    }

    fn check_typed<E: Plain>(&self, case: &Case<'_>, base: Option<&Base>, tokens: Range<u64>) -> Verdict {
        let Case { settings, problem, group, .. } = case;
        spread(group, tokens, |tokens| {
            let mut judge = Judge::<E>::new(problem, &self.variant, settings.numbers(), group.world_size());
            let mut scratch = Scratch::default();
            largest_error(tokens, |token| match base {
                Some(base) => {
                    let rows = [token, row_of_sum(&self.variant, token, group.world_size())];
                    if base.explains::<E>(problem, &self.outputs, rows, &mut scratch) {
                        Ok(base.max_error_ulp)
                    } else {
                        judge.check(&self.outputs, token)
                    }
                }
                None => judge.check(&self.outputs, token),
            })
        })
    }

    /// The variant's name, and what all ranks of the group found together.
    fn conclude(self, case: &Case<'_>, base: &mut Option<Base>) -> Result<(String, Verdict), Error> {
        let Run { variant, outputs, verdict, after } = self;
        let padding = check_padding(&case.problem, &outputs.scale_out);
        let own = verdict.and_then(|error| {
            padding?;
            after?;
            Ok((error, outputs.digests(&variant)))
        });
        let verdict = gather_verdicts(case.group, own)?.and_then(|all| {
            if let Some(rank) = all.iter().position(|(_, digests)| *digests != all[0].1) {
                return Err(format!("rank {rank}'s outputs are not the same bits as rank 0's"));
            }
            let is_base_sum =
                |base: &Base| held_rows(case, &variant, &base.outputs.residual_out) == outputs.residual_out;
            if !base.as_ref().is_none_or(is_base_sum) {
                return Err("residual_out is not the same bits as one-shot's".to_owned());
            }
            Ok(all.iter().fold(0.0f64, |largest, (error, _)| largest.max(*error)))
        });
        if let (None, Ok(max_error_ulp)) = (&base, &verdict)
            && case.problem.quantization == Quantization::None
        {
            *base = Some(Base { outputs, max_error_ulp: *max_error_ulp });
        }
        Ok((variant.name, verdict))
    }
}
