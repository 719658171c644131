//! The verification of a variant.
//!
//! The outputs are poisoned, the variant runs, and every rank checks its share of the tokens against the specification. As all
//! ranks must have the same bits, the shares cover all outputs. A second run must give the same bits again.
//!
//! A variant that was timed is verified once more, by the outputs of one more trial: some faults show only then.

use std::{iter::StepBy, ops::Range};

use fused_collective::{cpu::Plain, group::rendezvous::Group};
use fused_collective_core::{
    dtype::{DType, bf16, f16},
    plan::{owned_token, owned_tokens},
};
use zerocopy::IntoBytes as _;

use super::{
    inputs::{Numbers, Source, expert_row},
    judge::Judge,
    outputs::{Digests, Outputs, POISON, check_padding},
    parallel,
    variants::Variant,
};
use crate::{
    backend::{
        collective::Collective,
        problem::{Problem, Tensor},
        steps::Step,
    },
    job::ranks::{Error, gather_verdicts, hosts},
};

/// Bytes of rows that are made, then written at a time.
const WRITTEN_AT_ONCE: u64 = 64 << 20;

/// Writes this rank's input, and the tensors that all ranks share, and makes the addend of experts. A residual that the problem
/// does not have is poisoned.
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
    backend.fill(Tensor::ResidualShard, POISON)?;
    let (rank, ranks, hosts) = (group.rank(), group.world_size(), hosts(group));
    let (place, of_host) = (hosts.place(), hosts.ranks_per_host());
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
            owned_tokens(problem.tokens, place, of_host),
            &|row| owned_token(row, place, of_host),
        )?;
    }
    if !problem.residual {
        backend.fill(Tensor::Residual, POISON)?;
    }
    if let Some(experts) = problem.pattern.experts() {
        let chosen = problem.chosen();
        let row =
            |place| expert_row((rank, ranks), place, experts.top_k, chosen).map_or(-1, |row| row as i32);
        let index: Vec<i32> = (0..chosen).map(row).collect();
        backend.write(Tensor::ExpertIndex, 0, index.as_bytes())?;
        let mut scales = vec![0.0f32; chosen as usize];
        for (token, scales) in (0..).zip(scales.chunks_mut(experts.top_k as usize)) {
            numbers.fill_row(Source::ExpertScales(rank), token, scales);
        }
        backend.write(Tensor::ExpertScales, 0, scales.as_bytes())?;
        // An all-reduce by itself takes the addend that is made of these.
        backend.run(&[Step::CombineExperts])?;
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

/// Verifies `variant` on the problem whose inputs [`write_inputs`] wrote. Every rank returns the same: the largest error in
/// units in the last place, or the reason why the variant is wrong.
pub(crate) fn verify(
    backend: &mut dyn Collective,
    group: &Group,
    problem: &Problem,
    variant: &Variant,
    numbers: Numbers,
) -> Result<Result<f64, String>, Error> {
    let (digests, outputs) = Outputs::of(backend, problem, variant)?;
    let checked = check(&outputs, group, problem, variant, numbers, 1);
    drop(outputs);
    let again = Digests::of(backend, problem, variant)?;
    let checked = checked.and_then(|error| {
        if again == digests {
            Ok((digests.shared(variant), error))
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
    let (digests, outputs) = Outputs::after(backend, problem, variant, run)?;
    let checked = check(&outputs, group, problem, variant, numbers, times);
    let agreed = agree(group, checked.map(|error| (digests.shared(variant), error)))?;
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
    let hosts = hosts(group);
    let largest = spread(group, 0..problem.tokens, |tokens| {
        let mut judge = Judge::<E>::new(problem, variant, numbers, &hosts);
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

/// Checks this rank's share of `tokens`, which are those that it owns in two-shot. This rank's share of the processors runs
/// threads, each of which calls `check` with its tokens. Returns the largest error, or the first failure.
pub(crate) fn spread(
    group: &Group,
    tokens: Range<u64>,
    check: impl Fn(StepBy<Range<u64>>) -> Result<f64, String> + Sync,
) -> Result<f64, String> {
    // Each host has all tokens.
    let hosts = hosts(group);
    let (rank, world_size) = (u64::from(hosts.place()), u64::from(hosts.ranks_per_host()));
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
