//! Builds, tests and benchmarks fused-collective.

fn main() {}
