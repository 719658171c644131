//! The packages that are published: each is packed, unpacked elsewhere, and built from there against the other packed ones.

use std::{env, fs, path::PathBuf};

use anyhow::{Context as _, Result, ensure};

use crate::cmd;

/// The files of the licence, which every package has a link to: cargo packs no file of a folder above.
const LICENCES: [&str; 2] = ["LICENSE-APACHE", "LICENSE-MIT"];

/// Removes what cargo has unpacked of packages with these names and versions. It takes packed packages for those of a registry
/// without a host, whose folder's name is a number after a dash.
fn forget(packages: &[String]) -> Result<()> {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let Some(home) = home.or_else(|| Some(env::home_dir()?.join(".cargo"))) else { return Ok(()) };
    let Ok(registries) = fs::read_dir(home.join("registry/src")) else { return Ok(()) };
    for registry in registries {
        let registry = registry?;
        if !registry.file_name().as_encoded_bytes().starts_with(b"-") {
            continue;
        }
        for unpacked in packages.iter().map(|name| registry.path().join(name)).filter(|it| it.is_dir()) {
            fs::remove_dir_all(&unpacked).with_context(|| format!("cannot remove {}", unpacked.display()))?;
        }
    }
    Ok(())
}

/// Packs every package that may be published, and verifies each as `cargo publish` would.
pub(crate) fn check() -> Result<()> {
    let workspace = cmd::metadata()?;
    let packages = || workspace.packages.iter().filter(|package| package.publish.as_deref() != Some(&[]));
    let folder = workspace.target_directory.join("packages");
    let prepare = |subcommand| {
        let mut command = cmd::cargo(subcommand);
        command.arg("--quiet").arg("--target-dir").arg(&folder);
        packages().for_each(|it| {
            command.args(["--package", it.name.as_str()]);
        });
        command
    };
    // What cargo built and unpacked of a packed package it takes for good as long as the version is the same.
    cmd::run(&mut prepare("clean"))?;
    let names: Vec<String> = packages().map(|it| format!("{}-{}", it.name, it.version)).collect();
    forget(&names)?;
    let mut package = prepare("package");
    package.args(["--allow-dirty", "--config", "profile.dev.debug=false"]);
    // Device code builds for GPUs alone without it.
    package.args(["--features", "fused-collective-device/simulation"]);
    cmd::run(&mut package)?;

    let mut missing = Vec::new();
    for it in packages() {
        let name = format!("{}-{}", it.name, it.version);
        let unpacked = folder.join("package").join(&name);
        ensure!(unpacked.is_dir(), "{unpacked}, which cargo unpacks to verify {name}, is missing");
        missing.extend(
            LICENCES
                .into_iter()
                .filter(|file| !unpacked.join(file).is_file())
                .map(|file| format!("{name} lacks {file}")),
        );
    }
    ensure!(missing.is_empty(), "{}", missing.join("; "));
    Ok(())
}
