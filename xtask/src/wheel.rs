//! `cargo xtask wheel`: the Python package as one wheel, built by maturin, and its tests on CPUs. Tools of Python's are in an
//! environment of their own under the target folder.
//!
//! A wheel for others is linked by zig, which has the C library's symbols of every version and architecture: it runs on
//! systems that are older than this one.

use std::{
    env,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use fused_collective_build::{Processor, Toolchain};

use crate::{cmd, cross::Target, kernels};

/// The package's folder, in the workspace.
const PACKAGE: &str = "host/python";
/// The packages that build the wheel and run its tests.
const REQUIREMENTS: [&str; 4] = ["maturin==1.16.0", "numpy>=1.24,<3", "ml-dtypes>=0.4,<1", "pytest>=8,<10"];
/// The packages that build a wheel for others.
const RELEASE_REQUIREMENTS: [&str; 2] = ["maturin==1.16.0", "ziglang==0.17.1"];
/// The oldest systems that such a wheel runs on: those with glibc 2.28, of 2018.
const COMPATIBILITY: &str = "manylinux_2_28";
/// The longest time that pip takes to fetch these.
const PIP_LIMIT: Duration = Duration::from_secs(300);

/// Builds the wheel for this machine's architecture or `target`, with kernels for `processors`, into `output` (`target/wheels`
/// if there is none). Prints where.
///
/// # Errors
/// A tool is missing, or something does not build.
pub(crate) fn make(output: Option<PathBuf>, processors: &[Processor], target: Option<Target>) -> Result<()> {
    eprintln!("building the kernels (minutes the first time)");
    kernels::embed(processors)?;
    let output = match output {
        Some(output) => std::path::absolute(output)?,
        None => cmd::target_directory()?.join("wheels"),
    };
    let environment = environment("release", &RELEASE_REQUIREMENTS)?;
    let arch = target.map_or(env::consts::ARCH, Target::arch);
    let triple = format!("{arch}-unknown-linux-gnu");
    let toolchain = Toolchain::find(&[&triple], true)?;
    let mut maturin = maturin(&environment, "dist", &output)?;
    maturin.args(["--target", &triple, "--zig", "--compatibility", COMPATIBILITY]);
    maturin.env("CARGO_ZIGBUILD_PYTHON_PATH", environment.join("bin/python"));
    let folder = cmd::target_directory()?.join("cross/wheel");
    // Maturin hands on to cargo what cargo needs for the target.
    let cargo = toolchain.cargo_with_std(&manifest(), "build", &triple, &folder);
    let is_unstable = |argument: &&OsStr| argument.to_string_lossy().starts_with("-Z");
    maturin.args(cargo.get_args().filter(is_unstable)).env("CARGO_TARGET_DIR", &folder);
    maturin.envs(cargo.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let wheel = build(maturin, &output, arch)?;
    let size = fs::metadata(&wheel)?.len() as f64 / f64::from(1 << 20);
    println!("{} ({size:.1} MiB)", wheel.display());
    Ok(())
}

/// The command that tests the package, once it is built as tests are and installed. Python's environment is made first.
///
/// # Errors
/// As [`make`].
pub(crate) fn tests() -> Result<Command> {
    let environment = environment("environment", &REQUIREMENTS)?;
    let output = cmd::target_directory()?.join("python/wheels");
    let mut maturin = maturin(&environment, "dev", &output)?;
    maturin.arg("--interpreter").arg(environment.join("bin/python"));
    let wheel = build(maturin, &output, env::consts::ARCH)?;
    let mut install = pip(&environment);
    cmd::run_within(install.args(["--force-reinstall", "--no-deps"]).arg(wheel), PIP_LIMIT)?;
    let mut tests = Command::new(environment.join("bin/python"));
    // Nothing is written into the source tree.
    tests.args(["-B", "-m", "pytest", "--quiet", "-rs", "-p", "no:cacheprovider"]);
    tests.arg(cmd::root().join(PACKAGE).join("tests"));
    Ok(tests)
}

/// The environment `name` with `requirements`, made if it is not there.
fn environment(name: &str, requirements: &[&str]) -> Result<PathBuf> {
    let folder = cmd::target_directory()?.join("python").join(name);
    let (made, wanted) = (folder.join("requirements.txt"), requirements.join("\n"));
    if fs::read_to_string(&made).is_ok_and(|found| found == wanted) {
        return Ok(folder);
    }
    let mut venv = Command::new("python3");
    cmd::run_within(venv.args(["-m", "venv", "--clear"]).arg(&folder), PIP_LIMIT).context(
        "Python 3.10 or later is needed, with its module venv: on Debian, apt install python3-venv",
    )?;
    cmd::run_within(pip(&folder).args(requirements), PIP_LIMIT)?;
    fs::write(&made, wanted).with_context(|| format!("cannot write {}", made.display()))?;
    Ok(folder)
}

fn pip(environment: &Path) -> Command {
    let mut pip = Command::new(environment.join("bin/python"));
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]);
    pip
}

/// Maturin, to build the wheel with a profile of cargo's.
fn maturin(environment: &Path, profile: &str, output: &Path) -> Result<Command> {
    let mut maturin = Command::new(environment.join("bin/maturin"));
    maturin.args(["build", "--quiet", "--profile", profile, "--out"]).arg(output);
    maturin.arg("--manifest-path").arg(manifest());
    maturin.env("CARGO_TARGET_DIR", cmd::target_directory()?);
    Ok(maturin)
}

fn manifest() -> PathBuf {
    cmd::root().join(PACKAGE).join("Cargo.toml")
}

/// Builds the wheel in place of those for `arch` that are in `output`.
fn build(mut maturin: Command, output: &Path, arch: &str) -> Result<PathBuf> {
    for wheel in wheels(output, arch) {
        fs::remove_file(&wheel).with_context(|| format!("cannot replace {}", wheel.display()))?;
    }
    cmd::run(&mut maturin)?;
    let wheels = wheels(output, arch);
    ensure!(wheels.len() == 1, "maturin left {} wheels in {}", wheels.len(), output.display());
    wheels.into_iter().next().context("maturin left no wheel")
}

/// This package's wheels for `arch` in a folder, which need not be there.
fn wheels(folder: &Path, arch: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    let is_wheel = |path: &PathBuf| {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        name.starts_with("fused_collective-") && name.ends_with(&format!("_{arch}.whl"))
    };
    entries.filter(is_wheel).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_wheels_of_this_package_and_architecture_are_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let [own, other] = ["linux_x86_64", "manylinux_2_28_aarch64"]
            .map(|platform| folder.path().join(format!("fused_collective-0.1.0-cp310-abi3-{platform}.whl")));
        for path in
            [&own, &other, &folder.path().join("numpy-2.0.0-cp311.whl"), &folder.path().join("notes.txt")]
        {
            fs::write(path, "").unwrap();
        }
        assert_eq!(wheels(folder.path(), "x86_64"), [own]);
        assert_eq!(wheels(folder.path(), "aarch64"), [other]);
        assert!(wheels(&folder.path().join("absent"), "aarch64").is_empty());
    }
}
