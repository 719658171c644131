//! The kernels of fused-collective as PTX. `modules` has a module for each choice of an element type (`f32`, `f16`,
//! `bf16`) and a set of kernels (`w2`, `w4`, `w8`: the collectives for groups of at most so many ranks; `local`: those
//! that need no group), and the benchmark's (`f32_eager`, ..., `probes`). `fused_collective_device::entries!` and
//! `fused_collective_bench::entries!` list what each holds. All that they share is here.
//!
//! `cargo xtask ptx` builds all of them. By hand, one is built with a rustc that has the target's `core` or its source, and
//! unstable features allowed:
//! ```sh
//! RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Ctarget-cpu=sm_90 -Ctarget-feature=+ptx86" \
//!     cargo rustc --release -Zbuild-std=core --target nvptx64-nvidia-cuda --example bf16_w4 -- --emit=asm
//! ```
//! in this folder leaves `target/nvptx64-nvidia-cuda/release/examples/bf16_w4-*.s`: PTX, to be completed with
//! the two lines for each entry point that `entries!` describes under "Registers".
//!
//! `sm_80`, `sm_90`, `sm_100a` and `sm_120a` (which needs `+ptx87`) are the processors to build for: PTX for `sm_80` and
//! `sm_90` runs on all later ones too.
#![no_std]

/// No kernel has a path that panics, so this is in no PTX; rustc asks for it nevertheless.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
