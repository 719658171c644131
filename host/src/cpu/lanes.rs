//! Rows as vectors of 32-bit words, and the elements in them as vectors of `f32`.
//!
//! Explicit vectors, where a compiler vectorizes a loop over elements of 16 bits with a shuffle for each conversion: the
//! elements in the low halves of words and those in the high halves are widened, added and rounded apart, and so never
//! change places. The conversions give the bits of [`Element`]'s, which are the specification; only a signaling NaN may
//! stay one until the first operation on it.

use fused_collective_core::{
    dtype::{Element, bf16, f16},
    lamport,
};
use pulp::{Simd, bytemuck};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::line::{self, Line};

/// A vector of words in `f32`: the elements in the low halves of its words, and those in the high ones. Elements of 32
/// bits are all among the first, and nobody looks at the second.
pub(super) type Wide<S> = [<S as Simd>::f32s; 2];

/// An element type whose conversions are written in vectors.
pub trait Lanes: Element + FromBytes + IntoBytes + Immutable {
    /// Elements in a word.
    const PER_WORD: usize = 4 / size_of::<Self>();

    /// The elements of words, in `f32`.
    fn split<S: Simd>(simd: S, words: S::u32s) -> Wide<S>;

    /// Words of the nearest elements, ties to even.
    fn join<S: Simd>(simd: S, values: Wide<S>) -> S::u32s;
}

impl Lanes for f32 {
    #[inline(always)]
    fn split<S: Simd>(simd: S, words: S::u32s) -> Wide<S> {
        [simd.transmute_f32s_u32s(words), simd.splat_f32s(0.0)]
    }

    #[inline(always)]
    fn join<S: Simd>(simd: S, [values, _]: Wide<S>) -> S::u32s {
        simd.transmute_u32s_f32s(values)
    }
}

/// `words << BITS`.
#[inline(always)]
fn shl<S: Simd>(simd: S, words: S::u32s, bits: u32) -> S::u32s {
    simd.wrapping_dyn_shl_u32s(words, simd.splat_u32s(bits))
}

/// `words >> BITS`.
#[inline(always)]
fn shr<S: Simd>(simd: S, words: S::u32s, bits: u32) -> S::u32s {
    simd.wrapping_dyn_shr_u32s(words, simd.splat_u32s(bits))
}

/// The upper halves of words.
const UPPER: u32 = 0xffff_0000;

impl Lanes for bf16 {
    #[inline(always)]
    fn split<S: Simd>(simd: S, words: S::u32s) -> Wide<S> {
        let low = shl(simd, words, 16);
        let high = simd.and_u32s(words, simd.splat_u32s(UPPER));
        [low, high].map(|bits| simd.transmute_f32s_u32s(bits))
    }

    #[inline(always)]
    fn join<S: Simd>(simd: S, [low, high]: Wide<S>) -> S::u32s {
        let (low, high) = (round_to_bf16(simd, low), round_to_bf16(simd, high));
        simd.or_u32s(shr(simd, low, 16), simd.and_u32s(high, simd.splat_u32s(UPPER)))
    }
}

/// The nearest bf16 in the upper halves; the lower ones may be anything.
#[inline(always)]
fn round_to_bf16<S: Simd>(simd: S, values: S::f32s) -> S::u32s {
    let bits = simd.transmute_u32s_f32s(values);
    let odd = simd.and_u32s(shr(simd, bits, 16), simd.splat_u32s(1));
    let nearest_even = simd.add_u32s(bits, simd.add_u32s(odd, simd.splat_u32s(0x7fff)));
    let quiet = simd.or_u32s(bits, simd.splat_u32s(0x40_0000));
    simd.select_u32s(simd.equal_f32s(values, values), nearest_even, quiet)
}

impl Lanes for f16 {
    #[inline(always)]
    fn split<S: Simd>(simd: S, words: S::u32s) -> Wide<S> {
        [widen_f16(simd, words), widen_f16(simd, shr(simd, words, 16))]
    }

    #[inline(always)]
    fn join<S: Simd>(simd: S, [low, high]: Wide<S>) -> S::u32s {
        simd.or_u32s(round_to_f16(simd, low), shl(simd, round_to_f16(simd, high), 16))
    }
}

/// The f16 in the lower halves; the upper ones may be anything.
#[inline(always)]
fn widen_f16<S: Simd>(simd: S, bits: S::u32s) -> S::f32s {
    /// From the exponents of f16 to those of `f32`: exact, and makes normal numbers of subnormal ones.
    const REBIAS: f32 = f32::from_bits((127 + 127 - 15) << 23);
    const INFINITY: u32 = 0x1f << 23;
    let magnitude = shl(simd, simd.and_u32s(bits, simd.splat_u32s(0x7fff)), 13);
    let scaled = simd.mul_f32s(simd.transmute_f32s_u32s(magnitude), simd.splat_f32s(REBIAS));
    let finite = simd.transmute_u32s_f32s(scaled);
    // Exponent 31 is that of infinity and NaN in f16; in `f32` that is 255.
    let special = simd.or_u32s(finite, simd.splat_u32s(0xff << 23));
    let is_finite = simd.less_than_u32s(magnitude, simd.splat_u32s(INFINITY));
    let unsigned = simd.select_u32s(is_finite, finite, special);
    let sign = shl(simd, simd.and_u32s(bits, simd.splat_u32s(0x8000)), 16);
    simd.transmute_f32s_u32s(simd.or_u32s(unsigned, sign))
}

/// The nearest f16 in the lower halves, and zero in the upper ones. The steps are [`Element::from_f32`]'s.
#[inline(always)]
fn round_to_f16<S: Simd>(simd: S, values: S::f32s) -> S::u32s {
    /// Halfway between the largest f16 and the next step.
    const INFINITE_FROM: f32 = 65520.0;
    const NORMAL_FROM: f32 = 1.0 / 16384.0;
    let bits = simd.transmute_u32s_f32s(values);
    let magnitude = simd.and_u32s(bits, simd.splat_u32s(0x7fff_ffff));
    let absolute = simd.transmute_f32s_u32s(magnitude);
    let truncated = shr(simd, magnitude, 13);
    let odd = simd.and_u32s(truncated, simd.splat_u32s(1));
    let rebias_and_round = simd.splat_u32s(0xfffu32.wrapping_sub((127 - 15) << 23));
    let normal = shr(simd, simd.add_u32s(simd.add_u32s(magnitude, odd), rebias_and_round), 13);
    // Adding 0.5 lines an f16 subnormal's last place up with the last place of an f32: the addition rounds.
    let half = simd.splat_f32s(0.5);
    let subnormal = simd
        .sub_u32s(simd.transmute_u32s_f32s(simd.add_f32s(absolute, half)), simd.splat_u32s(0.5f32.to_bits()));
    let nan = simd.or_u32s(simd.and_u32s(truncated, simd.splat_u32s(0x3ff)), simd.splat_u32s(0x7e00));
    let finite =
        simd.select_u32s(simd.less_than_f32s(absolute, simd.splat_f32s(NORMAL_FROM)), subnormal, normal);
    let is_finite = simd.less_than_f32s(absolute, simd.splat_f32s(INFINITE_FROM));
    let number = simd.select_u32s(is_finite, finite, simd.splat_u32s(0x7c00));
    let unsigned = simd.select_u32s(simd.equal_f32s(values, values), number, nan);
    simd.or_u32s(unsigned, simd.and_u32s(shr(simd, bits, 16), simd.splat_u32s(0x8000)))
}

/// A [`Line`] in `f32`: the first [`vectors`] are it.
pub(super) type WideLine<S> = [Wide<S>; line::BYTES / 4];

/// Vectors of a line.
pub(super) const fn vectors<S: Simd>() -> usize {
    line::BYTES / size_of::<S::u32s>()
}

/// A line of zeros.
#[inline(always)]
pub(super) fn zeros<S: Simd>(simd: S) -> WideLine<S> {
    [[simd.splat_f32s(0.0); 2]; line::BYTES / 4]
}

/// The elements of a line.
#[inline(always)]
pub(super) fn widen<E: Lanes, S: Simd>(simd: S, line: &Line) -> WideLine<S> {
    let mut wide = zeros(simd);
    for (wide, bytes) in wide.iter_mut().zip(line.chunks_exact(size_of::<S::u32s>())) {
        *wide = E::split(simd, bytemuck::pod_read_unaligned(bytes));
    }
    wide
}

/// The elements of a line without the [sentinel](lamport::strip).
#[inline(always)]
pub(super) fn widen_stripped<E: Lanes, S: Simd>(simd: S, line: &Line) -> WideLine<S> {
    let mut wide = zeros(simd);
    for (wide, bytes) in wide.iter_mut().zip(line.chunks_exact(size_of::<S::u32s>())) {
        *wide = E::split(simd, strip(simd, bytemuck::pod_read_unaligned(bytes)));
    }
    wide
}

/// A line of the nearest elements.
#[inline(always)]
pub(super) fn round<E: Lanes, S: Simd>(simd: S, wide: &WideLine<S>, line: &mut Line) {
    for (bytes, wide) in line.chunks_exact_mut(size_of::<S::u32s>()).zip(wide) {
        bytes.copy_from_slice(bytemuck::bytes_of(&E::join(simd, *wide)));
    }
}

/// A line of the nearest elements, without the [sentinel](lamport::strip).
#[inline(always)]
pub(super) fn round_stripped<E: Lanes, S: Simd>(simd: S, wide: &WideLine<S>, line: &mut Line) {
    for (bytes, wide) in line.chunks_exact_mut(size_of::<S::u32s>()).zip(wide) {
        bytes.copy_from_slice(bytemuck::bytes_of(&strip(simd, E::join(simd, *wide))));
    }
}

#[inline(always)]
fn strip<S: Simd>(simd: S, words: S::u32s) -> S::u32s {
    simd.min_u32s(words, simd.splat_u32s(lamport::SENTINEL - 1))
}

#[cfg(test)]
mod tests {
    use pulp::{Arch, WithSimd};

    use super::*;

    /// One half of a wide line, word by word.
    fn half<S: Simd>(wide: &WideLine<S>, half: usize) -> impl Iterator<Item = f32> {
        let vectors = wide.iter().take(line::BYTES / size_of::<S::u32s>());
        vectors.flat_map(move |wide| bytemuck::cast_slice::<S::f32s, f32>(&wide[half..=half]).iter().copied())
    }

    /// Words split and joined, and the elements between.
    struct Split<'a, E>(&'a [E]);

    impl<E: Lanes> WithSimd for Split<'_, E> {
        type Output = (Vec<f32>, Vec<E>);

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
            let (mut values, mut joined) = (Vec::new(), Vec::new());
            for line in self.0.as_bytes().as_chunks().0 {
                let wide = widen::<E, S>(simd, line);
                let (low, high) = (half::<S>(&wide, 0), half::<S>(&wide, 1));
                values.extend(low.zip(high).flat_map(|(low, high)| [low, high]));
                let mut line = [0; line::BYTES];
                round::<E, S>(simd, &wide, &mut line);
                joined.extend(
                    line.chunks_exact(size_of::<E>()).map(|bytes| E::read_from_bytes(bytes).unwrap()),
                );
            }
            (values, joined)
        }
    }

    /// Values rounded: each of them in both halves of a word.
    struct Round<'a>(&'a [f32]);

    impl Round<'_> {
        #[inline(always)]
        fn round<E: Lanes, S: Simd>(&self, simd: S) -> Vec<E> {
            let vectors = self.0.chunks_exact(S::F32_LANES).map(|values| {
                let values: S::f32s = bytemuck::pod_read_unaligned(bytemuck::cast_slice(values));
                E::join(simd, [values; 2])
            });
            let elements = |vector: S::u32s| {
                let bytes = bytemuck::bytes_of(&vector).to_vec();
                bytes
                    .chunks_exact(size_of::<E>())
                    .map(|bytes| E::read_from_bytes(bytes).unwrap())
                    .collect::<Vec<E>>()
            };
            vectors.flat_map(elements).collect()
        }
    }

    impl WithSimd for Round<'_> {
        type Output = (Vec<bf16>, Vec<f16>);

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
            (self.round(simd), self.round(simd))
        }
    }

    fn quiet<E: Element>(value: E) -> u32 {
        // What any operation on it would make of it, and `from_f32` is one.
        E::from_f32(value.to_f32()).to_bits()
    }

    fn check_split<E: Lanes>(arch: Arch) {
        let all: Vec<E> = (0..=u32::from(u16::MAX)).map(E::from_bits).collect();
        let (values, joined) = arch.dispatch(Split(&all));
        for ((&element, value), joined) in all.iter().zip(values).zip(joined) {
            let (value, expected) = (if value.is_nan() { value + 0.0 } else { value }, element.to_f32());
            let expected = if expected.is_nan() { expected + 0.0 } else { expected };
            assert_eq!(value.to_bits(), expected.to_bits(), "{:#06x} widened", element.to_bits());
            assert_eq!(joined.to_bits(), quiet(element), "{:#06x} widened and rounded", element.to_bits());
        }
    }

    #[test]
    fn elements_are_widened_as_core_does() {
        for arch in [Arch::Scalar, Arch::new()] {
            check_split::<bf16>(arch);
            check_split::<f16>(arch);
        }
    }

    #[test]
    fn values_are_rounded_as_core_does() {
        // Every sign, exponent and the upper mantissa bits; on, next to and between the ties of both types.
        let below = [0, 1, 0x7ff, 0x800, 0xfff].into_iter();
        let values: Vec<f32> =
            below.flat_map(|low| (0..1u32 << 20).map(move |high| f32::from_bits(high << 12 | low))).collect();
        for arch in [Arch::Scalar, Arch::new()] {
            let (in_bf16, in_f16) = arch.dispatch(Round(&values));
            for (index, &value) in values.iter().enumerate() {
                let (first, second) = (2 * index, 2 * index + 1);
                let (bits, expected) = (value.to_bits(), bf16::from_f32(value).to_bits());
                assert_eq!([in_bf16[first], in_bf16[second]].map(bf16::to_bits), [expected; 2], "{bits:#x}");
                let expected = <f16 as Element>::from_f32(value).to_bits();
                assert_eq!([in_f16[first], in_f16[second]].map(f16::to_bits), [expected; 2], "{bits:#x}");
            }
        }
    }
}
