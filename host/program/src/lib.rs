//! The program `fused-collective`: fused all-reduces measured against the separate operations, verified, soaked, and made
//! to fail.
//!
//! [`commands`] holds each command whole; a [`job`] is the ranks that run one; a [`backend`] does what they ask; [`check`]
//! says what is right; [`peers`] measures other packages; [`mod@report`] shows what was found.

pub mod backend;
mod bounded;
pub mod check;
pub mod commands;
pub mod exit;
#[cfg(test)]
mod fuzz;
pub mod job;
pub mod measurement;
pub mod peers;
pub mod quant_mode;
pub mod report;
pub mod usage;
