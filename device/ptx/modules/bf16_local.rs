//! What needs no group, for `bf16`, and what measures links: it knows no element type, so one module has it.
#![no_std]
#![feature(abi_ptx)]

// The panic handler.
use fused_collective_ptx as _;

fused_collective_device::entries!(local, bf16);
fused_collective_device::entries!(links);
