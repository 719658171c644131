//! The outputs of a run, as bytes: poisoned before, read after, compared between ranks.

use std::sync::Arc;

use fused_collective::cpu::Plain;
use fused_collective_core::{plan::owned_index, quant::Quantization};

use super::variants::Variant;
use crate::{
    backend::{
        collective::Collective,
        problem::{Problem, Tensor},
    },
    job::ranks::Error,
    measurement::Kind,
};

/// The byte that fills outputs before a run. It makes NaN in every element type, and is a rare code of random inputs.
pub(crate) const POISON: u8 = 0xff;

/// Digests of tensors, to tell later whether they were written.
pub(crate) struct Held(Vec<(Tensor, u64)>);

impl Held {
    pub(crate) fn of(
        backend: &mut dyn Collective,
        tensors: impl IntoIterator<Item = Tensor>,
    ) -> Result<Self, Error> {
        let held = tensors.into_iter().map(|tensor| Ok((tensor, backend.digest(tensor)?)));
        held.collect::<Result<_, Error>>().map(Held)
    }

    /// The first of the tensors that is no longer the same.
    pub(crate) fn first_changed(&self, backend: &mut dyn Collective) -> Result<Option<Tensor>, Error> {
        for &(tensor, digest) in &self.0 {
            if backend.digest(tensor)? != digest {
                return Ok(Some(tensor));
            }
        }
        Ok(None)
    }
}

/// Copies of tensors, which are put back after an operation has overwritten them.
pub(crate) struct Saved(Vec<(Tensor, Vec<u8>)>);

impl Saved {
    pub(crate) fn of(backend: &mut dyn Collective, tensors: &[Tensor]) -> Result<Self, Error> {
        let saved = tensors.iter().map(|&tensor| Ok((tensor, backend.read(tensor)?)));
        saved.collect::<Result<_, Error>>().map(Saved)
    }

    pub(crate) fn restore(&self, backend: &mut dyn Collective) -> Result<(), Error> {
        self.restore_those(backend, |_| true)
    }

    /// Puts back those of `tensors`.
    pub(crate) fn restore_only(&self, backend: &mut dyn Collective, tensors: &[Tensor]) -> Result<(), Error> {
        self.restore_those(backend, |tensor| tensors.contains(&tensor))
    }

    fn restore_those(
        &self,
        backend: &mut dyn Collective,
        which: impl Fn(Tensor) -> bool,
    ) -> Result<(), Error> {
        let mut held = self.0.iter().filter(|(tensor, bytes)| !bytes.is_empty() && which(*tensor));
        held.try_for_each(|(tensor, bytes)| Ok(backend.write(*tensor, 0, bytes)?))
    }
}

/// Fills all outputs with [`POISON`].
pub(crate) fn poison_outputs(backend: &mut dyn Collective) -> Result<(), Error> {
    Tensor::OUTPUTS.into_iter().try_for_each(|tensor| Ok(backend.fill(tensor, POISON)?))
}

/// Poisons the outputs, calls `run`, which runs the variant, and reads them: `read` gets the tensors of sum and norm. Puts back
/// what was overwritten.
fn after<T>(
    backend: &mut dyn Collective,
    problem: &Problem,
    variant: &Variant,
    run: impl FnOnce(&mut dyn Collective) -> Result<(), Error>,
    read: impl FnOnce(&mut dyn Collective, Tensor, Option<Tensor>) -> Result<T, Error>,
) -> Result<T, Error> {
    let saved = Saved::of(backend, &variant.overwritten(problem))?;
    poison_outputs(backend)?;
    if variant.kind == Kind::Standard {
        // Or an operation that is missing, or late, would leave the next one what another variant left.
        for tensor in [Tensor::Combined, Tensor::Reduced] {
            backend.fill(tensor, POISON)?;
        }
    }
    run(backend)?;
    let (sum, norm) = variant.written(problem);
    let read = read(backend, sum, norm)?;
    saved.restore(backend)?;
    Ok(read)
}

/// The digests of the outputs of one run; 0 of one that the variant does not write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Digests {
    /// Of the sum that this rank has.
    pub(crate) sum: u64,
    /// Of norm, codes and scales, which all ranks have.
    pub(crate) rest: [u64; 3],
}

impl Digests {
    /// Poisons the outputs, runs the variant, and digests them. Inputs that were overwritten are put back.
    pub(crate) fn of(
        backend: &mut dyn Collective,
        problem: &Problem,
        variant: &Variant,
    ) -> Result<Self, Error> {
        after(backend, problem, variant, |backend| Ok(backend.run(&variant.steps)?), Self::read)
    }

    /// Those of an operation whose sum is in `sum` and whose norm is in `norm`, if it writes one.
    pub(crate) fn read(
        backend: &mut dyn Collective,
        sum: Tensor,
        norm: Option<Tensor>,
    ) -> Result<Self, Error> {
        let norm = norm.map_or(Ok(0), |norm| backend.digest(norm))?;
        let rest = [norm, backend.digest(Tensor::QuantOut)?, backend.digest(Tensor::ScaleOut)?];
        Ok(Digests { sum: backend.digest(sum)?, rest })
    }

    /// Those that are the same on all ranks: of a sharded sum each has other rows.
    pub(crate) fn shared(&self, variant: &Variant) -> [u64; 4] {
        let [norm, codes, scales] = self.rest;
        [if variant.sharded { 0 } else { self.sum }, norm, codes, scales]
    }
}

/// The outputs of one run, as bytes. A tensor that the variant does not write is empty.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Outputs {
    /// Shared by runs that have the same.
    pub(crate) residual_out: Arc<Vec<u8>>,
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
    ) -> Result<(Digests, Self), Error> {
        Self::after(backend, problem, variant, |backend| Ok(backend.run(&variant.steps)?))
    }

    /// Poisons the outputs, calls `run`, which runs the variant, and reads them. Inputs that were overwritten are put back.
    pub(crate) fn after(
        backend: &mut dyn Collective,
        problem: &Problem,
        variant: &Variant,
        run: impl FnOnce(&mut dyn Collective) -> Result<(), Error>,
    ) -> Result<(Digests, Self), Error> {
        after(backend, problem, variant, run, |backend, sum, norm| {
            Ok((Digests::read(backend, sum, norm)?, Outputs::read(backend, sum, norm)?))
        })
    }

    /// Reads the outputs of an operation whose sum is in `sum` and whose norm is in `norm`, if it writes one.
    pub(crate) fn read(
        backend: &mut dyn Collective,
        sum: Tensor,
        norm: Option<Tensor>,
    ) -> Result<Self, Error> {
        let sum = Arc::new(backend.read(sum)?);
        Self::with_sum(backend, sum, norm)
    }

    /// As [`read`](Self::read), of an operation whose sum is known.
    pub(crate) fn with_sum(
        backend: &mut dyn Collective,
        residual_out: Arc<Vec<u8>>,
        norm: Option<Tensor>,
    ) -> Result<Self, Error> {
        Ok(Outputs {
            residual_out,
            norm_out: norm.map_or(Ok(Vec::new()), |norm| backend.read(norm))?,
            quant_out: backend.read(Tensor::QuantOut)?,
            scale_out: backend.read(Tensor::ScaleOut)?,
        })
    }

    /// Describes the first byte that is not that of `expected`.
    pub(crate) fn first_difference(&self, expected: &Outputs) -> Option<String> {
        let tensors = [
            (Tensor::ResidualOut, &*self.residual_out, &*expected.residual_out),
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
}

/// The row of `token` in the sum that `variant` leaves, on a rank that has it.
pub(crate) fn row_of_sum(variant: &Variant, token: u64, world_size: u32) -> u64 {
    if variant.sharded { owned_index(token, world_size) } else { token }
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
