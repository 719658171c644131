//! The digest as a kernel: one thread computes it.

#![no_std]
#![feature(abi_ptx, stdarch_nvptx)]

use core::arch::nvptx::{_thread_idx_x, trap};

/// The parameter.
#[repr(C)]
pub struct Parameter {
    /// The place of the digest.
    out: *mut u64,
}

/// Writes the digest.
///
/// # Safety
/// `out` is a place that the kernel may write to, and that nothing else accesses meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "ptx-kernel" fn digest(parameter: Parameter) {
    // SAFETY: reads a special register.
    if unsafe { _thread_idx_x() } == 0 {
        let digest = digest_bare::digest();
        // SAFETY: the caller's promise, and only this thread comes here.
        unsafe { parameter.out.write(digest) };
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: ends the kernel.
    unsafe { trap() }
}
