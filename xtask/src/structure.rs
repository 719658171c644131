//! Rules of the workspace's structure that the compiler does not check: the dependencies between crates, folders and files,
//! and a `core` without `alloc`, `std` and `unsafe`.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use crate::{
    cmd,
    modules::{self, Files},
};

/// The crates of the workspace that each crate may depend on, for its tests as well. Every crate has a row.
const MAY_DEPEND_ON: [(&str, &[&str]); 15] = [
    ("fused-collective-core", &[]),
    ("fused-collective-digest", &["fused-collective-core", "fused-collective-emulator"]),
    // On itself with its feature `simulation`, for its tests.
    ("fused-collective-device", &["fused-collective-core", "fused-collective-device"]),
    ("fused-collective-bench", &["fused-collective-core", "fused-collective-device"]),
    ("fused-collective-build", &["fused-collective-core"]),
    ("fused-collective-kernels", &["fused-collective-core"]),
    ("fused-collective-emulator", &["fused-collective-core"]),
    (
        "fused-collective-device-tests",
        &[
            "fused-collective-bench",
            "fused-collective-core",
            "fused-collective-device",
            "fused-collective-emulator",
        ],
    ),
    ("fused-collective-nccl-sys", &[]),
    ("fused-collective", &["fused-collective-core", "fused-collective-kernels", "fused-collective-nccl-sys"]),
    ("fused-collective-capi", &["fused-collective"]),
    (
        "fused-collective-cli",
        &["fused-collective", "fused-collective-bench", "fused-collective-core", "fused-collective-nccl-sys"],
    ),
    ("fused-collective-python", &["fused-collective"]),
    ("fused-collective-tests", &["fused-collective", "fused-collective-cli", "fused-collective-core"]),
    (
        "xtask",
        &[
            "fused-collective-bench",
            "fused-collective-build",
            "fused-collective-core",
            "fused-collective-digest",
            "fused-collective-kernels",
            "fused-collective-nccl-sys",
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
            wrong.push(format!("{} has no row in the table of dependencies", package.name));
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

/// Checks that no files of a crate use each other in a circle, and that its folders use each other as ARCHITECTURE.md says.
pub(crate) fn files() -> Result<()> {
    let architecture = cmd::root().join("ARCHITECTURE.md");
    let folders = layers(&fs::read_to_string(&architecture).context("cannot read ARCHITECTURE.md")?)?;
    let mut wrong = Vec::new();
    for (folder, _) in &folders {
        if !cmd::root().join(folder).is_dir() {
            wrong.push(format!("{folder}, of which ARCHITECTURE.md states layers, is no folder"));
        }
    }
    for package in &cmd::metadata()?.packages {
        for target in &package.targets {
            let root = target.src_path.as_std_path();
            let files = modules::files(root)?;
            for circle in modules::circles(&files) {
                let uses = uses(&files, |file, other| circle.contains(&file) && circle.contains(&other));
                wrong.push(format!("a circle of files in {}:{uses}", package.name));
            }
            for (folder, layers) in &folders {
                if target.is_lib() && root.parent() == Some(&cmd::root().join(folder)) {
                    wrong.extend(upwards(folder, layers, &files, root));
                }
            }
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// The layers of a folder's parts, lowest first. A part is a folder or a file, named without `.rs`.
type Layers = Vec<Vec<String>>;

/// The folders in the block `layers` of ARCHITECTURE.md, one a line, as `FOLDER  PART, PART < PART < ...`: a part uses parts
/// of layers to its left only. A line that begins with a space continues the one before.
fn layers(text: &str) -> Result<Vec<(String, Layers)>> {
    let (_, block) = text.split_once("```layers\n").context("ARCHITECTURE.md has no block ```layers")?;
    let (block, _) = block.split_once("```").context("the block ```layers of ARCHITECTURE.md has no end")?;
    let lines = block.replace("\n ", " ");
    let folders = lines.lines().map(|line| {
        let (folder, layers) =
            line.split_once(' ').with_context(|| format!("a folder without layers: {line}"))?;
        let parts = |layer: &str| layer.split(',').map(|part| part.trim().to_owned()).collect();
        Ok((folder.to_owned(), layers.split('<').map(parts).collect()))
    });
    folders.collect()
}

/// The uses in the crate of `root` that its layers do not allow, and the parts without a layer and the reverse. The root
/// itself is free.
fn upwards(folder: &str, layers: &Layers, files: &Files, root: &Path) -> Vec<String> {
    let part = |file: &Path| {
        let inside = file.strip_prefix(root.parent()?).ok()?.components().next()?;
        Some(Path::new(&inside).file_stem()?.to_string_lossy().into_owned())
    };
    let parts: BTreeSet<String> =
        files.keys().filter(|&file| file != root).filter_map(|file| part(file)).collect();
    let stated: BTreeSet<String> = layers.iter().flatten().cloned().collect();
    let mut wrong: Vec<String> = parts
        .symmetric_difference(&stated)
        .map(|part| format!("{part} is in {folder} or in its layers in ARCHITECTURE.md, but not in both"))
        .collect();
    let layer = |part: String| layers.iter().position(|layer| layer.contains(&part));
    let uses = uses(files, |file, other| {
        let [from, to] = [file, other].map(|file| part(file).filter(|part| stated.contains(part)));
        from.is_some() && to.is_some() && from != to && from.map(layer) <= to.map(layer)
    });
    if !uses.is_empty() {
        wrong.push(format!("uses in {folder} against its layers in ARCHITECTURE.md:{uses}"));
    }
    wrong
}

/// The uses between files that `which` selects, a line for each.
fn uses(files: &Files, which: impl Fn(&Path, &Path) -> bool) -> String {
    let name = |file: &Path| file.strip_prefix(cmd::root()).unwrap_or(file).display().to_string();
    let mut lines = String::new();
    for (file, used) in files {
        for (other, items) in used.iter().filter(|(other, _)| which(file, other)) {
            let items: Vec<_> = items.iter().map(|(item, line)| format!("{item} (line {line})")).collect();
            lines += &format!("\n  {} uses {} of {}", name(file), items.join(", "), name(other));
        }
    }
    lines
}

/// Checks that `core` and all its dependencies are built without `alloc` and `std`, and that `core` forbids `unsafe`.
///
/// Builds for targets without an operating system show the absence of `std` as well. They do not show the absence of
/// `alloc`, which their toolchains may have.
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
            // The compiler does the rest: no module can allow a forbidden lint.
            if !has("#![forbid(unsafe_code)]") {
                wrong.push("core/src/lib.rs lacks #![forbid(unsafe_code)]".to_owned());
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

/// The lines of `file` (relative to the source folder) that link `alloc` or `std` outside tests, each as
/// `file:line: reason`.
fn lines_to_reject(file: &Path, text: &str) -> Vec<String> {
    let mut previous = "";
    let mut wrong = Vec::new();
    for (number, line) in (1..).zip(text.lines().map(str::trim)) {
        let links = |name| line.contains(&format!("extern crate {name}"));
        if (links("alloc") || links("std")) && previous != "#[cfg(test)]" {
            wrong.push(format!(
                "{}:{number}: only tests may use alloc and std (write `#[cfg(test)]` on the line before)",
                file.display()
            ));
        }
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
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn a_part_uses_lower_layers_only() {
        let text = "Text.\n```layers\na/src  error < left,\n       right < top\nb  one\n```\n";
        let folders = layers(text).unwrap();
        assert_eq!(folders[0].0, "a/src");
        assert_eq!(folders[0].1, [&["error"][..], &["left", "right"], &["top"]]);
        assert_eq!(folders[1], ("b".to_owned(), vec![vec!["one".to_owned()]]));

        let file = |name: &str| cmd::root().join("a/src").join(name);
        let uses = [
            ("lib.rs", &["top/mod.rs"][..]),
            ("error.rs", &["lib.rs"]),
            ("left.rs", &["error.rs", "right/mod.rs"]),
            ("right/mod.rs", &["right/inner.rs"]),
            ("right/inner.rs", &["top/mod.rs"]),
            ("top/mod.rs", &["left.rs", "error.rs"]),
        ];
        let items = || [("X".to_owned(), 7)].into();
        let files: Files = uses
            .map(|(name, others)| {
                (file(name), others.iter().map(|other| (file(other), items())).collect::<BTreeMap<_, _>>())
            })
            .into();
        assert_eq!(
            upwards("a/src", &folders[0].1, &files, &file("lib.rs")),
            ["uses in a/src against its layers in ARCHITECTURE.md:\n  \
              a/src/left.rs uses X (line 7) of a/src/right/mod.rs\n  \
              a/src/right/inner.rs uses X (line 7) of a/src/top/mod.rs"]
        );
        // Every part has a layer, and every layer its parts.
        let wrong = upwards("a/src", &folders[1].1, &files, &file("lib.rs"));
        assert_eq!(wrong.len(), ["error", "left", "one", "right", "top"].len(), "{wrong:?}");
    }

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
}
