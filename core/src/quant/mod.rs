//! FP8 and FP4: formats, scales and the layouts of scale factors.

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
}
