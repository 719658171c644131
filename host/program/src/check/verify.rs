//! The verification of a variant.
//!
//! The outputs are poisoned, the variant runs, and every rank checks its share of the tokens against the specification. As all
//! ranks must have the same bits, the shares cover all outputs. A second run must give the same bits again.
//!
//! A variant that was timed is verified once more, by the outputs of one more trial: some faults show only then.

use std::{
    hash::{DefaultHasher, Hasher},
    iter::StepBy,
    ops::Range,
};

use fused_collective::{cpu::Plain, group::rendezvous::Group};
use fused_collective_core::{
    dtype::{DType, bf16, f16},
    fusion::{Mode, Operation},
    norm::Weights,
    plan::{owned_index, owned_token, owned_tokens},
    quant::Quantization,
    reference::check_token,
    specification::{Observed, Row, Token, TokenExperts},
};
use zerocopy::IntoBytes as _;

use super::{
    inputs::{Numbers, Source},
    parallel,
    variants::Variant,
};
use crate::{
    backend::{
        collective::Collective,
        problem::{Problem, Tensor},
    },
    job::ranks::{Error, gather_verdicts},
    measurement::SumError,
};

/// The byte that fills outputs before a run. It makes NaN in every element type, and is a rare code of random inputs.
pub(crate) const POISON: u8 = 0xff;
/// Bytes of a tensor that are poisoned at a time.
const POISONED_AT_ONCE: u64 = 1 << 20;
/// Bytes of rows that are made, then written at a time.
const WRITTEN_AT_ONCE: u64 = 64 << 20;
/// Bytes of a tensor that are digested at a time by one processor.
const DIGESTED_AT_ONCE: usize = 1 << 20;

/// Rows whose sums are compared with exact ones.
const MOST_ROWS: u64 = 256;

/// Fills `tensor` with [`POISON`].
pub(crate) fn poison(backend: &mut dyn Collective, problem: &Problem, tensor: Tensor) -> Result<(), Error> {
    let bytes = problem.bytes(tensor).unwrap_or(0);
    let poison = vec![POISON; bytes.min(POISONED_AT_ONCE) as usize];
    let mut at = 0;
    while at < bytes {
        let length = (bytes - at).min(POISONED_AT_ONCE);
        backend.write(tensor, at, &poison[..length as usize])?;
        at += length;
    }
    Ok(())
}

/// Writes this rank's input, and the tensors that all ranks share. A residual that the problem does not have is poisoned.
pub(crate) fn write_inputs(
    backend: &mut dyn Collective,
    problem: &Problem,
    numbers: Numbers,
    group: &Group,
) -> Result<(), Error> {
    match problem.dtype {
        DType::F32 => write_typed_inputs::<f32>(backend, problem, numbers, group),
        DType::F16 => write_typed_inputs::<f16>(backend, problem, numbers, group),
        DType::Bf16 => write_typed_inputs::<bf16>(backend, problem, numbers, group),
    }
}

fn write_typed_inputs<E: Plain>(
    backend: &mut dyn Collective,
    problem: &Problem,
    numbers: Numbers,
    group: &Group,
) -> Result<(), Error> {
    // Poison shows a read of rows that this rank does not have.
    poison(backend, problem, Tensor::ResidualShard)?;
    let (rank, ranks) = (group.rank(), group.world_size());
    let mut write = |tensor, source, rows, token_of: &(dyn Fn(u64) -> u64 + Sync)| {
        write_rows::<E>(backend, problem.hidden, ranks, tensor, rows, |place, row| {
            numbers.fill_row(source, token_of(place), row);
        })
    };
    write(Tensor::Gamma, Source::Gamma, 1, &|_| 0)?;
    if problem.pattern.post_norm().is_some() {
        write(Tensor::PostGamma, Source::PostGamma, 1, &|_| 0)?;
    }
    write(Tensor::ExpertRows, Source::ExpertRows(rank), problem.chosen(), &|row| row)?;
    write(Tensor::Input, Source::Input(rank), problem.tokens, &|token| token)?;
    if problem.residual {
        write(Tensor::Residual, Source::Residual, problem.tokens, &|token| token)?;
    }
    if problem.sharded {
        write(
            Tensor::ResidualShard,
            Source::Residual,
            owned_tokens(problem.tokens, rank, ranks),
            &|place| owned_token(place, rank, ranks),
        )?;
    }
    if !problem.residual {
        poison(backend, problem, Tensor::Residual)?;
    }
    if let Some(experts) = problem.pattern.experts() {
        let chosen = problem.chosen();
        let row = |place| numbers.expert_row(rank, place, chosen).map_or(-1, |row| row as i32);
        let index: Vec<i32> = (0..chosen).map(row).collect();
        backend.write(Tensor::ExpertIndex, 0, index.as_bytes())?;
        let mut scales = vec![0.0f32; chosen as usize];
        for (token, scales) in (0..).zip(scales.chunks_mut(experts.top_k as usize)) {
            numbers.fill_row(Source::ExpertScales(rank), token, scales);
        }
        backend.write(Tensor::ExpertScales, 0, scales.as_bytes())?;
    }
    Ok(())
}

/// Writes the first `rows` rows of `tensor`, each made by `fill` from its place, on the processors of one of `ranks` ranks.
fn write_rows<E: Plain>(
    backend: &mut dyn Collective,
    hidden: u64,
    ranks: u32,
    tensor: Tensor,
    rows: u64,
    fill: impl Fn(u64, &mut [E]) + Sync,
) -> Result<(), Error> {
    let row_bytes = hidden * size_of::<E>() as u64;
    let at_once = (WRITTEN_AT_ONCE / row_bytes).clamp(1, rows.max(1));
    let mut batch = vec![E::default(); (at_once * hidden) as usize];
    for first in (0..rows).step_by(at_once as usize) {
        let batch = &mut batch[..((rows - first).min(at_once) * hidden) as usize];
        let items = (first..).zip(batch.chunks_mut(hidden as usize)).collect();
        parallel::map(ranks, items, |(place, row)| fill(place, row));
        backend.write(tensor, first * row_bytes, batch.as_bytes())?;
    }
    Ok(())
}

/// Copies of tensors, which are put back after an operation has overwritten them.
pub(crate) struct Saved(Vec<(Tensor, Vec<u8>)>);

impl Saved {
    pub(crate) fn of(backend: &mut dyn Collective, tensors: &[Tensor]) -> Result<Self, Error> {
        let saved = tensors.iter().map(|&tensor| Ok((tensor, backend.read(tensor)?)));
        saved.collect::<Result<_, Error>>().map(Saved)
    }

    /// The first of the tensors that is no longer the same.
    pub(crate) fn first_changed(&self, backend: &mut dyn Collective) -> Result<Option<Tensor>, Error> {
        for (tensor, bytes) in &self.0 {
            if backend.read(*tensor)? != *bytes {
                return Ok(Some(*tensor));
            }
        }
        Ok(None)
    }

    pub(crate) fn restore(&self, backend: &mut dyn Collective) -> Result<(), Error> {
        let mut held = self.0.iter().filter(|(_, bytes)| !bytes.is_empty());
        held.try_for_each(|(tensor, bytes)| Ok(backend.write(*tensor, 0, bytes)?))
    }
}

/// The outputs of one run, as bytes. A tensor that the variant does not write is empty.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Outputs {
    pub(crate) residual_out: Vec<u8>,
    pub(crate) norm_out: Vec<u8>,
    pub(crate) quant_out: Vec<u8>,
    pub(crate) scale_out: Vec<u8>,
}

impl Outputs {
    /// Poisons the outputs, runs the variant, and reads them.
    pub(crate) fn of(
        backend: &mut dyn Collective,
        problem: &Problem,
        variant: &Variant,
    ) -> Result<Self, Error> {
        Self::after(backend, problem, variant, |backend| Ok(backend.run(&variant.steps)?))
    }

    /// Poisons the outputs, calls `run`, which runs the variant, and reads them. Inputs that were overwritten are put back.
    pub(crate) fn after(
        backend: &mut dyn Collective,
        problem: &Problem,
        variant: &Variant,
        run: impl FnOnce(&mut dyn Collective) -> Result<(), Error>,
    ) -> Result<Self, Error> {
        let saved = Saved::of(backend, &variant.overwritten(problem))?;
        for tensor in Tensor::OUTPUTS {
            poison(backend, problem, tensor)?;
        }
        run(backend)?;
        let norm = variant.writes_norm.then(|| variant.norm());
        let outputs = Outputs::read(backend, variant.sum(problem), norm)?;
        saved.restore(backend)?;
        Ok(outputs)
    }

    /// Reads the outputs of an operation whose sum is in `sum` and whose norm is in `norm`, if it writes one.
    pub(crate) fn read(
        backend: &mut dyn Collective,
        sum: Tensor,
        norm: Option<Tensor>,
    ) -> Result<Self, Error> {
        Ok(Outputs {
            residual_out: backend.read(sum)?,
            norm_out: norm.map_or(Ok(Vec::new()), |norm| backend.read(norm))?,
            quant_out: backend.read(Tensor::QuantOut)?,
            scale_out: backend.read(Tensor::ScaleOut)?,
        })
    }

    /// Describes the first byte that is not that of `expected`.
    pub(crate) fn first_difference(&self, expected: &Outputs) -> Option<String> {
        let tensors = [
            (Tensor::ResidualOut, &self.residual_out, &expected.residual_out),
            (Tensor::NormOut, &self.norm_out, &expected.norm_out),
            (Tensor::QuantOut, &self.quant_out, &expected.quant_out),
            (Tensor::ScaleOut, &self.scale_out, &expected.scale_out),
        ];
        let mut wrong = tensors.into_iter().filter(|(_, found, expected)| found != expected);
        wrong.find_map(|(tensor, found, expected)| {
            let at = found.iter().zip(expected).position(|(found, expected)| found != expected)?;
            let (found, expected) = (found[at], expected[at]);
            Some(format!("byte {at} of {tensor:?} is {found:#04x}, not the verified {expected:#04x}"))
        })
    }

    /// Digests of the outputs that are the same on all ranks: `residual_out` unless it is sharded, `norm_out`, `quant_out`
    /// and `scale_out`.
    pub(crate) fn digests(&self, variant: &Variant, ranks: u32) -> [u64; 4] {
        let residual_out = if variant.sharded { &[][..] } else { &self.residual_out };
        [residual_out, &self.norm_out, &self.quant_out, &self.scale_out].map(|bytes| digest(bytes, ranks))
    }
}

/// A digest of bytes, for comparison between ranks of this build of the program. One of `ranks` ranks computes it.
fn digest(bytes: &[u8], ranks: u32) -> u64 {
    let of_part = |bytes: &[u8]| {
        let mut hasher = DefaultHasher::new();
        hasher.write(bytes);
        hasher.finish()
    };
    let parts = parallel::map(ranks, bytes.chunks(DIGESTED_AT_ONCE).collect(), of_part);
    of_part(parts.as_bytes())
}

/// Verifies `variant` on the problem whose inputs [`write_inputs`] wrote. Every rank returns the same: the largest error in
/// units in the last place, or the reason why the variant is wrong.
pub(crate) fn verify(
    backend: &mut dyn Collective,
    group: &Group,
    problem: &Problem,
    variant: &Variant,
    numbers: Numbers,
) -> Result<Result<f64, String>, Error> {
    let outputs = Outputs::of(backend, problem, variant)?;
    let ranks = group.world_size();
    let (digests, sum) = (outputs.digests(variant, ranks), digest(&outputs.residual_out, ranks));
    let checked = check(&outputs, group, problem, variant, numbers, 1);
    drop(outputs);
    let again = Outputs::of(backend, problem, variant)?;
    let checked = checked.and_then(|error| {
        if (again.digests(variant, ranks), digest(&again.residual_out, ranks)) == (digests, sum) {
            Ok((digests, error))
        } else {
            Err("a repeated run gave other bits".to_owned())
        }
    });
    agree(group, checked)
}

/// Verifies `variant` by the outputs of one more trial of `operations` operations, like those that were timed. Returns the
/// same as [`verify`], and the outputs.
///
/// In place, each operation reads what the one before it wrote, and the outputs are those of all of them in turn. Numbers
/// that are no longer finite at the end are a failure.
pub(crate) fn verify_timed(
    backend: &mut dyn Collective,
    group: &Group,
    problem: &Problem,
    variant: &Variant,
    operations: u32,
    numbers: Numbers,
) -> Result<Result<(f64, Outputs), String>, Error> {
    // This time counts for nothing.
    let run = |backend: &mut dyn Collective| Ok(backend.time(&variant.steps, operations).map(drop)?);
    let mut times = 1;
    if !variant.overwritten(problem).is_empty() {
        // The first trial may run the steps once more, to capture them.
        Outputs::after(backend, problem, variant, run)?;
        times = backend.runs_on_each(operations);
    }
    let outputs = Outputs::after(backend, problem, variant, run)?;
    let checked = check(&outputs, group, problem, variant, numbers, times);
    let agreed = agree(group, checked.map(|error| (outputs.digests(variant, group.world_size()), error)))?;
    Ok(agreed.map(|error| (error, outputs)))
}

/// The largest error of all ranks, or the reason why the variant is wrong, from the digests and the error that each has
/// found. Every rank returns the same.
fn agree(group: &Group, checked: Result<([u64; 4], f64), String>) -> Result<Result<f64, String>, Error> {
    Ok(gather_verdicts(group, checked)?.and_then(|all| {
        if let Some(rank) = all.iter().position(|(digests, _)| *digests != all[0].0) {
            return Err(format!("rank {rank}'s outputs are not the same bits as rank 0's"));
        }
        Ok(all.iter().fold(0.0f64, |largest, (_, error)| largest.max(*error)))
    }))
}

/// Checks this rank's share of the tokens, after the variant ran so many `times` on the same tensors.
fn check(
    outputs: &Outputs,
    group: &Group,
    problem: &Problem,
    variant: &Variant,
    numbers: Numbers,
    times: u32,
) -> Result<f64, String> {
    match problem.dtype {
        DType::F32 => check_typed::<f32>(outputs, group, problem, variant, numbers, times),
        DType::F16 => check_typed::<f16>(outputs, group, problem, variant, numbers, times),
        DType::Bf16 => check_typed::<bf16>(outputs, group, problem, variant, numbers, times),
    }
}

fn check_typed<E: Plain>(
    outputs: &Outputs,
    group: &Group,
    problem: &Problem,
    variant: &Variant,
    numbers: Numbers,
    times: u32,
) -> Result<f64, String> {
    let largest = spread(group, 0..problem.tokens, |tokens| {
        let mut judge = Judge::<E>::new(problem, variant, numbers, group.world_size());
        judge.times = times;
        largest_error(tokens, |token| judge.check(outputs, token))
    })?;
    check_padding(problem, &outputs.scale_out)?;
    Ok(largest)
}

/// The largest error that `check` finds in `tokens`, or the first failure.
pub(crate) fn largest_error(
    mut tokens: impl Iterator<Item = u64>,
    mut check: impl FnMut(u64) -> Result<f64, String>,
) -> Result<f64, String> {
    tokens.try_fold(0.0f64, |largest, token| check(token).map(|error| largest.max(error)))
}

/// The row of `token` in the sum that `variant` leaves, on a rank that has it.
pub(crate) fn row_of_sum(variant: &Variant, token: u64, world_size: u32) -> u64 {
    if variant.sharded { owned_index(token, world_size) } else { token }
}

/// Checks this rank's share of `tokens`, which are those that it owns in two-shot. This rank's share of the processors runs
/// threads, each of which calls `check` with its tokens. Returns the largest error, or the first failure.
pub(crate) fn spread(
    group: &Group,
    tokens: Range<u64>,
    check: impl Fn(StepBy<Range<u64>>) -> Result<f64, String> + Sync,
) -> Result<f64, String> {
    let (rank, world_size) = (u64::from(group.rank()), u64::from(group.world_size()));
    let count = tokens.end.saturating_sub(tokens.start);
    let threads =
        (parallel::processors(group.world_size()) as u64).clamp(1, count.div_ceil(world_size).max(1));
    // The first of this rank's tokens.
    let skipped = (rank + world_size - tokens.start % world_size) % world_size;
    let own = (0..threads).map(|thread| {
        let first = (tokens.start + skipped + thread * world_size).min(tokens.end);
        (first..tokens.end).step_by((world_size * threads) as usize)
    });
    let errors = parallel::map(group.world_size(), own.collect(), check);
    errors.into_iter().try_fold(0.0f64, |largest, error| error.map(|error| largest.max(error)))
}

/// The check of tokens: against the specification, bit for bit, where a variant has its bits, and against the reference. It
/// makes the inputs of all ranks itself.
pub(crate) struct Judge<'a, E> {
    operation: Operation,
    problem: &'a Problem,
    variant: &'a Variant,
    numbers: Numbers,
    inputs: Vec<Vec<E>>,
    residual: Vec<E>,
    gamma: Vec<E>,
    post_gamma: Vec<E>,
    /// The experts of a token on each rank; empty without experts.
    experts: Vec<Chosen<E>>,
    /// The times that the variant ran on the same tensors. In place, each time reads the outputs of the one before.
    times: u32,
    /// The outputs of a token, as specified.
    specified: Specified<E>,
}

/// The experts of a token on one rank, whose rows are a tensor of their own.
#[derive(Clone)]
struct Chosen<E> {
    rows: Vec<E>,
    index: Vec<i32>,
    scales: Vec<f32>,
}

impl<E: Plain> Chosen<E> {
    fn new(top_k: usize, hidden: usize) -> Self {
        let rows = vec![E::default(); top_k * hidden];
        Chosen { rows, index: vec![-1; top_k], scales: vec![0.0; top_k] }
    }

    fn fill(&mut self, problem: &Problem, numbers: Numbers, rank: u32, token: u64) {
        let (top_k, hidden) = (self.index.len() as u64, problem.hidden as usize);
        let places = token * top_k..(token + 1) * top_k;
        for ((place, k), row) in places.zip(0..).zip(self.rows.chunks_mut(hidden)) {
            let chosen = numbers.expert_row(rank, place, problem.chosen());
            self.index[k as usize] = if chosen.is_some() { k } else { -1 };
            if let Some(chosen) = chosen {
                numbers.fill_row(Source::ExpertRows(rank), chosen, row);
            }
        }
        numbers.fill_row(Source::ExpertScales(rank), token, &mut self.scales);
    }

    fn experts(&self) -> TokenExperts<'_, E> {
        TokenExperts { rows: &self.rows, index: &self.index, scales: Weights::F32(&self.scales) }
    }
}

/// The memory of a [`Row`].
struct Specified<E> {
    residual_out: Vec<E>,
    norm: Vec<E>,
    values: Vec<u8>,
    scales: Vec<u8>,
}

impl<E> Specified<E> {
    fn row(&mut self) -> Row<'_, E> {
        let Specified { residual_out, norm, values, scales } = self;
        Row { residual_out, norm, values, scales }
    }
}

impl<'a, E: Plain> Judge<'a, E> {
    pub(crate) fn new(problem: &'a Problem, variant: &'a Variant, numbers: Numbers, world_size: u32) -> Self {
        let row = vec![E::default(); problem.hidden as usize];
        let mut gamma = row.clone();
        numbers.fill_row(Source::Gamma, 0, &mut gamma);
        let mut post_gamma = row.clone();
        numbers.fill_row(Source::PostGamma, 0, &mut post_gamma);
        let experts = problem.pattern.experts();
        let experts = experts.map(|experts| Chosen::new(experts.top_k as usize, row.len()));
        // The mode shows in the bits of a wire format, the layout of the residual in none.
        let call = variant.fused();
        let operation = Operation {
            keep_norm: variant.writes_norm,
            rounding: variant.rounding(),
            ..call.map_or(problem.operation(Mode::Auto), |call| call.operation(problem))
        };
        Judge {
            specified: Specified {
                residual_out: row.clone(),
                norm: row.clone(),
                values: vec![0; operation.quantization.value_bytes_per_row(operation.hidden) as usize],
                scales: vec![0; Row::<E>::scale_bytes(&operation) as usize],
            },
            operation,
            problem,
            variant,
            numbers,
            inputs: vec![row.clone(); world_size as usize],
            residual: row,
            gamma,
            post_gamma,
            experts: experts.map_or(Vec::new(), |experts| vec![experts; world_size as usize]),
            times: 1,
        }
    }

    /// Makes inputs of this variant's outputs in place, as all runs but the last leave them.
    fn advance(&mut self, index: u64) -> Result<(), String> {
        let Judge { operation, problem, inputs, residual, specified, .. } = self;
        let experts: Vec<_> = self.experts.iter().map(Chosen::experts).collect();
        for _ in 1..self.times {
            let rows: Vec<&[E]> = inputs.iter().map(Vec::as_slice).collect();
            let token = token_of(problem, &rows, &experts, [residual, &self.gamma, &self.post_gamma], index);
            specified.row().compute(operation, &token).map_err(|error| error.to_string())?;
            if problem.residual {
                residual.copy_from_slice(&specified.residual_out);
            }
            if self.variant.writes_norm {
                inputs.iter_mut().for_each(|input| input.copy_from_slice(&specified.norm));
            }
        }
        if self.times > 1 && !inputs.iter().flatten().chain(&*residual).all(|x| x.to_f32().is_finite()) {
            return Err(format!(
                "after {} operations in place token {index} is not finite: use a wider element type",
                self.times
            ));
        }
        Ok(())
    }

    /// Makes the inputs of token `index`.
    fn fill(&mut self, index: u64) {
        let Judge { problem, numbers, .. } = *self;
        for (rank, input) in (0..).zip(&mut self.inputs) {
            numbers.fill_row(Source::Input(rank), index, input);
        }
        numbers.fill_row(Source::Residual, index, &mut self.residual);
        for (rank, experts) in (0..).zip(&mut self.experts) {
            experts.fill(problem, numbers, rank, index);
        }
    }

    /// The error of the specified sum of token `index` against the one without a wire format.
    fn sum_error(&mut self, index: u64) -> SumError {
        self.fill(index);
        let experts: Vec<_> = self.experts.iter().map(Chosen::experts).collect();
        let rows: Vec<&[E]> = self.inputs.iter().map(Vec::as_slice).collect();
        let tensors = [&self.residual[..], &self.gamma, &self.post_gamma];
        let token = token_of(self.problem, &rows, &experts, tensors, index);
        let exact = Operation { wire: None, ..self.operation };
        let [sum, exact] = [&self.operation, &exact].map(|operation| {
            let mut sum = vec![0.0; self.problem.hidden as usize];
            token.sum(operation, &mut sum);
            sum
        });
        SumError::of(&sum, &exact)
    }

    /// The largest error of any output of token `index` in units in the last place, or a description of a wrong output.
    pub(crate) fn check(&mut self, outputs: &Outputs, index: u64) -> Result<f64, String> {
        let problem = self.problem;
        self.fill(index);
        self.advance(index)?;
        let experts: Vec<_> = self.experts.iter().map(Chosen::experts).collect();
        let rows: Vec<&[E]> = self.inputs.iter().map(Vec::as_slice).collect();
        let token =
            token_of(problem, &rows, &experts, [&self.residual, &self.gamma, &self.post_gamma], index);
        let hidden = problem.hidden as usize;
        let sum = row_of_sum(self.variant, index, self.inputs.len() as u32);
        let (residual_out, norm_out) =
            (row::<E>(&outputs.residual_out, sum, hidden), row(&outputs.norm_out, index, hidden));
        let observed = Observed {
            residual_out: &residual_out,
            norm_out: &norm_out,
            values: values(problem, outputs, index),
            scales: &outputs.scale_out,
        };
        if self.variant.is_specified(self.inputs.len() as u32) {
            let mut row = self.specified.row();
            row.compute(&self.operation, &token).map_err(|error| error.to_string())?;
            row.compare(&self.operation, index, &observed).map_err(|wrong| wrong.to_string())?;
        }
        if self.operation.wire.is_some() {
            // It has the bits, and the reference judges exact sums.
            return Ok(0.0);
        }
        check_token(&self.operation, &token, &observed).map_err(|wrong| wrong.to_string())
    }
}

/// The specified inputs of token `index`, with its residual, gamma and the post-norm's.
fn token_of<'a, E: Plain>(
    problem: &Problem,
    inputs: &'a [&'a [E]],
    experts: &'a [TokenExperts<'a, E>],
    [residual, gamma, post_gamma]: [&'a [E]; 3],
    index: u64,
) -> Token<'a, E> {
    Token {
        inputs,
        residual: problem.residual.then_some(residual),
        bias: None,
        post_gamma: Some(Weights::Element(post_gamma)),
        experts: Some(experts),
        gamma: Weights::Element(gamma),
        scale: problem.scale,
        index,
    }
}

/// The error of the sum of `variant`, whose bits are the specification's, if it has a wire format: that of the first
/// [`MOST_ROWS`] rows. Every rank computes the same.
pub(crate) fn sum_error(
    problem: &Problem,
    variant: &Variant,
    numbers: Numbers,
    world_size: u32,
) -> Option<SumError> {
    fn typed<E: Plain>(
        problem: &Problem,
        variant: &Variant,
        numbers: Numbers,
        world_size: u32,
    ) -> Option<SumError> {
        let of_row = |index| Judge::<E>::new(problem, variant, numbers, world_size).sum_error(index);
        SumError::of_rows(parallel::map(world_size, (0..problem.tokens.min(MOST_ROWS)).collect(), of_row))
    }
    if variant.wire().is_exact() {
        return None;
    }
    match problem.dtype {
        DType::F32 => typed::<f32>(problem, variant, numbers, world_size),
        DType::F16 => typed::<f16>(problem, variant, numbers, world_size),
        DType::Bf16 => typed::<bf16>(problem, variant, numbers, world_size),
    }
}

/// The codes of token `index`; empty if the problem has no quantization.
pub(crate) fn values<'a>(problem: &Problem, outputs: &'a Outputs, index: u64) -> &'a [u8] {
    if problem.quantization == Quantization::None {
        return &[];
    }
    let row_bytes = problem.quantization.value_bytes_per_row(problem.hidden) as usize;
    &outputs.quant_out[index as usize * row_bytes..][..row_bytes]
}

/// Row `index` of a tensor's bytes; empty if the tensor is.
pub(crate) fn row<E: Plain>(bytes: &[u8], index: u64, hidden: usize) -> Vec<E> {
    let row_bytes = hidden * size_of::<E>();
    let start = index as usize * row_bytes;
    let row = bytes.get(start..start + row_bytes).unwrap_or_default();
    row.chunks_exact(size_of::<E>()).flat_map(E::read_from_bytes).collect()
}

/// Checks that the padding of the scales is 0.
pub(crate) fn check_padding(problem: &Problem, scales: &[u8]) -> Result<(), String> {
    let Some(tensor) = problem.scales() else { return Ok(()) };
    for row in 0..tensor.rows_padded() {
        let first = if row < tensor.rows { tensor.cols } else { 0 };
        for col in first..tensor.cols_padded() {
            let found = tensor.get(scales, row, col);
            if found != Some(0) {
                return Err(format!("scale_out[{row}, {col}] is padding and holds {found:x?}, not 0"));
            }
        }
    }
    Ok(())
}
