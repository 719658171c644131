//! The collectives for groups of 2 ranks of addends in a wire format, for `f32`.
#![no_std]
#![feature(abi_ptx)]

// The panic handler.
use fused_collective_ptx as _;

fused_collective_device::entries!(wire, f32);
