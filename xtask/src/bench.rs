//! `cargo xtask bench`: the release program's benchmark, with the options as they were given.

use std::os::unix::process::CommandExt;

use anyhow::{Error, anyhow};

use crate::cmd;

/// Becomes `fused-collective bench OPTIONS`, built if need be, so that signals, the exit status and relative paths
/// are the program's own (`cargo run` hands over its process in the same way). Returns only an error.
pub(crate) fn exec(options: &[String]) -> Error {
    let mut cargo = cmd::cargo("run");
    cargo
        .args(["--release", "--package", "fused-collective", "--bin", "fused-collective", "--", "bench"])
        .args(options);
    anyhow!(cargo.exec()).context("cannot start cargo")
}
