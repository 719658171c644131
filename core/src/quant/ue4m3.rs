//! UE4M3: [E4M3](super::e4m3) without a sign, the format of NVFP4's block scales. Bit 7 is 0.
//!
//! Scales are 0, multiples of 2^-9 up to 2^-6, and then 8 numbers in each power of two, up to 448.

use super::e4m3;

/// The largest number.
pub const MAX: f32 = e4m3::MAX;
/// The only NaN of the format.
pub const NAN: u8 = e4m3::NAN;

/// The code nearest to `value`, ties to even. Numbers above [`MAX`] become [`MAX`], negative numbers (`-0.0` and `-inf`
/// included) become 0, and every NaN becomes [`NAN`].
#[inline(always)]
pub fn encode(value: f32) -> u8 {
    let code = e4m3::encode(value);
    if code & 0x80 != 0 { 0 } else { code }
}

/// The number that a code stands for, exactly. Bit 7 is ignored.
#[inline(always)]
pub fn decode(code: u8) -> f32 {
    e4m3::decode(code & 0x7f)
}
