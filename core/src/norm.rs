//! RMSNorm of a row: `x * (1 / sqrt(mean(x^2) + epsilon)) * (weight_bias + gamma)`, in `f32`.
//!
//! The definition is that of Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019 (arXiv:1910.07467).
//! `weight_bias` is 0 in the usual form and 1 in Gemma's.
//!
//! # Order of operations
//! These functions are the specification: CPUs and GPUs give their bits, however they share a row. Every operation is
//! rounded to `f32` once, to nearest even, subnormal numbers included.
//! - *Squares* of neighbours `a, b`, at an even index and the next, are added by `fma(b, b, a * a)`.
//! - *Sums* are taken in three levels: of the 2 or 4 pairs of a 16-byte [`Pack`](crate::pack::Pack), of the 32 packs of a
//!   *line*, and of the lines of a row. In each level, the sum of a sequence is the sum of its terms of even index plus the
//!   sum of its terms of odd index, and a term past the end is 0.
//! - *The reciprocal root* is [`rsqrt`] of `fma(sum, 1 / hidden, epsilon)`.
//! - *The norm* is `value * inverse_rms * (weight_bias + gamma)`, from left to right.
//!
//! A warp holds a line, one pack in each lane. Whatever the number of warps, of packs in a thread and of blocks that
//! share the row, the partial sums of this order are theirs: a block takes every `n`-th line of `n` blocks. On CPUs the
//! terms of even and odd index are the halves of a vector, once it is laid out for it.
//!
//! ```
//! use fused_collective_core::norm::{inverse_rms, normalize_row, sum_of_squares};
//!
//! let row = [1.0f32, 7.0, -5.0, 5.0]; // mean square 25
//! let gamma = [1.0f32, 1.0, 1.0, 2.0];
//! let mut out = [0.0; 4];
//! let inverse_rms = inverse_rms(sum_of_squares(&row), 1.0 / 4.0, 0.0, f32::mul_add);
//! normalize_row(&row, &gamma, inverse_rms, 0.0, &mut out);
//! assert_eq!(out, [0.2, 1.4, -1.0, 2.0]);
//! ```

use core::ops::Range;

use crate::{dtype::Element, fusion::WeightType};

/// Weights in a type that [`WeightType`] names: RMSNorm's, `[hidden]`, or the scales of experts.
#[derive(Clone, Copy, Debug)]
pub enum Weights<'a, E> {
    /// Weights of the element type.
    Element(&'a [E]),
    /// Weights in `f32`.
    F32(&'a [f32]),
}

impl<E: Element> Weights<'_, E> {
    /// Their type.
    pub const fn weight_type(&self) -> WeightType {
        match self {
            Weights::Element(_) => WeightType::Element,
            Weights::F32(_) => WeightType::F32,
        }
    }

    /// Number of weights.
    pub const fn len(&self) -> usize {
        match self {
            Weights::Element(gamma) => gamma.len(),
            Weights::F32(gamma) => gamma.len(),
        }
    }

    /// True if there are no weights.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The weights in `range`.
    ///
    /// # Panics
    /// If `range` does not lie in the weights.
    #[must_use]
    pub fn range(self, range: Range<usize>) -> Self {
        match self {
            Weights::Element(weights) => Weights::Element(&weights[range]),
            Weights::F32(weights) => Weights::F32(&weights[range]),
        }
    }

    /// Weight `index`, widened.
    ///
    /// # Panics
    /// If `index` is not less than [`len`](Self::len).
    #[inline(always)]
    pub fn get(&self, index: usize) -> f32 {
        match self {
            Weights::Element(gamma) => gamma[index].to_f32(),
            Weights::F32(gamma) => gamma[index],
        }
    }
}

/// Packs of a line, a level of the [sum over a row](self#order-of-operations).
pub const LINE_PACKS: usize = 32;

/// A fused multiply-add, `a * b + c` rounded once, as these functions take it: in software as [`libm::fmaf`], by
/// instruction as `f32::mul_add` of `std` or a GPU's `fma`. All give the same bits.
pub trait Fma: Fn(f32, f32, f32) -> f32 + Copy {}
impl<F: Fn(f32, f32, f32) -> f32 + Copy> Fma for F {}

/// The sum of the squares of one pack, widened.
#[inline(always)]
pub fn pack_squares<E: Element>(pack: E::Wide, fma: impl Fma) -> f32 {
    let mut pairs = [0.0; 4];
    for (pair, &[even, odd]) in pairs.iter_mut().zip(pack.as_ref().as_chunks::<2>().0) {
        *pair = fma(odd, odd, even * even);
    }
    // Both sums of a pack of 4 elements are one pair.
    match E::LANES {
        8 => (pairs[0] + pairs[2]) + (pairs[1] + pairs[3]),
        _ => pairs[0] + pairs[1],
    }
}

/// The sum of a sequence by halves, that of its terms of even index first: see the [module](self#order-of-operations).
#[inline(always)]
pub fn sum_by_halves<const N: usize>(mut terms: [f32; N]) -> f32 {
    const { assert!(N.is_power_of_two()) };
    fold_by_halves(&mut terms)
}

/// [`sum_by_halves`] of as many terms as there are, a power of two, which it overwrites.
#[inline(always)]
pub fn fold_by_halves(terms: &mut [f32]) -> f32 {
    // Terms whose indices agree in the low bits belong together longest.
    let mut width = terms.len() / 2;
    while width > 0 {
        let (low, high) = terms.split_at_mut(width);
        for (low, high) in low.iter_mut().zip(high) {
            *low += *high;
        }
        width /= 2;
    }
    terms[0]
}

/// The sum of the squares of a row, in the [specified order](self#order-of-operations).
pub fn sum_of_squares<E: Element>(row: &[E]) -> f32 {
    let line_sum = |line: &[E]| {
        let mut packs = [0.0; LINE_PACKS];
        for (sum, elements) in packs.iter_mut().zip(line.chunks(E::LANES)) {
            let mut pack = E::WIDE_ZERO;
            for (value, element) in pack.as_mut().iter_mut().zip(elements) {
                *value = element.to_f32();
            }
            *sum = pack_squares::<E>(pack, libm::fmaf);
        }
        sum_by_halves(packs)
    };
    let line = LINE_PACKS * E::LANES;
    let lines = row.len().div_ceil(line);
    // In the order of their reversed indices, lines that belong together are neighbours. A level's partial sum waits for
    // the one beside it.
    let levels = lines.next_power_of_two().trailing_zeros();
    let mut waiting = [0.0; usize::BITS as usize];
    for turn in 0..1usize << levels {
        let index = turn.reverse_bits().checked_shr(usize::BITS - levels).unwrap_or(0);
        let start = (index * line).min(row.len());
        let mut sum = line_sum(&row[start..row.len().min(start + line)]);
        let mut level = 0;
        while turn >> level & 1 == 1 {
            sum += waiting[level];
            level += 1;
        }
        waiting[level] = sum;
    }
    waiting[levels as usize]
}

/// `1 / sqrt(value)` of a sum of squares and epsilon, with a relative error of at most 2^-23: an integer estimate, one
/// step of third order and one of Newton's, of the same operations everywhere.
///
/// Values below 2^-126, the smallest normal number, count as 2^-126: 0 gives 2^63, and so a row of zeros is normalized to
/// zeros if epsilon is 0. Infinity gives 0, and NaN gives NaN.
#[inline(always)]
pub fn rsqrt(value: f32, fma: impl Fma) -> f32 {
    // The estimate of Lomont, "Fast inverse square root", 2003, within 3.5%; the constants of the first step minimize the
    // largest error after it, 2.6e-5.
    const ESTIMATE: u32 = 0x5f37_4c00;
    const STEP: [f32; 2] = [0.375_813_4, 1.333_338_6];
    let normal = if value < f32::MIN_POSITIVE { f32::MIN_POSITIVE } else { value };
    let root = f32::from_bits(ESTIMATE.wrapping_sub(normal.to_bits() >> 1));
    let error = fma(-(normal * root), root, 1.0);
    let root = fma(STEP[0] * root * error, error + STEP[1], root);
    let error = fma(-(normal * root), root, 1.0);
    let root = fma(0.5 * root, error, root);
    if value == f32::INFINITY { 0.0 } else { root }
}

/// `1 / sqrt(sum_of_squares / hidden + epsilon)`, by [`rsqrt`]; `inverse_hidden` is `1 / hidden`.
#[inline(always)]
pub fn inverse_rms(sum_of_squares: f32, inverse_hidden: f32, epsilon: f32, fma: impl Fma) -> f32 {
    rsqrt(fma(sum_of_squares, inverse_hidden, epsilon), fma)
}

/// One element: `value * inverse_rms * weight` in `f32`, from left to right, rounded to `E`.
#[inline(always)]
pub fn normalize<E: Element>(value: f32, inverse_rms: f32, weight: f32) -> E {
    E::from_f32(value * inverse_rms * weight)
}

/// Normalizes a row: `out[i] = round(row[i] * inverse_rms * (weight_bias + gamma[i]))`.
///
/// `row`, `gamma` and `out` should have the same length. Elements past the end of the shortest are skipped.
#[inline(always)]
pub fn normalize_row<E: Element, G: Element>(
    row: &[E],
    gamma: &[G],
    inverse_rms: f32,
    weight_bias: f32,
    out: &mut [E],
) {
    for ((out, value), gamma) in out.iter_mut().zip(row).zip(gamma) {
        *out = normalize(value.to_f32(), inverse_rms, weight_bias + gamma.to_f32());
    }
}
