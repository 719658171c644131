#![doc = include_str!("../README.md")]
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod agreement;
pub mod cost;
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
pub mod specification;
mod tokens;
pub mod wire;
pub mod workspace;

/// The largest number of ranks of one host in a group. Ranks are numbered from 0.
pub const MAX_WORLD_SIZE: u32 = 16;
/// The largest number of ranks in a group of several hosts.
pub const MAX_RANKS: u32 = 128;
/// The smallest number of ranks in a group: one rank, whose sum is its own input.
pub const MIN_WORLD_SIZE: u32 = 1;
/// The divisor of all hidden sizes of operations, so that rows are whole packs and NVFP4 blocks.
pub const HIDDEN_MULTIPLE: u64 = 16;
/// The largest hidden size of an operation.
pub const MAX_HIDDEN: u64 = 65_536;
