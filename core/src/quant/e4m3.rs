//! E4M3: FP8 with a sign, four exponent bits of bias 7 and three mantissa bits; no infinity, NaN is `S.1111.111`.
//!
//! The format of Micikevicius et al., "FP8 Formats for Deep Learning" (2022), and of the OCP 8-bit floating point
//! specification; `float8_e4m3fn` in PyTorch and `ml_dtypes`. Normal numbers are from 2^-6 to 448 and rounding changes
//! them by at most 1/16. Subnormal numbers are multiples of 2^-9.

use super::minifloat;

/// The largest number.
pub const MAX: f32 = 448.0;
/// The NaN that [`encode`] returns.
pub const NAN: u8 = 0x7f;

/// The code nearest to `value`, ties to even, as PTX's `cvt.rn.satfinite.e4m3x2.f32`. Magnitudes above [`MAX`],
/// infinity included, become [`MAX`] with their sign. Every NaN becomes [`NAN`].
#[inline(always)]
pub fn encode(value: f32) -> u8 {
    // The NaN's code, read as a number, would be 480. Comparisons with NaN are false, so the last of these selects,
    // each one instruction, turns every NaN into +480.
    const BEYOND: f32 = 480.0;
    let value = if value > MAX { MAX } else { value };
    let value = if value < -MAX { -MAX } else { value };
    let value = if value < BEYOND { value } else { BEYOND };
    let bits = value.to_bits();
    (minifloat::round::<3, 7>(bits & 0x7fff_ffff) | (bits >> 24 & 0x80)) as u8
}

/// The number that a code stands for, exactly. Both NaN codes become a quiet NaN of their sign.
#[inline(always)]
pub fn decode(code: u8) -> f32 {
    let magnitude = code as u32 & 0x7f;
    let number = minifloat::expand::<3, 7>(magnitude);
    let unsigned = if magnitude == NAN as u32 { f32::NAN.to_bits() } else { number };
    f32::from_bits(unsigned | (code as u32 & 0x80) << 24)
}
