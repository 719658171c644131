//! The digest as a firmware for Cortex-M4F: it writes the number by semihosting, and ends the emulator.

#![no_std]
#![no_main]

use core::arch::{asm, global_asm};

// The vector table: stack, reset, and one handler for every fault. The processor starts with its floating-point unit off;
// it is switched on before any compiled code, which may save its registers.
global_asm!(
    ".section .vectors, \"a\"",
    ".word stack_top, reset",
    ".rept 14",
    ".word fault",
    ".endr",
    ".section .text.reset, \"ax\"",
    ".thumb_func",
    ".global reset",
    "reset:",
    "ldr r0, =0xe000ed88", // CPACR
    "ldr r1, [r0]",
    "orr r1, r1, #(0xf << 20)",
    "str r1, [r0]",
    "dsb",
    "isb",
    "bl main",
);

/// SYS_WRITE0 of semihosting: writes a string that ends in 0.
const WRITE: usize = 0x04;
/// SYS_EXIT of semihosting, and its reasons.
const EXIT: usize = 0x18;
const DONE: usize = 0x2_0026;
const FAILED: usize = 0x2_0024;

/// Asks the debugger, here the emulator, to do `operation` with `argument`.
fn semihosting(operation: usize, argument: usize) {
    // SAFETY: of the two operations here one reads a string that ends in 0 and lives in the caller, and neither writes to
    // memory. The debugger changes no register but r0.
    unsafe { asm!("bkpt 0xab", inout("r0") operation => _, in("r1") argument) };
}

#[unsafe(no_mangle)]
extern "C" fn main() -> ! {
    let digest = digest_bare::digest();
    let mut text = *b"0000000000000000\n\0";
    for (place, digit) in text[..16].iter_mut().enumerate() {
        let nibble = (digest >> (60 - 4 * place)) as u8 & 0xf;
        *digit = if nibble < 10 { b'0' + nibble } else { b'a' + nibble - 10 };
    }
    semihosting(WRITE, text.as_ptr() as usize);
    end(DONE)
}

/// Every fault, a stack past the end of memory among them.
#[unsafe(no_mangle)]
extern "C" fn fault() -> ! {
    end(FAILED)
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    end(FAILED)
}

fn end(reason: usize) -> ! {
    loop {
        semihosting(EXIT, reason);
    }
}
