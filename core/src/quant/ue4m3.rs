//! UE4M3: [E4M3](super::e4m3) without its sign, the block scale of NVFP4. Bit 7 is 0.

use super::e4m3;

/// The largest number.
pub const MAX: f32 = e4m3::MAX;
/// The NaN that [`encode`] gives, and the format's only one.
pub const NAN: u8 = e4m3::NAN;

/// The nearest code, ties to even; what is larger than [`MAX`] becomes [`MAX`], what is negative (`-0.0` and
/// `-inf` included) becomes 0, the nearest number there is, and every NaN becomes [`NAN`].
#[inline(always)]
pub fn encode(value: f32) -> u8 {
    let code = e4m3::encode(value);
    if code & 0x80 != 0 { 0 } else { code }
}

/// The value of a code, exactly; bit 7 is ignored.
#[inline(always)]
pub fn decode(code: u8) -> f32 {
    e4m3::decode(code & 0x7f)
}
