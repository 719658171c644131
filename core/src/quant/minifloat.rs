//! What E4M3, E2M1 and UE4M3 share: formats of a few bits, with subnormals and without infinities.
//!
//! Nothing here overflows; the arithmetic wraps so that builds with overflow checks vectorize too.
//!
//! A format has `MANTISSA` stored bits below the leading one and a smallest normal number of
//! `2^(1 - BIAS)`. A code without its sign is `exponent << MANTISSA | mantissa`, so codes count the
//! format's magnitudes in order.

/// The code nearest to a magnitude, ties to even. `magnitude` is the bits of an `f32` without its sign, at
/// most the step after the format's largest number.
#[inline(always)]
pub(super) fn round<const MANTISSA: u32, const BIAS: u32>(magnitude: u32) -> u32 {
    let smallest_normal = (128 - BIAS) << 23;
    let exponent = (magnitude & 0x7f80_0000).max(smallest_normal);
    // An f32 of this exponent has the format's step as its last place, so adding the magnitude rounds it
    // and leaves the number of steps in the low bits: at least 2^MANTISSA unless it is subnormal.
    let anchor = exponent.wrapping_add((23 - MANTISSA) << 23);
    let steps = (f32::from_bits(magnitude) + f32::from_bits(anchor)).to_bits().wrapping_sub(anchor);
    steps.wrapping_add(exponent.wrapping_sub(smallest_normal) >> (23 - MANTISSA))
}

/// The `f32` bits of a code without its sign.
#[inline(always)]
pub(super) fn expand<const MANTISSA: u32, const BIAS: u32>(code: u32) -> u32 {
    let step = f32::from_bits((128 - BIAS - MANTISSA) << 23);
    let normal = (code << (23 - MANTISSA)) + ((127 - BIAS) << 23);
    let subnormal = (code as f32 * step).to_bits();
    if code >> MANTISSA == 0 { subnormal } else { normal }
}
