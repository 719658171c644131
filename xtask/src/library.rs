//! The library's promises to whoever embeds it: few crates, each feature alone, nothing of CUDA to build with, and no symbol
//! of the driver for another's linker to find.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::{Context, Result, ensure};
use cargo_metadata::{Message, MetadataCommand, TargetKind};
use object::{
    Object, ObjectSymbol,
    read::archive::{ArchiveFile, ArchiveMember},
};

use crate::cmd;

/// The package.
const LIBRARY: &str = "fused-collective";
/// The crates that it may pull with all its features, proc-macros and build scripts counted. Twelve are for ranks of several
/// hosts: ten are HMAC-SHA-256, by which they prove that they belong together, and two find NCCL.
const CRATES: usize = 37;

/// Checks that the library pulls at most [`CRATES`] crates, and none that links with a native library: that is what would
/// look for one when it is built.
pub(crate) fn crates() -> Result<()> {
    let mut tree = cmd::cargo("tree");
    tree.args(["--package", LIBRARY, "--all-features", "--edges", "normal,build", "--prefix", "none"]);
    let tree = cmd::read(&mut tree)?;
    let crates = crates_of(&tree);
    ensure!(crates.len() <= CRATES, "{LIBRARY} pulls {} crates, and may {CRATES}:\n{tree}", crates.len());
    let metadata = MetadataCommand::new().manifest_path(cmd::root().join("Cargo.toml")).exec()?;
    let linking: Vec<String> = metadata
        .packages
        .iter()
        .filter(|package| crates.contains(&(package.name.to_string(), format!("v{}", package.version))))
        .filter_map(|package| Some(format!("{} links with {}", package.name, package.links.as_ref()?)))
        .collect();
    ensure!(linking.is_empty(), "a user of {LIBRARY} would need what it links with: {}", linking.join("; "));
    println!("{LIBRARY} pulls {} crates", crates.len());
    Ok(())
}

/// The crates in the output of `cargo tree`, as name and version, but for the first, whose tree it is.
fn crates_of(tree: &str) -> BTreeSet<(String, String)> {
    let crates = tree.lines().filter_map(|line| {
        let mut words = line.split_whitespace().map(str::to_owned);
        Some((words.next()?, words.next()?))
    });
    let mut crates: Vec<_> = crates.collect();
    let itself = crates.first().cloned();
    crates.retain(|it| Some(it) != itself.as_ref());
    crates.into_iter().collect()
}

/// Checks that the library builds, without a warning, with each feature alone and with none, and with no variable set.
pub(crate) fn features() -> Result<()> {
    for features in [&[][..], &["--features", "cpu"], &["--features", "cuda"]] {
        let mut clippy = cmd::cargo("clippy");
        clippy
            .args(["--package", LIBRARY, "--no-default-features"])
            .args(features)
            // Each backend leaves parts of what both stand on to the other.
            .args(["--", "-D", "warnings", "-A", "dead_code"]);
        // Cargo reads `.cargo/config.toml` of the folder that it runs in: in another one it sets none of this project's
        // variables, as a user's build does not.
        clippy.current_dir("/").env_remove("CUDA_LIBRARY_PATH");
        cmd::run(&mut clippy)?;
    }
    Ok(())
}

/// Checks that the library, built with all its features, defines no symbol that NVIDIA's driver has.
pub(crate) fn symbols() -> Result<()> {
    // What the tests' build has built.
    let mut build = cmd::cargo("test");
    build.args(["--workspace", "--no-run", "--message-format=json-render-diagnostics"]);
    let mut libraries = Vec::new();
    for message in Message::parse_stream(cmd::read(&mut build)?.as_bytes()) {
        if let Message::CompilerArtifact(artifact) = message?
            && artifact.target.name == LIBRARY.replace('-', "_")
            && artifact.target.is_kind(TargetKind::Lib)
            && !artifact.profile.test
        {
            libraries.extend(artifact.filenames.into_iter().filter(|file| file.extension() == Some("rlib")));
        }
    }
    ensure!(!libraries.is_empty(), "cargo built the tests without {LIBRARY}");
    for library in &libraries {
        let symbols = driver_symbols(library.as_std_path())?;
        ensure!(symbols.is_empty(), "{library} defines symbols of the driver: {}", symbols.join(", "));
    }
    Ok(())
}

/// The symbols that a library of Rust defines and that are named as the driver's functions are: `cuInit`.
fn driver_symbols(library: &Path) -> Result<Vec<String>> {
    let data = fs::read(library).with_context(|| format!("cannot read {}", library.display()))?;
    let archive = ArchiveFile::parse(&*data).with_context(|| format!("cannot read {}", library.display()))?;
    let mut symbols = Vec::new();
    for member in archive.members() {
        let member: ArchiveMember<'_> = member?;
        // The compiler's metadata is no object.
        let Ok(object) = object::File::parse(member.data(&*data)?) else { continue };
        for symbol in object.symbols().filter(|symbol| symbol.is_definition()) {
            let name = symbol.name()?;
            if name.strip_prefix("cu").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_uppercase()))
            {
                symbols.push(name.to_owned());
            }
        }
    }
    Ok(symbols)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn every_crate_is_counted_once_and_the_library_is_not() {
        let tree = "a v0.2.0 (/home/a)\nb v1.0.0\nc v2.0.0 (proc-macro)\nb v1.0.0 (*)\nb v2.0.0\n\n";
        let crates = crates_of(tree);
        let expected = [("b", "v1.0.0"), ("b", "v2.0.0"), ("c", "v2.0.0")];
        assert_eq!(crates, expected.map(|(name, version)| (name.to_owned(), version.to_owned())).into());
    }

    #[test]
    fn a_library_that_defines_the_driver_s_functions_is_found_out() {
        let folder = tempfile::tempdir().unwrap();
        let symbols = |name: &str, source: &str| {
            let source_file = folder.path().join(name);
            fs::write(&source_file, source).unwrap();
            let library = source_file.with_extension("rlib");
            cmd::run(Command::new("rustc").args(["--crate-type=rlib", "-o"]).arg(&library).arg(&source_file))
                .unwrap();
            driver_symbols(&library).unwrap()
        };
        let define = "#[unsafe(no_mangle)] pub extern \"C\" fn cuInit(_: u32) -> u32 { 0 } pub fn cuts() {}";
        assert_eq!(symbols("defines.rs", define), ["cuInit"]);
        let call = "unsafe extern \"C\" { fn cuInit(flags: u32) -> u32; } pub fn init() -> u32 { unsafe { cuInit(0) } }";
        assert_eq!(symbols("calls.rs", call), [""; 0]);
    }
}
