//! The parameters of epilogues and of their quantizers.

use super::address::Address;
use crate::quant::ScaleStrides;

/// An epilogue that stores, or quantizes, the sum as it is.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plain<Q> {
    /// What is made of the sum.
    pub quantizer: Q,
}

/// An epilogue of RMSNorm and a quantization.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RmsNorm<Q> {
    /// `[hidden]` elements, or `f32`, 16-byte aligned. Constant.
    pub gamma: Address,
    /// `[total_tokens, hidden]` elements, or null: then the norm is not stored.
    pub norm_out: Address,
    /// `1 / hidden`.
    pub inverse_hidden: f32,
    /// Added to the mean square.
    pub epsilon: f32,
    /// Added to gamma.
    pub weight_bias: f32,
    /// 1: gamma is `f32`, and elements are not; else 0.
    pub gamma_f32: u32,
    /// What is made of the norm.
    pub quantizer: Q,
}

/// No quantization.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unquantized;

/// FP8 with a static scale for the whole tensor.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fp8Static {
    /// `[total_tokens, hidden]` E4M3 codes, 8-byte aligned.
    pub values: Address,
    /// One `f32`. Constant.
    pub scale: Address,
}

/// FP8 with a scale for each token.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fp8PerToken {
    /// `[total_tokens, hidden]` E4M3 codes, 8-byte aligned.
    pub values: Address,
    /// `[total_tokens]` `f32`.
    pub scales: Address,
}

/// The scales of blocks. The kernel zeroes their padding.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockScales {
    /// A [`ScaleTensor`](crate::quant::ScaleTensor) of `total_tokens` rows, 16-byte aligned, padding included.
    pub address: Address,
    /// Its layout.
    pub strides: ScaleStrides,
}

/// FP8 with a scale for each block: per group, or MXFP8.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fp8Block {
    /// `[total_tokens, hidden]` E4M3 codes, 8-byte aligned.
    pub values: Address,
    /// `[total_tokens, hidden / block]` UE8M0 codes or, of 4 bytes, `f32`.
    pub scales: BlockScales,
    /// The logarithm of the 16-byte packs of elements in a block: from 2 to 5.
    pub block_packs_log2: u32,
    /// Keeps the struct free of padding.
    pub reserved: u32,
}

/// NVFP4: E2M1 in blocks of 16 with UE4M3 scales under a global scale.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fp4 {
    /// `[total_tokens, hidden / 2]` bytes of two E2M1 codes each, 4-byte aligned.
    pub values: Address,
    /// `[total_tokens, hidden / 16]` UE4M3 codes.
    pub scales: BlockScales,
    /// One `f32`. Constant.
    pub global_scale: Address,
}

/// MXFP4: E2M1 in blocks of 32 with UE8M0 scales.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MxFp4 {
    /// `[total_tokens, hidden / 2]` bytes of two E2M1 codes each, 4-byte aligned.
    pub values: Address,
    /// `[total_tokens, hidden / 32]` UE8M0 codes.
    pub scales: BlockScales,
}

/// A quantization that is chosen at launch. Of its fields, those of the quantizer that [`kind`](Self::kind) names count.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AnyQuantizer {
    /// The codes.
    pub values: Address,
    /// The scales of blocks; of them the address alone where each token has a scale.
    pub scales: BlockScales,
    /// The static or the global scale.
    pub scale: Address,
    /// [`Quantizer`](crate::kernels::Quantizer) as a number.
    pub kind: u32,
    /// [`Fp8Block::block_packs_log2`].
    pub block_packs_log2: u32,
}

/// An epilogue that is chosen at launch: RMSNorm and a quantization or, if gamma is null, that of [`Plain`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AnyEpilogue {
    /// The norm, and what is made of it.
    pub norm: RmsNorm<AnyQuantizer>,
}
