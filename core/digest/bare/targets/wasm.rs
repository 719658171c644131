//! The digest as a WebAssembly module with one function.

#![no_std]

/// The digest.
#[unsafe(export_name = "digest")]
pub extern "C" fn export() -> u64 {
    digest_bare::digest()
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    core::arch::wasm32::unreachable()
}
