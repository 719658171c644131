//! The choice of all-reduces that the separate operations are measured with.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// The all-reduces that the separate operations can use on GPUs. The CPU backend has this project's alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AllReduceChoice {
    /// NCCL's.
    Nccl,
    /// NCCL's over symmetric windows.
    NcclSymmetric,
    /// The faster of this project's one-shot and two-shot.
    Custom,
}

impl AllReduceChoice {
    /// Every choice.
    pub const ALL: [AllReduceChoice; 3] =
        [AllReduceChoice::Nccl, AllReduceChoice::NcclSymmetric, AllReduceChoice::Custom];

    /// The name on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            AllReduceChoice::Nccl => "nccl",
            AllReduceChoice::NcclSymmetric => "nccl-symmetric",
            AllReduceChoice::Custom => "custom",
        }
    }
}

impl FromStr for AllReduceChoice {
    type Err = UnknownAllReduce;

    /// Reads `nccl`, `nccl-symmetric` or `custom`.
    fn from_str(text: &str) -> Result<Self, UnknownAllReduce> {
        AllReduceChoice::ALL.into_iter().find(|choice| choice.name() == text).ok_or(UnknownAllReduce)
    }
}

/// The text names no all-reduce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownAllReduce;

impl fmt::Display for UnknownAllReduce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not an all-reduce: use nccl, nccl-symmetric or custom")
    }
}

impl std::error::Error for UnknownAllReduce {}
