//! The project for a processor architecture that is not this machine's: a compiler, a linker, and an emulator that runs tests.
//!
//! On Debian, packages bring linker and emulator; they are installed where that is possible, as root. Elsewhere cargo's own
//! variables name them: `CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER` and `_RUNNER`.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    str::FromStr,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use fused_collective_build::Toolchain;

use crate::cmd;

/// A file that shows each of the packages to be installed: Debian's linker, its C library for the target, the emulator.
const DEBIAN_PACKAGES: [Package; 3] = [
    ("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu"),
    ("/usr/aarch64-linux-gnu/lib/libc.so.6", "libc6-dev-arm64-cross"),
    ("qemu-aarch64", "qemu-user"),
];
/// The time that Debian's package manager gets.
const APT_LIMIT: Duration = Duration::from_secs(1200);

/// An architecture that the project is built for from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// 64-bit Arm, Grace for one.
    Aarch64,
}

impl FromStr for Target {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let aarch64 = Target::Aarch64;
        if name == aarch64.arch() { Ok(aarch64) } else { Err(format!("{name} is no target: aarch64 is")) }
    }
}

impl Target {
    /// Its name in `std::env::consts::ARCH`.
    pub(crate) fn arch(self) -> &'static str {
        match self {
            Target::Aarch64 => "aarch64",
        }
    }

    /// Its name for rustc.
    pub(crate) fn triple(self) -> &'static str {
        match self {
            Target::Aarch64 => "aarch64-unknown-linux-gnu",
        }
    }

    /// Cargo's variables for its linker and for the runner of its programs.
    fn variables(self) -> [String; 2] {
        let triple = self.triple().to_uppercase().replace('-', "_");
        ["LINKER", "RUNNER"].map(|what| format!("CARGO_TARGET_{triple}_{what}"))
    }

    /// Tells if this machine is one.
    pub(crate) fn is_here(self) -> bool {
        env::consts::ARCH == self.arch()
    }
}

/// The tools for a [`Target`].
pub(crate) struct Tools {
    target: Target,
    toolchain: Toolchain,
    /// Cargo's variables for linker and runner, where the environment has none.
    variables: Vec<(String, String)>,
}

impl Tools {
    /// All that a build for `target` and a run of its tests take, installed where it is missing and can be.
    ///
    /// # Errors
    /// The target is this machine, or what is missing and how to get it.
    pub(crate) fn find(target: Target) -> Result<Self> {
        let arch = target.arch();
        ensure!(!target.is_here(), "this machine is {arch} itself: what it builds and tests needs no target");
        let toolchain = Toolchain::find(&[target.triple()], true)?;
        let [linker, runner] = target.variables();
        let mut variables = vec![
            (linker, format!("{arch}-linux-gnu-gcc")),
            (runner, format!("qemu-{arch} -L /usr/{arch}-linux-gnu")),
        ];
        variables.retain(|(name, _)| env::var_os(name).is_none());
        if !variables.is_empty() {
            require_packages(&DEBIAN_PACKAGES, &target.variables().join(" and "))?;
        }
        Ok(Tools { target, toolchain, variables })
    }

    /// `cargo SUBCOMMAND` on this workspace, for the target.
    ///
    /// # Errors
    /// When cargo does not say where this workspace is built.
    pub(crate) fn cargo(&self, subcommand: &str) -> Result<Command> {
        let (manifest, triple) = (cmd::root().join("Cargo.toml"), self.target.triple());
        let mut cargo =
            self.toolchain.cargo_with_std(&manifest, subcommand, triple, &self.target_directory()?);
        cargo.envs(self.variables.iter().map(|(name, value)| (name, value)));
        Ok(cargo)
    }

    /// The folder that cargo builds for the target in, with a folder for each profile.
    ///
    /// # Errors
    /// As [`cargo`](Tools::cargo).
    pub(crate) fn folder(&self) -> Result<PathBuf> {
        Ok(self.target_directory()?.join(self.target.triple()))
    }

    fn target_directory(&self) -> Result<PathBuf> {
        Ok(cmd::target_directory()?.join("cross").join(self.target.arch()))
    }
}

/// A file that shows a package to be installed, and the package.
type Package = (&'static str, &'static str);

/// Makes sure that `packages` are installed.
///
/// # Errors
/// One is not and cannot be: how to install it, and `instead`, what to set where there is no such package.
pub(crate) fn require_packages(packages: &[Package], instead: &str) -> Result<()> {
    if missing(packages).is_empty() {
        return Ok(());
    }
    debian(packages).with_context(|| {
        format!(
            "a tool is missing: on Debian, as root, apt-get update && apt-get install --no-install-recommends {}; \
             elsewhere set {instead}",
            missing(packages).join(" ")
        )
    })
}

/// Those of `packages` that are not installed.
fn missing(packages: &[Package]) -> Vec<&'static str> {
    let path = env::var_os("PATH").unwrap_or_default();
    // A file with a whole path is where it says, whatever folder it is joined to.
    let is_there = |file| env::split_paths(&path).any(|folder| folder.join(file).is_file());
    packages.iter().filter(|(file, _)| !is_there(file)).map(|(_, package)| *package).collect()
}

/// Installs what is missing of `packages`.
fn debian(packages: &[Package]) -> Result<()> {
    ensure!(Path::new("/etc/debian_version").exists(), "this is not Debian");
    ensure!(rustix::process::geteuid().is_root(), "only root can install packages");
    let apt_get = |args: &[&str]| {
        let mut command = Command::new("apt-get");
        command.args(["-o", "DPkg::Lock::Timeout=120"]).args(args).env("DEBIAN_FRONTEND", "noninteractive");
        cmd::run_within(&mut command, APT_LIMIT)
    };
    apt_get(&["update"])?;
    let names = missing(packages);
    apt_get(&[&["install", "--yes", "--no-install-recommends", "--no-remove"], &names[..]].concat())?;
    ensure!(missing(packages).is_empty(), "{} are not what was installed", missing(packages).join(", "));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_named_as_its_architecture() {
        assert_eq!("aarch64".parse(), Ok(Target::Aarch64));
        assert_eq!("arm".parse::<Target>(), Err("arm is no target: aarch64 is".to_owned()));
        assert_eq!(
            Target::Aarch64.variables(),
            [
                "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER",
                "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER"
            ]
        );
    }

    #[test]
    fn a_package_is_missing_if_its_file_is() {
        let packages = [("sh", "dash"), ("/bin/sh", "dash"), ("no-such-program", "nothing")];
        assert_eq!(missing(&packages), ["nothing"]);
    }
}
