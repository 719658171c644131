//! From the largest magnitude of a token or a block to its scale, and from a scale to what values are
//! multiplied by.
//!
//! Every function states its `f32` operations: IEEE multiplications and divisions, in that order, rounded to
//! nearest even, subnormals kept. A kernel that performs the same gets the same bits.
//!
//! # NaN and infinity
//! E4M3 has a NaN, so a NaN element keeps to itself: [`amax`] passes over it, and it is encoded as NaN. E2M1 has
//! none, so there it spoils its block's scale instead: [`amax_or_nan`] is NaN, the scale is NaN, and so is
//! whatever is computed from the block. An infinite element makes an infinite `amax`; a block's scale then
//! saturates, while a token's `f32` scale becomes infinite and its infinite elements NaN.

use super::{e2m1, e4m3, ue4m3, ue8m0};

/// The smallest scale that [`fp8_per_token`] gives: a token of zeros must not divide by zero.
pub const MIN_FP8_PER_TOKEN: f32 = 1.0 / (e4m3::MAX * 512.0);

/// The larger of `largest`, which must not be NaN, and `value`'s magnitude; a NaN `value` is passed over. Starts
/// from 0.
#[inline(always)]
pub fn amax(largest: f32, value: f32) -> f32 {
    let magnitude = value.abs();
    if magnitude > largest { magnitude } else { largest }
}

/// The larger of `largest` and `value`'s magnitude, or NaN if either is NaN. Starts from 0.
#[inline(always)]
pub fn amax_or_nan(largest: f32, value: f32) -> f32 {
    // The bits of magnitudes are in their order, and a NaN's are above infinity's.
    f32::from_bits(largest.to_bits().max(value.abs().to_bits()))
}

/// What values are multiplied by before they are rounded to FP8 under an `f32` scale: `1 / scale`.
#[inline(always)]
pub fn fp8_multiplier(scale: f32) -> f32 {
    1.0 / scale
}

/// A token's `f32` scale: `max(amax / 448, 1 / (448 * 512))`, as vLLM's dynamic per-token kernel.
#[inline(always)]
pub fn fp8_per_token(amax: f32) -> f32 {
    let scale = amax / e4m3::MAX;
    if scale > MIN_FP8_PER_TOKEN { scale } else { MIN_FP8_PER_TOKEN }
}

/// A UE8M0 scale for E4M3 values: `amax / 448` rounded up, so that no finite element saturates. Values are
/// multiplied by [its reciprocal](ue8m0::decode_reciprocal).
#[inline(always)]
pub fn fp8_block(amax: f32) -> u8 {
    ue8m0::encode_up(amax / e4m3::MAX)
}

/// A UE8M0 scale for E2M1 values: `amax / 6` rounded up, so that no finite element saturates. Values are
/// multiplied by [its reciprocal](ue8m0::decode_reciprocal).
#[inline(always)]
pub fn mxfp4_block(amax: f32) -> u8 {
    ue8m0::encode_up(amax / e2m1::MAX)
}

/// NVFP4's block scale: `UE4M3(global_scale * (amax / 6))`. The global scale is usually `448 * 6` over the largest
/// magnitude of the whole tensor.
#[inline(always)]
pub fn nvfp4_block(amax: f32, global_scale: f32) -> u8 {
    ue4m3::encode(nvfp4_scale(amax, global_scale))
}

/// The scale that [`nvfp4_block`] rounds to UE4M3.
#[inline(always)]
pub fn nvfp4_scale(amax: f32, global_scale: f32) -> f32 {
    global_scale * (amax / e2m1::MAX)
}

/// What values of an NVFP4 block are multiplied by: `global_scale / UE4M3^-1(code)`, or 0 where the scale is 0
/// because the whole block is too small for it.
#[inline(always)]
pub fn nvfp4_multiplier(code: u8, global_scale: f32) -> f32 {
    nvfp4_multiplier_of(ue4m3::decode(code), global_scale)
}

/// [`nvfp4_multiplier`] of the scale that a code stands for.
#[inline(always)]
pub fn nvfp4_multiplier_of(scale: f32, global_scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { global_scale / scale }
}
