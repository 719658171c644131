//! The collectives of any epilogue for groups of at most 8 ranks, for `bf16`.
#![no_std]
#![feature(abi_ptx)]

// The panic handler.
use fused_collective_ptx as _;

fused_collective_device::entries!(any, bf16, 8);
