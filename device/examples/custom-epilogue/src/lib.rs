//! A kernel with an epilogue that this project does not have: all-reduce, residual add, and GELU in place of a norm.
//!
//! GELU is its usual approximation by a sigmoid, `x * sigmoid(1.702 x)` (Hendrycks and Gimpel, 2016).
//!
//! # Building
//! A program that launches the kernel compiles it in its build script, with `fused-collective-build`:
//! ```ignore
//! use fused_collective_build::{Bounds, Error, Kernels, Processor};
//!
//! fn main() -> Result<(), Error> {
//!     let kernels = Kernels::new("custom-epilogue").processors(&[Processor::Sm90]);
//!     // 65,536 registers of a multiprocessor are 64 for each of 1,024 threads, which this kernel does with.
//!     for module in kernels.bounds(|_| Bounds { threads: 1024, blocks: 1 }).build()? {
//!         println!("cargo::rustc-env=GELU_PTX={}", module.path.display());
//!     }
//!     Ok(())
//! }
//! ```
//! The program then has the PTX as `include_str!(env!("GELU_PTX"))`. In this repository `cargo xtask ptx` does the same, and
//! leaves `target/ptx-examples/sm_90/custom_epilogue.ptx`.
//!
//! # Launching
//! The host launches `all_reduce_gelu` with a `Fused<Gelu>`, by the rules in `fused_collective_device::launch`.
#![no_std]
#![feature(abi_ptx, asm_experimental_arch)]

use core::arch::asm;

use fused_collective_device::{
    collective, convert,
    dtype::{Element, bf16},
    epilogue::{Epilogue, PackIndex, RowValues},
    pack::Pack,
    prologue::Given,
    launch::{Address, Fused},
    simt,
};

/// The epilogue's parameters.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Gelu {
    /// `[total_tokens, hidden]` elements, 16-byte aligned.
    pub out: Address,
}

impl<E: Element> Epilogue<E> for Gelu {
    type Constants = ();
    type Weights = ();
    type Ready = ();

    #[inline(always)]
    unsafe fn finish(&self, index: PackIndex, row: Pack, _: RowValues, _weights: (), _constants: ()) {
        let mut values = convert::widen::<E>(row);
        for value in values.as_mut() {
            *value = gelu(*value);
        }
        // SAFETY: the pack is inside the tensor, and this thread's alone.
        unsafe { simt::store(index.of(self.out), convert::narrow::<E>(values)) };
    }
}

#[inline(always)]
fn gelu(x: f32) -> f32 {
    const LOG2_E: f32 = core::f32::consts::LOG2_E;
    let power: f32;
    // SAFETY: arithmetic. 2 to the power of the operand, approximately.
    unsafe {
        asm!("ex2.approx.f32 {0}, {1};", out(reg32) power, in(reg32) -1.702 * LOG2_E * x, options(pure, nomem));
    }
    x / (1.0 + power)
}

/// For groups of at most four ranks, with one pack of a row in each thread.
///
/// # Safety
/// Launched by the rules in `fused_collective_device::launch`.
#[unsafe(no_mangle)]
pub unsafe extern "ptx-kernel" fn all_reduce_gelu(params: Fused<Gelu>) {
    // SAFETY: as this function's.
    unsafe { collective::two_shot::<bf16, Gelu, Given, 4, 1, true>(&params, &Given) }
}

/// No kernel has a path that panics, so this is in no PTX; rustc asks for it nevertheless.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
