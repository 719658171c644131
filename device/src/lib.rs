//! The GPU kernels of a fused all-reduce + residual + RMSNorm + FP8/FP4 quantization, and the device functions
//! that they are made of.
//!
//! A fused kernel is a [collective] (one-shot or two-shot) times an [epilogue] (what becomes of the
//! sum: stored, normalized, quantized). Both are ordinary Rust functions over [`simt`], so the source that rustc
//! compiles to PTX also runs in tests on a machine without a GPU: see [`simt::host`].
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`launch`] | what a kernel is launched with, and the launch rules |
//! | [`simt`] | the GPU's words: indices, barriers, shuffles, memory order, dependent launch |
//! | [`collective`] | one-shot and two-shot, with a sharded residual too, and across hosts; bounded waits, memory order |
//! | [`local()`] | an epilogue without a collective; a norm of the sum ahead of it, or the addend of experts' rows alone |
//! | [`epilogue`] | the epilogue trait, norm, quantizers to FP8 and FP4 |
//! | [`prologue`] | the prologue trait, MoE's experts |
//! | [`entries!`] | the table of kernel entry points, and their names |
//! | [`convert`] | conversions by instruction |
//!
//! # A kernel of your own
//! Write a crate of type `staticlib` that depends on this one, implement [`epilogue::Epilogue`] for a
//! `repr(C)` struct of your parameters, and wrap the collective in an entry point:
//! ```ignore
//! #![no_std]
//! #![feature(abi_ptx)]
//! use fused_collective_device::{collective, dtype::bf16, launch::Fused, prologue::Given, wire::Elements};
//!
//! #[unsafe(no_mangle)]
//! pub unsafe extern "ptx-kernel" fn my_kernel(params: Fused<MyEpilogue>) {
//!     // At most 4 ranks, one resident pack per thread.
//!     unsafe { collective::one_shot::<bf16, MyEpilogue, Given, Elements, 4, 1, true>(&params, &Given, &Elements) }
//! }
//! ```
//! A [`prologue::Prologue`] in place of `Given` makes the rank's addend.
//! `device/examples/custom-epilogue` is such a crate, complete. `fused-collective-build` compiles it to PTX in a build script.
//! Launch it by the rules in [`launch`].
//!
//! Kernels must be free of panics, local memory and spills: index arrays only by constants or in loops of constant
//! length, and look at what `ptxas -v` says.
//!
//! # GPUs
//! The code follows the target processor given to rustc (`-C target-cpu`): clusters and programmatic dependent
//! launch from `sm_90`, FP8 conversion instructions from `sm_89`, FP4 ones for `sm_100a` and `sm_120a`; elsewhere
//! portable code of the same results. `sm_80` is the least.
#![no_std]
#![cfg_attr(target_arch = "nvptx64", feature(asm_experimental_arch, link_llvm_intrinsics))]
#![cfg_attr(target_arch = "nvptx64", allow(internal_features, reason = "shuffles: see `simt::nvptx`"))]

#[cfg(not(any(target_arch = "nvptx64", feature = "simulation")))]
compile_error!(
    "fused-collective-device is device code for the target nvptx64-nvidia-cuda; its feature `simulation` runs it on \
     threads, for tests"
);

#[cfg(not(target_arch = "nvptx64"))]
extern crate std;

pub use fused_collective_core::{dtype, launch, pack};

/// The fingerprint of the launch ABI, in every module that has device functions of this crate.
#[cfg(target_arch = "nvptx64")]
#[unsafe(export_name = "fused_collective_layout")]
#[used]
pub static LAYOUT: u32 = launch::LAYOUT;

pub mod collective;
pub mod convert;
mod entries;
pub mod epilogue;
mod local;
pub mod prologue;
pub mod row;
pub mod simt;
pub mod wire;

pub use local::local;
