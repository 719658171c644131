//! The arithmetic, the layouts and the protocol rules of a fused all-reduce.
//!
//! A tensor-parallel transformer layer ends in an all-reduce, a residual add, an RMSNorm and often an
//! FP8 or FP4 quantization. This crate says what that operation computes ([`fusion`], [`norm`],
//! [`quant`]), how it is split over ranks and blocks ([`plan`]), how ranks hand data to each other
//! ([`lamport`], [`workspace`]), what they must agree on ([`agreement`]), which kernels there are ([`kernels`]), what
//! a kernel is told ([`launch`]) and what the right answer is ([`mod@reference`]). It knows of no backend: the same
//! code serves a GPU kernel, a server process and a microcontroller.
//!
//! `no_std`, no allocation, no `unsafe`.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod agreement;
pub mod dtype;
pub mod fingerprint;
pub mod fusion;
pub mod kernels;
pub mod lamport;
pub mod launch;
pub mod norm;
pub mod pack;
pub mod plan;
pub mod quant;
pub mod reference;
pub mod workspace;

/// The largest group: ranks are numbered from 0 to at most 15.
pub const MAX_WORLD_SIZE: u32 = 16;
/// The smallest group: one rank, whose sum is its own input.
pub const MIN_WORLD_SIZE: u32 = 1;
/// Hidden sizes are multiples of this, so that rows split into 16-byte packs and quantization blocks.
pub const HIDDEN_MULTIPLE: u64 = 16;
/// The largest hidden size.
pub const MAX_HIDDEN: u64 = 65_536;
