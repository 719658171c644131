//! `cargo xtask wheel`: the Python package as one wheel, built by maturin, and its tests on CPUs. Tools of Python's are in an
//! environment of their own under the target folder.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use fused_collective_build::Processor;

use crate::{cmd, kernels};

/// The package's folder, in the workspace.
const PACKAGE: &str = "host/python";
/// The packages that build the wheel and run its tests.
const REQUIREMENTS: [&str; 4] = ["maturin==1.16.0", "numpy>=1.24,<3", "ml-dtypes>=0.4,<1", "pytest>=8,<10"];
/// The longest time that pip takes to fetch these.
const PIP_LIMIT: Duration = Duration::from_secs(300);

/// Builds the wheel with kernels for `processors` into `output` (`target/wheels` if there is none). Prints where.
///
/// # Errors
/// A tool is missing, or something does not build.
pub(crate) fn make(output: Option<PathBuf>, processors: &[Processor]) -> Result<()> {
    eprintln!("building the kernels (minutes the first time)");
    kernels::embed(processors)?;
    let output = match output {
        Some(output) => std::path::absolute(output)?,
        None => cmd::target_directory()?.join("wheels"),
    };
    let wheel = build(&environment()?, "dist", &output)?;
    let size = fs::metadata(&wheel)?.len() as f64 / f64::from(1 << 20);
    println!("{} ({size:.1} MiB)", wheel.display());
    Ok(())
}

/// The command that tests the package, once it is built as tests are and installed. Python's environment is made first.
///
/// # Errors
/// As [`make`].
pub(crate) fn tests() -> Result<Command> {
    let environment = environment()?;
    let wheel = build(&environment, "dev", &cmd::target_directory()?.join("python/wheels"))?;
    let mut install = pip(&environment);
    cmd::run_within(install.args(["--force-reinstall", "--no-deps"]).arg(wheel), PIP_LIMIT)?;
    let mut tests = Command::new(environment.join("bin/python"));
    // Nothing is written into the source tree.
    tests.args(["-B", "-m", "pytest", "--quiet", "-rs", "-p", "no:cacheprovider"]);
    tests.arg(cmd::root().join(PACKAGE).join("tests"));
    Ok(tests)
}

/// The environment with [`REQUIREMENTS`], made if it is not there.
fn environment() -> Result<PathBuf> {
    let folder = cmd::target_directory()?.join("python/environment");
    let (made, wanted) = (folder.join("requirements.txt"), REQUIREMENTS.join("\n"));
    if fs::read_to_string(&made).is_ok_and(|found| found == wanted) {
        return Ok(folder);
    }
    let mut venv = Command::new("python3");
    cmd::run_within(venv.args(["-m", "venv", "--clear"]).arg(&folder), PIP_LIMIT).context(
        "Python 3.10 or later is needed, with its module venv: on Debian, apt install python3-venv",
    )?;
    cmd::run_within(pip(&folder).args(REQUIREMENTS), PIP_LIMIT)?;
    fs::write(&made, wanted).with_context(|| format!("cannot write {}", made.display()))?;
    Ok(folder)
}

fn pip(environment: &Path) -> Command {
    let mut pip = Command::new(environment.join("bin/python"));
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]);
    pip
}

/// Builds the wheel with a profile of cargo's, in place of those that are in `output`.
fn build(environment: &Path, profile: &str, output: &Path) -> Result<PathBuf> {
    for wheel in wheels(output) {
        fs::remove_file(&wheel).with_context(|| format!("cannot replace {}", wheel.display()))?;
    }
    let mut maturin = Command::new(environment.join("bin/maturin"));
    maturin.args(["build", "--quiet", "--profile", profile, "--interpreter"]);
    maturin.arg(environment.join("bin/python")).arg("--out").arg(output).arg("--manifest-path");
    maturin.arg(cmd::root().join(PACKAGE).join("Cargo.toml"));
    cmd::run(maturin.env("CARGO_TARGET_DIR", cmd::target_directory()?))?;
    let wheels = wheels(output);
    ensure!(wheels.len() == 1, "maturin left {} wheels in {}", wheels.len(), output.display());
    wheels.into_iter().next().context("maturin left no wheel")
}

/// This package's wheels in a folder, which need not be there.
fn wheels(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    let is_wheel = |path: &PathBuf| {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        name.starts_with("fused_collective-") && name.ends_with(".whl")
    };
    entries.filter(is_wheel).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_wheels_of_this_package_are_replaced() {
        let folder = tempfile::tempdir().unwrap();
        for name in
            ["fused_collective-0.1.0-cp310-abi3-linux_x86_64.whl", "numpy-2.0.0-cp311.whl", "notes.txt"]
        {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let found = wheels(folder.path());
        assert_eq!(found, [folder.path().join("fused_collective-0.1.0-cp310-abi3-linux_x86_64.whl")]);
        assert!(wheels(&folder.path().join("absent")).is_empty());
    }
}
