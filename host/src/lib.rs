#![doc = include_str!("../README.md")]

#[cfg(not(target_os = "linux"))]
compile_error!("fused-collective runs on Linux only: it shares memory between processes by memfd and /proc");

#[cfg(feature = "cpu")]
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod error;
#[cfg(test)]
mod fuzz;
pub mod group;
mod query;
#[cfg(all(feature = "cpu", feature = "cuda"))]
pub mod raw;

pub use error::{Error, ErrorKind, TensorProblem};
pub use fused_collective_core as core;
pub use query::Query;
