//! The specification's digest on processors of every kind: each runs `core/digest` and has to find the same number.
//!
//! Cargo's own variable `CARGO_TARGET_THUMBV7EM_NONE_EABIHF_RUNNER` names an emulator of Cortex-M4F other than Debian's.

use std::{env, fs, path::PathBuf, process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use fused_collective_build::{TARGET, Toolchain};
use fused_collective_digest::DIGEST;

use crate::{
    cmd,
    cross::{self, Target, Tools},
};

/// The package for processors without an operating system.
const BARE: &str = "core/digest/bare";
const CORTEX_M: &str = "thumbv7em-none-eabihf";
const WASM: &str = "wasm32-unknown-unknown";
/// Cargo's variable for the emulator of a Cortex-M.
const CORTEX_M_RUNNER: &str = "CARGO_TARGET_THUMBV7EM_NONE_EABIHF_RUNNER";
/// QEMU as a board with a Cortex-M4F. The firmware's semihosting is the only device.
const QEMU: &str = "qemu-system-arm -machine mps2-an386 -display none -monitor none -serial none -chardev \
                    stdio,id=out -semihosting-config enable=on,target=native,chardev=out -kernel";
/// The time of a build: Rust's `std` may be part of it.
const BUILD_LIMIT: Duration = Duration::from_secs(1200);
/// The time of a run, a hundred times what each takes.
const RUN_LIMIT: Duration = Duration::from_secs(120);

/// Builds the digest for a processor, runs it there, and returns what it printed.
type Run = fn() -> Result<String>;

/// Everything that computes the digest.
pub(crate) const PROCESSORS: [(&str, Run); 5] = [
    ("the digest of this machine", native),
    ("the digest of aarch64", aarch64),
    ("the digest of a Cortex-M", cortex_m),
    ("the digest as WebAssembly", wasm),
    ("the digest as PTX", ptx),
];

/// Holds what a processor printed to the digest.
///
/// # Errors
/// Another number, or none.
pub(crate) fn hold(printed: &str) -> Result<()> {
    println!("{}", printed.trim());
    let expected = format!("{DIGEST:016x}");
    ensure!(printed.trim() == expected, "the digest is {:?}, not {expected:?}", printed.trim());
    Ok(())
}

fn native() -> Result<String> {
    of_workspace(|subcommand| Ok(cmd::cargo(subcommand)))
}

fn aarch64() -> Result<String> {
    if Target::Aarch64.is_here() {
        return native();
    }
    let tools = Tools::find(Target::Aarch64)?;
    of_workspace(|subcommand| tools.cargo(subcommand))
}

/// The digest that the workspace's own program prints.
fn of_workspace(cargo: impl Fn(&str) -> Result<Command>) -> Result<String> {
    let arguments = ["--package", "fused-collective-digest", "--example", "digest"];
    cmd::run_within(cargo("build")?.args(arguments), BUILD_LIMIT)?;
    cmd::output_within(cargo("run")?.args(arguments), RUN_LIMIT)
}

fn cortex_m() -> Result<String> {
    let has_runner = env::var_os(CORTEX_M_RUNNER).is_some();
    if !has_runner {
        cross::require_packages(&[("qemu-system-arm", "qemu-system-arm")], CORTEX_M_RUNNER)?;
    }
    let script = cmd::root().join(BARE).join("targets/cortex_m.ld");
    let toolchain = Toolchain::find(&[CORTEX_M], true)?;
    let cargo = |subcommand| {
        let mut cargo = bare(&toolchain, subcommand, CORTEX_M, "cortex_m")?;
        cargo.env("RUSTFLAGS", format!("-Clink-arg=-T{}", script.display()));
        if !has_runner {
            cargo.env(CORTEX_M_RUNNER, QEMU);
        }
        anyhow::Ok(cargo)
    };
    cmd::run_within(&mut cargo("build")?, BUILD_LIMIT)?;
    // On Unix cargo becomes the program that it runs, which the limit so ends.
    cmd::output_within(&mut cargo("run")?, RUN_LIMIT)
}

fn wasm() -> Result<String> {
    cross::require_packages(&[("node", "nodejs")], "PATH to a folder with Node's `node`")?;
    let toolchain = Toolchain::find(&[WASM], true)?;
    cmd::run_within(&mut bare(&toolchain, "build", WASM, "wasm")?, BUILD_LIMIT)?;
    let mut node = Command::new("node");
    node.arg(cmd::root().join(BARE).join("targets/digest.mjs"));
    cmd::output_within(node.arg(folder()?.join(WASM).join("release/examples/wasm.wasm")), RUN_LIMIT)
}

/// A kernel of one thread, in the emulator. It is none of the library's: it has local memory and paths that panic.
fn ptx() -> Result<String> {
    let toolchain = Toolchain::find(&[TARGET], true)?;
    let ptx = folder()?.join("digest.ptx");
    let mut build = bare(&toolchain, "rustc", TARGET, "ptx")?;
    // Kernels use unstable features of the language.
    build.env("RUSTC_BOOTSTRAP", "1");
    for option in ["panic=\"abort\"", "lto=\"fat\"", "codegen-units=1"] {
        build.args(["--config", &format!("profile.release.{option}")]);
    }
    // The emulator knows neither functions nor tables: all is inlined but what panics, and a switch is branches.
    let flags =
        "-Ctarget-cpu=sm_80 -Cllvm-args=-switch-to-lookup=false -Cllvm-args=-inline-threshold=1000000";
    build.env("RUSTFLAGS", flags).arg("--").arg(format!("--emit=asm={}", ptx.display()));
    cmd::run_within(&mut build, BUILD_LIMIT)?;
    let arguments = ["--package", "fused-collective-digest", "--example", "emulated"];
    cmd::run_within(cmd::cargo("build").args(arguments), BUILD_LIMIT)?;
    cmd::output_within(cmd::cargo("run").args(arguments).arg("--").arg(ptx), RUN_LIMIT)
}

/// `cargo SUBCOMMAND` on one of the package's targets, with this workspace's versions of other crates.
fn bare(toolchain: &Toolchain, subcommand: &str, target: &str, example: &str) -> Result<Command> {
    let package = cmd::root().join(BARE);
    fs::copy(cmd::root().join("Cargo.lock"), package.join("Cargo.lock")).context("cannot copy Cargo.lock")?;
    let mut cargo = toolchain.cargo(&package.join("Cargo.toml"), subcommand, target, &folder()?);
    cargo.args(["--release", "--example", example]).env_remove("CARGO_ENCODED_RUSTFLAGS");
    Ok(cargo)
}

fn folder() -> Result<PathBuf> {
    Ok(cmd::target_directory()?.join("cross/digest"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_digest_and_none_are_errors() {
        assert!(hold(&format!("{DIGEST:016x}\n")).is_ok());
        assert!(hold("").is_err());
        let error = hold(&format!("{:016x}\n", DIGEST ^ 1)).unwrap_err().to_string();
        assert!(error.contains(&format!("not \"{DIGEST:016x}\"")), "{error}");
    }
}
