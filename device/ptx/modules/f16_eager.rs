//! The primitive steps of an eager framework, for `f16`.
#![no_std]
#![feature(abi_ptx)]

// The panic handler.
use fused_collective_ptx as _;

fused_collective_bench::entries!(eager, f16);
