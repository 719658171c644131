//! The program: see `fused-collective --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    fused_collective_cli::commands::main()
}
