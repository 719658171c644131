//! The outputs of a run, as bytes: poisoned before, read after, compared between ranks.

use std::hash::{DefaultHasher, Hasher};

use fused_collective::cpu::Plain;
use fused_collective_core::{plan::owned_index, quant::Quantization};
use zerocopy::IntoBytes as _;

use super::{parallel, variants::Variant};
use crate::{
    backend::{
        collective::Collective,
        problem::{Problem, Tensor},
    },
    job::ranks::Error,
};

/// The byte that fills outputs before a run. It makes NaN in every element type, and is a rare code of random inputs.
pub(crate) const POISON: u8 = 0xff;
/// Bytes of a tensor that are poisoned at a time.
const POISONED_AT_ONCE: u64 = 1 << 20;
/// Bytes of a tensor that are digested at a time by one processor.
const DIGESTED_AT_ONCE: usize = 1 << 20;

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
pub(super) fn digest(bytes: &[u8], ranks: u32) -> u64 {
    let of_part = |bytes: &[u8]| {
        let mut hasher = DefaultHasher::new();
        hasher.write(bytes);
        hasher.finish()
    };
    let parts = parallel::map(ranks, bytes.chunks(DIGESTED_AT_ONCE).collect(), of_part);
    of_part(parts.as_bytes())
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
