//! Encoding and decoding shared by E4M3, E2M1 and UE4M3: formats of a few bits with subnormals, without infinities.
//!
//! A format has `MANTISSA` stored bits below the leading one and a smallest normal number of `2^(1 - BIAS)`. A code
//! without its sign is `exponent << MANTISSA | mantissa`, so codes count the magnitudes of the format in order.
//!
//! No operation here overflows; the arithmetic wraps so that builds with overflow checks are vectorized too.

/// The code nearest to a magnitude, ties to even. `magnitude` is the bits of an `f32` without its sign, at most one
/// step above the format's largest number.
#[inline(always)]
pub(super) fn round<const MANTISSA: u32, const BIAS: u32>(magnitude: u32) -> u32 {
    let smallest_normal = (128 - BIAS) << 23;
    let exponent = (magnitude & 0x7f80_0000).max(smallest_normal);
    // The last place of an f32 of this exponent is the format's step. Adding the magnitude to the anchor therefore
    // rounds the magnitude and leaves the number of steps in the low bits: at least 2^MANTISSA for normal numbers.
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
