//! Arithmetic on rows, vectorized for the processor it runs on.
//!
//! The loops are `fused_collective_core`'s and portable; [`pulp`] compiles each of them once more for
//! AVX2 and AVX-512 and picks at run time. For that, a pass is a struct with an always-inlined `with_simd`: a
//! closure would be compiled once, for the oldest processor. Nothing here fuses a multiply with an add, so
//! every processor gives the same bits.

use bytemuck::Pod;
use fused_collective_core::{
    dtype::Element,
    fusion::Norm,
    lamport,
    norm::{self, Gamma},
    quant::{self, Quantization},
};
use pulp::{Simd, WithSimd};

/// An element that is also plain bytes.
pub trait Plain: Element + Pod {}
impl<E: Element + Pod> Plain for E {}

#[inline(always)]
fn strip_row<E: Plain>(row: &[E], out: &mut [E]) {
    let (words, _) = bytemuck::cast_slice::<E, u8>(row).as_chunks::<4>();
    let (outs, _) = bytemuck::cast_slice_mut::<E, u8>(out).as_chunks_mut::<4>();
    for (out, word) in outs.iter_mut().zip(words) {
        *out = lamport::strip(u32::from_ne_bytes(*word)).to_ne_bytes();
    }
}

#[inline(always)]
fn sum_rows<E: Plain>(rows: &[&[E]], residual: Option<&[E]>, strip: bool, out: &mut [E]) {
    /// Elements summed at once, in the nearest cache.
    const BLOCK: usize = 256;
    // The second addend is the residual where one rank is all there is.
    let (first, second, rest, residual) = match rows {
        [] => return,
        [only] => (only, residual.as_ref(), &[][..], None),
        [first, second, rest @ ..] => (first, Some(second), rest, residual),
    };
    let mut sums = [0.0f32; BLOCK];
    let mut rounded = [E::default(); BLOCK];
    for (block, out) in out.chunks_mut(BLOCK).enumerate() {
        let range = block * BLOCK..block * BLOCK + out.len();
        let sums = &mut sums[..out.len()];
        let rounded = &mut rounded[..out.len()];
        let firsts = sums.iter_mut().zip(&first[range.clone()]);
        if let Some(second) = second {
            for ((sum, first), second) in firsts.zip(&second[range.clone()]) {
                *sum = first.to_f32() + second.to_f32();
            }
        } else {
            firsts.for_each(|(sum, first)| *sum = first.to_f32());
        }
        for row in rest.iter().chain(residual.as_ref()) {
            for (sum, element) in sums.iter_mut().zip(&row[range.clone()]) {
                *sum += element.to_f32();
            }
        }
        for (rounded, sum) in rounded.iter_mut().zip(sums) {
            *rounded = E::from_f32(*sum);
        }
        if strip { strip_row(rounded, out) } else { out.copy_from_slice(rounded) }
    }
}

/// `out = strip(row)`, word by word: see [`lamport::strip`]. Both have the same length.
pub(crate) struct StripRow<'a, E> {
    pub(crate) row: &'a [E],
    pub(crate) out: &'a mut [E],
}

impl<E: Plain> WithSimd for StripRow<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        strip_row(self.row, self.out);
    }
}

/// `out = round(rows[0] + rows[1] + ... + residual)`, in `f32` in that order, sent through [`lamport::strip`]
/// if `strip`. All have the same length.
pub(crate) struct SumRows<'a, E> {
    pub(crate) rows: &'a [&'a [E]],
    pub(crate) residual: Option<&'a [E]>,
    pub(crate) strip: bool,
    pub(crate) out: &'a mut [E],
}

impl<E: Plain> WithSimd for SumRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        sum_rows(self.rows, self.residual, self.strip, self.out);
    }
}

/// Where one row's results go; an empty slice for what the operation does not write.
#[derive(Debug)]
pub(crate) struct RowOutputs<'a, E> {
    /// `[hidden]`, or empty where only the quantized norm is wanted.
    pub(crate) norm: &'a mut [E],
    /// The row's bytes.
    pub(crate) values: &'a mut [u8],
    /// The whole tensor's scales.
    pub(crate) scales: &'a mut [u8],
}

/// What follows the sum, the same for every row of an operation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Finish<'a, E> {
    pub(crate) norm: Norm,
    pub(crate) gamma: Gamma<'a, E>,
    pub(crate) quantization: Quantization,
    pub(crate) scale: f32,
    pub(crate) tokens: u64,
}

impl<E: Plain> Finish<'_, E> {
    /// Zeroes what pads the rows of scales, once all rows of `hidden` elements are quantized.
    pub(crate) fn pad(&self, hidden: u64, scales: &mut [u8]) {
        if let (Some(block), Some(layout)) = (self.quantization.block(), self.quantization.scale_layout()) {
            layout.zero_padding_rows(self.tokens, hidden / block, scales);
        }
    }

    #[inline(always)]
    fn quantize(&self, normed: &[E], token: u64, values: &mut [u8], scales: &mut [u8]) {
        if self.quantization != Quantization::None {
            quant::quantize_row(self.quantization, normed, token, self.tokens, self.scale, values, scales)
                .expect("the tensors' sizes were checked against the operation");
        }
    }
}

/// Normalizes and quantizes `row`, the rounded sum of token `token`. `scratch` holds a row.
pub(crate) struct FinishRow<'a, E> {
    pub(crate) finish: &'a Finish<'a, E>,
    pub(crate) row: &'a [E],
    pub(crate) token: u64,
    pub(crate) outputs: RowOutputs<'a, E>,
    pub(crate) scratch: &'a mut [E],
}

impl<E: Plain> WithSimd for FinishRow<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let FinishRow { finish, row, token, outputs, scratch } = self;
        let sum = norm::sum_of_squares(row);
        let inverse_rms = norm::inverse_rms(sum, row.len() as u64, finish.norm.epsilon);
        let normed = if outputs.norm.is_empty() { scratch } else { outputs.norm };
        let bias = finish.norm.weight_bias;
        match finish.gamma {
            Gamma::Element(gamma) => norm::normalize_row(row, gamma, inverse_rms, bias, normed),
            Gamma::F32(gamma) => norm::normalize_row(row, gamma, inverse_rms, bias, normed),
        }
        finish.quantize(normed, token, outputs.values, outputs.scales);
    }
}

/// Quantizes `normed`, the normalized row of token `token`.
pub(crate) struct QuantizeRow<'a, E> {
    pub(crate) finish: &'a Finish<'a, E>,
    pub(crate) normed: &'a [E],
    pub(crate) token: u64,
    pub(crate) values: &'a mut [u8],
    pub(crate) scales: &'a mut [u8],
}

impl<E: Plain> WithSimd for QuantizeRow<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        self.finish.quantize(self.normed, self.token, self.values, self.scales);
    }
}
