//! The packages that are published: each is packed, unpacked elsewhere, and built from there against the other packed ones.

use anyhow::{Result, ensure};

use crate::cmd;

/// The files of the licence, which every package has a link to: cargo packs no file of a folder above.
const LICENCES: [&str; 2] = ["LICENSE-APACHE", "LICENSE-MIT"];

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
    // What cargo built of a packed package it takes for good as long as the version is the same.
    cmd::run(&mut prepare("clean"))?;
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
