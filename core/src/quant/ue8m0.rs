//! UE8M0: the power of two `2^(code - 127)`, the block scale of the OCP microscaling (MX) formats.
//!
//! There is no sign and no zero; code 255 is NaN. The conversions take an input's magnitude, as CUDA's
//! `__nv_cvt_float_to_e8m0` does: a scale is never negative.

/// The largest number, 2^127.
pub const MAX: f32 = f32::from_bits(254 << 23);
/// The smallest number, 2^-127: a subnormal `f32`.
pub const MIN: f32 = f32::from_bits(1 << 22);
/// The NaN, and the format's only one.
pub const NAN: u8 = 0xff;

const MAGNITUDE: u32 = 0x7fff_ffff;

/// The code of the nearest power of two, what lies halfway (1.5 times one) going up; zero and what else is
/// smaller than [`MIN`] becomes [`MIN`], what is larger than [`MAX`], infinity included, [`MAX`].
#[inline(always)]
pub fn encode(value: f32) -> u8 {
    const HALFWAY_TO_SECOND: u32 = 0x0060_0000; // 1.5 * 2^-127
    let magnitude = value.to_bits() & MAGNITUDE;
    let nearest = (magnitude.wrapping_add(1 << 22) >> 23).min(254);
    let number = if magnitude < HALFWAY_TO_SECOND { 0 } else { nearest };
    (if value.is_nan() { NAN as u32 } else { number }) as u8
}

/// The code of the smallest power of two that is not less than `value`, saturating as [`encode`] does: PTX's
/// `cvt.rp.satfinite.ue8m0x2.f32`. A block's scale is rounded so, or its largest element would saturate.
#[inline(always)]
pub fn encode_up(value: f32) -> u8 {
    let magnitude = value.to_bits() & MAGNITUDE;
    let above = (magnitude.wrapping_add(0x7f_ffff) >> 23).min(254);
    let number = if magnitude <= MIN.to_bits() { 0 } else { above };
    (if value.is_nan() { NAN as u32 } else { number }) as u8
}

/// The value of a code, exactly.
#[inline(always)]
pub fn decode(code: u8) -> f32 {
    let number = if code == 0 { MIN.to_bits() } else { (code as u32) << 23 };
    f32::from_bits(if code == NAN { f32::NAN.to_bits() } else { number })
}

/// The reciprocal of a code's value, exactly: every power of two of the format has one. NaN for NaN.
#[inline(always)]
pub fn decode_reciprocal(code: u8) -> f32 {
    decode(if code == NAN { NAN } else { 254 - code })
}
