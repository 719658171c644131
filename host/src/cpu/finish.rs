//! The norm and the quantization of a row, which follow its sum.
//!
//! The norm is written in vectors; the quantizers' loops are `fused_collective_core`'s and portable.

use fused_collective_core::{
    MAX_HIDDEN,
    fusion::{Norm, Rounding},
    norm::{self, Weights},
    pack::Pack,
    quant::{self, Quantization},
};
use pulp::{Simd, WithSimd, bytemuck};
use zerocopy::IntoBytes as _;

use super::{
    lanes::{self, vectors},
    line::{self, Line},
    rows::{Plain, lines, lines_mut, padded},
    sum::add,
};

/// Bytes of a [line](norm::LINE_PACKS) of the sum over a row.
const SUM_BYTES: usize = norm::LINE_PACKS * Pack::BYTES as usize;
/// Lines of the longest row.
const SUM_LINES: usize = MAX_HIDDEN as usize * 4 / SUM_BYTES;

/// [`norm::sum_of_squares`].
#[inline(always)]
fn sum_of_squares<E: Plain, S: Simd>(simd: S, row: &[E]) -> f32 {
    let mut sums = [0.0; SUM_LINES];
    let mut rows = row.as_bytes().chunks(SUM_BYTES);
    let lines = rows.len();
    for (sum, bytes) in sums.iter_mut().zip(&mut rows) {
        *sum = match bytes.try_into() {
            Ok(bytes) => line_squares::<E, S>(simd, bytes),
            Err(_) => {
                let mut line = [0; SUM_BYTES];
                line[..bytes.len()].copy_from_slice(bytes);
                line_squares::<E, S>(simd, &line)
            }
        };
    }
    norm::fold_by_halves(&mut sums[..lines.next_power_of_two()])
}

/// The sum of the squares of the 32 packs of a line.
#[inline(always)]
fn line_squares<E: Plain, S: Simd>(simd: S, bytes: &[u8; SUM_BYTES]) -> f32 {
    /// Words of a line.
    const WORDS: usize = SUM_BYTES / 4;
    let mut pairs = [0.0f32; WORDS];
    let lanes = S::F32_LANES;
    for (line, pairs) in
        bytes.as_chunks::<{ line::BYTES }>().0.iter().zip(pairs.chunks_exact_mut(line::BYTES / 4))
    {
        let wide = lanes::widen::<E, S>(simd, line);
        for ([even, odd], pairs) in wide.iter().zip(pairs.chunks_exact_mut(lanes)) {
            // Elements of 32 bits are a word each: their pairs are neighbours.
            let pair = match E::PER_WORD {
                2 => simd.mul_add_f32s(*odd, *odd, simd.mul_f32s(*even, *even)),
                _ => *even,
            };
            pairs.copy_from_slice(bytemuck::cast_slice(&[pair]));
        }
    }
    let mut packs = [0.0f32; norm::LINE_PACKS];
    for (pack, words) in packs.iter_mut().zip(pairs.as_chunks::<4>().0) {
        *pack = match E::PER_WORD {
            2 => (words[0] + words[2]) + (words[1] + words[3]),
            _ => {
                words[1].mul_add(words[1], words[0] * words[0])
                    + words[3].mul_add(words[3], words[2] * words[2])
            }
        };
    }
    norm::sum_by_halves(packs)
}

/// As [`norm::normalize_row`]; with `add` the norm is added to what `out` holds, after that rounding of the norm.
#[inline(always)]
fn normalize_row<E: Plain, S: Simd>(
    simd: S,
    row: &[E],
    gamma: &[E],
    inverse_rms: f32,
    bias: f32,
    add: Option<Rounding>,
    out: &mut [E],
) {
    let (inverse_rms, bias) = (simd.splat_f32s(inverse_rms), simd.splat_f32s(bias));
    let ((row, row_rest), (gamma, gamma_rest), (out, out_rest)) = (lines(row), lines(gamma), lines_mut(out));
    for ((out, row), gamma) in out.iter_mut().zip(row).zip(gamma) {
        normalize_line::<E, S>(simd, row, gamma, (inverse_rms, bias, add), out);
    }
    if !out_rest.is_empty() {
        let mut norm = padded(out_rest);
        let (row, gamma) = (padded(row_rest), padded(gamma_rest));
        normalize_line::<E, S>(simd, &row, &gamma, (inverse_rms, bias, add), &mut norm);
        out_rest.copy_from_slice(&norm[..out_rest.len()]);
    }
}

#[inline(always)]
fn normalize_line<E: Plain, S: Simd>(
    simd: S,
    row: &Line,
    gamma: &Line,
    (inverse_rms, bias, add_to): (S::f32s, S::f32s, Option<Rounding>),
    out: &mut Line,
) {
    let (mut values, gamma) = (lanes::widen::<E, S>(simd, row), lanes::widen::<E, S>(simd, gamma));
    for (values, gamma) in values.iter_mut().zip(gamma).take(vectors::<S>()) {
        for (value, gamma) in values[..E::PER_WORD].iter_mut().zip(gamma) {
            *value = simd.mul_f32s(simd.mul_f32s(*value, inverse_rms), simd.add_f32s(bias, gamma));
        }
    }
    if let Some(rounding) = add_to {
        if rounding == Rounding::AfterAllReduce {
            let mut rounded = padded(&[]);
            lanes::round::<E, S>(simd, &values, &mut rounded);
            values = lanes::widen::<E, S>(simd, &rounded);
        }
        add::<E, S>(simd, &mut values, &lanes::widen::<E, S>(simd, out));
    }
    lanes::round::<E, S>(simd, &values, out);
}

/// The places of one row's results; an empty slice for one that the operation does not write.
#[derive(Debug)]
pub struct RowOutputs<'a, E> {
    /// `[hidden]`: the norm; empty if it is not stored.
    pub norm: &'a mut [E],
    /// The row's codes; empty without a quantization.
    pub values: &'a mut [u8],
    /// The tensor's scales, padding included; empty where there are none.
    pub scales: &'a mut [u8],
}

/// The norm and the quantization that follow the sum, the same for every row of an operation.
#[derive(Clone, Copy, Debug)]
pub struct Finish<'a, E> {
    /// RMSNorm's parameters.
    pub norm: Norm,
    /// RMSNorm's weight, `[hidden]`.
    pub gamma: Weights<'a, E>,
    /// The quantization of the norm.
    pub quantization: Quantization,
    /// The per-tensor or global scale, where the quantization reads one.
    pub scale: f32,
    /// Rows of the tensor, which the layout of scales depends on.
    pub tokens: u64,
}

impl<E: Plain> Finish<'_, E> {
    /// Zeroes what pads the rows of scales, once all rows of `hidden` elements are quantized.
    pub fn pad(&self, hidden: u64, scales: &mut [u8]) {
        if let Some(tensor) = self.quantization.scales(self.tokens, hidden) {
            tensor.zero_padding_rows(scales);
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
pub struct FinishRow<'a, E> {
    /// The norm and the quantization.
    pub finish: &'a Finish<'a, E>,
    /// `[hidden]`: the sum.
    pub row: &'a [E],
    /// The row's number in the tensor.
    pub token: u64,
    /// The results.
    pub outputs: RowOutputs<'a, E>,
    /// `[hidden]`, for a norm that is not stored.
    pub scratch: &'a mut [E],
}

impl<E: Plain> WithSimd for FinishRow<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let FinishRow { finish, row, token, outputs, scratch } = self;
        let sum = sum_of_squares(simd, row);
        let inverse_rms = norm::inverse_rms(sum, 1.0 / row.len() as f32, finish.norm.epsilon, f32::mul_add);
        let normed = if outputs.norm.is_empty() { scratch } else { outputs.norm };
        let bias = finish.norm.weight_bias;
        match finish.gamma {
            Weights::Element(gamma) => normalize_row(simd, row, gamma, inverse_rms, bias, None, normed),
            Weights::F32(gamma) => norm::normalize_row(row, gamma, inverse_rms, bias, normed),
        }
        finish.quantize(normed, token, outputs.values, outputs.scales);
    }
}

/// `out = round(norm of row + out)`, or the norm alone.
pub struct PostNormRow<'a, E> {
    /// RMSNorm's parameters.
    pub norm: Norm,
    /// RMSNorm's weight, `[hidden]`.
    pub gamma: Weights<'a, E>,
    /// `[hidden]`: the rounded sum of all ranks.
    pub row: &'a [E],
    /// `None` for the norm alone; else the rounding of the norm before the residual is added.
    pub add: Option<Rounding>,
    /// `[hidden]`: the residual, and then the sum.
    pub out: &'a mut [E],
}

impl<E: Plain> WithSimd for PostNormRow<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let PostNormRow { norm, gamma, row, add, out } = self;
        let squares = sum_of_squares(simd, row);
        let inverse_rms = norm::inverse_rms(squares, 1.0 / row.len() as f32, norm.epsilon, f32::mul_add);
        let bias = norm.weight_bias;
        match gamma {
            Weights::Element(gamma) => normalize_row(simd, row, gamma, inverse_rms, bias, add, out),
            Weights::F32(gamma) => {
                for ((out, value), gamma) in out.iter_mut().zip(row).zip(gamma) {
                    let mut norm = value.to_f32() * inverse_rms * (bias + gamma);
                    if let Some(rounding) = add {
                        if rounding == Rounding::AfterAllReduce {
                            norm = E::from_f32(norm).to_f32();
                        }
                        norm += out.to_f32();
                    }
                    *out = E::from_f32(norm);
                }
            }
        }
    }
}

/// Quantizes `normed`, the normalized row of token `token`.
pub struct QuantizeRow<'a, E> {
    /// The quantization.
    pub finish: &'a Finish<'a, E>,
    /// `[hidden]`: the norm.
    pub normed: &'a [E],
    /// The row's number in the tensor.
    pub token: u64,
    /// The row's codes.
    pub values: &'a mut [u8],
    /// The tensor's scales, padding included.
    pub scales: &'a mut [u8],
}

impl<E: Plain> WithSimd for QuantizeRow<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        self.finish.quantize(self.normed, self.token, self.values, self.scales);
    }
}

#[cfg(test)]
mod tests {
    use fused_collective_core::dtype::{Element, bf16, f16};
    use pulp::Arch;

    use super::*;
    use crate::cpu::rows::tests::row;

    fn bits<E: Element>(row: &[E]) -> Vec<u32> {
        row.iter().map(|element| element.to_bits()).collect()
    }

    fn check_norms<E: Plain>(arch: Arch) {
        for hidden in (2..=208).step_by(2) {
            let (row, gamma) = (row::<E>(1, hidden), row::<E>(2, hidden));
            let norm = Norm { weight_bias: 1.0, ..Norm::default() };
            let finish = Finish {
                norm,
                gamma: Weights::Element(&gamma),
                quantization: Quantization::None,
                scale: 1.0,
                tokens: 1,
            };
            // Numbers only, or the norm is all NaN.
            let row: Vec<E> = row
                .into_iter()
                .map(|value| if value.to_f32().is_finite() { value } else { E::default() })
                .collect();
            let (mut found, mut scratch) = (row.clone(), row.clone());
            let outputs = RowOutputs { norm: &mut found, values: &mut [], scales: &mut [] };
            arch.dispatch(FinishRow { finish: &finish, row: &row, token: 0, outputs, scratch: &mut scratch });
            let sum = arch.dispatch(Squares(&row));
            assert_eq!(sum.to_bits(), norm::sum_of_squares(&row).to_bits(), "{} {hidden}", E::DTYPE);
            let mut expected = row.clone();
            let inverse_rms = norm::inverse_rms(sum, 1.0 / hidden as f32, norm.epsilon, f32::mul_add);
            norm::normalize_row(&row, &gamma, inverse_rms, 1.0, &mut expected);
            assert_eq!(bits(&found), bits(&expected), "{} {hidden}", E::DTYPE);
        }
    }

    struct Squares<'a, E>(&'a [E]);

    impl<E: Plain> WithSimd for Squares<'_, E> {
        type Output = f32;

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> f32 {
            sum_of_squares(simd, self.0)
        }
    }

    #[test]
    fn rows_of_every_length_are_normalized_as_elements_are() {
        for arch in [Arch::Scalar, Arch::new()] {
            check_norms::<f32>(arch);
            check_norms::<f16>(arch);
            check_norms::<bf16>(arch);
        }
    }
}
