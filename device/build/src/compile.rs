//! From a package to PTX, by cargo and rustc.
//!
//! `--emit=asm` gives all of a `staticlib` linked as one PTX file. One run of cargo builds all of a processor's modules, as
//! many at a time as there are cores, and only those whose source has changed.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

use cargo_metadata::Message;

use crate::{
    Error, Module, Processor, Report, TARGET, Toolchain,
    bounds::{self, BoundsOf},
    check, command,
    package::Package,
};

/// The profile of device code: linked whole, and without unwinding, which GPUs do not have.
const PROFILE: [&str; 3] =
    ["profile.release.panic=\"abort\"", "profile.release.lto=\"fat\"", "profile.release.codegen-units=1"];

pub(crate) struct Compiler<'a> {
    pub(crate) toolchain: Toolchain,
    pub(crate) package: Package,
    pub(crate) cache: &'a Path,
    pub(crate) output: &'a Path,
    pub(crate) bounds: Option<&'a BoundsOf>,
}

impl Compiler<'_> {
    /// Compiles the package's modules for `compiled_for`, and writes them for each of `processors`.
    pub(crate) fn compile(
        &self,
        compiled_for: Processor,
        processors: &[Processor],
    ) -> Result<Vec<Module>, Error> {
        let built = self.libraries(compiled_for)?;
        let mut modules = Vec::new();
        for name in self.package.modules() {
            let wrong = |problem: String| Error::Compiler { module: name.to_owned(), problem };
            let library = built.iter().find(|(target, _)| target == name);
            let (_, library) = library.ok_or_else(|| wrong("cargo built no library of it".to_owned()))?;
            let assembly = assembly(library, name)?
                .ok_or_else(|| wrong(format!("rustc left no assembly beside {}", library.display())))?;
            let text = fs::read_to_string(&assembly).map_err(Error::io("read", &assembly))?;
            let text = renumber(&without_comments(&text));
            let header = compiled_for.header();
            if !text.contains(&header) {
                return Err(wrong(format!("{} does not begin with {header:?}", assembly.display())));
            }
            for &processor in processors {
                let mut ptx = text.replacen(&header, &processor.header(), 1);
                if let Some(bounds) = self.bounds {
                    ptx = bounds::add(&ptx, processor, name, bounds);
                }
                let folder = self.output.join(processor.name());
                let path = folder.join(format!("{name}.ptx"));
                fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
                fs::write(&path, ptx).map_err(Error::io("write", &path))?;
                // Older machine code must not stay beside newer PTX. Usually there is none.
                let _ = fs::remove_file(check::machine_code(&path));
                let name = name.to_owned();
                modules.push(Module { name, processor, path, machine_code: None, report: Report::default() });
            }
        }
        Ok(modules)
    }

    /// Runs cargo. Returns the static libraries that it built, with their targets' names.
    fn libraries(&self, compiled_for: Processor) -> Result<Vec<(String, PathBuf)>, Error> {
        let Package { manifest, name, device, .. } = &self.package;
        let mut cargo = self.toolchain.cargo(manifest, "build", TARGET, &self.cache.join("cross/ptx"));
        cargo.args(["--release", "--message-format=json-render-diagnostics", "--package", name]);
        cargo.args(self.package.targets());
        // Kernels use unstable features of the language, and a package's flags are one of cargo's.
        cargo.env("RUSTC_BOOTSTRAP", "1").arg("-Zprofile-rustflags");
        // Flags for all would have Rust's own `core` built once more for each processor. What kernels use of it is generic
        // or inline, and so compiled with them.
        cargo.env("RUSTFLAGS", "").env_remove("CARGO_ENCODED_RUSTFLAGS");
        for option in PROFILE {
            cargo.args(["--config", option]);
        }
        for package in device {
            let mut flags = compiled_for.flags().to_vec();
            if package == name {
                flags.push("--emit=asm".to_owned());
            }
            cargo.arg("--config").arg(format!("profile.release.package.{package}.rustflags={flags:?}"));
        }
        let messages = command::output(&mut cargo)?;
        let mut libraries = Vec::new();
        for message in Message::parse_stream(messages.as_bytes()) {
            let message = message.map_err(Error::io("understand cargo's messages on", manifest))?;
            let Message::CompilerArtifact(artifact) = message else { continue };
            let library = artifact.filenames.iter().find(|file| file.extension() == Some("a"));
            libraries.extend(library.map(|library| (artifact.target.name.clone(), library.into())));
        }
        Ok(libraries)
    }
}

/// PTX without its lines of comments, which stand round every instruction that the source wrote itself.
fn without_comments(ptx: &str) -> String {
    let lines = ptx.lines().filter(|line| !line.trim_start().starts_with("//"));
    lines.flat_map(|line| [line, "\n"]).collect()
}

/// The beginning of a label: the number of its function and `_` follow, and then its own number.
const LABEL: &str = "$L__BB";

/// PTX with registers and labels of each kernel numbered as they are named first. To an assembler it is the same. It compresses
/// better, and where two builds differ in a register they do not differ everywhere after it.
fn renumber(ptx: &str) -> String {
    // Of each kind, which its declaration adds, the new numbers by the old ones.
    let mut kinds: HashMap<&str, HashMap<&str, usize>> = HashMap::new();
    let (mut renumbered, mut rest) = (String::with_capacity(ptx.len()), ptx);
    while let Some(at) = rest.find(['%', '$', '.']) {
        let name = &rest[at..];
        let prefix = match name.strip_prefix(LABEL) {
            Some(label) => &name[..LABEL.len() + label.find('_').map_or(0, |end| end + 1)],
            None => &name[..1 + name[1..].find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(name.len() - 1)],
        };
        renumbered += &rest[..at + prefix.len()];
        rest = &name[prefix.len()..];
        if prefix == ".entry" || prefix == ".func" {
            kinds.clear();
        } else if prefix.starts_with(LABEL) || rest.starts_with('<') {
            kinds.entry(prefix).or_default();
        }
        let (digits, after) = rest.split_at(rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len()));
        if let Some(numbers) = kinds.get_mut(prefix).filter(|_| !digits.is_empty()) {
            let next = numbers.len() + 1;
            renumbered += &numbers.entry(digits).or_insert(next).to_string();
            rest = after;
        }
    }
    renumbered + rest
}

/// The assembly that rustc left with the static library `library` of the crate `name`. Both have a hash in their name, and
/// older ones may lie beside them; `library` is a copy of the current one.
fn assembly(library: &Path, name: &str) -> Result<Option<PathBuf>, Error> {
    let current = fs::read(library).map_err(Error::io("read", library))?;
    let beside = library.parent().unwrap_or(library);
    for folder in [beside, &beside.join("deps")] {
        let entries = match fs::read_dir(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries.map_err(Error::io("read", folder))?,
        };
        for entry in entries {
            let path = entry.map_err(Error::io("read", folder))?.path();
            let stem =
                path.file_name().and_then(|file| file.to_str()?.strip_prefix("lib")?.strip_suffix(".a"));
            let Some(stem) =
                stem.filter(|stem| stem.strip_prefix(name).is_some_and(|hash| hash.starts_with('-')))
            else {
                continue;
            };
            if fs::read(&path).map_err(Error::io("read", &path))? == current {
                return Ok(Some(folder.join(format!("{stem}.s"))));
            }
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_comments_are_left_out_of_ptx_and_nothing_else_is() {
        let ptx = "//\n.version 8.6\n\tret;   // end\n\t// begin inline asm\n\texit;\n";
        assert_eq!(without_comments(ptx), ".version 8.6\n\tret;   // end\n\texit;\n");
    }

    #[test]
    fn registers_and_labels_are_numbered_as_they_are_named() {
        let ptx = |[a, b, c, d, label]: [u32; 5]| {
            format!(
                ".version 8.6\n.visible .entry one(\n\t.param .b64 one_param_0\n)\n{{\n\t.reg .b32 \t%r<9>;\n\t.reg .b64 \t%rd<9>;\n\
                 \tmov.u64 \t%rd{a}, %clock64;\n\tmov.u32 \t%r{b}, %tid.x;\n\tbra \t$L__BB0_{label};\n\
                 $L__BB0_{label}:\n\tadd.s32 \t%r{c}, %r{b}, %r{d};\n\tret;\n}}\n"
            )
        };
        let two = |text: String| text.replace("one", "two");
        let numbered = ptx([1, 1, 2, 3, 1]);
        assert_eq!(renumber(&ptx([7, 5, 3, 8, 6])), numbered);
        assert_eq!(renumber(&numbered), numbered);
        // A kernel or a function has names of its own, and what is not declared is none.
        let function = |text: String| text.replace(".visible .entry", ".func");
        assert_eq!(
            renumber(&(ptx([7, 5, 3, 8, 6]) + &function(ptx([2, 4, 6, 8, 3])))),
            ptx([1, 1, 2, 3, 1]) + &function(ptx([1, 1, 2, 3, 1]))
        );
        let both = ptx([7, 5, 3, 8, 6]) + &two(ptx([2, 4, 6, 8, 3]));
        assert_eq!(renumber(&both), numbered.clone() + &two(numbered));
        for text in ["", "%", "$", "$L__BB", "100%", "%r1 $L_brx_5 %clock64 e.g. 1.5"] {
            assert_eq!(renumber(text), text);
        }
    }

    #[test]
    fn the_assembly_is_that_of_the_library_that_is_current() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        for (hash, text) in [("0a", "old"), ("1b", "current"), ("2c", "other")] {
            write(&format!("libbf16_w2-{hash}.a"), text);
        }
        write("libf16_w2-3d.a", "current");
        write("libbf16_w2.a", "current");
        let library = folder.path().join("libbf16_w2.a");
        assert_eq!(assembly(&library, "bf16_w2").unwrap(), Some(folder.path().join("bf16_w2-1b.s")));
        write("libbf16_w2.a", "newer");
        assert_eq!(assembly(&library, "bf16_w2").unwrap(), None);
        // As cargo has it for a package's library.
        fs::create_dir(folder.path().join("deps")).unwrap();
        write("deps/libbf16_w2-4e.a", "newer");
        assert_eq!(assembly(&library, "bf16_w2").unwrap(), Some(folder.path().join("deps/bf16_w2-4e.s")));
    }
}
