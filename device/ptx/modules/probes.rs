//! The kernels that check, and those that measure links: they know no element type.
#![no_std]
#![feature(abi_ptx)]

// The panic handler.
use fused_collective_ptx as _;

fused_collective_bench::entries!(probes);
