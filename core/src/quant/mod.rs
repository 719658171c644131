//! FP8 and FP4: formats, scales and the layouts of scale factors.
//!
//! - the formats, each a module of `encode` and `decode`: [`e4m3`] and [`e2m1`] for values, [`ue4m3`] and
//!   [`ue8m0`] for block scales;
//! - [`scale`]: from the largest magnitude of a token or block to its scale;
//! - [`ScaleLayout`]: where a scale lies in memory;
//! - [`quantize_row`]: all of it for one row of a tensor.
//!
//! What is quantized is the element, rounded to its type. Encoders are branch-free, exact for every `f32` and
//! give what PTX's `cvt` instructions give, so all backends agree bit for bit.

pub mod e2m1;
pub mod e4m3;
mod layout;
mod minifloat;
mod row;
pub mod scale;
pub mod ue4m3;
pub mod ue8m0;

pub use row::{RowError, quantize_row};

/// How scale factors are laid out in memory; one byte each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleLayout {
    /// Row-major, `[tokens, hidden / block]`.
    Linear,
    /// The order in which Blackwell's matrix instructions read them: tiles of 128 rows by 4 columns.
    Swizzled128x4,
}

/// What the norm is quantized to. `T` is tokens, `H` the hidden size.
///
/// | quantization | `quant_out` | `scale_out` | scale read |
/// | --- | --- | --- | --- |
/// | `Fp8Static` | `[T, H]` E4M3 | none | `f32`, per tensor |
/// | `Fp8PerToken` | `[T, H]` E4M3 | `[T]` `f32` | none |
/// | `Fp8PerGroup` | `[T, H]` E4M3 | `[T, H / group]` UE8M0 | none |
/// | `NvFp4` | `[T, H / 2]` E2M1 pairs | `[T, H / 16]` UE4M3 | `f32`, global |
/// | `MxFp8` | `[T, H]` E4M3 | `[T, H / 32]` UE8M0 | none |
/// | `MxFp4` | `[T, H / 2]` E2M1 pairs | `[T, H / 32]` UE8M0 | none |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Quantization {
    /// The norm stays as it is.
    None,
    /// E4M3, with a scale that the caller gives for the whole tensor.
    Fp8Static,
    /// E4M3, with a scale computed for each token.
    Fp8PerToken,
    /// E4M3, with a power-of-two scale computed for each `group` elements of a token.
    Fp8PerGroup {
        /// Elements that share a scale: 32, 64 or 128.
        group: u32,
        /// Layout of the scales.
        layout: ScaleLayout,
    },
    /// NVIDIA's FP4: E2M1 in blocks of 16 with UE4M3 scales under a global scale.
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
    /// Elements that share a block scale, if any.
    pub const fn block(self) -> Option<u64> {
        match self {
            Quantization::None | Quantization::Fp8Static | Quantization::Fp8PerToken => None,
            Quantization::Fp8PerGroup { group, .. } => Some(group as u64),
            Quantization::NvFp4 { .. } => Some(16),
            Quantization::MxFp8 { .. } | Quantization::MxFp4 { .. } => Some(32),
        }
    }

    /// Whether rows of `hidden` elements can be quantized so: whole blocks, of a size that exists.
    pub const fn supports(self, hidden: u64) -> bool {
        match self {
            Quantization::None | Quantization::Fp8Static | Quantization::Fp8PerToken => true,
            Quantization::Fp8PerGroup { group, .. } => {
                matches!(group, 32 | 64 | 128) && hidden.is_multiple_of(group as u64)
            }
            Quantization::NvFp4 { .. } => hidden.is_multiple_of(16),
            Quantization::MxFp8 { .. } | Quantization::MxFp4 { .. } => hidden.is_multiple_of(32),
        }
    }

    /// Bytes of one row of `quant_out`, for `hidden` elements.
    pub const fn value_bytes_per_row(self, hidden: u64) -> u64 {
        match self {
            Quantization::None => 0,
            Quantization::Fp8Static
            | Quantization::Fp8PerToken
            | Quantization::Fp8PerGroup { .. }
            | Quantization::MxFp8 { .. } => hidden,
            Quantization::NvFp4 { .. } | Quantization::MxFp4 { .. } => hidden / 2,
        }
    }

    /// Layout of the block scales, if there are any.
    pub const fn scale_layout(self) -> Option<ScaleLayout> {
        match self {
            Quantization::None | Quantization::Fp8Static | Quantization::Fp8PerToken => None,
            Quantization::Fp8PerGroup { layout, .. }
            | Quantization::NvFp4 { layout }
            | Quantization::MxFp8 { layout }
            | Quantization::MxFp4 { layout } => Some(layout),
        }
    }

    /// Scales of one row of `scale_out`, padding not counted: a scale for each block, or one for the token.
    pub const fn scale_cols(self, hidden: u64) -> u64 {
        match (self, self.block()) {
            (Quantization::Fp8PerToken, _) => 1,
            (_, None | Some(0)) => 0,
            (_, Some(block)) => hidden / block,
        }
    }

    /// Bytes of `scale_out` for `tokens` rows of `hidden` elements, padding included; `None` past 64 bits.
    pub const fn scale_bytes(self, tokens: u64, hidden: u64) -> Option<u64> {
        match (self, self.scale_layout()) {
            (Quantization::Fp8PerToken, _) => tokens.checked_mul(4),
            (_, Some(layout)) => layout.bytes(tokens, self.scale_cols(hidden)),
            (_, None) => Some(0),
        }
    }
}
