//! Kernels with an epilogue that this project does not have: all-reduce, residual add, and GELU in place of a norm. One of them
//! has a prologue of its own, too: a rank's rows are multiplied by weights of their tokens first.
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
//! The host launches `all_reduce_gelu` with a `Fused<Gelu>`, and `weighted_all_reduce_gelu` with a `Fused<Weighted>`, by the
//! rules in `fused_collective_device::launch`.
#![no_std]
#![feature(abi_ptx, asm_experimental_arch)]

use core::arch::asm;

use fused_collective_device::{
    collective, convert,
    dtype::{Element, bf16},
    epilogue::{Epilogue, PackIndex, RowValues},
    launch::{Address, Fused},
    pack::Pack,
    prologue::{Given, Prologue},
    simt,
    wire::Elements,
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

/// The parameters of an epilogue and a prologue: a kernel's own are one struct.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Weighted {
    /// The epilogue's.
    pub gelu: Gelu,
    /// `[total_tokens, hidden]` elements, 16-byte aligned: this rank's rows. The kernel leaves the addends in `input`.
    pub rows: Address,
    /// `[total_tokens]` `f32`.
    pub weights: Address,
}

impl<E: Element> Prologue<E> for Weighted {
    #[inline(always)]
    unsafe fn addend(&self, index: PackIndex) -> Pack {
        // SAFETY: as this function's: the token and the pack are inside the tensors, which nobody writes meanwhile.
        let (row, weight) = unsafe {
            (simt::load(index.of(self.rows)), simt::load_value::<f32>(self.weights.offset(index.token * 4)))
        };
        let mut values = convert::widen::<E>(row);
        for value in values.as_mut() {
            *value *= weight;
        }
        convert::narrow::<E>(values)
    }
}

impl<E: Element> Epilogue<E> for Weighted {
    type Constants = ();
    type Weights = ();
    type Ready = ();

    #[inline(always)]
    unsafe fn finish(&self, index: PackIndex, row: Pack, of_row: RowValues, _weights: (), _constants: ()) {
        // SAFETY: as this function's.
        unsafe { Epilogue::<E>::finish(&self.gelu, index, row, of_row, (), ()) }
    }
}

/// As [`all_reduce_gelu`], of rows that are multiplied by weights first.
///
/// # Safety
/// As [`all_reduce_gelu`].
#[unsafe(no_mangle)]
pub unsafe extern "ptx-kernel" fn weighted_all_reduce_gelu(params: Fused<Weighted>) {
    // SAFETY: as this function's.
    unsafe { collective::two_shot::<bf16, Weighted, Weighted, Elements, 4, 1, true>(&params, &params.epilogue, &Elements) }
}

/// For groups of at most four ranks, with one pack of a row in each thread.
///
/// # Safety
/// Launched by the rules in `fused_collective_device::launch`.
#[unsafe(no_mangle)]
pub unsafe extern "ptx-kernel" fn all_reduce_gelu(params: Fused<Gelu>) {
    // SAFETY: as this function's.
    unsafe { collective::two_shot::<bf16, Gelu, Given, Elements, 4, 1, true>(&params, &Given, &Elements) }
}

/// No kernel has a path that panics, so this is in no PTX; rustc asks for it nevertheless.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
