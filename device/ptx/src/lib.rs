//! The kernels of fused-collective as PTX. `modules` has a module for each choice of an element type (`f32`, `f16`,
//! `bf16`) and a set of kernels (`w2`, `w4`, `w8`: the collectives for groups of at most so many ranks; `wire2`: those of
//! addends in a wire format; `any2`, `any8`: those of any epilogue; `local`: those that need no group; `streamed`: those whose
//! rows do not fit into registers), and the benchmark's (`f32_eager`, ..., `probes`). `fused_collective_device::entries!` and
//! `fused_collective_bench::entries!` list what each holds. All that they share is here.
//!
//! `cargo xtask ptx` builds all of them, by `fused-collective-build`, for the processors `sm_80`, `sm_90`, `sm_100a` and
//! `sm_120a`.
#![no_std]

/// No kernel has a path that panics, so this is in no PTX; rustc asks for it nevertheless.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
