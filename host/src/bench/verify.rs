//! Checking a variant before it is timed.
//!
//! Outputs are poisoned, the variant runs, and every rank checks its share of the tokens against the reference;
//! that all ranks' outputs are the same bits makes the shares cover everything. A second run must give the same
//! bits again.

use std::{
    hash::{DefaultHasher, Hasher},
    panic::resume_unwind,
    thread,
};

use fused_collective_core::{
    dtype::{DType, bf16, f16},
    fusion::{Mode, Operation},
    norm::Gamma,
    quant::Quantization,
    reference::{Observed, Token, check_token},
};

use serde::{Serialize, de::DeserializeOwned};

use super::{
    Error,
    inputs::{Source, fill_row},
    variants::Variant,
};
use crate::{
    collective::{Collective, Problem, Tensor},
    cpu::Plain,
    rendezvous::Group,
};

/// What outputs hold before a run: a NaN in every element type, and no code that the inputs could give often.
pub(crate) const POISON: u8 = 0xff;
/// Bytes of a tensor that are poisoned at a time.
const POISONED_AT_ONCE: u64 = 1 << 20;

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

/// Writes the problem's inputs: those of this rank, and those that all ranks share. A residual that the problem
/// does not have is poisoned.
pub(crate) fn write_inputs(
    backend: &mut dyn Collective,
    problem: &Problem,
    seed: u64,
    rank: u32,
) -> Result<(), Error> {
    match problem.dtype {
        DType::F32 => write_typed_inputs::<f32>(backend, problem, seed, rank),
        DType::F16 => write_typed_inputs::<f16>(backend, problem, seed, rank),
        DType::Bf16 => write_typed_inputs::<bf16>(backend, problem, seed, rank),
    }
}

fn write_typed_inputs<E: Plain>(
    backend: &mut dyn Collective,
    problem: &Problem,
    seed: u64,
    rank: u32,
) -> Result<(), Error> {
    let mut row = vec![E::default(); problem.hidden as usize];
    let mut write = |tensor, source, rows: u64| {
        (0..rows).try_for_each(|token| {
            fill_row(seed, source, token, &mut row);
            let bytes: &[u8] = bytemuck::cast_slice(&row);
            backend.write(tensor, token * bytes.len() as u64, bytes)
        })
    };
    write(Tensor::Input, Source::Input(rank), problem.tokens)?;
    write(Tensor::Gamma, Source::Gamma, 1)?;
    if problem.residual {
        write(Tensor::Residual, Source::Residual, problem.tokens)?;
    } else {
        poison(backend, problem, Tensor::Residual)?;
    }
    Ok(())
}

/// The outputs of one run, as bytes.
struct Outputs {
    residual_out: Vec<u8>,
    norm_out: Vec<u8>,
    quant_out: Vec<u8>,
    scale_out: Vec<u8>,
}

impl Outputs {
    /// Runs the variant on poisoned outputs.
    fn of(backend: &mut dyn Collective, problem: &Problem, variant: &Variant) -> Result<Self, Error> {
        for tensor in Tensor::OUTPUTS {
            poison(backend, problem, tensor)?;
        }
        backend.run(&variant.steps)?;
        Ok(Outputs {
            residual_out: backend.read(Tensor::ResidualOut)?,
            norm_out: if variant.writes_norm { backend.read(Tensor::NormOut)? } else { Vec::new() },
            quant_out: backend.read(Tensor::QuantOut)?,
            scale_out: backend.read(Tensor::ScaleOut)?,
        })
    }

    /// One digest for each output: `residual_out`, `norm_out`, `quant_out`, `scale_out`.
    fn digests(&self) -> [u64; 4] {
        [&self.residual_out, &self.norm_out, &self.quant_out, &self.scale_out].map(|bytes| digest(bytes))
    }
}

/// Tells bytes from other bytes, in this build of the program: ranks that compare digests run the same one.
pub(crate) fn digest(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

/// What is known of a variant that is right.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Verified {
    /// The largest error of any output on any rank, in units in the last place.
    pub(crate) max_error_ulp: f64,
    /// [`digest`] of `ResidualOut`, which all ranks have alike.
    pub(crate) residual_digest: u64,
}

/// Verifies `variant` on the problem whose inputs `write_inputs` wrote. Every rank learns the same: that it is right,
/// or why it is wrong.
pub(crate) fn verify(
    backend: &mut dyn Collective,
    group: &Group,
    problem: &Problem,
    variant: &Variant,
    seed: u64,
) -> Result<Result<Verified, String>, Error> {
    let outputs = Outputs::of(backend, problem, variant)?;
    let digests = outputs.digests();
    let checked = match problem.dtype {
        DType::F32 => check::<f32>(&outputs, group, problem, variant, seed),
        DType::F16 => check::<f16>(&outputs, group, problem, variant, seed),
        DType::Bf16 => check::<bf16>(&outputs, group, problem, variant, seed),
    };
    drop(outputs);
    let again = Outputs::of(backend, problem, variant)?.digests();
    let checked = checked.and_then(|error| {
        if again == digests { Ok((digests, error)) } else { Err("a repeated run gave other bits".to_owned()) }
    });
    Ok(gather_verdicts(group, checked)?.and_then(|all| {
        if let Some(rank) = all.iter().position(|(digests, _)| *digests != all[0].0) {
            return Err(format!("rank {rank}'s outputs are not the same bits as rank 0's"));
        }
        let max_error_ulp = all.iter().fold(0.0f64, |largest, (_, error)| largest.max(*error));
        Ok(Verified { max_error_ulp, residual_digest: digests[0] })
    }))
}

/// What every rank found, in rank order, or the first rank's reason why something is wrong.
pub(crate) fn gather_verdicts<T: Serialize + DeserializeOwned>(
    group: &Group,
    verdict: Result<T, String>,
) -> Result<Result<Vec<T>, String>, Error> {
    let bytes = serde_json::to_vec(&verdict).map_err(|error| Error::Failed(error.to_string()))?;
    let mut found = Vec::new();
    for (rank, bytes) in group.all_gather(&bytes)?.iter().enumerate() {
        let verdict: Result<T, String> = serde_json::from_slice(bytes).map_err(|error| {
            Error::Failed(format!("rank {rank} sent a verdict that cannot be read: {error}"))
        })?;
        match verdict {
            Ok(result) => found.push(result),
            Err(why) => return Ok(Err(format!("rank {rank}: {why}"))),
        }
    }
    Ok(Ok(found))
}

/// Checks this rank's share of the tokens, on this rank's share of the processors.
fn check<E: Plain>(
    outputs: &Outputs,
    group: &Group,
    problem: &Problem,
    variant: &Variant,
    seed: u64,
) -> Result<f64, String> {
    let (rank, world_size) = (u64::from(group.rank()), u64::from(group.world_size()));
    let processors = thread::available_parallelism().map_or(1, |count| count.get() as u64);
    let threads = (processors / world_size).clamp(1, problem.tokens.div_ceil(world_size).max(1));
    let errors: Vec<Result<f64, String>> = thread::scope(|scope| {
        let checks: Vec<_> = (0..threads)
            .map(|thread| {
                let tokens =
                    (rank + thread * world_size..problem.tokens).step_by((world_size * threads) as usize);
                scope.spawn(move || {
                    check_tokens::<E>(outputs, group.world_size(), problem, variant, seed, tokens)
                })
            })
            .collect();
        checks.into_iter().map(|check| check.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    let largest =
        errors.into_iter().try_fold(0.0f64, |largest, error| error.map(|error| largest.max(error)))?;
    check_padding(problem, &outputs.scale_out)?;
    Ok(largest)
}

/// Checks `tokens`.
fn check_tokens<E: Plain>(
    outputs: &Outputs,
    world_size: u32,
    problem: &Problem,
    variant: &Variant,
    seed: u64,
    tokens: impl Iterator<Item = u64>,
) -> Result<f64, String> {
    let operation = Operation { keep_norm: variant.writes_norm, ..problem.operation(Mode::Auto) };
    let hidden = problem.hidden as usize;
    let row_bytes = problem.quantization.value_bytes_per_row(problem.hidden) as usize;
    let mut inputs = vec![vec![E::default(); hidden]; world_size as usize];
    let mut residual = vec![E::default(); hidden];
    let mut gamma = vec![E::default(); hidden];
    fill_row(seed, Source::Gamma, 0, &mut gamma);
    let mut largest = 0.0f64;
    for index in tokens {
        for (rank, input) in (0..).zip(&mut inputs) {
            fill_row(seed, Source::Input(rank), index, input);
        }
        fill_row(seed, Source::Residual, index, &mut residual);
        let rows: Vec<&[E]> = inputs.iter().map(Vec::as_slice).collect();
        let token = Token {
            inputs: &rows,
            residual: problem.residual.then_some(&residual[..]),
            gamma: Gamma::Element(&gamma),
            scale: problem.scale,
            index,
        };
        let (residual_out, norm_out) =
            (row::<E>(&outputs.residual_out, index, hidden), row(&outputs.norm_out, index, hidden));
        let observed = Observed {
            residual_out: &residual_out,
            norm_out: &norm_out,
            values: if problem.quantization == Quantization::None {
                &[]
            } else {
                &outputs.quant_out[index as usize * row_bytes..][..row_bytes]
            },
            scales: &outputs.scale_out,
        };
        let error = check_token(&operation, variant.rounding(), &token, &observed)
            .map_err(|wrong| wrong.to_string())?;
        largest = largest.max(error);
    }
    Ok(largest)
}

/// Row `index` of a tensor's bytes; empty if the tensor is.
fn row<E: Plain>(bytes: &[u8], index: u64, hidden: usize) -> Vec<E> {
    let row_bytes = hidden * size_of::<E>();
    let start = index as usize * row_bytes;
    bytes.get(start..start + row_bytes).map(bytemuck::allocation::pod_collect_to_vec).unwrap_or_default()
}

/// Whatever pads the scales is 0.
fn check_padding(problem: &Problem, scales: &[u8]) -> Result<(), String> {
    let Some(layout) = problem.quantization.scale_layout() else { return Ok(()) };
    let cols = problem.quantization.scale_cols(problem.hidden);
    for row in 0..layout.rows_padded(problem.tokens) {
        let first = if row < problem.tokens { cols } else { 0 };
        for col in first..layout.cols_padded(cols) {
            let found = scales[layout.offset(row, col, cols) as usize];
            if found != 0 {
                return Err(format!("scale_out[{row}, {col}] is padding and holds {found:#04x}, not 0"));
            }
        }
    }
    Ok(())
}
