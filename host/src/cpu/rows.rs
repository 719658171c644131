//! Rows as elements, bytes and lines.
//!
//! [`sum`](super::sum) and [`finish`](super::finish) compute on rows, in vectors (`lanes`) for the processor
//! that runs them. [`pulp`] compiles each pass once more for AVX2 and AVX-512 and picks at run time. For that, a pass is a
//! struct with an always-inlined `with_simd`: a closure would be compiled once, for the oldest processor. Every processor
//! gives the bits of `core::specification`; those without a fused multiply-add compute it in software.

use zerocopy::{FromBytes as _, IntoBytes as _};

use super::{
    lanes::Lanes,
    line::{self, Line},
};

/// An element that is also plain bytes.
pub trait Plain: Lanes {}
impl<E: Lanes> Plain for E {}

/// The elements that `bytes` hold.
///
/// # Panics
/// If they are not whole elements at an element's alignment.
#[inline(always)]
pub fn elements<E: Plain>(bytes: &[u8]) -> &[E] {
    <[E]>::ref_from_bytes(bytes).unwrap_or_else(|error| panic!("{error}"))
}

/// As [`elements`], to be written.
///
/// # Panics
/// As [`elements`].
#[inline(always)]
pub fn elements_mut<E: Plain>(bytes: &mut [u8]) -> &mut [E] {
    <[E]>::mut_from_bytes(bytes).unwrap_or_else(|error| panic!("{error}"))
}

/// The lines of a row and what is left. Rows need not be aligned to anything but their elements.
#[inline(always)]
pub(super) fn lines<E: Plain>(row: &[E]) -> (&[Line], &[u8]) {
    row.as_bytes().as_chunks()
}

/// As [`lines`], to be written.
#[inline(always)]
pub(super) fn lines_mut<E: Plain>(row: &mut [E]) -> (&mut [Line], &mut [u8]) {
    row.as_mut_bytes().as_chunks_mut()
}

/// The rest of a row, and zeros.
#[inline(always)]
pub(super) fn padded(rest: &[u8]) -> Line {
    let mut line = [0; line::BYTES];
    line[..rest.len()].copy_from_slice(rest);
    line
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Row `number`, with numbers of all kinds in it.
    pub(in crate::cpu) fn row<E: Plain>(number: usize, hidden: usize) -> Vec<E> {
        let special = [0.0, -0.0, 1e-40, 6e4, -6e4, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
        let element = |index: usize| match ((index * 31 + number * 17) % 97, index % 32) {
            // Elements that are the sentinel on rank 1, and half of it on others, if they have 16 bits.
            (_, 6) => E::from_bits(u32::MAX),
            (_, 7) if number == 1 => E::from_bits(u32::MAX),
            (_, 14 | 15) => E::from_f32(-0.0),
            (kind @ 0..8, _) if index % 3 == 1 => E::from_f32(special[kind]),
            (kind, _) => E::from_f32((kind as f32 - 48.0) * 0.13),
        };
        (0..hidden).map(element).collect()
    }
}
