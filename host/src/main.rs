//! The program: see `fused-collective --help`.

fn main() {}
