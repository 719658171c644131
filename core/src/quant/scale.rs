//! From the largest magnitude of a token or block to its scale, and from a scale to the multiplier of elements.
//!
//! Every function states its `f32` operations: IEEE multiplications and divisions, in the stated order, rounded to
//! nearest even, with subnormal numbers. A kernel that performs the same operations gets the same bits.
//!
//! A UE8M0 scale and the static one divide elements, as a multiplication by the reciprocal; the `f32` scale of a token or
//! group divides them itself, as in vLLM and FlashInfer. NVFP4 has two scales: the global scale multiplies elements and the
//! block scale divides them. The [module](super) has the table.
//!
//! # NaN and infinity
//! E4M3 has a NaN, so a NaN element becomes a NaN code and affects no other: [`amax`] skips NaN. E2M1 has no NaN, so a
//! NaN element makes the scale of its block NaN ([`amax_or_nan`]), and with it all elements of the block.
//! An infinite element makes `amax` infinite. A block's scale then saturates. A token's `f32` scale becomes infinite,
//! and the token's infinite elements become NaN.

use super::{e2m1, e4m3, ue4m3, ue8m0};

/// The smallest scale that [`fp8_per_token`] returns, so that no token, not even one of zeros, divides by zero.
pub const MIN_FP8_PER_TOKEN: f32 = 1.0 / (e4m3::MAX * 512.0);

/// The smallest per-tensor scale of static FP8: below it, its reciprocal is infinite, and [`fp8_multiplier`] 0. The successor
/// of 2^-128.
pub const MIN_FP8_STATIC: f32 = f32::from_bits((1 << 21) + 1);

/// The largest global scale of NVFP4: above it, [`nvfp4_multiplier`] is infinite for the smallest block scale, 2^-9.
pub const MAX_NVFP4_GLOBAL: f32 = f32::MAX / 512.0;

/// The larger of `largest` and the magnitude of `value`, or `largest` if `value` is NaN. `largest` must not be NaN; a
/// fold over elements starts from 0.
#[inline(always)]
pub fn amax(largest: f32, value: f32) -> f32 {
    let magnitude = value.abs();
    if magnitude > largest { magnitude } else { largest }
}

/// The larger of `largest` and the magnitude of `value`, or NaN if either is NaN. A fold over elements starts from 0.
#[inline(always)]
pub fn amax_or_nan(largest: f32, value: f32) -> f32 {
    // The bits of magnitudes are in their order, and a NaN's are above infinity's.
    f32::from_bits(largest.to_bits().max(value.abs().to_bits()))
}

/// The multiplier of elements under a static `f32` scale: `1 / scale`. It is 0 under a scale that is not from [`MIN_FP8_STATIC`]
/// to [`f32::MAX`], so that zeros stay zeros: such a scale in a tensor gives codes of zero, and NaN for elements that are
/// not finite.
#[inline(always)]
pub fn fp8_multiplier(scale: f32) -> f32 {
    if (MIN_FP8_STATIC..=f32::MAX).contains(&scale) { 1.0 / scale } else { 0.0 }
}

/// The global scale of NVFP4 as it is used: 0 in place of one that is not above 0 and at most [`MAX_NVFP4_GLOBAL`]. Under 0
/// all block scales and codes of finite elements are zeros.
#[inline(always)]
pub fn nvfp4_global(scale: f32) -> f32 {
    if scale > 0.0 && scale <= MAX_NVFP4_GLOBAL { scale } else { 0.0 }
}

/// The `f32` scale of a token: `max(amax / 448, 1 / (448 * 512))`, as in vLLM's dynamic per-token kernel.
#[inline(always)]
pub fn fp8_per_token(amax: f32) -> f32 {
    let scale = amax / e4m3::MAX;
    if scale > MIN_FP8_PER_TOKEN { scale } else { MIN_FP8_PER_TOKEN }
}

/// The least magnitude that an `f32` scale of a group stands for, so that no group divides by zero.
pub const MIN_FP8_GROUP_AMAX: f32 = 1e-10;

/// The `f32` scale of a group of E4M3 codes: `max(amax, 1e-10) / 448`, as in vLLM's `per_token_group_quant_fp8`.
#[inline(always)]
pub fn fp8_group(amax: f32) -> f32 {
    let amax = if amax > MIN_FP8_GROUP_AMAX { amax } else { MIN_FP8_GROUP_AMAX };
    amax / e4m3::MAX
}

/// The UE8M0 scale of a block of E4M3 codes: the least power of two that is at least `amax / 448`, exactly, so that no
/// finite element saturates. The multiplier of elements is [the reciprocal](ue8m0::decode_reciprocal), which is exact.
#[inline(always)]
pub fn fp8_block(amax: f32) -> u8 {
    block_scale::<{ e4m3::MAX.to_bits() }>(amax)
}

/// The UE8M0 scale of a block of E2M1 codes: the least power of two that is at least `amax / 6`, exactly, so that no
/// finite element saturates. The multiplier of elements is [the reciprocal](ue8m0::decode_reciprocal), which is exact.
#[inline(always)]
pub fn mxfp4_block(amax: f32) -> u8 {
    block_scale::<{ e2m1::MAX.to_bits() }>(amax)
}

/// The code of the least power of two that is at least `amax` divided by the number of bits `MAX`. Saturates as
/// [`ue8m0::encode_up`].
#[inline(always)]
fn block_scale<const MAX: u32>(amax: f32) -> u8 {
    const FRACTION: u32 = (1 << 23) - 1;
    let bits = amax.abs().to_bits();
    // A larger significand than the format's largest number has carries over into the exponent; the quotient's exponent
    // is then the difference.
    let exponent = (bits + (FRACTION - (MAX & FRACTION))) >> 23;
    let code = exponent.saturating_sub((MAX >> 23) - 127);
    let infinity = f32::INFINITY.to_bits();
    (if bits < infinity {
        code
    } else if bits == infinity {
        254
    } else {
        u32::from(ue8m0::NAN)
    }) as u8
}

/// The block scale of NVFP4: `UE4M3(global_scale * (amax / 6))`, rounded to nearest. The global scale is usually
/// `448 * 6` divided by the largest magnitude of the tensor. The block of that magnitude then has the scale 448.
#[inline(always)]
pub fn nvfp4_block(amax: f32, global_scale: f32) -> u8 {
    ue4m3::encode(nvfp4_scale(amax, global_scale))
}

/// The scale that [`nvfp4_block`] rounds to UE4M3: `global_scale * (amax / 6)`.
#[inline(always)]
pub fn nvfp4_scale(amax: f32, global_scale: f32) -> f32 {
    global_scale * (amax / e2m1::MAX)
}

/// The multiplier of the elements of an NVFP4 block: `global_scale` divided by the block scale that `code` stands for.
/// It is 0 where the block scale is 0, in a block whose elements are too small for any other.
#[inline(always)]
pub fn nvfp4_multiplier(code: u8, global_scale: f32) -> f32 {
    nvfp4_multiplier_of(ue4m3::decode(code), global_scale)
}

/// [`nvfp4_multiplier`] of a decoded block scale.
#[inline(always)]
pub fn nvfp4_multiplier_of(scale: f32, global_scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { global_scale / scale }
}
