//! The quantization modes that the program measures.

use std::{fmt, str::FromStr};

use fused_collective_core::quant::{Quantization, ScaleLayout};
use serde::{Deserialize, Serialize};

/// The quantization after the norm in a measured operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QuantMode {
    /// No quantization: all-reduce, residual add, RMSNorm.
    None,
    /// E4M3 with one static scale for the whole tensor.
    Fp8,
    /// NVFP4, with block scales in the layout that matrix kernels read.
    Fp4,
}

impl QuantMode {
    /// Every mode.
    pub const ALL: [QuantMode; 3] = [QuantMode::None, QuantMode::Fp8, QuantMode::Fp4];

    /// The name on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            QuantMode::None => "none",
            QuantMode::Fp8 => "fp8",
            QuantMode::Fp4 => "fp4",
        }
    }

    /// The quantization that the mode measures.
    pub const fn quantization(self) -> Quantization {
        match self {
            QuantMode::None => Quantization::None,
            QuantMode::Fp8 => Quantization::Fp8Static,
            QuantMode::Fp4 => Quantization::NvFp4 { layout: ScaleLayout::Swizzled128x4 },
        }
    }

    /// The per-tensor or global scale for the [random inputs](crate::check::inputs).
    ///
    /// The inputs have variance 1, and so has the norm before the weight, whose magnitude is below 1.8. The scales put almost
    /// all values in range: FP8 values within 448, and the largest block scale of NVFP4 near 448.
    pub const fn scale(self) -> f32 {
        match self {
            QuantMode::None => 1.0,
            QuantMode::Fp8 => 1.0 / 64.0,
            QuantMode::Fp4 => 448.0,
        }
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
        f.write_str("not a quantization mode: use none, fp8 or fp4")
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
