//! The kernels of fused-collective as PTX: one module for each choice of two features, an element type (`f32`,
//! `f16`, `bf16`) and a set of kernels (`w2`, `w4`, `w8`: the collectives for groups of at most so many ranks;
//! `local`: all that needs no group). `fused_collective_device::entries!` lists what each holds.
//!
//! Built with a rustc that has the target's `core` or its source, and unstable features allowed:
//! ```sh
//! RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Ctarget-cpu=sm_90 -Ctarget-feature=+ptx86" \
//!     cargo rustc --release -Zbuild-std=core --target nvptx64-nvidia-cuda --features bf16,w4 -- --emit=asm
//! ```
//! in this folder leaves `target/nvptx64-nvidia-cuda/release/deps/fused_collective_ptx-*.s`: PTX, to be completed with
//! the two lines for each entry point that `entries!` describes under "Registers".
//!
//! `sm_80`, `sm_90`, `sm_100a` and `sm_120a` (which needs `+ptx87`) are the processors to build for: PTX for `sm_80` and `sm_90` runs on
//! all later ones too.
#![no_std]
#![feature(abi_ptx)]

macro_rules! module {
    ($element:ident, $feature:literal) => {
        #[cfg(all(feature = $feature, feature = "w2"))]
        fused_collective_device::entries!(collectives, $element, 2);
        #[cfg(all(feature = $feature, feature = "w4"))]
        fused_collective_device::entries!(collectives, $element, 4);
        #[cfg(all(feature = $feature, feature = "w8"))]
        fused_collective_device::entries!(collectives, $element, 8);
        #[cfg(all(feature = $feature, feature = "local"))]
        fused_collective_device::entries!(local, $element);
    };
}

module!(f32, "f32");
module!(f16, "f16");
module!(bf16, "bf16");

// They know no element type, so one module has them.
#[cfg(all(feature = "bf16", feature = "local"))]
fused_collective_device::entries!(links);

/// No kernel has a path that panics, so this is in no PTX; rustc asks for it nevertheless.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
