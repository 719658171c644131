//! The binary `fused-collective`.

use std::process::ExitCode;

fn main() -> ExitCode {
    fused_collective_cli::commands::main()
}
