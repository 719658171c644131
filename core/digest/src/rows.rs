//! Rows from a seed, and all that the specification makes of them.

use fused_collective_core::{
    dtype::Element,
    fusion::{Experts, Mode, Norm, Operation, PartialSums, Residual, Rounding, WeightType},
    norm::Weights,
    quant::{Quantization, dequantize, quantize},
    specification::{Row, Token, TokenExperts},
    wire::WireFormat,
};

use crate::{
    cases::{QUANTIZATIONS, quantization},
    fold::Fold,
};

/// Elements of the longest row: eight lines of the sum of squares in `f32`.
const LONGEST: usize = 1024;
/// Rows that are added.
const RANKS: usize = 3;
/// The most experts of a token.
const MOST_EXPERTS: usize = 4;
/// The rows of a token's experts on each rank.
const EXPERTS: [[i32; MOST_EXPERTS]; RANKS] = [[2, -1, 0, 1], [-1, 1, 1, 0], [-1; MOST_EXPERTS]];
/// Bytes of the most scales: blocks of 16, in whole tiles.
const SCALES: usize = 128 * LONGEST / 16;

/// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number of this kind. Elements round it, by the conversion that is part of the specification.
    fn number(&mut self, kind: u32) -> f32 {
        let random = self.next();
        let (significand, sign) = (random as u32 & 0x007f_ffff, (random >> 32) as u32 & 1 << 31);
        let pick = (random >> 40) as u32 & 0xff;
        let (exponent, significand) = match kind {
            // Near 1.
            0 => (120 + (pick & 15), significand),
            // Few digits: sums and codes are often ties.
            1 => (124 + (pick & 3), significand & 0x0070_0000),
            // Zeros, subnormal, tiny and huge numbers of every type.
            2 => match pick & 7 {
                0 => (0, 0),
                1 => (0, significand),
                2 => (1 + (pick >> 3), significand),
                3 => (127 - 24 + (pick >> 4), significand),
                4 => (127 + 15, significand),
                5 => (254, 0x007f_ffff),
                _ => (127, significand),
            },
            // One infinity or NaN in many.
            3 if pick == 0 => (255, significand),
            3 if pick == 1 => (255, 0),
            3 => (127, significand),
            // Any bits.
            _ => ((random >> 48) as u32 & 0xff, significand),
        };
        f32::from_bits(sign | exponent << 23 | significand)
    }

    fn fill<E: Element>(&mut self, kind: u32, row: &mut [E]) {
        for element in row {
            *element = E::from_f32(self.number(kind));
        }
    }
}

/// The tensors of a row. They are kept between rows, so that the stack has them once.
struct Tensors<E> {
    /// One row after the other: also the rows of experts.
    inputs: [E; RANKS * LONGEST],
    residual: [E; LONGEST],
    gamma: [E; LONGEST],
    gamma_f32: [f32; LONGEST],
    residual_out: [E; LONGEST],
    norm: [E; LONGEST],
    restored: [E; LONGEST],
    values: [u8; LONGEST],
    scales: [u8; SCALES],
}

/// Folds the outputs for rows of every kind, length, rounding and quantization.
#[inline(always)]
pub(crate) fn fold_rows<E: Element>(fold: &mut Fold) {
    let mut tensors = Tensors {
        inputs: [E::default(); RANKS * LONGEST],
        residual: [E::default(); LONGEST],
        gamma: [E::default(); LONGEST],
        gamma_f32: [0.0; LONGEST],
        residual_out: [E::default(); LONGEST],
        norm: [E::default(); LONGEST],
        restored: [E::default(); LONGEST],
        values: [0; LONGEST],
        scales: [0; SCALES],
    };
    // Lengths that are no whole line, no power of two of lines, and no whole group for some of the quantizations.
    for hidden in [16, 416, 640, LONGEST] {
        // Short rows are many, since each has one sum of squares only.
        for number in 0..if hidden == 16 { 4 * QUANTIZATIONS } else { QUANTIZATIONS } {
            if quantization(number % QUANTIZATIONS).supports(hidden as u64) {
                for rounding in [Rounding::Once, Rounding::AfterAllReduce] {
                    tensors.fold_row(hidden, number, rounding, fold);
                }
            }
        }
    }
}

impl<E: Element> Tensors<E> {
    #[inline(always)]
    fn fold_row(&mut self, hidden: usize, number: u32, rounding: Rounding, fold: &mut Fold) {
        let twice = rounding == Rounding::AfterAllReduce;
        let mut random = Random(hidden as u64 ^ u64::from(number) << 32 ^ u64::from(twice) << 48);
        let kind = (random.next() >> 32) as u32 % 5;
        random.fill(kind, &mut self.inputs[..RANKS * hidden]);
        random.fill(kind, &mut self.residual[..hidden]);
        random.fill(0, &mut self.gamma[..hidden]);
        random.fill(0, &mut self.gamma_f32[..hidden]);
        let quantization = quantization(number % QUANTIZATIONS);
        // Near 1, and so one that every quantization takes.
        let scale = f32::from_bits(random.number(0).to_bits() & !(1 << 31));
        let norm = Norm {
            epsilon: if number.is_multiple_of(3) { 0.0 } else { 1e-6 },
            weight_bias: if number.is_multiple_of(4) { 1.0 } else { 0.0 },
            gamma: if number.is_multiple_of(2) { WeightType::Element } else { WeightType::F32 },
        };
        let experts = Experts {
            top_k: 1 + number % MOST_EXPERTS as u32,
            scales: norm.gamma,
            shared: number.is_multiple_of(5),
        };
        let operation = Operation {
            dtype: E::DTYPE,
            tokens: 1,
            hidden: hidden as u64,
            residual: Residual::replicated(twice || !number.is_multiple_of(5)),
            norm: Some(norm),
            quantization,
            keep_norm: true,
            rounding,
            bias: number.is_multiple_of(7),
            post_norm: (number / 3).is_multiple_of(4).then_some(norm),
            experts: (number / 4).is_multiple_of(3).then_some(experts),
            wire: WireFormat::ALL.get(number as usize % 5).copied(),
            partial_sums: PartialSums::F32,
            mode: if number.is_multiple_of(2) { Mode::TwoShot } else { Mode::OneShot },
        };
        let rows = &self.inputs[..RANKS * hidden];
        let inputs: [_; RANKS] = core::array::from_fn(|rank| &rows[rank * hidden..][..hidden]);
        let weights = |count: usize| match norm.gamma {
            WeightType::Element => Weights::Element(&self.gamma[..count]),
            WeightType::F32 => Weights::F32(&self.gamma_f32[..count]),
        };
        let top_k = experts.top_k as usize;
        let experts = EXPERTS.each_ref().map(|index| TokenExperts {
            rows,
            index: &index[..top_k],
            scales: weights(top_k),
        });
        let ranks = 1 + number as usize % RANKS;
        let token = Token {
            inputs: &inputs[..ranks],
            hosts: 1,
            residual: operation.residual.is_some().then_some(&self.residual[..hidden]),
            // Any row will do.
            bias: operation.bias.then_some(&self.gamma[..hidden]),
            post_gamma: Some(weights(hidden)),
            experts: Some(&experts[..ranks]),
            gamma: weights(hidden),
            scale,
            index: 0,
        };
        let mut row = Row {
            residual_out: &mut self.residual_out[..hidden],
            norm: &mut self.norm[..hidden],
            values: &mut self.values[..quantization.value_bytes_per_row(hidden as u64) as usize],
            scales: &mut self.scales[..Row::<E>::scale_bytes(&operation) as usize],
        };
        fold.word(u64::from(row.compute(&operation, &token).is_ok()));
        fold.elements(row.residual_out);
        fold.elements(row.norm);
        fold_quantized(quantization, row.values, row.scales, fold);
        if quantization != Quantization::None {
            self.fold_tensor(quantization, hidden as u64, scale, fold);
        }
    }

    /// Folds the norm's quantization as a tensor, in its layout, and what comes back of it.
    fn fold_tensor(&mut self, quantization: Quantization, hidden: u64, scale: f32, fold: &mut Fold) {
        // Two rows have two lines of a tile.
        let tokens = if quantization.supports(hidden / 2) { 2 } else { 1 };
        let shape = [tokens, hidden / tokens];
        let norm = &self.norm[..hidden as usize];
        let values = &mut self.values[..quantization.value_bytes_per_row(hidden) as usize];
        let bytes = quantization.scale_bytes(shape[0], shape[1]).unwrap_or(0) as usize;
        let scales = &mut self.scales[..bytes];
        fold.word(u64::from(quantize(quantization, shape, norm, scale, values, scales).is_ok()));
        fold_quantized(quantization, values, scales, fold);
        let restored = &mut self.restored[..hidden as usize];
        fold.word(u64::from(dequantize(quantization, shape, values, scales, scale, restored).is_ok()));
        fold.elements(restored);
    }
}

/// Folds codes and scales, the NaNs among codes and `f32` scales as the same.
fn fold_quantized(quantization: Quantization, values: &[u8], scales: &[u8], fold: &mut Fold) {
    match quantization {
        Quantization::NvFp4 { .. } | Quantization::MxFp4 { .. } => fold.bytes(values),
        _ => fold.e4m3(values),
    }
    match quantization {
        Quantization::Fp8PerToken => {
            scales.as_chunks().0.iter().for_each(|&scale| fold.elements(&[f32::from_le_bytes(scale)]));
        }
        _ => fold.bytes(scales),
    }
}
