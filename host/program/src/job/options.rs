//! What commands ask of a job alike.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The backend that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendChoice {
    /// CUDA where there are GPUs for every rank, else the CPU.
    Auto,
    /// Rank processes over shared memory.
    Cpu,
    /// One process a GPU.
    Cuda,
}

impl FromStr for BackendChoice {
    type Err = UnknownBackend;

    /// Reads `auto`, `cpu` or `cuda`.
    fn from_str(text: &str) -> Result<Self, UnknownBackend> {
        match text {
            "auto" => Ok(BackendChoice::Auto),
            "cpu" => Ok(BackendChoice::Cpu),
            "cuda" => Ok(BackendChoice::Cuda),
            _ => Err(UnknownBackend),
        }
    }
}

/// The text names no backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownBackend;

impl std::fmt::Display for UnknownBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("not a backend: use auto, cpu or cuda")
    }
}

impl std::error::Error for UnknownBackend {}

/// The all-reduces that the separate operations can use on GPUs. The CPU backend has its own alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AllReduceChoice {
    /// NCCL's.
    Nccl,
    /// This project's one-shot or two-shot, whichever is faster.
    Custom,
}

impl AllReduceChoice {
    /// All of them.
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

impl std::fmt::Display for UnknownAllReduce {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("not an all-reduce: use nccl or custom")
    }
}

impl std::error::Error for UnknownAllReduce {}
