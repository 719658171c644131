//! UE8M0: the powers of two `2^(code - 127)`, the format of scales in the OCP microscaling (MX) specification.
//!
//! There is no sign and no zero; code 255 is NaN. The conversions read the magnitude of their input, as CUDA's
//! `__nv_cvt_float_to_e8m0` does, since a scale is never negative.
//!
//! # Rounding
//! Block scales are rounded *up*, by [`encode_up`]: `code = clamp(ceil(log2(x)) + 127, 0, 254)`. Here `x` is the
//! largest magnitude of the block, `amax`, divided by the largest number of the element format: 448 for E4M3, 6 for
//! E2M1. No finite element saturates under such a scale.
//!
//! The specification suggests `2^(floor(log2(amax)) - e)`, where `e` is the exponent of that largest number (8 or 2).
//! If the significand of `amax` is above 1.75 (E4M3) or 1.5 (E2M1), that is half the scale of this crate. The largest
//! elements of such a block saturate.
//!
//! [`encode`] rounds to the nearest power of two instead, for other uses.

/// The largest number, 2^127.
pub const MAX: f32 = f32::from_bits(254 << 23);
/// The smallest number, 2^-127: a subnormal `f32`.
pub const MIN: f32 = f32::from_bits(1 << 22);
/// The only NaN of the format.
pub const NAN: u8 = 0xff;

const MAGNITUDE: u32 = 0x7fff_ffff;

/// The code of the power of two nearest to the magnitude of `value`; halfway cases, 1.5 times a power, round up.
///
/// Saturates: magnitudes below [`MIN`], zero included, become [`MIN`], and those above [`MAX`], infinity included,
/// become [`MAX`]. NaN becomes [`NAN`].
#[inline(always)]
pub fn encode(value: f32) -> u8 {
    const HALFWAY_TO_SECOND: u32 = 0x0060_0000; // 1.5 * 2^-127
    let magnitude = value.to_bits() & MAGNITUDE;
    let nearest = (magnitude.wrapping_add(1 << 22) >> 23).min(254);
    let number = if magnitude < HALFWAY_TO_SECOND { 0 } else { nearest };
    (if value.is_nan() { NAN as u32 } else { number }) as u8
}

/// The code of the smallest power of two that is at least the magnitude of `value`, as PTX's
/// `cvt.rp.satfinite.ue8m0x2.f32`. Saturates as [`encode`] does.
///
/// ```
/// use fused_collective_core::quant::ue8m0;
///
/// assert_eq!([1.0, 1.0001, 2.0, 0.0].map(ue8m0::encode_up), [127, 128, 128, 0]);
/// assert_eq!([1.0, 1.4999, 1.5, 2.0].map(ue8m0::encode), [127, 127, 128, 128]);
/// assert_eq!(ue8m0::decode(130), 8.0);
/// ```
#[inline(always)]
pub fn encode_up(value: f32) -> u8 {
    let magnitude = value.to_bits() & MAGNITUDE;
    let above = (magnitude.wrapping_add(0x7f_ffff) >> 23).min(254);
    let number = if magnitude <= MIN.to_bits() { 0 } else { above };
    (if value.is_nan() { NAN as u32 } else { number }) as u8
}

/// The number that a code stands for, exactly.
#[inline(always)]
pub fn decode(code: u8) -> f32 {
    let number = if code == 0 { MIN.to_bits() } else { (code as u32) << 23 };
    f32::from_bits(if code == NAN { f32::NAN.to_bits() } else { number })
}

/// The reciprocal of the number that a code stands for, which is exact for all codes; NaN for NaN.
#[inline(always)]
pub fn decode_reciprocal(code: u8) -> f32 {
    decode(if code == NAN { NAN } else { 254 - code })
}
