//! Arithmetic on rows, vectorized for the processor it runs on.
//!
//! The sum and the norm are written in vectors ([`lanes`]); the quantizers' loops are `fused_collective_core`'s and
//! portable. [`pulp`] compiles each pass once more for AVX2 and AVX-512 and picks at run time. For that, a pass is a
//! struct with an always-inlined `with_simd`: a closure would be compiled once, for the oldest processor. Nothing here
//! fuses a multiply with an add, so every processor gives the same bits.

use fused_collective_core::{
    fusion::Norm,
    lamport,
    norm::{self, Gamma},
    quant::{self, Quantization},
};
use pulp::{Simd, WithSimd};

use super::lanes::{self, Lanes, Wide, load, store, vector_bytes};

/// An element that is also plain bytes.
pub trait Plain: Lanes {}
impl<E: Lanes> Plain for E {}

#[inline(always)]
fn strip_row<E: Plain>(row: &[E], out: &mut [E]) {
    let (words, _) = bytemuck::cast_slice::<E, u8>(row).as_chunks::<4>();
    let (outs, _) = bytemuck::cast_slice_mut::<E, u8>(out).as_chunks_mut::<4>();
    for (out, word) in outs.iter_mut().zip(words) {
        *out = lamport::strip(u32::from_ne_bytes(*word)).to_ne_bytes();
    }
}

/// Vectors that are summed together: the more, the fewer times all rows are looked for.
const MANY: usize = 4;

#[inline(always)]
fn sum_rows<E: Plain, S: Simd>(simd: S, sum: SumRows<'_, E>) {
    let SumRows { rows, residual, strip, out } = sum;
    let out: &mut [u8] = bytemuck::cast_slice_mut(out);
    let (many, one) = (MANY * vector_bytes::<S>(), vector_bytes::<S>());
    let mut at = 0;
    while at + many <= out.len() {
        let sums = sum_vectors::<E, S, MANY, true>(simd, rows, residual, strip, at);
        store::<S, MANY>(&mut out[at..at + many], &sums);
        at += many;
    }
    while at + one <= out.len() {
        let sums = sum_vectors::<E, S, 1, true>(simd, rows, residual, strip, at);
        store::<S, 1>(&mut out[at..at + one], &sums);
        at += one;
    }
    if at < out.len() {
        let sums = sum_vectors::<E, S, 1, false>(simd, rows, residual, strip, at);
        store::<S, 1>(&mut out[at..], &sums);
    }
}

/// The sums of `N` vectors from byte `at` on: see [`load`].
#[inline(always)]
fn sum_vectors<E: Plain, S: Simd, const N: usize, const WHOLE: bool>(
    simd: S,
    rows: &[&[E]],
    residual: Option<&[E]>,
    strip: bool,
    at: usize,
) -> [S::u32s; N] {
    let mut rounded = [simd.splat_u32s(0); N];
    let Some((first, others)) = rows.split_first() else { return rounded };
    let mut sums: [Wide<S>; N] = load_wide::<E, S, N, WHOLE>(simd, first, at);
    for row in others {
        add::<E, S, N>(simd, &mut sums, load_wide::<E, S, N, WHOLE>(simd, row, at));
    }
    if let Some(residual) = residual {
        add::<E, S, N>(simd, &mut sums, load_wide::<E, S, N, WHOLE>(simd, residual, at));
    }
    for (rounded, sum) in rounded.iter_mut().zip(sums) {
        *rounded = E::join(simd, sum);
        if strip {
            *rounded = lanes::strip(simd, *rounded);
        }
    }
    rounded
}

#[inline(always)]
fn load_wide<E: Plain, S: Simd, const N: usize, const WHOLE: bool>(
    simd: S,
    row: &[E],
    at: usize,
) -> [Wide<S>; N] {
    let mut wide = [[simd.splat_f32s(0.0); 2]; N];
    for (index, wide) in wide.iter_mut().enumerate() {
        *wide = E::split(simd, load::<S, WHOLE>(bytemuck::cast_slice(row), at + index * vector_bytes::<S>()));
    }
    wide
}

#[inline(always)]
fn add<E: Plain, S: Simd, const N: usize>(simd: S, sums: &mut [Wide<S>; N], addends: [Wide<S>; N]) {
    for (sum, addend) in sums.iter_mut().zip(addends) {
        for (sum, addend) in sum[..E::PER_WORD].iter_mut().zip(addend) {
            *sum = simd.add_f32s(*sum, addend);
        }
    }
}

/// Words whose squares are summed apart, however long a vector is: every processor gives the same bits. They hide the
/// latency of additions and keep the rounding error of a long row near that of a short one.
const PARTIAL_SUMS: usize = 32;
const PARTIAL_BYTES: usize = 4 * PARTIAL_SUMS;

/// As [`norm::sum_of_squares`], in another order.
#[inline(always)]
fn sum_of_squares<E: Plain, S: Simd>(simd: S, row: &[E]) -> f32 {
    let (blocks, rest) = bytemuck::cast_slice::<E, u8>(row).as_chunks();
    // As many as hold the partial sums are used.
    let mut sums = [[simd.splat_f32s(0.0); 2]; PARTIAL_SUMS];
    for block in blocks {
        add_squares::<E, S>(simd, &mut sums, block);
    }
    if !rest.is_empty() {
        let mut block = [0; PARTIAL_BYTES];
        block[..rest.len()].copy_from_slice(rest);
        add_squares::<E, S>(simd, &mut sums, &block);
    }
    let mut total = [0.0; PARTIAL_SUMS];
    for (total, sums) in total.chunks_exact_mut(S::F32_LANES).zip(&sums) {
        for sum in &sums[..E::PER_WORD] {
            for (total, sum) in total.iter_mut().zip(bytemuck::cast_slice::<S::f32s, f32>(&[*sum])) {
                *total += sum;
            }
        }
    }
    let mut width = PARTIAL_SUMS / 2;
    while width > 0 {
        for index in 0..width {
            total[index] += total[index + width];
        }
        width /= 2;
    }
    total[0]
}

#[inline(always)]
fn add_squares<E: Plain, S: Simd>(simd: S, sums: &mut [Wide<S>; PARTIAL_SUMS], block: &[u8; PARTIAL_BYTES]) {
    for (sums, words) in sums.iter_mut().zip(block.chunks_exact(vector_bytes::<S>())) {
        let values = E::split(simd, load::<S, true>(words, 0));
        for (sum, value) in sums[..E::PER_WORD].iter_mut().zip(values) {
            *sum = simd.add_f32s(*sum, simd.mul_f32s(value, value));
        }
    }
}

/// As [`norm::normalize_row`].
#[inline(always)]
fn normalize_row<E: Plain, S: Simd>(
    simd: S,
    row: &[E],
    gamma: &[E],
    inverse_rms: f32,
    bias: f32,
    out: &mut [E],
) {
    let one = vector_bytes::<S>();
    let (inverse_rms, bias) = (simd.splat_f32s(inverse_rms), simd.splat_f32s(bias));
    let (whole, rest) = bytemuck::cast_slice_mut::<E, u8>(out).split_at_mut(size_of_val(row) / one * one);
    for (index, out) in whole.chunks_exact_mut(one).enumerate() {
        let norm = normalize_vector::<E, S, true>(simd, row, gamma, inverse_rms, bias, index * one);
        store::<S, 1>(out, &[norm]);
    }
    if !rest.is_empty() {
        let norm = normalize_vector::<E, S, false>(simd, row, gamma, inverse_rms, bias, whole.len());
        store::<S, 1>(rest, &[norm]);
    }
}

#[inline(always)]
fn normalize_vector<E: Plain, S: Simd, const WHOLE: bool>(
    simd: S,
    row: &[E],
    gamma: &[E],
    inverse_rms: S::f32s,
    bias: S::f32s,
    at: usize,
) -> S::u32s {
    let mut values = E::split(simd, load::<S, WHOLE>(bytemuck::cast_slice(row), at));
    let gamma = E::split(simd, load::<S, WHOLE>(bytemuck::cast_slice(gamma), at));
    for (value, gamma) in values[..E::PER_WORD].iter_mut().zip(gamma) {
        *value = simd.mul_f32s(simd.mul_f32s(*value, inverse_rms), simd.add_f32s(bias, gamma));
    }
    E::join(simd, values)
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
    fn with_simd<S: Simd>(self, simd: S) {
        sum_rows(simd, self);
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
    fn with_simd<S: Simd>(self, simd: S) {
        let FinishRow { finish, row, token, outputs, scratch } = self;
        let sum = sum_of_squares(simd, row);
        let inverse_rms = norm::inverse_rms(sum, row.len() as u64, finish.norm.epsilon);
        let normed = if outputs.norm.is_empty() { scratch } else { outputs.norm };
        let bias = finish.norm.weight_bias;
        match finish.gamma {
            Gamma::Element(gamma) => normalize_row(simd, row, gamma, inverse_rms, bias, normed),
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

#[cfg(test)]
mod tests {
    use fused_collective_core::dtype::{Element, bf16, f16};
    use pulp::Arch;

    use super::*;

    /// Row `number`, with numbers of all kinds in it.
    fn row<E: Plain>(number: usize, hidden: usize) -> Vec<E> {
        let special = [0.0, -0.0, 1e-40, 6e4, -6e4, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
        let value = |index: usize| match (index * 31 + number * 17) % 97 {
            kind @ 0..8 if index % 3 == 1 => special[kind],
            kind => (kind as f32 - 48.0) * 0.13,
        };
        (0..hidden).map(|index| E::from_f32(value(index))).collect()
    }

    fn bits<E: Element>(row: &[E]) -> Vec<u32> {
        row.iter().map(|element| element.to_bits()).collect()
    }

    fn check_sums<E: Plain>(arch: Arch) {
        for hidden in (2..=208).step_by(2) {
            for ranks in 1..=5 {
                let rows: Vec<Vec<E>> = (0..=ranks).map(|number| row(number, hidden)).collect();
                let addends: Vec<&[E]> = rows[..ranks].iter().map(Vec::as_slice).collect();
                for residual in [None, Some(&rows[ranks][..])] {
                    let mut out = vec![E::default(); hidden];
                    arch.dispatch(SumRows { rows: &addends, residual, strip: false, out: &mut out });
                    let sum = |index: usize| {
                        let addends = addends.iter().copied().chain(residual);
                        let values = addends.map(|row| row[index].to_f32());
                        E::from_f32(values.reduce(|sum, value| sum + value).unwrap())
                    };
                    let expected: Vec<E> = (0..hidden).map(sum).collect();
                    // Which of two NaN an addition keeps is nobody's promise.
                    let same = out.iter().zip(&expected).all(|(found, expected)| {
                        let nan = found.to_f32().is_nan() && expected.to_f32().is_nan();
                        nan || found.to_bits() == expected.to_bits()
                    });
                    assert!(same, "{} {hidden} {ranks}: {out:?}, not {expected:?}", E::DTYPE);
                    let (mut stripped, mut after) = (expected.clone(), expected);
                    arch.dispatch(SumRows { rows: &addends, residual, strip: true, out: &mut stripped });
                    strip_row(&out, &mut after);
                    assert_eq!(bits(&stripped), bits(&after));
                }
            }
        }
    }

    fn check_norms<E: Plain>(arch: Arch) {
        for hidden in (2..=208).step_by(2) {
            let (row, gamma) = (row::<E>(1, hidden), row::<E>(2, hidden));
            let norm = Norm { weight_bias: 1.0, ..Norm::default() };
            let finish = Finish {
                norm,
                gamma: Gamma::Element(&gamma),
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
            let squares: f64 = row.iter().map(|value| f64::from(value.to_f32()).powi(2)).sum();
            let sum = arch.dispatch(Squares(&row));
            assert!((f64::from(sum) - squares).abs() <= 1e-6 * squares, "{sum}, not {squares}");
            // The same bits whatever the vectors' length.
            assert_eq!(sum.to_bits(), Arch::Scalar.dispatch(Squares(&row)).to_bits());
            let mut expected = row.clone();
            let inverse_rms = norm::inverse_rms(sum, hidden as u64, norm.epsilon);
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
    fn rows_of_every_length_are_summed_as_elements_are() {
        for arch in [Arch::Scalar, Arch::new()] {
            check_sums::<f32>(arch);
            check_sums::<f16>(arch);
            check_sums::<bf16>(arch);
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
