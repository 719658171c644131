//! The verification matrix: every element type, quantization, mode and kind of shape, each checked in full.
//!
//! A case is one fused operation on random inputs. It is right if
//! - the [reference](fused_collective_core::reference) allows every element, whatever the outputs held before;
//! - the outputs of all ranks are the same bits, and so are those of a repeated run;
//! - `residual_out` is the same bits in one-shot and in two-shot, and for every quantization, unless rows have a format of
//!   fewer bits between ranks;
//! - the operation gives these bits, too, when its rows are cut into calls of random sizes whose outputs replace their inputs;
//! - the operation has not written its inputs, unrelated tensors, the guards of tensors or idle slots of the workspace. It
//!   has not read unrelated tensors and guards, which are full of NaN.
//!
//! The reference is slow, so each shape is checked against it once. A later case is right if it has the same bits, by digests
//! that the backend makes where the tensors lie, or if it has the codes and scales of `core`'s quantization of the same norm. Only
//! other results are checked against the reference again.
//!
//! Every rank calls [`run`] with its [`Place`]. All ranks go through the same steps and reach the same verdicts. A rank
//! never waits for another for longer than the check of a slice takes, so the deadline holds for problems of every size.

use std::{borrow::Cow, ops::Range, sync::Arc};

use fastrand::Rng;
use fused_collective::{cpu::Plain, group::rendezvous::Group};
use fused_collective_core::{
    dtype::{DType, bf16, f16},
    fusion::Mode,
    quant::{Quantization, quantize_row},
};

use super::{
    settings::{Settings, Shape, wires_of},
    verdicts::{Place, Tally, Verdict, Verdicts, count, gather_groups},
};

use crate::{
    backend::{
        collective::Collective,
        guards::first_other,
        problem::{Problem, Tensor},
    },
    check::{
        chunks,
        judge::Judge,
        outputs::{
            Digests, Held, Outputs, POISON, Saved, check_padding, poison_outputs, row, row_of_sum, values,
        },
        variants::{Variant, that_span, variants},
        verify::{largest_error, spread, write_inputs},
    },
    job::ranks::{Error, gather_verdicts, hosts},
    quant_mode::QuantMode,
    report::progress::Progress,
    wire::Wire,
};

/// Elements of an activation that are checked between two barriers: about a second of work for one processor.
const SLICE_ELEMENTS: u64 = 4 << 20;

/// Runs the matrix of `settings` in every group, with the formats `wires` between ranks. `tell` gets a
/// line for every case that fails, and one for every element type, quantization and hidden size.
///
/// # Errors
/// A group or the backend failed. A wrong case is no error but a failure in the tally.
pub fn run(
    settings: &Settings,
    wires: &[Wire],
    place: &mut Place<'_>,
    progress: &Progress,
    mut tell: impl FnMut(&str),
) -> Result<Tally, Error> {
    let mut total = Tally::default();
    for section in settings.sections() {
        let mut tallies = [Tally::default(); QuantMode::ALL.len()];
        for shape in section.shapes(settings) {
            let mut known = Known::default();
            for (quant_mode, tally) in section.quant_modes().zip(&mut tallies) {
                let title = shape.title(quant_mode);
                progress.doing(title.clone());
                // The backend's errors do not name the case. The group's errors are about ranks.
                let verdicts = verify_modes(settings, wires, shape, quant_mode, place, &mut known, progress)
                    .map_err(|error| match error {
                        Error::Collective(error) => Error::Failed(format!("{title}: {error}")),
                        error => error,
                    })?;
                count(
                    settings.job.groups,
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
        count(settings.job.groups, &title, found, &mut tallies[0], &mut tell);
        for (quant_mode, tally) in section.quant_modes().zip(tallies) {
            tell(&section.line(quant_mode, tally));
            total.add(tally);
        }
    }
    Ok(total)
}

/// Searches everything for stray writes while all ranks are idle. Returns nothing on a rank without a group.
fn audit(place: &mut Place<'_>) -> Result<Verdicts, Error> {
    let Some((group, backend)) = &mut place.own else { return Ok(Vec::new()) };
    let stray = backend.find_stray_write(true)?;
    let own = stray.map_or(Ok(0.0), |what| Err(format!("{what} was written")));
    let verdict = gather_verdicts(group, own)?.map(|_| 0.0);
    Ok(vec![("no tensor's memory".to_owned(), verdict)])
}

/// The knowledge that the problems of a shape share.
#[derive(Default)]
struct Known {
    /// The [inputs](INPUTS), which are the same.
    inputs: Option<Saved>,
    /// The verified outputs without a quantization, a set for each of the variants that have bits of their own.
    bases: Vec<(Bits, Base)>,
}

/// The parts of a variant that show in its bits.
#[derive(Clone, Copy, PartialEq)]
struct Bits {
    wire: Wire,
    /// True if the sum of all ranks goes through the format, too.
    sends_sum: bool,
}

impl Bits {
    fn of(variant: &Variant) -> Bits {
        let wire = variant.wire();
        let sends_sum = variant.fused().is_some_and(|call| call.mode == Mode::TwoShot && !call.sharded);
        Bits { wire, sends_sum: sends_sum && !wire.is_exact() }
    }
}

/// Outputs that the reference has allowed.
struct Base {
    outputs: Outputs,
    max_error_ulp: f64,
    /// The digests of the sum, as it is on this rank whole and sharded.
    sums: [Option<u64>; 2],
}

/// A problem's digests of norm, codes and scales that were verified.
type Rests = Vec<(Bits, [u64; 3])>;

impl Base {
    /// True if token `index` of `outputs` is right because it has the same bits, or is their quantization. Row `sum` of
    /// `residual_out` holds the token.
    fn explains<E: Plain>(
        &self,
        problem: &Problem,
        outputs: &Outputs,
        [index, sum]: [u64; 2],
        scratch: &mut Scratch,
    ) -> bool {
        fn row_of(bytes: &[u8], index: u64, row_bytes: u64) -> &[u8] {
            let start = (index * row_bytes) as usize;
            bytes.get(start..start + row_bytes as usize).unwrap_or_default()
        }
        let row_bytes = problem.row_bytes();
        let known = &self.outputs;
        if row_of(&known.residual_out, index, row_bytes) != row_of(&outputs.residual_out, sum, row_bytes) {
            return false;
        }
        if problem.quantization == Quantization::None {
            return row_of(&known.norm_out, index, row_bytes) == row_of(&outputs.norm_out, index, row_bytes);
        }
        let norm = row::<E>(&known.norm_out, index, problem.hidden as usize);
        scratch.quantize(problem, &norm).is_some_and(|(codes, scales)| {
            let (own, all) = (problem.quantization.scales(1, problem.hidden), problem.scales());
            let same_scales = own.zip(all).is_none_or(|(own, all)| {
                (0..own.cols).all(|col| own.get(scales, 0, col) == all.get(&outputs.scale_out, index, col))
            });
            codes == values(problem, outputs, index) && same_scales
        })
    }
}

/// The base of the variants that have the bits of `variant`.
fn base_of<'a>(bases: &'a [(Bits, Base)], variant: &Variant) -> Option<&'a Base> {
    bases.iter().find(|(bits, _)| *bits == Bits::of(variant)).map(|(_, base)| base)
}

/// Buffers for the quantization of one row.
#[derive(Default)]
struct Scratch {
    codes: Vec<u8>,
    scales: Vec<u8>,
}

impl Scratch {
    /// `core`'s codes of a row, and its scales as those of a tensor of one row.
    fn quantize<E: Plain>(&mut self, problem: &Problem, norm: &[E]) -> Option<(&[u8], &[u8])> {
        let quantization = problem.quantization;
        self.codes.resize(quantization.value_bytes_per_row(problem.hidden) as usize, 0);
        self.scales.resize(quantization.scale_bytes(1, problem.hidden)? as usize, 0);
        quantize_row(quantization, norm, 0, 1, problem.scale, &mut self.codes, &mut self.scales).ok()?;
        Some((&self.codes, &self.scales))
    }
}

/// Solves one problem in each mode, and returns the verdicts. Returns nothing on a rank without a group.
fn verify_modes(
    settings: &Settings,
    wires: &[Wire],
    shape: Shape,
    quant_mode: QuantMode,
    place: &mut Place<'_>,
    known: &mut Known,
    progress: &Progress,
) -> Result<Verdicts, Error> {
    let Known { inputs, bases } = known;
    let mut rests = Rests::new();
    let problem = shape.problem(quant_mode);
    let wires = wires_of(&problem, wires);
    let hosts = place.hosts();
    let mut case = match &mut place.own {
        Some((group, backend)) => Some(Case::prepare(settings, problem, group, &mut **backend, inputs)?),
        None => None,
    };
    // The set-up of a rank must not count against the deadline of another rank's operation.
    place.world.barrier()?;
    let elements = problem.tokens * problem.hidden;
    let slices = elements.div_ceil(SLICE_ELEMENTS).max(1);
    let mut verdicts = Vec::new();
    // Without all-reduces for separate operations there are only the fused variants.
    let all = variants(problem.pattern, quant_mode, problem.residual, problem.sharded, true, wires, &[]);
    for variant in that_span(hosts, all) {
        let mut run = match &mut case {
            Some(case) => Some(case.run(variant, bases, &rests)?),
            None => None,
        };
        for slice in 0..slices {
            if let (Some(case), Some(run)) = (&case, &mut run) {
                let tokens = [slice, slice + 1].map(|slice| problem.tokens * slice / slices);
                run.check(case, bases, tokens[0]..tokens[1]);
            }
            place.world.barrier()?;
        }
        if let (Some(case), Some(run)) = (&mut case, run) {
            verdicts.push(run.conclude(case, bases, &mut rests)?);
        }
        progress.step();
    }
    Ok(verdicts)
}

/// A problem whose inputs are written.
struct Case<'a> {
    settings: &'a Settings,
    problem: Problem,
    group: &'a Group,
    backend: &'a mut dyn Collective,
    inputs: &'a Saved,
    /// Digests of all that no variant may change.
    untouched: Held,
}

/// The tensors that no operation may change. They include a residual that the problem does not have.
const INPUTS: [(Tensor, &str); 8] = [
    (Tensor::Input, "the input"),
    (Tensor::Residual, "the residual"),
    (Tensor::ResidualShard, "the sharded residual"),
    (Tensor::Gamma, "gamma"),
    (Tensor::PostGamma, "the post-norm's gamma"),
    (Tensor::ExpertRows, "the experts' rows"),
    (Tensor::ExpertIndex, "the experts' indices"),
    (Tensor::ExpertScales, "the experts' scales"),
];

/// The tensors that only separate operations use.
const SCRATCH: [Tensor; 5] =
    [Tensor::Combined, Tensor::Reduced, Tensor::WideA, Tensor::WideB, Tensor::PerToken];

impl<'a> Case<'a> {
    fn prepare(
        settings: &'a Settings,
        problem: Problem,
        group: &'a Group,
        backend: &'a mut dyn Collective,
        inputs: &'a mut Option<Saved>,
    ) -> Result<Self, Error> {
        backend.prepare(&problem)?;
        let inputs = match inputs {
            Some(inputs) => {
                inputs.restore(backend)?;
                &*inputs
            }
            none => {
                write_inputs(backend, &problem, settings.numbers(), group)?;
                none.insert(Saved::of(backend, &INPUTS.map(|(tensor, _)| tensor))?)
            }
        };
        for tensor in SCRATCH {
            backend.fill(tensor, POISON)?;
        }
        let tensors = INPUTS.into_iter().map(|(tensor, _)| tensor).chain(SCRATCH);
        let untouched = Held::of(backend, tensors)?;
        Ok(Case { settings, problem, group, backend, inputs, untouched })
    }

    /// Runs `variant` twice, and checks that it wrote nothing but its outputs. Reads those that are not known to be right.
    fn run(&mut self, variant: Variant, bases: &[(Bits, Base)], rests: &Rests) -> Result<Run, Error> {
        let (sum, norm) = variant.written(&self.problem);
        poison_outputs(self.backend)?;
        self.backend.run(&variant.steps)?;
        let digests = Digests::read(self.backend, sum, norm)?;
        poison_outputs(self.backend)?;
        let is_written = |tensor| {
            tensor == sum || Some(tensor) == norm || matches!(tensor, Tensor::QuantOut | Tensor::ScaleOut)
        };
        let unwritten = Held::of(self.backend, Tensor::OUTPUTS.into_iter().filter(|&it| !is_written(it)))?;
        self.backend.run(&variant.steps)?;
        let mut after = Ok(0.0);
        if Digests::read(self.backend, sum, norm)? != digests {
            after = Err("a repeated run gave other bits".to_owned());
        }
        let base = base_of(bases, &variant);
        let knows_sum = base.is_some_and(|base| base.sums[usize::from(variant.sharded)] == Some(digests.sum));
        let knows_all = knows_sum && rests.contains(&(Bits::of(&variant), digests.rest));
        let whole_sum = base.filter(|_| knows_sum && !variant.sharded);
        let outputs = match whole_sum {
            _ if knows_all => None,
            Some(base) => {
                let sum = Arc::clone(&base.outputs.residual_out);
                Some(Outputs::with_sum(self.backend, sum, norm)?)
            }
            None => Some(Outputs::read(self.backend, sum, norm)?),
        };
        let verdict = Ok(base.filter(|_| knows_all).map_or(0.0, |base| base.max_error_ulp));
        let untouched = self.check_untouched(&unwritten)?;
        let in_chunks = self.check_chunks(&variant, &digests, outputs.as_ref(), base)?;
        Ok(Run { variant, digests, knows_sum, outputs, verdict, after: after.and(untouched), in_chunks })
    }

    /// Checks on this rank that several calls in place, each of some rows, give outputs of the same `digests`.
    fn check_chunks(
        &mut self,
        variant: &Variant,
        digests: &Digests,
        outputs: Option<&Outputs>,
        base: Option<&Base>,
    ) -> Result<Verdict, Error> {
        let in_place = variant.clone().in_place();
        let Some(call) = in_place.fused() else { return Ok(Ok(0.0)) };
        // The same on every rank, and others for other shapes.
        let seed = self.settings.seed ^ self.problem.tokens << 32 ^ self.problem.hidden;
        let mut random = Rng::with_seed(seed);
        let owners = hosts(self.group).ranks_per_host();
        let steps = chunks::cut(&self.problem, call, owners, &mut random);
        let problem = self.problem;
        // No rank's calls may write while another one searches for stray writes of the calls before.
        self.group.barrier()?;
        poison_outputs(self.backend)?;
        chunks::run(self.backend, &problem, &steps)?;
        let (sum, norm) = in_place.written(&problem);
        let mut wrong = None;
        if Digests::read(self.backend, sum, norm)? != *digests {
            let found = Outputs::read(self.backend, sum, norm)?;
            // Of known outputs that were not read, the base has sum and norm.
            let known = outputs.cloned().or_else(|| {
                let Outputs { residual_out, norm_out, .. } =
                    base.filter(|_| !variant.sharded)?.outputs.clone();
                let norm_out = norm.map_or_else(Vec::new, |_| norm_out);
                Some(Outputs { residual_out, norm_out, ..found.clone() })
            });
            let difference = known.and_then(|known| found.first_difference(&known));
            wrong = Some(difference.unwrap_or_else(|| "the outputs are not the verified bits".to_owned()));
        }
        self.inputs.restore_only(self.backend, &in_place.overwritten(&problem))?;
        let stray = self.backend.find_stray_write(false)?;
        Ok(match (wrong, stray) {
            (Some(wrong), _) => Err(format!("in place, in {} calls: {wrong}", steps.len())),
            (None, Some(stray)) => Err(format!("in place, in {} calls: {stray} was written", steps.len())),
            (None, None) => Ok(0.0),
        })
    }

    /// Checks on this rank that a run wrote nothing but its outputs: not the inputs, nor the tensors that it leaves `unwritten`. All
    /// ranks are idle meanwhile.
    fn check_untouched(&mut self, unwritten: &Held) -> Result<Verdict, Error> {
        for held in [&self.untouched, unwritten] {
            let Some(changed) = held.first_changed(self.backend)? else { continue };
            if let Some((_, name)) = INPUTS.iter().find(|(tensor, _)| *tensor == changed) {
                return Ok(Err(format!("{name} was changed")));
            }
            let at = first_other(&self.backend.read(changed)?, POISON).unwrap_or(0);
            return Ok(Err(format!(
                "{changed:?} is no output of the operation, and byte {at} of it was written"
            )));
        }
        let stray = self.backend.find_stray_write(false)?;
        Ok(stray.map_or(Ok(0.0), |what| Err(format!("{what} is in no tensor, and was written"))))
    }
}

/// The sum that `variant` must leave on this rank, if `sum` is the whole sum. With a sharded residual it is this rank's
/// rows, followed by poison.
fn held_rows<'a>(case: &Case<'_>, variant: &Variant, sum: &'a [u8]) -> Cow<'a, [u8]> {
    if !variant.sharded {
        return Cow::Borrowed(sum);
    }
    let hosts = hosts(case.group);
    let (place, owners) = (hosts.place() as usize, hosts.ranks_per_host() as usize);
    let rows = sum.chunks(case.problem.row_bytes() as usize).skip(place).step_by(owners);
    let mut held: Vec<u8> = rows.flatten().copied().collect();
    held.resize(sum.len(), POISON);
    Cow::Owned(held)
}

/// A run of a variant, with this rank's verdicts.
struct Run {
    variant: Variant,
    digests: Digests,
    /// True if the sum is a verified one.
    knows_sum: bool,
    /// `None` if all outputs are verified ones.
    outputs: Option<Outputs>,
    /// The verdict on the tokens so far.
    verdict: Verdict,
    /// The verdict on everything else, which counts if the tokens are right.
    after: Verdict,
    /// The verdict on calls of some rows, which counts if all ranks' outputs are right.
    in_chunks: Verdict,
}

impl Run {
    /// Checks this rank's share of `tokens`.
    fn check(&mut self, case: &Case<'_>, bases: &[(Bits, Base)], tokens: Range<u64>) {
        let (Ok(so_far), Some(outputs)) = (&self.verdict, &self.outputs) else { return };
        let base = base_of(bases, &self.variant);
        let found = match case.problem.dtype {
            DType::F32 => self.check_typed::<f32>(case, outputs, base, tokens),
            DType::F16 => self.check_typed::<f16>(case, outputs, base, tokens),
            DType::Bf16 => self.check_typed::<bf16>(case, outputs, base, tokens),
        };
        self.verdict = found.map(|error| error.max(*so_far));
    }

    fn check_typed<E: Plain>(
        &self,
        case: &Case<'_>,
        outputs: &Outputs,
        base: Option<&Base>,
        tokens: Range<u64>,
    ) -> Verdict {
        let Case { settings, problem, group, .. } = case;
        let hosts = hosts(group);
        spread(group, tokens, |tokens| {
            let mut judge = Judge::<E>::new(problem, &self.variant, settings.numbers(), &hosts);
            let mut scratch = Scratch::default();
            largest_error(tokens, |token| match base {
                Some(base) => {
                    let rows = [token, row_of_sum(&self.variant, token, hosts.ranks_per_host())];
                    if base.explains::<E>(problem, outputs, rows, &mut scratch) {
                        Ok(base.max_error_ulp)
                    } else {
                        judge.check(outputs, token)
                    }
                }
                None => judge.check(outputs, token),
            })
        })
    }

    /// The variant's name, and the verdict of all ranks of the group. What is right is known from then on.
    fn conclude(
        self,
        case: &Case<'_>,
        bases: &mut Vec<(Bits, Base)>,
        rests: &mut Rests,
    ) -> Result<(String, Verdict), Error> {
        let Run { variant, digests, knows_sum, outputs, verdict, after, in_chunks } = self;
        let padding =
            outputs.as_ref().map_or(Ok(()), |outputs| check_padding(&case.problem, &outputs.scale_out));
        let own = verdict.and_then(|error| {
            padding?;
            after?;
            let sum_of = |base: &Base| {
                let held = held_rows(case, &variant, &base.outputs.residual_out);
                outputs.as_ref().is_some_and(|outputs| *held == **outputs.residual_out)
            };
            if !knows_sum && !base_of(bases, &variant).is_none_or(sum_of) {
                return Err("residual_out is not the same bits as one-shot's".to_owned());
            }
            Ok((error, digests.shared(&variant)))
        });
        let verdict = gather_verdicts(case.group, own)?.and_then(|all| {
            if let Some(rank) = all.iter().position(|(_, digests)| *digests != all[0].1) {
                return Err(format!("rank {rank}'s outputs are not the same bits as rank 0's"));
            }
            Ok(all.iter().fold(0.0f64, |largest, (error, _)| largest.max(*error)))
        });
        if let Ok(max_error_ulp) = verdict {
            let bits = Bits::of(&variant);
            let place = usize::from(variant.sharded);
            match (bases.iter_mut().find(|(it, _)| *it == bits), outputs) {
                (Some((_, base)), _) => base.sums[place] = Some(digests.sum),
                (None, Some(outputs))
                    if case.problem.quantization == Quantization::None && !variant.sharded =>
                {
                    bases.push((bits, Base { outputs, max_error_ulp, sums: [Some(digests.sum), None] }));
                }
                _ => {}
            }
            if base_of(bases, &variant).is_some() {
                rests.push((bits, digests.rest));
            }
        }
        let in_chunks = gather_verdicts(case.group, in_chunks)?;
        Ok((variant.name, verdict.and_then(|error| in_chunks.map(|_| error))))
    }
}
