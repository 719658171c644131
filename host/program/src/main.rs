//! The binary `fused-collective`.

use std::process::ExitCode;

use fused_collective_cli::{allocator::Allocator, commands, multicast};

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

fn main() -> ExitCode {
    // SAFETY: the process begins here, with one thread.
    unsafe { multicast::agree() };
    commands::main()
}
