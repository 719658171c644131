//! Finds, or installs, what the builds need beyond a plain stable toolchain: cargo's components, and a compiler with
//! `core` for targets other than this machine's. Everything else in the workspace builds without this module.
//!
//! For a target's `core`, in this order:
//! 1. the active toolchain, where it has the target's `core`, or the source of it (`rust-src`);
//! 2. `rustup target add`, where rustup manages the toolchain and reaches its server;
//! 3. on Debian, the packages `rustc-web` and `rust-web-src`, a compiler and its source that install beside rustup's
//!    toolchains. The build installs them where it may, as root.

use std::{
    env,
    ffi::OsString,
    fmt, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

use crate::cmd;

/// How long rustup may take: it has a few megabytes for each target to fetch, and may wait for a silent network.
const RUSTUP_LIMIT: Duration = Duration::from_secs(120);
/// Where Debian's packages put their compiler.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
/// Debian's compiler and the source of its `core`.
const DEBIAN_PACKAGES: [&str; 2] = ["rustc-web", "rust-web-src"];

/// A compiler that has `core` for the targets it was found for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Toolchain {
    /// The compiler to use instead of the active one.
    rustc: Option<PathBuf>,
    /// Whether `core` is built from source. On a stable compiler that needs `RUSTC_BOOTSTRAP`.
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
    /// A toolchain for all of `targets`, installed if there is none.
    ///
    /// # Errors
    /// What was tried, why it failed, and what a user can do.
    pub(crate) fn find(targets: &[&str]) -> Result<Self> {
        let mut tried = String::new();
        let mut note = |step: &str, error: anyhow::Error| tried += &format!("\n  {step}: {error:#}");
        match active(targets) {
            Ok(found) => return Ok(found),
            Err(error) => note("the active toolchain", error),
        }
        match rustup(&[&["target", "add"], targets].concat()).and_then(|()| active(targets)) {
            Ok(found) => return Ok(found),
            Err(error) => note("rustup", error),
        }
        match debian() {
            Ok(found) => return Ok(found),
            Err(error) => note("Debian's packages", error),
        }
        bail!(
            "no compiler with `core` for {}:{tried}\nAny of these helps:\n  rustup component add rust-src\n  \
             rustup target add {}\n  on Debian, as root: apt-get update && apt-get install --no-install-recommends {}",
            targets.join(", "),
            targets.join(" "),
            DEBIAN_PACKAGES.join(" "),
        )
    }

    /// A toolchain for all of `targets` that is there already.
    ///
    /// # Errors
    /// Why the active toolchain is none, and why Debian's is none.
    pub(crate) fn installed(targets: &[&str]) -> Result<Self> {
        let debian =
            || debian_installed().map(|()| Toolchain { rustc: Some(DEBIAN_RUSTC.into()), build_core: true });
        active(targets).or_else(|why| debian().with_context(|| format!("{why:#}")))
    }

    /// `cargo SUBCOMMAND` for `target` with this toolchain, on the package or workspace of `manifest`. The outputs are
    /// in `target/cross/FOLDER`: compilers that share a folder throw away what the other made, and wait for each other.
    ///
    /// # Errors
    /// When cargo cannot say where the workspace's target directory is.
    pub(crate) fn cargo(
        &self,
        manifest: &Path,
        subcommand: &str,
        target: &str,
        folder: &str,
    ) -> Result<Command> {
        let mut command = cmd::cargo_on(manifest, subcommand);
        command
            .args(["--target", target])
            .arg("--target-dir")
            .arg(cmd::metadata()?.target_directory.join("cross").join(folder));
        if let Some(rustc) = &self.rustc {
            command.env("RUSTC", rustc);
        }
        if self.build_core {
            command.arg("-Zbuild-std=core").env("RUSTC_BOOTSTRAP", "1");
        }
        Ok(command)
    }
}

/// Makes sure that `cargo SUBCOMMAND` exists, which the rustup component `component` brings.
///
/// # Errors
/// When it does not exist and rustup cannot add it: how to install it.
pub(crate) fn require_component(subcommand: &str, component: &str) -> Result<()> {
    let exists = || {
        let mut version = Command::new(cmd::cargo_program());
        let status =
            version.args([subcommand, "--version"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
        status.is_ok_and(|status| status.success())
    };
    if exists() {
        return Ok(());
    }
    rustup(&["component", "add", component]).with_context(|| {
        format!(
            "`cargo {subcommand}` is missing: run `rustup component add {component}`, or install the {component} of \
             this Rust from where it came"
        )
    })
}

/// The active toolchain, if it has `core` for all of `targets` or can build it.
fn active(targets: &[&str]) -> Result<Toolchain> {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let mut missing = Vec::new();
    for &target in targets {
        if !has_core(&rustc, target)? {
            missing.push(target);
        }
    }
    if missing.is_empty() {
        return Ok(Toolchain { rustc: None, build_core: false });
    }
    ensure!(has_source(&rustc)?, "neither `core` for {} nor rust-src", missing.join(", "));
    Ok(Toolchain { rustc: None, build_core: true })
}

/// Whether `rustc` comes with a compiled `core` for `target`.
fn has_core(rustc: &OsString, target: &str) -> Result<bool> {
    let folder = cmd::read(Command::new(rustc).args(["--print", "target-libdir", "--target", target]))?;
    let Ok(files) = fs::read_dir(folder.trim_end()) else {
        return Ok(false);
    };
    let mut names = files.filter_map(|file| file.ok()?.file_name().into_string().ok());
    Ok(names.any(|name| name.starts_with("libcore-") && name.ends_with(".rlib")))
}

/// Whether `rustc` comes with the source of the standard library, where cargo looks for it.
fn has_source(rustc: &OsString) -> Result<bool> {
    let sysroot = cmd::read(Command::new(rustc).args(["--print", "sysroot"]))?;
    Ok(Path::new(sysroot.trim_end()).join("lib/rustlib/src/rust/library/Cargo.lock").exists())
}

/// Runs rustup, for the active toolchain. A rustup that is missing or does not reach its server is an error.
fn rustup(args: &[&str]) -> Result<()> {
    // Without its server rustup may panic: the message is enough.
    cmd::run_within(Command::new("rustup").args(args).env("RUST_BACKTRACE", "0"), RUSTUP_LIMIT)
}

/// Debian's compiler, installed from its packages if need be.
fn debian() -> Result<Toolchain> {
    ensure!(Path::new("/etc/debian_version").exists(), "this is not Debian");
    if let Err(error) = debian_installed() {
        ensure!(rustix::process::geteuid().is_root(), "{error:#}, and only root can install the packages");
        let apt_get = |args: &[&str]| {
            let mut command = Command::new("apt-get");
            command
                .args(["-o", "DPkg::Lock::Timeout=120"])
                .args(args)
                .env("DEBIAN_FRONTEND", "noninteractive");
            cmd::run(&mut command)
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

/// Checks that Debian's compiler and its source are there, and recent enough for this workspace.
fn debian_installed() -> Result<()> {
    ensure!(Path::new(DEBIAN_RUSTC).exists(), "{DEBIAN_RUSTC} is not there");
    ensure!(has_source(&DEBIAN_RUSTC.into())?, "{DEBIAN_RUSTC} has no source of `core`");
    let version = cmd::read(Command::new(DEBIAN_RUSTC).arg("--version"))?;
    let needed = env!("CARGO_PKG_RUST_VERSION");
    ensure!(
        minor_version(&version) >= minor_version(needed),
        "{DEBIAN_RUSTC} is {}, the workspace needs {needed}",
        version.trim_end()
    );
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
        let version = cmd::read(Command::new("rustc").args(["--version", "--verbose"])).unwrap();
        let host = version.lines().find_map(|line| line.strip_prefix("host: ")).unwrap();
        assert_eq!(active(&[host]).unwrap(), Toolchain { rustc: None, build_core: false });
    }

    #[test]
    fn a_target_that_rustc_does_not_know_is_an_error() {
        assert!(active(&["pdp11-dec-unix"]).is_err());
    }

    #[test]
    fn core_is_built_from_source_by_the_compiler_that_was_found() {
        let toolchain = Toolchain { rustc: Some(DEBIAN_RUSTC.into()), build_core: true };
        let command =
            toolchain.cargo(Path::new("Cargo.toml"), "build", "thumbv6m-none-eabi", "core").unwrap();
        let arguments: Vec<_> = command.get_args().collect();
        assert!(arguments.contains(&"-Zbuild-std=core".as_ref()));
        assert!(arguments.windows(2).any(|pair| pair == ["--target", "thumbv6m-none-eabi"]));
        let variables: Vec<_> = command.get_envs().filter_map(|(name, value)| Some((name, value?))).collect();
        assert!(variables.contains(&("RUSTC".as_ref(), DEBIAN_RUSTC.as_ref())));
        assert!(variables.contains(&("RUSTC_BOOTSTRAP".as_ref(), "1".as_ref())));
    }
}
