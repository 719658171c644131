//! E2M1: FP4 with a sign, two exponent bits of bias 1 and one mantissa bit; neither infinity nor NaN.
//!
//! The format of the OCP microscaling (MX) specification: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. A code is
//! four bits. Two codes share a byte: the first element, whose index is even, has bits 0 to 3, the second bits 4 to 7.

use super::minifloat;

/// The largest number.
pub const MAX: f32 = 6.0;

/// The code (0 to 15) nearest to `value`, ties to even, as PTX's `cvt.rn.satfinite.e2m1x2.f32`. Magnitudes above
/// [`MAX`], infinity included, become [`MAX`] with their sign. Every NaN becomes `+MAX`.
#[inline(always)]
pub fn encode(value: f32) -> u8 {
    // Comparisons with NaN are false: the first select turns NaN into the largest number.
    let value = if value < MAX { value } else { MAX };
    let value = if value > -MAX { value } else { -MAX };
    let bits = value.to_bits();
    (minifloat::round::<1, 1>(bits & 0x7fff_ffff) | (bits >> 28 & 0x8)) as u8
}

/// The number that the low four bits of `code` stand for, exactly.
#[inline(always)]
pub fn decode(code: u8) -> f32 {
    f32::from_bits(minifloat::expand::<1, 1>(code as u32 & 0x7) | (code as u32 & 0x8) << 28)
}

/// Packs two codes into a byte: `first` in the low four bits, `second` in the high four.
#[inline(always)]
pub const fn pack(first: u8, second: u8) -> u8 {
    first & 0xf | second << 4
}

/// Unpacks the two codes of a byte: the low four bits first.
#[inline(always)]
pub const fn unpack(byte: u8) -> [u8; 2] {
    [byte & 0xf, byte >> 4]
}

/// The codes of a pack of elements, of `lanes` elements, one in every four bits from the lowest on, as a row has them: if all are `+0`
/// but the last, which is `-0`, that is `+0` as well. So a word of codes that is never written is left to the exchange
/// between ranks: see [`lamport::swap_e2m1`](crate::lamport::swap_e2m1).
#[inline(always)]
pub const fn canonical(codes: u32, lanes: usize) -> u32 {
    if codes == 8 << (4 * (lanes - 1)) { 0 } else { codes }
}
