//! Kernels that only measure or check, and what a program launches them with.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`table`] | their modules and entry points by name |
//! | [`launch`] | their parameters, and a fingerprint of them |
//! | [`digest`](mod@digest) | a digest of bytes, which one of the kernels makes of memory |
//! | [`links`] | the memory that links between GPUs are measured with |
//! | `kernels` | the kernels themselves: device code, behind the feature of this name |
//!
//! The fused kernels and what they need are in `fused-collective-device`, which knows nothing of these.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod digest;
#[cfg(feature = "kernels")]
mod entries;
#[cfg(feature = "kernels")]
pub mod kernels;
pub mod launch;
pub mod links;
pub mod table;
