//! RMSNorm of a row: `x * (1 / sqrt(mean(x^2) + epsilon)) * (weight_bias + gamma)`, in `f32`.
//!
//! The definition is that of Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019 (arXiv:1910.07467).
//! `weight_bias` is 0 in the usual form and 1 in Gemma's.
//!
//! Every processor that runs these functions gets the same bits. GPU kernels add the squares in an order of their own,
//! which may change the last bits of a norm. The loops have neither branches nor dependences between adjacent elements,
//! so that a compiler vectorizes them.
//!
//! ```
//! use fused_collective_core::norm::{inverse_rms, normalize_row, sum_of_squares};
//!
//! let row = [1.0f32, 7.0, -5.0, 5.0]; // mean square 25
//! let gamma = [1.0f32, 1.0, 1.0, 2.0];
//! let mut out = [0.0; 4];
//! let inverse_rms = inverse_rms(sum_of_squares(&row), 4, 0.0);
//! normalize_row(&row, &gamma, inverse_rms, 0.0, &mut out);
//! assert_eq!(out, [0.2, 1.4, -1.0, 2.0]);
//! ```

use crate::dtype::Element;

/// The weight of RMSNorm, `[hidden]`, in a type that [`GammaType`](crate::fusion::GammaType) names.
#[derive(Clone, Copy, Debug)]
pub enum Gamma<'a, E> {
    /// Weights of the element type.
    Element(&'a [E]),
    /// Weights in `f32`.
    F32(&'a [f32]),
}

impl<E: Element> Gamma<'_, E> {
    /// Number of weights.
    pub const fn len(&self) -> usize {
        match self {
            Gamma::Element(gamma) => gamma.len(),
            Gamma::F32(gamma) => gamma.len(),
        }
    }

    /// True if there are no weights.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Weight `index`, widened.
    ///
    /// # Panics
    /// If `index` is not less than [`len`](Self::len).
    #[inline(always)]
    pub fn get(&self, index: usize) -> f32 {
        match self {
            Gamma::Element(gamma) => gamma[index].to_f32(),
            Gamma::F32(gamma) => gamma[index],
        }
    }
}

/// Independent partial sums. They hide the latency of additions, fill vector registers, and keep the rounding error
/// of a long row near that of a short one.
const PARTIAL_SUMS: usize = 32;

/// The sum of the squares of a row, in `f32`: 32 partial sums, of every 32nd element each, added as a binary tree.
#[inline(always)]
pub fn sum_of_squares<E: Element>(row: &[E]) -> f32 {
    sum_of(row, |value| value * value)
}

/// The sum of a row, in `f32`, in the order of [`sum_of_squares`].
#[inline(always)]
pub fn sum<E: Element>(row: &[E]) -> f32 {
    sum_of(row, |value| value)
}

#[inline(always)]
fn sum_of<E: Element>(row: &[E], term: impl Fn(f32) -> f32 + Copy) -> f32 {
    /// Elements that are widened together: few enough for the nearest cache, enough to fill vector loops.
    const BLOCK: usize = 256;
    let mut sums = [0.0f32; PARTIAL_SUMS];
    let mut wide = [0.0f32; BLOCK];
    for block in row.chunks(BLOCK) {
        for (wide, element) in wide.iter_mut().zip(block) {
            *wide = term(element.to_f32());
        }
        let (chunks, rest) = wide[..block.len()].as_chunks::<PARTIAL_SUMS>();
        for chunk in chunks {
            for (sum, term) in sums.iter_mut().zip(chunk) {
                *sum += term;
            }
        }
        for (sum, term) in sums.iter_mut().zip(rest) {
            *sum += term;
        }
    }
    let mut width = PARTIAL_SUMS / 2;
    while width > 0 {
        for index in 0..width {
            sums[index] += sums[index + width];
        }
        width /= 2;
    }
    sums[0]
}

/// `1 / sqrt(sum_of_squares / hidden + epsilon)`, each operation rounded to `f32`.
#[inline(always)]
pub fn inverse_rms(sum_of_squares: f32, hidden: u64, epsilon: f32) -> f32 {
    1.0 / libm::sqrtf(sum_of_squares / hidden as f32 + epsilon)
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
