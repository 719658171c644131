//! E2M1: a sign, two exponent bits with bias 1, one mantissa bit; neither infinity nor NaN.
//!
//! The FP4 of the OCP microscaling (MX) specification: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.
//! A code is four bits; two of them share a byte, the first element in the low half.

use super::minifloat;

/// The largest number.
pub const MAX: f32 = 6.0;

/// The nearest code (0 to 15), ties to even; what is larger than [`MAX`] in magnitude, infinities included,
/// becomes [`MAX`] with its sign, and every NaN becomes `+MAX`: PTX's `cvt.rn.satfinite.e2m1x2.f32`.
#[inline(always)]
pub fn encode(value: f32) -> u8 {
    // Comparisons with NaN are false: the first select turns NaN into the largest number.
    let value = if value < MAX { value } else { MAX };
    let value = if value > -MAX { value } else { -MAX };
    let bits = value.to_bits();
    (minifloat::round::<1, 1>(bits & 0x7fff_ffff) | (bits >> 28 & 0x8)) as u8
}

/// The value of the code in the low four bits, exactly.
#[inline(always)]
pub fn decode(code: u8) -> f32 {
    f32::from_bits(minifloat::expand::<1, 1>(code as u32 & 0x7) | (code as u32 & 0x8) << 28)
}

/// Two codes in a byte, `first` in the low half.
#[inline(always)]
pub const fn pack(first: u8, second: u8) -> u8 {
    first & 0xf | second << 4
}

/// The two codes of a byte, the first element's first.
#[inline(always)]
pub const fn unpack(byte: u8) -> [u8; 2] {
    [byte & 0xf, byte >> 4]
}
