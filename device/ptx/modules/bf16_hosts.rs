//! The kernels of groups of several hosts, for `bf16`.
#![no_std]
#![feature(abi_ptx)]

// The panic handler.
use fused_collective_ptx as _;

fused_collective_device::entries!(hosts, bf16);
