//! The quantization modes that the program measures.

use std::{fmt, str::FromStr};

use fused_collective_core::quant::{GroupScale, Quantization, ScaleLayout};
use serde::{Deserialize, Serialize};

/// The quantization after the norm in a measured operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QuantMode {
    /// No quantization: all-reduce, residual add, RMSNorm.
    None,
    /// E4M3 with one static scale for the whole tensor.
    Fp8,
    /// NVFP4, with block scales in the layout that matrix kernels read.
    Fp4,
    /// E4M3 with a scale for each token.
    Fp8PerToken,
    /// E4M3 with UE8M0 scales of groups of 128, packed as DeepGEMM reads them on Blackwell.
    #[serde(rename = "fp8_group128")]
    Fp8Group128,
    /// E4M3 with `f32` scales of groups of 128, as DeepGEMM reads them on Hopper.
    #[serde(rename = "fp8_group128_f32")]
    Fp8Group128F32,
    /// E4M3 with `f32` scales of groups of 64, column-major.
    #[serde(rename = "fp8_group64")]
    Fp8Group64,
    /// MXFP8, with block scales in the layout that matrix kernels read.
    #[serde(rename = "mxfp8")]
    MxFp8,
    /// MXFP4, likewise.
    #[serde(rename = "mxfp4")]
    MxFp4,
}

impl QuantMode {
    /// Every mode.
    pub const ALL: [QuantMode; 9] = [
        QuantMode::None,
        QuantMode::Fp8,
        QuantMode::Fp4,
        QuantMode::Fp8PerToken,
        QuantMode::Fp8Group128,
        QuantMode::Fp8Group128F32,
        QuantMode::Fp8Group64,
        QuantMode::MxFp8,
        QuantMode::MxFp4,
    ];

    /// The modes that are measured unless others are asked for.
    pub const DEFAULT: [QuantMode; 3] = [QuantMode::None, QuantMode::Fp8, QuantMode::Fp4];

    /// The name on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            QuantMode::None => "none",
            QuantMode::Fp8 => "fp8",
            QuantMode::Fp4 => "fp4",
            QuantMode::Fp8PerToken => "fp8_per_token",
            QuantMode::Fp8Group128 => "fp8_group128",
            QuantMode::Fp8Group128F32 => "fp8_group128_f32",
            QuantMode::Fp8Group64 => "fp8_group64",
            QuantMode::MxFp8 => "mxfp8",
            QuantMode::MxFp4 => "mxfp4",
        }
    }

    /// The quantization that the mode measures.
    pub const fn quantization(self) -> Quantization {
        let layout = ScaleLayout::Swizzled128x4;
        match self {
            QuantMode::None => Quantization::None,
            QuantMode::Fp8 => Quantization::Fp8Static,
            QuantMode::Fp4 => Quantization::NvFp4 { layout },
            QuantMode::Fp8PerToken => Quantization::Fp8PerToken,
            QuantMode::Fp8Group128 => Quantization::Fp8PerGroup {
                group: 128,
                scales: GroupScale::Ue8m0,
                layout: ScaleLayout::DeepGemm,
            },
            QuantMode::Fp8Group128F32 => Quantization::Fp8PerGroup {
                group: 128,
                scales: GroupScale::F32,
                layout: ScaleLayout::DeepGemm,
            },
            QuantMode::Fp8Group64 => Quantization::Fp8PerGroup {
                group: 64,
                scales: GroupScale::F32,
                layout: ScaleLayout::ColumnMajor,
            },
            QuantMode::MxFp8 => Quantization::MxFp8 { layout },
            QuantMode::MxFp4 => Quantization::MxFp4 { layout },
        }
    }

    /// The per-tensor or global scale for the [random inputs](crate::check::inputs).
    ///
    /// The inputs have variance 1, and so has the norm before the weight, whose magnitude is below 1.8. The scales put almost
    /// all values in range: FP8 values within 448, and the largest block scale of NVFP4 near 448.
    pub const fn scale(self) -> f32 {
        match self {
            QuantMode::Fp8 => 1.0 / 64.0,
            QuantMode::Fp4 => 448.0,
            _ => 1.0,
        }
    }

    /// Every mode's name, for messages.
    pub fn names() -> String {
        QuantMode::ALL.map(QuantMode::name).join(", ")
    }
}

impl fmt::Display for QuantMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The text names no quantization mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownQuantMode;

impl fmt::Display for UnknownQuantMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not a quantization mode: use one of {}", QuantMode::names())
    }
}

impl std::error::Error for UnknownQuantMode {}

impl FromStr for QuantMode {
    type Err = UnknownQuantMode;

    /// Reads a mode's name in any case.
    fn from_str(text: &str) -> Result<Self, UnknownQuantMode> {
        QuantMode::ALL.into_iter().find(|mode| mode.name().eq_ignore_ascii_case(text)).ok_or(UnknownQuantMode)
    }
}
