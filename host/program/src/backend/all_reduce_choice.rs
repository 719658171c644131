//! The choice of all-reduces that the separate operations are measured with.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// The all-reduces that the separate operations can use on GPUs. The CPU backend has this project's alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AllReduceChoice {
    /// NCCL's.
    Nccl,
    /// The faster of this project's one-shot and two-shot.
    Custom,
}

impl AllReduceChoice {
    /// Every choice.
    pub const ALL: [AllReduceChoice; 2] = [AllReduceChoice::Nccl, AllReduceChoice::Custom];
}

impl FromStr for AllReduceChoice {
    type Err = UnknownAllReduce;

    /// Reads `nccl` or `custom`.
    fn from_str(text: &str) -> Result<Self, UnknownAllReduce> {
        match text {
            "nccl" => Ok(AllReduceChoice::Nccl),
            "custom" => Ok(AllReduceChoice::Custom),
            _ => Err(UnknownAllReduce),
        }
    }
}

/// The text names no all-reduce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownAllReduce;

impl fmt::Display for UnknownAllReduce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not an all-reduce: use nccl or custom")
    }
}

impl std::error::Error for UnknownAllReduce {}
