//! The tensors of a rank, in memory between guards.

use fused_collective::cpu::{
    Plain,
    rows::{elements, elements_mut},
};

use crate::allocator::fallibly;
use crate::backend::{
    error::Error,
    guards::{GUARD, GUARD_BYTES, stray_write},
    problem::Tensor,
};

/// A tensor between its guards. It starts at a cache line, as some processors copy to other addresses several times slower.
#[derive(Debug, Default)]
pub(super) struct Buffer {
    words: Vec<u64>,
    start: usize,
    bytes: usize,
}

impl Buffer {
    /// Bytes of a cache line.
    const LINE: usize = 64;

    pub(super) fn new(bytes: u64) -> Result<Self, Error> {
        let too_large = || Error::Memory(format!("a tensor of {bytes} bytes does not fit in memory"));
        let length = usize::try_from(bytes).map_err(|_| too_large())?;
        let words_needed = (length.div_ceil(8)).checked_add((2 * GUARD_BYTES + Self::LINE) / 8);
        let words_needed = words_needed.ok_or_else(too_large)?;
        let mut words = Vec::new();
        fallibly(|| words.try_reserve_exact(words_needed)).map_err(|_| too_large())?;
        words.resize(words_needed, 0u64);
        let start = words.as_ptr().addr().wrapping_neg() % Self::LINE + GUARD_BYTES;
        let all: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
        all[..start].fill(GUARD);
        all[start + length..].fill(GUARD);
        Ok(Buffer { words, start, bytes: length })
    }

    /// Describes a write into the guards.
    pub(super) fn stray_write(&self) -> Option<String> {
        let all: &[u8] = bytemuck::cast_slice(&self.words);
        stray_write(&all[..self.start], &all[self.start + self.bytes..])
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[self.start..self.start + self.bytes]
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.words)[self.start..self.start + self.bytes]
    }

    pub(super) fn elements<E: Plain>(&self) -> &[E] {
        elements(self.bytes())
    }

    pub(super) fn elements_mut<E: Plain>(&mut self) -> &mut [E] {
        elements_mut(self.bytes_mut())
    }
}

/// The tensors of a problem, one for each role.
#[derive(Debug, Default)]
pub(super) struct Tensors {
    pub(super) input: Buffer,
    pub(super) residual: Buffer,
    pub(super) residual_shard: Buffer,
    pub(super) gamma: Buffer,
    pub(super) post_gamma: Buffer,
    pub(super) expert_rows: Buffer,
    pub(super) expert_index: Buffer,
    pub(super) expert_scales: Buffer,
    pub(super) combined: Buffer,
    pub(super) reduced: Buffer,
    pub(super) residual_out: Buffer,
    pub(super) residual_shard_out: Buffer,
    pub(super) norm_out: Buffer,
    pub(super) quant_out: Buffer,
    pub(super) scale_out: Buffer,
    pub(super) wide_a: Buffer,
    pub(super) wide_b: Buffer,
    pub(super) per_token: Buffer,
}

impl Tensors {
    pub(super) fn get_mut(&mut self, tensor: Tensor) -> &mut Buffer {
        match tensor {
            Tensor::Input => &mut self.input,
            Tensor::Residual => &mut self.residual,
            Tensor::ResidualShard => &mut self.residual_shard,
            Tensor::Gamma => &mut self.gamma,
            Tensor::PostGamma => &mut self.post_gamma,
            Tensor::ExpertRows => &mut self.expert_rows,
            Tensor::ExpertIndex => &mut self.expert_index,
            Tensor::ExpertScales => &mut self.expert_scales,
            Tensor::Combined => &mut self.combined,
            Tensor::Reduced => &mut self.reduced,
            Tensor::ResidualOut => &mut self.residual_out,
            Tensor::ResidualShardOut => &mut self.residual_shard_out,
            Tensor::NormOut => &mut self.norm_out,
            Tensor::QuantOut => &mut self.quant_out,
            Tensor::ScaleOut => &mut self.scale_out,
            Tensor::WideA => &mut self.wide_a,
            Tensor::WideB => &mut self.wide_b,
            Tensor::PerToken => &mut self.per_token,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::mem::replace;

    use super::*;

    #[test]
    fn a_byte_on_either_side_of_a_tensor_is_missed() {
        for bytes in [0, 1, 63, 64, 4097] {
            let mut buffer = Buffer::new(bytes).unwrap();
            buffer.bytes_mut().fill(0);
            assert_eq!(buffer.bytes().as_ptr().addr() % Buffer::LINE, 0);
            assert_eq!(buffer.stray_write(), None);
            let (start, end) = (buffer.start, buffer.start + buffer.bytes);
            for (at, expected) in [(start - 1, "1 bytes before its start"), (end, "0 bytes past its end")] {
                let byte: &mut u8 = &mut bytemuck::cast_slice_mut(&mut buffer.words)[at];
                let guard = replace(byte, 0);
                assert_eq!(buffer.stray_write().as_deref(), Some(expected), "{bytes} bytes");
                let byte: &mut u8 = &mut bytemuck::cast_slice_mut(&mut buffer.words)[at];
                *byte = guard;
            }
        }
    }
}
