//! The quantizations: element format, block size, scale layout, and the bytes that a tensor of each takes.

use core::fmt;

use super::{
    layout::{ScaleLayout, ScaleTensor},
    scale::{MAX_NVFP4_GLOBAL, MIN_FP8_STATIC, fp8_multiplier, nvfp4_global},
};

/// The type of the scales of [`Quantization::Fp8PerGroup`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GroupScale {
    /// Powers of two in a byte, as MX formats have them: [`fp8_block`](super::scale::fp8_block).
    Ue8m0,
    /// `f32`, as DeepSeek's checkpoints have them: [`fp8_group`](super::scale::fp8_group). Not in swizzled layouts.
    F32,
}

/// A quantization of a tensor `[T, H]` of `T` tokens and hidden size `H`.
///
/// | quantization | codes (`quant_out`) | scales (`scale_out`) | scale from the caller |
/// | --- | --- | --- | --- |
/// | `Fp8Static` | `[T, H]` E4M3 | none | `f32`, per tensor |
/// | `Fp8PerToken` | `[T, H]` E4M3 | `[T]` `f32` | none |
/// | `Fp8PerGroup` | `[T, H]` E4M3 | `[T, H / group]` UE8M0 or `f32` | none |
/// | `NvFp4` | `[T, H / 2]` E2M1 pairs | `[T, H / 16]` UE4M3 | `f32`, global |
/// | `MxFp8` | `[T, H]` E4M3 | `[T, H / 32]` UE8M0 | none |
/// | `MxFp4` | `[T, H / 2]` E2M1 pairs | `[T, H / 32]` UE8M0 | none |
///
/// Scales of blocks are in a [`ScaleLayout`]; `f32` scales are little-endian, and those of `Fp8PerToken` adjacent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Quantization {
    /// No quantization: no codes and no scales.
    None,
    /// E4M3 with one scale for the whole tensor, which the caller gives.
    Fp8Static,
    /// E4M3 with a scale for each token.
    Fp8PerToken,
    /// E4M3 with a scale for each `group` elements of a token.
    Fp8PerGroup {
        /// Elements that share a scale: 32, 64 or 128.
        group: u32,
        /// Type of the scales.
        scales: GroupScale,
        /// Layout of the scales.
        layout: ScaleLayout,
    },
    /// NVIDIA's NVFP4: E2M1 in blocks of 16 with UE4M3 scales, and one global scale, which the caller gives.
    NvFp4 {
        /// Layout of the block scales.
        layout: ScaleLayout,
    },
    /// OCP MXFP8: E4M3 in blocks of 32 with UE8M0 scales.
    MxFp8 {
        /// Layout of the block scales.
        layout: ScaleLayout,
    },
    /// OCP MXFP4: E2M1 in blocks of 32 with UE8M0 scales.
    MxFp4 {
        /// Layout of the block scales.
        layout: ScaleLayout,
    },
}

impl Quantization {
    /// Elements that share a block scale; `None` without block scales.
    pub const fn block(self) -> Option<u64> {
        match self {
            Quantization::None | Quantization::Fp8Static | Quantization::Fp8PerToken => None,
            Quantization::Fp8PerGroup { group, .. } => Some(group as u64),
            Quantization::NvFp4 { .. } => Some(16),
            Quantization::MxFp8 { .. } | Quantization::MxFp4 { .. } => Some(32),
        }
    }

    /// True if `hidden` elements are whole blocks, of a size that the format has, with scales that their layout takes.
    pub const fn supports(self, hidden: u64) -> bool {
        match self.block() {
            None => true,
            Some(block) => self.has_group() && self.has_layout() && hidden.is_multiple_of(block),
        }
    }

    /// True unless this has groups of a size that there are none of.
    pub const fn has_group(self) -> bool {
        !matches!(self, Quantization::Fp8PerGroup { group, .. } if !matches!(group, 32 | 64 | 128))
    }

    /// True unless the layout is for scales of another size: see [`ScaleLayout::takes`].
    pub const fn has_layout(self) -> bool {
        match self.scale_layout() {
            Some(layout) => layout.takes(self.scale_size()),
            None => true,
        }
    }

    /// Bytes of the codes of one row of `hidden` elements.
    pub const fn value_bytes_per_row(self, hidden: u64) -> u64 {
        match self {
            Quantization::None => 0,
            _ if self.is_fp4() => hidden / 2,
            _ => hidden,
        }
    }

    /// True if codes are E2M1, two in a byte.
    pub const fn is_fp4(self) -> bool {
        matches!(self, Quantization::NvFp4 { .. } | Quantization::MxFp4 { .. })
    }

    /// True if the caller gives a scale: the per-tensor scale of `Fp8Static`, the global scale of `NvFp4`.
    pub const fn reads_scale(self) -> bool {
        matches!(self, Quantization::Fp8Static | Quantization::NvFp4 { .. })
    }

    /// Layout of the block scales; `None` without block scales.
    pub const fn scale_layout(self) -> Option<ScaleLayout> {
        match self {
            Quantization::None | Quantization::Fp8Static | Quantization::Fp8PerToken => None,
            Quantization::Fp8PerGroup { layout, .. }
            | Quantization::NvFp4 { layout }
            | Quantization::MxFp8 { layout }
            | Quantization::MxFp4 { layout } => Some(layout),
        }
    }

    /// The same quantization with its block scales in `layout`.
    pub const fn with_layout(self, layout: ScaleLayout) -> Quantization {
        match self {
            Quantization::Fp8PerGroup { group, scales, .. } => {
                Quantization::Fp8PerGroup { group, scales, layout }
            }
            Quantization::NvFp4 { .. } => Quantization::NvFp4 { layout },
            Quantization::MxFp8 { .. } => Quantization::MxFp8 { layout },
            Quantization::MxFp4 { .. } => Quantization::MxFp4 { layout },
            Quantization::None | Quantization::Fp8Static | Quantization::Fp8PerToken => self,
        }
    }

    /// Bytes of a scale.
    const fn scale_size(self) -> u64 {
        match self {
            Quantization::Fp8PerToken | Quantization::Fp8PerGroup { scales: GroupScale::F32, .. } => 4,
            _ => 1,
        }
    }

    /// Scales of one row, without padding: one for each block, or one for the token.
    pub const fn scale_cols(self, hidden: u64) -> u64 {
        match (self, self.block()) {
            (Quantization::Fp8PerToken, _) => 1,
            (_, None | Some(0)) => 0,
            (_, Some(block)) => hidden / block,
        }
    }

    /// The scales of `tokens` rows of `hidden` elements; `None` without scales of blocks or tokens.
    pub const fn scales(self, tokens: u64, hidden: u64) -> Option<ScaleTensor> {
        let layout = match (self, self.scale_layout()) {
            (Quantization::Fp8PerToken, _) => ScaleLayout::Linear,
            (_, Some(layout)) => layout,
            (_, None) => return None,
        };
        let (cols, size) = (self.scale_cols(hidden), self.scale_size());
        Some(ScaleTensor { layout, rows: tokens, cols, size })
    }

    /// Bytes of the scales of `tokens` rows of `hidden` elements, padding included; `None` past 64 bits.
    pub const fn scale_bytes(self, tokens: u64, hidden: u64) -> Option<u64> {
        match self.scales(tokens, hidden) {
            Some(scales) => scales.bytes(),
            None => Some(0),
        }
    }

    /// Checks the scale that the caller gives: the per-tensor scale of `Fp8Static`, the global scale of `NvFp4`.
    /// The other quantizations read no such scale and accept any.
    ///
    /// # Errors
    /// [`ScaleError`] for a scale under which codes do not stand for elements: 0, negative, infinite or NaN, or
    /// outside the range in which every multiplier is finite. Zeros times an infinite multiplier would be NaN.
    pub fn check_scale(self, scale: f32) -> Result<(), ScaleError> {
        match self {
            Quantization::Fp8Static if fp8_multiplier(scale) == 0.0 => Err(ScaleError::Fp8Static(scale)),
            Quantization::NvFp4 { .. } if nvfp4_global(scale) == 0.0 => Err(ScaleError::NvFp4(scale)),
            _ => Ok(()),
        }
    }
}

/// A scale for a whole tensor that cannot be meant: see [`Quantization::check_scale`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ScaleError {
    /// The per-tensor scale of static FP8 is not from [`MIN_FP8_STATIC`] to [`f32::MAX`].
    Fp8Static(f32),
    /// The global scale of NVFP4 is not above 0 and at most [`MAX_NVFP4_GLOBAL`].
    NvFp4(f32),
}

impl fmt::Display for ScaleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ScaleError::Fp8Static(scale) => write!(
                f,
                "scale {scale:e} of static FP8 is not valid: use a finite number of at least {MIN_FP8_STATIC:e}"
            ),
            ScaleError::NvFp4(scale) => write!(
                f,
                "global scale {scale:e} of NVFP4 is not valid: use a number above 0 and at most {MAX_NVFP4_GLOBAL:e}"
            ),
        }
    }
}

impl core::error::Error for ScaleError {}
