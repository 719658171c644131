//! A compiler with `core` for targets other than this machine's, tried in this order:
//! 1. the active toolchain, where it has the target's `core`, or the source of it (`rust-src`);
//! 2. `rustup target add`, where rustup manages the toolchain and reaches its server;
//! 3. on Debian, the packages `rustc-web` and `rust-web-src`, a compiler and its source that install beside rustup's
//!    toolchains.

use std::{
    env,
    ffi::OsString,
    fmt, fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use crate::{
    Error,
    command::{output, run},
};

/// The target that GPU kernels are compiled for, as rustc names it.
pub const TARGET: &str = "nvptx64-nvidia-cuda";

/// The time that rustup gets to fetch a few megabytes for each target: its network may be silent.
const RUSTUP_LIMIT: Duration = Duration::from_secs(120);
/// The time that Debian's package manager gets.
const APT_LIMIT: Duration = Duration::from_secs(1200);
/// The place where Debian's packages put their compiler.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
/// Debian's compiler and the source of its `core`.
const DEBIAN_PACKAGES: [&str; 2] = ["rustc-web", "rust-web-src"];

/// A compiler that has `core` for the targets it was found for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Toolchain {
    /// The compiler to use instead of the active one.
    rustc: Option<PathBuf>,
    /// Builds `core` from source. On a stable compiler that needs `RUSTC_BOOTSTRAP`.
    build_core: bool,
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.rustc {
            Some(rustc) => write!(f, "{}", rustc.display())?,
            None => f.write_str("the active toolchain")?,
        }
        if self.build_core { f.write_str(", building `core` from its source") } else { Ok(()) }
    }
}

impl Toolchain {
    /// A toolchain for all of `targets`: the active one or Debian's. With `install`, one that lacks something gets it where
    /// that is possible: by rustup, or as root from Debian's packages.
    ///
    /// # Errors
    /// [`Error::NoToolchain`]: what was tried, why it failed, and what a user can do.
    pub fn find(targets: &[&str], install: bool) -> Result<Self, Error> {
        let mut tried = String::new();
        let mut note = |step: &str, error: Error| tried += &format!("\n  {step}: {error}");
        match active(targets) {
            Ok(found) => return Ok(found),
            Err(error) => note("the active toolchain", error),
        }
        if install {
            // Without its server rustup may panic: the message is enough.
            let mut rustup = Command::new("rustup");
            rustup.args(["target", "add"]).args(targets).env("RUST_BACKTRACE", "0");
            match run(&mut rustup, RUSTUP_LIMIT).and_then(|()| active(targets)) {
                Ok(found) => return Ok(found),
                Err(error) => note("rustup", error),
            }
        }
        match debian(install) {
            Ok(found) => return Ok(found),
            Err(error) => note("Debian's packages", error),
        }
        Err(Error::NoToolchain { targets: targets.join(" "), tried })
    }

    /// `cargo SUBCOMMAND` for `target` with this toolchain, on the package or workspace of `manifest`. Compilers must not
    /// share `target_directory`: each throws away what another made, and waits for it.
    pub fn cargo(&self, manifest: &Path, subcommand: &str, target: &str, target_directory: &Path) -> Command {
        let mut command = Command::new(cargo());
        command.arg(subcommand).arg("--manifest-path").arg(manifest);
        command.args(["--target", target]).arg("--target-dir").arg(target_directory);
        // Of `cargo clippy`, if that runs the build script that runs this.
        command.env_remove("RUSTC_WORKSPACE_WRAPPER");
        if let Some(rustc) = &self.rustc {
            command.env("RUSTC", rustc);
        }
        if self.build_core {
            command.arg("-Zbuild-std=core").env("RUSTC_BOOTSTRAP", "1");
        }
        command
    }

    /// Like [`cargo`](Toolchain::cargo), for programs: where `core` is built from its source, `std` is too.
    pub fn cargo_with_std(
        &self,
        manifest: &Path,
        subcommand: &str,
        target: &str,
        target_directory: &Path,
    ) -> Command {
        let mut command = self.cargo(manifest, subcommand, target, target_directory);
        if self.build_core {
            // The last of such flags counts.
            command.arg("-Zbuild-std=std");
        }
        command
    }
}

/// The cargo that runs this program (cargo says so in the environment), or else the one that is found.
pub(crate) fn cargo() -> OsString {
    env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// The active toolchain, if it has `core` for all of `targets` or can build it.
fn active(targets: &[&str]) -> Result<Toolchain, Error> {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let mut missing = Vec::new();
    for &target in targets {
        if !has_core(&rustc, target)? {
            missing.push(target);
        }
    }
    if !missing.is_empty() && !has_source(&rustc)? {
        return Err(lacks(&rustc, format!("neither `core` for {} nor rust-src", missing.join(", "))));
    }
    Ok(Toolchain { rustc: None, build_core: !missing.is_empty() })
}

/// A compiler that cannot be used.
fn lacks(rustc: &OsString, outcome: String) -> Error {
    Error::Command { command: rustc.display().to_string(), outcome }
}

/// Tells if `rustc` comes with a compiled `core` for `target`.
fn has_core(rustc: &OsString, target: &str) -> Result<bool, Error> {
    let folder = output(Command::new(rustc).args(["--print", "target-libdir", "--target", target]))?;
    let Ok(files) = fs::read_dir(folder.trim_end()) else {
        return Ok(false);
    };
    let mut names = files.filter_map(|file| file.ok()?.file_name().into_string().ok());
    Ok(names.any(|name| name.starts_with("libcore-") && name.ends_with(".rlib")))
}

/// Tells if `rustc` comes with the source of the standard library, where cargo looks for it.
fn has_source(rustc: &OsString) -> Result<bool, Error> {
    let sysroot = output(Command::new(rustc).args(["--print", "sysroot"]))?;
    Ok(Path::new(sysroot.trim_end()).join("lib/rustlib/src/rust/library/Cargo.lock").exists())
}

/// Debian's compiler; with `install`, from its packages if need be.
fn debian(install: bool) -> Result<Toolchain, Error> {
    if let Err(error) = debian_installed() {
        if !install || !Path::new("/etc/debian_version").exists() {
            return Err(error);
        }
        // The folder of this process belongs to its effective user.
        if fs::metadata("/proc/self").map_or(1, |process| process.uid()) != 0 {
            return Err(lacks(&DEBIAN_RUSTC.into(), format!("{error}; only root can install it")));
        }
        let apt_get = |args: &[&str]| {
            let mut command = Command::new("apt-get");
            command.args(["-o", "DPkg::Lock::Timeout=120"]).args(args);
            run(command.env("DEBIAN_FRONTEND", "noninteractive"), APT_LIMIT)
        };
        // A machine's package lists may be missing or name versions that are gone.
        apt_get(&["update"])?;
        // The packages conflict with Debian's other Rust packages: never remove what the user has installed.
        apt_get(
            &[&["install", "--yes", "--no-install-recommends", "--no-remove"], &DEBIAN_PACKAGES[..]].concat(),
        )?;
        debian_installed()?;
    }
    Ok(Toolchain { rustc: Some(DEBIAN_RUSTC.into()), build_core: true })
}

/// Checks that Debian's compiler and its source are there, and recent enough for this crate.
fn debian_installed() -> Result<(), Error> {
    let rustc = OsString::from(DEBIAN_RUSTC);
    let version = output(Command::new(&rustc).arg("--version"))?;
    if !has_source(&rustc)? {
        return Err(lacks(&rustc, "no source of `core`".to_owned()));
    }
    let needed = env!("CARGO_PKG_RUST_VERSION");
    if minor_version(&version) < minor_version(needed) {
        return Err(lacks(&rustc, format!("{}, which is older than {needed}", version.trim_end())));
    }
    Ok(())
}

/// The 96 of `1.96`, `1.96.0` or `rustc 1.96.0 (hash date)`.
fn minor_version(text: &str) -> Option<u32> {
    text.trim_start_matches("rustc ")
        .strip_prefix("1.")?
        .split(|c: char| !c.is_ascii_digit())
        .next()?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_number() {
        assert_eq!(
            minor_version("rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)\n"),
            Some(96)
        );
        assert_eq!(minor_version("1.95"), Some(95));
        assert!(minor_version("rustc 1.100.0") > minor_version("1.95"));
        assert!(minor_version("gcc 12.2") < minor_version("1.0"));
    }

    #[test]
    fn the_active_toolchain_has_core_for_its_own_host() {
        let version = output(Command::new("rustc").args(["--version", "--verbose"])).unwrap();
        let host = version.lines().find_map(|line| line.strip_prefix("host: ")).unwrap();
        let found = Toolchain::find(&[host], false).unwrap();
        assert_eq!(found, Toolchain { rustc: None, build_core: false });
    }

    #[test]
    fn a_target_that_rustc_does_not_know_is_an_error() {
        assert!(active(&["pdp11-dec-unix"]).is_err());
    }

    #[test]
    fn core_is_built_from_source_by_the_compiler_that_was_found() {
        let toolchain = Toolchain { rustc: Some(DEBIAN_RUSTC.into()), build_core: true };
        let command =
            toolchain.cargo(Path::new("Cargo.toml"), "build", "thumbv6m-none-eabi", Path::new("target"));
        let arguments: Vec<_> = command.get_args().collect();
        assert!(arguments.contains(&"-Zbuild-std=core".as_ref()));
        assert!(arguments.windows(2).any(|pair| pair == ["--target", "thumbv6m-none-eabi"]));
        let variables: Vec<_> = command.get_envs().filter_map(|(name, value)| Some((name, value?))).collect();
        assert!(variables.contains(&("RUSTC".as_ref(), DEBIAN_RUSTC.as_ref())));
        assert!(variables.contains(&("RUSTC_BOOTSTRAP".as_ref(), "1".as_ref())));
        // Cargo takes the last.
        let (manifest, folder) = (Path::new("Cargo.toml"), Path::new("target"));
        let command = toolchain.cargo_with_std(manifest, "build", "aarch64-unknown-linux-gnu", folder);
        assert_eq!(command.get_args().last(), Some("-Zbuild-std=std".as_ref()));
    }
}
