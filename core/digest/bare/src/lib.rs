//! The digest, for targets that bring their own panic handler and entry point.

#![no_std]

pub use fused_collective_digest::digest;
