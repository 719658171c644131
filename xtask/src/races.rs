//! The CPU backend under ThreadSanitizer: ranks that are threads must have no data race.
//!
//! The stable compiler carries the sanitizer's runtime. Its own standard library is not compiled for it, and what that hides
//! is listed in `host/tests/thread_sanitizer.txt`.

use std::{env, process::Command};

use anyhow::{Result, ensure};

use crate::cmd;

/// The tests, among those of `cpu_collective`, that take minutes here and show no other order of accesses.
const SLOW: [&str; 3] = ["any_operation", "the_largest_hidden_size", "wire_formats"];
/// A test with a race, which shows that the sanitizer finds one.
const PLANTED: &str = "a_planted_race";

/// The tests of the CPU backend.
pub(crate) fn tests() -> Result<Command> {
    let mut tests = cargo_test()?;
    tests.args(SLOW.map(|test| format!("--skip={test}")));
    Ok(tests)
}

/// Runs a test that has a data race, which must be reported.
pub(crate) fn find_planted() -> Result<()> {
    let output = cargo_test()?.args(["--ignored", "--exact", PLANTED]).output()?;
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    let is_found = said.contains("WARNING: ThreadSanitizer: data race") && said.contains(PLANTED);
    ensure!(is_found && !output.status.success(), "ThreadSanitizer does not find a planted race:\n{said}");
    Ok(())
}

/// `cargo test` of the CPU backend under the sanitizer, up to the arguments of the tests.
fn cargo_test() -> Result<Command> {
    let suppressions = cmd::root().join("host/tests/thread_sanitizer.txt");
    let mut tests = cmd::cargo("test");
    tests
        // With a target, build scripts and macros are compiled without the sanitizer.
        .args(["--target", &format!("{}-unknown-linux-gnu", env::consts::ARCH)])
        .arg("--target-dir")
        .arg(cmd::target_directory()?.join("cross/races"))
        .args(["--package=fused-collective", "--no-default-features", "--features=cpu"])
        .args(["--test=cpu_collective", "--"])
        .env("RUSTFLAGS", "-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer")
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_PROFILE_DEV_DEBUG", "0")
        .env("TSAN_OPTIONS", format!("suppressions={}", suppressions.display()));
    Ok(tests)
}
