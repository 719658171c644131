//! RMSNorm: `x * rsqrt(mean(x^2) + epsilon) * (weight_bias + gamma)`, in `f32`.
//!
//! "Root Mean Square Layer Normalization", Zhang and Sennrich, 2019 (arXiv:1910.07467). The loops run
//! over chunks of [`LANES`] independent elements, so that a compiler vectorizes them.

use crate::{HIDDEN_MULTIPLE, dtype::Element};

/// RMSNorm's weight, `[hidden]`, in either of the types that [`GammaType`](crate::fusion::GammaType) names.
#[derive(Clone, Copy, Debug)]
pub enum Gamma<'a, E> {
    /// In the element type.
    Element(&'a [E]),
    /// In `f32`.
    F32(&'a [f32]),
}

impl<E: Element> Gamma<'_, E> {
    /// Elements.
    pub const fn len(&self) -> usize {
        match self {
            Gamma::Element(gamma) => gamma.len(),
            Gamma::F32(gamma) => gamma.len(),
        }
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element `index`; it must be less than [`len`](Self::len).
    #[inline(always)]
    pub fn get(&self, index: usize) -> f32 {
        match self {
            Gamma::Element(gamma) => gamma[index].to_f32(),
            Gamma::F32(gamma) => gamma[index],
        }
    }
}

/// Elements that the loops here take at once; every valid hidden size is a multiple.
pub const LANES: usize = HIDDEN_MULTIPLE as usize;

/// Independent partial sums of [`sum_of_squares`]. They hide the latency of additions and keep the
/// rounding error of a long row near that of a short one.
const PARTIAL_SUMS: usize = 4;

/// The sum of the squares of a row, in `f32`.
///
/// A row whose length is not a multiple of [`LANES`] loses its tail: [`validate`] the operation first.
///
/// [`validate`]: crate::fusion::Operation::validate
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
    let mut sums = [[0.0f32; LANES]; PARTIAL_SUMS];
    let (chunks, _) = row.as_chunks::<LANES>();
    let (groups, rest) = chunks.as_chunks::<PARTIAL_SUMS>();
    for group in groups {
        for (sum, chunk) in sums.iter_mut().zip(group) {
            add_terms(sum, chunk, term);
        }
    }
    for (sum, chunk) in sums.iter_mut().zip(rest) {
        add_terms(sum, chunk, term);
    }
    let mut lanes = [0.0; LANES];
    for (index, lane) in lanes.iter_mut().enumerate() {
        *lane = (sums[0][index] + sums[1][index]) + (sums[2][index] + sums[3][index]);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for index in 0..width {
            lanes[index] += lanes[index + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[inline(always)]
fn add_terms<E: Element>(sum: &mut [f32; LANES], chunk: &[E; LANES], term: impl Fn(f32) -> f32) {
    for (sum, element) in sum.iter_mut().zip(chunk) {
        *sum += term(element.to_f32());
    }
}

/// `1 / sqrt(sum_of_squares / hidden + epsilon)`.
#[inline(always)]
pub fn inverse_rms(sum_of_squares: f32, hidden: u64, epsilon: f32) -> f32 {
    1.0 / libm::sqrtf(sum_of_squares / hidden as f32 + epsilon)
}

/// One element: scaled, weighted, rounded once.
#[inline(always)]
pub fn normalize<E: Element>(value: f32, inverse_rms: f32, weight: f32) -> E {
    E::from_f32(value * inverse_rms * weight)
}

/// A row: `out[i] = round(row[i] * inverse_rms * (weight_bias + gamma[i]))`.
///
/// `row`, `gamma` and `out` have the same length, a multiple of [`LANES`]; a shorter one ends the work early.
#[inline(always)]
pub fn normalize_row<E: Element, G: Element>(
    row: &[E],
    gamma: &[G],
    inverse_rms: f32,
    weight_bias: f32,
    out: &mut [E],
) {
    let (rows, _) = row.as_chunks::<LANES>();
    let (gammas, _) = gamma.as_chunks::<LANES>();
    let (outs, _) = out.as_chunks_mut::<LANES>();
    for ((out, row), gamma) in outs.iter_mut().zip(rows).zip(gammas) {
        for index in 0..LANES {
            let weight = weight_bias + gamma[index].to_f32();
            out[index] = normalize(row[index].to_f32(), inverse_rms, weight);
        }
    }
}
