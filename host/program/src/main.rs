//! The binary `fused-collective`.

use std::process::ExitCode;

use fused_collective_cli::{commands, multicast};

fn main() -> ExitCode {
    // SAFETY: the process begins here, with one thread.
    unsafe { multicast::agree() };
    commands::main()
}
