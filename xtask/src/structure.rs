//! What the compiler does not check of the workspace's structure: which crate may depend on which, and that `core`
//! needs neither an allocator nor `unsafe` outside `arch`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use crate::cmd;

/// The crates of the workspace that each crate may depend on, for its tests as well. Crates without a row are free.
const MAY_DEPEND_ON: [(&str, &[&str]); 10] = [
    ("fused-collective-core", &[]),
    // On itself with its feature `simulation`, for its tests.
    ("fused-collective-device", &["fused-collective-core", "fused-collective-device"]),
    ("fused-collective-bench", &["fused-collective-core", "fused-collective-device"]),
    ("fused-collective-build", &["fused-collective-core"]),
    ("fused-collective-emulator", &["fused-collective-core"]),
    ("fused-collective-kernels", &["fused-collective-core"]),
    (
        "fused-collective-device-tests",
        &[
            "fused-collective-bench",
            "fused-collective-core",
            "fused-collective-device",
            "fused-collective-emulator",
        ],
    ),
    ("nccl-sys", &[]),
    (
        "fused-collective",
        &["fused-collective-bench", "fused-collective-core", "fused-collective-kernels", "nccl-sys"],
    ),
    (
        "xtask",
        &[
            "fused-collective-bench",
            "fused-collective-build",
            "fused-collective-core",
            "fused-collective-kernels",
            "nccl-sys",
        ],
    ),
];

/// Checks every crate's dependencies against [`MAY_DEPEND_ON`].
pub(crate) fn dependencies() -> Result<()> {
    let workspace = cmd::metadata()?;
    let members: Vec<&str> = workspace.packages.iter().map(|package| package.name.as_str()).collect();
    let mut wrong = Vec::new();
    for package in &workspace.packages {
        let Some((_, allowed)) = MAY_DEPEND_ON.iter().find(|(name, _)| *name == package.name.as_str()) else {
            continue;
        };
        for dependency in package.dependencies.iter().map(|dependency| dependency.name.as_str()) {
            if members.contains(&dependency) && !allowed.contains(&dependency) {
                wrong.push(format!("{} must not depend on {dependency}", package.name));
            }
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    Ok(())
}

/// Checks that `core` and all it depends on is built without `alloc` and `std`, and that only `arch` has `unsafe`.
///
/// That there is no `std` is shown by the targets it is built for as well; that there is no `alloc` is not, since their
/// toolchains may bring one.
pub(crate) fn core() -> Result<()> {
    let mut wrong = features()?;
    let source = cmd::root().join("core/src");
    for file in rust_files(&source)? {
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let name = file.strip_prefix(&source)?;
        wrong.extend(lines_to_reject(name, &text).into_iter().map(|line| format!("core/src/{line}")));
        if name == Path::new("lib.rs") {
            let has = |attribute: &str| text.lines().any(|line| line == attribute);
            if !has("#![no_std]") {
                wrong.push("core/src/lib.rs lacks #![no_std]".to_owned());
            }
            // With `forbid`, the compiler lets not even `arch` allow it.
            if !has("#![forbid(unsafe_code)]") && !has("#![deny(unsafe_code)]") {
                wrong.push("core/src/lib.rs neither forbids nor denies unsafe_code".to_owned());
            }
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    Ok(())
}

/// The packages that an ordinary build of `core` takes in with their feature `alloc` or `std`.
fn features() -> Result<Vec<String>> {
    let mut tree = cmd::cargo("tree");
    tree.args(["--package", "fused-collective-core", "--edges", "normal,no-proc-macro"]);
    // A feature that only a test of another crate asks for is not part of such a build.
    tree.args(["--prefix", "none", "--format", "{p}\t{f}"]);
    let tree = cmd::read(&mut tree)?;
    let mut wrong: Vec<String> = tree
        .lines()
        .filter_map(|line| line.split_once('\t'))
        .filter(|(_, features)| features.split(',').any(|feature| ["alloc", "std"].contains(&feature)))
        .map(|(package, features)| format!("core depends on {package} with the features {features}"))
        .collect();
    wrong.sort();
    wrong.dedup();
    Ok(wrong)
}

/// The lines of `file` (relative to the source folder) that take in `alloc` or `std` outside tests, or that allow
/// `unsafe` outside `arch`, each as `file:line: reason`.
fn lines_to_reject(file: &Path, text: &str) -> Vec<String> {
    let in_arch = file.iter().next().is_some_and(|first| first == "arch" || first == "arch.rs");
    let mut previous = "";
    let mut wrong = Vec::new();
    for (number, line) in (1..).zip(text.lines().map(str::trim)) {
        let takes_in = |name| line.contains(&format!("extern crate {name}"));
        let reason = if (takes_in("alloc") || takes_in("std")) && previous != "#[cfg(test)]" {
            Some("only tests may use alloc and std (write `#[cfg(test)]` on the line before)")
        } else if line.starts_with('#')
            && ["allow(unsafe_code)", "expect(unsafe_code)", "warn(unsafe_code)"]
                .iter()
                .any(|it| line.contains(it))
            && !in_arch
        {
            Some("only the files of `arch` may allow unsafe code, each for itself")
        } else {
            None
        };
        wrong.extend(reason.map(|reason| format!("{}:{number}: {reason}", file.display())));
        previous = line;
    }
    wrong
}

/// Every `.rs` file under `folder`.
fn rust_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else if entry.path().extension().is_some_and(|extension| extension == "rs") {
                files.push(entry.path());
            }
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn core_may_use_alloc_and_std_in_tests_only() {
        let file = Path::new("quant/mod.rs");
        assert_eq!(lines_to_reject(file, "#[cfg(test)]\nextern crate std;\n"), [""; 0]);
        for line in ["extern crate std;", "    pub extern crate alloc as heap;"] {
            let wrong = lines_to_reject(file, &format!("//! Text.\n\n{line}\n"));
            assert!(
                matches!(&wrong[..], [line] if line.starts_with("quant/mod.rs:3: only tests")),
                "{wrong:?}"
            );
        }
    }

    #[test]
    fn only_arch_may_allow_unsafe_code() {
        for attribute in ["#[allow(unsafe_code)]", "#![allow(unsafe_code)]", "    #[expect(unsafe_code)]"] {
            assert_eq!(lines_to_reject(Path::new("arch/x86_64.rs"), attribute), [""; 0]);
            assert_eq!(lines_to_reject(Path::new("arch.rs"), attribute), [""; 0]);
            let wrong = lines_to_reject(Path::new("pack.rs"), attribute);
            assert!(
                matches!(&wrong[..], [line] if line.starts_with("pack.rs:1: only the files of `arch`")),
                "{wrong:?}"
            );
        }
        assert_eq!(
            lines_to_reject(Path::new("lib.rs"), "#![deny(unsafe_code)]\n#![forbid(unsafe_code)]"),
            [""; 0]
        );
    }
}
