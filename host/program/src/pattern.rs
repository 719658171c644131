//! The steps around the all-reduce and the norm, beside the residual and the quantization.

use std::{fmt, str::FromStr};

use fused_collective_core::{
    dtype::DType,
    fusion::{Experts, Norm, WeightType},
};
use serde::{Deserialize, Serialize};

/// A pattern of fused steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pattern {
    /// The all-reduce, the residual and the norm.
    #[default]
    AllReduceNorm,
    /// The all-reduce, a norm of its sum, the residual and the norm, as in Gemma 2 and 3.
    PostNorm,
    /// The last step of a mixture of experts, then the all-reduce, the residual and the norm.
    Moe,
}

impl Pattern {
    /// Every pattern.
    pub const ALL: [Pattern; 3] = [Pattern::AllReduceNorm, Pattern::PostNorm, Pattern::Moe];

    /// The name on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Pattern::AllReduceNorm => "all-reduce-norm",
            Pattern::PostNorm => "post-norm",
            Pattern::Moe => "moe",
        }
    }

    /// The norm of the sum: Gemma's.
    pub fn post_norm(self) -> Option<Norm> {
        (self == Pattern::PostNorm).then(|| Norm { weight_bias: 1.0, ..Norm::default() })
    }

    /// The experts of a token: as many as in DeepSeek-V3 and Qwen3, and a shared one.
    pub fn experts(self) -> Option<Experts> {
        (self == Pattern::Moe).then_some(Experts { top_k: 8, scales: WeightType::F32, shared: true })
    }

    /// True if every GPU that there are kernels for takes rows of `hidden` elements: a norm of the sum needs them in registers.
    pub fn fits(self, dtype: DType, hidden: u64) -> bool {
        const RESIDENT_BYTES: u64 = 8 << 10;
        self != Pattern::PostNorm || hidden * dtype.bytes() <= RESIDENT_BYTES
    }

    /// True for the pattern without further steps.
    pub fn is_default(&self) -> bool {
        *self == Pattern::default()
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Pattern {
    type Err = UnknownPattern;

    /// Reads a name.
    fn from_str(text: &str) -> Result<Self, UnknownPattern> {
        Pattern::ALL.into_iter().find(|pattern| pattern.name() == text).ok_or(UnknownPattern)
    }
}

/// The text names no pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownPattern;

impl fmt::Display for UnknownPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a pattern: use all-reduce-norm, post-norm or moe")
    }
}

impl std::error::Error for UnknownPattern {}
