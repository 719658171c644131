//! The program `fused-collective`, which measures fused all-reduces against separate operations, verifies them, and tests
//! them under load and under faults.
//!
//! | module | content |
//! | --- | --- |
//! | [`commands`] | the command line, and each command in a folder |
//! | [`job`] | the ranks that run a command |
//! | [`multicast`] | NVLink multicast, switched off for all libraries or for none |
//! | [`mod@allocator`] | the end of a process without memory |
//! | [`backend`] | the operations of the program on CPUs and GPUs |
//! | [`check`] | inputs, variants, and the check of their results |
//! | [`peers`] | other packages that the benchmark measures |
//! | [`mod@report`] | the parts of reports that commands share |

pub mod allocator;
pub mod backend;
mod bounded;
pub mod check;
pub mod commands;
pub mod exit;
#[cfg(test)]
mod fuzz;
pub mod job;
pub mod measurement;
pub mod multicast;
pub mod pattern;
pub mod peers;
pub mod quant_mode;
pub mod report;
pub mod usage;
mod values;
pub mod wire;
