//! The program, linked once more by GNU ld: a distribution's compiler uses it, rustup's uses LLD.
//!
//! Only the last step is done again, from what the tests' build left, so it takes about a second. `cargo rustc` with other
//! link arguments would choose the features of shared crates for the program alone, and compile most of it again.

use std::{collections::BTreeSet, env, fs, path::PathBuf, process::Command};

use anyhow::{Context, Result, ensure};
use cargo_metadata::{Artifact, Message};

use crate::cmd;

/// The note that LLD leaves in what it links. GNU ld leaves none.
const NOTE_OF_LLD: &[u8] = b"Linker: LLD";

/// A program that cargo has built, and what it was linked from.
#[derive(Debug)]
pub(crate) struct Program {
    /// Its file.
    pub(crate) executable: PathBuf,
    source: PathBuf,
    edition: &'static str,
    /// The name and the file of the library that the binary is a shell of.
    rlib: (String, PathBuf),
    /// Folders of native libraries, as rustc's `-L` takes them.
    search: BTreeSet<String>,
}

impl Program {
    /// The binary `name` among `messages`, cargo's lines of JSON about a build.
    ///
    /// # Errors
    /// The build made no such binary, or none with a library in its package.
    pub(crate) fn among(messages: &str, name: &str) -> Result<Self> {
        let (mut artifacts, mut search) = (Vec::new(), BTreeSet::new());
        for message in Message::parse_stream(messages.as_bytes()) {
            match message? {
                Message::CompilerArtifact(artifact) if !artifact.profile.test => artifacts.push(artifact),
                Message::BuildScriptExecuted(script) => {
                    search.extend(script.linked_paths.into_iter().map(String::from));
                }
                _ => {}
            }
        }
        let is_program = |it: &&Artifact| it.target.is_bin() && it.target.name == name;
        let program = artifacts.iter().find(is_program);
        let program = program.with_context(|| format!("cargo built no program {name}"))?;
        let is_library = |it: &&Artifact| it.target.is_lib() && it.package_id == program.package_id;
        let library = artifacts.iter().find(is_library);
        let library = library.with_context(|| format!("{name} has no library in its package"))?;
        let file = library.filenames.iter().find(|file| file.extension() == Some("rlib"));
        Ok(Program {
            executable: program.executable.clone().context("the program was built to no file")?.into(),
            source: program.target.src_path.clone().into(),
            edition: program.target.edition.as_str(),
            rlib: (library.target.name.clone(), file.context("a library has an rlib")?.into()),
            search,
        })
    }

    /// Links it by GNU ld into a file of its own, and starts that.
    ///
    /// # Errors
    /// GNU ld is missing or refuses something, or the program does not start.
    pub(crate) fn link(&self) -> Result<()> {
        let folder = tempfile::tempdir()?;
        let program = folder.path().join("program");
        let (name, file) = &self.rlib;
        let mut rustc = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
        rustc.args(["--edition", self.edition, "--crate-name", "program"]).arg(&self.source);
        rustc.arg("--extern").arg(format!("{name}={}", file.display()));
        rustc.arg("-L").arg(format!("dependency={}", file.with_file_name("").display()));
        rustc.args(self.search.iter().flat_map(|path| ["-L", path]));
        rustc.arg("-Clink-arg=-fuse-ld=bfd").arg("-o").arg(&program);
        cmd::run(&mut rustc)?;
        let bytes = fs::read(&program)?;
        let by_lld = bytes.windows(NOTE_OF_LLD.len()).any(|bytes| bytes == NOTE_OF_LLD);
        ensure!(!by_lld, "the compiler linked by LLD although it was told to use GNU ld");
        cmd::read(Command::new(&program).arg("--help")).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cargo's line about a target of the package `it`.
    fn artifact(kind: &str, name: &str, files: &str, test: bool) -> String {
        let executable = if kind == "bin" { files } else { "null" };
        format!(
            r#"{{"reason":"compiler-artifact","package_id":"it","manifest_path":"/it/Cargo.toml","target":{{"kind":["{kind}"],"crate_types":["{kind}"],"name":"{name}","src_path":"/it/{kind}.rs","edition":"2024"}},"profile":{{"opt_level":"1","debug_assertions":true,"overflow_checks":true,"test":{test}}},"features":[],"filenames":[{files}],"executable":{executable},"fresh":true}}
"#
        )
    }

    #[test]
    fn a_program_is_linked_from_the_library_of_its_package_that_is_no_test() {
        let library = artifact("lib", "it_lib", r#""/deps/it.rmeta","/deps/it.rlib""#, false);
        let test = artifact("lib", "it_lib", r#""/deps/it-test""#, true);
        let program = artifact("bin", "it", r#""/it""#, false);
        let program = Program::among(&[&*test, &*library, &*program].concat(), "it").unwrap();
        assert_eq!(program.executable, PathBuf::from("/it"));
        assert_eq!(program.source, PathBuf::from("/it/bin.rs"));
        assert_eq!(program.rlib, ("it_lib".to_owned(), PathBuf::from("/deps/it.rlib")));
        assert_eq!(program.edition, "2024");
    }

    #[test]
    fn a_build_without_the_program_or_its_library_is_an_error() {
        let error = |messages: &str| Program::among(messages, "it").unwrap_err().to_string();
        assert_eq!(error(""), "cargo built no program it");
        let program = artifact("bin", "it", r#""/it""#, false);
        assert_eq!(error(&program), "it has no library in its package");
    }
}
