//! `cargo xtask dist`: a folder, and an archive of it, that runs on a machine with nothing but a driver (or, on the CPU
//! backend, with nothing): the stripped program and the C library, with the kernels for every processor in them, and the
//! licences of all that they are built from.
//!
//! The one thing that it does need is a C library that is recent enough: the program's own list of symbol versions says
//! how recent.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    env, fmt,
    fs::{self, File},
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use cargo_metadata::{DependencyKind, MetadataCommand, Package};
use flate2::{Compression, write::GzEncoder};
use fused_collective_build::Processor;
use object::{Endianness, elf::FileHeader64, read::elf::FileHeader};

use crate::{
    cmd,
    cross::{Target, Tools},
    kernels,
};

const PACKAGE: &str = "fused-collective-cli";
/// Its program.
const PROGRAM: &str = "fused-collective";
/// The package of the C ABI.
const CAPI: &str = "fused-collective-capi";
/// Its libraries.
const LIBRARIES: [&str; 2] = ["libfused_collective_capi.so", "libfused_collective_capi.a"];
/// Its header, in the workspace.
const HEADER: &str = "host/capi/include/fused_collective.h";
/// The profile in the workspace's `Cargo.toml`, and the folder that cargo gives it.
const PROFILE: &str = "dist";
/// Files from the workspace's root that go along as they are.
const LICENSES: [&str; 2] = ["LICENSE-APACHE", "LICENSE-MIT"];

/// Builds everything, for this machine or for `target`, and leaves it in `output` (`target/distribution` if there is none).
/// Prints where.
///
/// # Errors
/// Something does not build, or cannot be written.
pub(crate) fn make(output: Option<PathBuf>, processors: &[Processor], target: Option<Target>) -> Result<()> {
    let target = target.filter(|target| !target.is_here());
    let tools = target.map(Tools::find).transpose()?;
    let output = match output {
        Some(output) => output,
        None => cmd::target_directory()?.join("distribution"),
    };
    eprintln!("building the kernels (minutes the first time)");
    let kernels = kernels::embed(processors)?;
    let program = build(tools.as_ref(), &["--package", PACKAGE, "--bin", PROGRAM])?.join(PROGRAM);
    let folder = build(tools.as_ref(), &["--package", CAPI, "--lib"])?;
    let libraries = LIBRARIES.map(|library| folder.join(library));
    for archive in kernels {
        // The kernels that only measure are the program's.
        let carriers = if archive.starts_with(cmd::root().join("device")) { &libraries[..] } else { &[] };
        for carrier in carriers.iter().chain([&program]) {
            ensure!(
                contains(carrier, &archive)?,
                "{} does not carry the kernels in {}: build again",
                carrier.display(),
                archive.display()
            );
        }
    }
    let contents = Contents {
        version: version()?,
        arch: target.map_or(env::consts::ARCH, Target::arch),
        glibc: glibc_needed(&program)?.max(glibc_needed(&libraries[0])?),
        program,
        libraries,
        processors: processors.to_vec(),
        third_party: third_party(&target.map_or_else(host, |target| Ok(target.triple().to_owned()))?)?,
    };
    let (folder, archive) = contents.write(&output)?;
    let size = fs::metadata(&archive)?.len() as f64 / f64::from(1 << 20);
    println!("{}\n{} ({size:.1} MiB)", folder.display(), archive.display());
    println!("needs {}, and for GPUs NVIDIA's driver; nothing else", contents.needs());
    Ok(())
}

/// Tells if the bytes of the file `part` are in the file `whole`.
fn contains(whole: &Path, part: &Path) -> Result<bool> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let (whole, part) = (read(whole)?, read(part)?);
    ensure!(!part.is_empty(), "there are no kernels");
    Ok(whole.windows(part.len()).any(|bytes| bytes == part))
}

/// Builds `what` with [`PROFILE`], and returns the folder that it is in. Paths of this machine are left out of it.
fn build(tools: Option<&Tools>, what: &[&str]) -> Result<PathBuf> {
    let mut flags = vec![format!("--remap-path-prefix={}=.", cmd::root().display())];
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    if let Some(cargo) = home.or_else(|| env::home_dir().map(|home| home.join(".cargo"))) {
        flags.push(format!("--remap-path-prefix={}=cargo", cargo.display()));
    }
    let (mut cargo, folder) = match tools {
        None => (cmd::cargo("build"), cmd::target_directory()?),
        Some(tools) => (tools.cargo("build")?, tools.folder()?),
    };
    cargo.args(["--profile", PROFILE]).args(what);
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    cmd::run(&mut cargo)?;
    Ok(folder.join(PROFILE))
}

fn version() -> Result<String> {
    let packages = cmd::metadata()?.packages;
    let package = packages.iter().find(|package| package.name.as_str() == PACKAGE);
    Ok(package.with_context(|| format!("the workspace has no package {PACKAGE}"))?.version.to_string())
}

/// A version of the C library: 2.34.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Glibc(u32, u32);

impl fmt::Display for Glibc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// The latest version of glibc whose symbols a program asks for; `None` if it asks for none.
fn glibc_needed(program: &Path) -> Result<Option<Glibc>> {
    let bytes = fs::read(program).with_context(|| format!("cannot read {}", program.display()))?;
    needed(&bytes).with_context(|| format!("{} is not a program for Linux", program.display()))
}

fn needed(bytes: &[u8]) -> Result<Option<Glibc>> {
    let header = FileHeader64::<Endianness>::parse(bytes)?;
    let endian = header.endian()?;
    let sections = header.sections(endian, bytes)?;
    let mut latest = None;
    let Some((mut libraries, strings)) = sections.gnu_verneed(endian, bytes)? else { return Ok(None) };
    let strings = sections.strings(endian, bytes, strings)?;
    while let Some((_, mut versions)) = libraries.next()? {
        while let Some(version) = versions.next()? {
            let name = String::from_utf8_lossy(version.name(endian, strings)?);
            latest = latest.max(parse_glibc(&name));
        }
    }
    Ok(latest)
}

/// `GLIBC_2.34`, or `GLIBC_2.2.5`, whose last part matters to nobody.
fn parse_glibc(version: &str) -> Option<Glibc> {
    let mut parts = version.strip_prefix("GLIBC_")?.split('.');
    Some(Glibc(parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// What goes into the folder.
struct Contents {
    version: String,
    /// The architecture that it is for.
    arch: &'static str,
    program: PathBuf,
    /// Those of the C ABI.
    libraries: [PathBuf; 2],
    /// Those that it has kernels for.
    processors: Vec<Processor>,
    glibc: Option<Glibc>,
    third_party: String,
}

impl Contents {
    /// `fused-collective-0.1.0-x86_64-linux`.
    fn name(&self) -> String {
        format!("{PROGRAM}-{}-{}-{}", self.version, self.arch, env::consts::OS)
    }

    fn needs(&self) -> String {
        let linux = format!("Linux on {}", self.arch);
        // Rust's programs unwind with GCC's library, which is there wherever glibc usually is.
        self.glibc.map_or_else(
            || linux.clone(),
            |glibc| format!("{linux} with glibc {glibc} or later and libgcc_s"),
        )
    }

    /// Writes the folder and its archive into `output`, in place of those that are there, and returns both.
    fn write(&self, output: &Path) -> Result<(PathBuf, PathBuf)> {
        fs::create_dir_all(output).with_context(|| format!("cannot create {}", output.display()))?;
        // What is being written has another name until it is whole.
        let scratch = tempfile::Builder::new().prefix(".dist-").tempdir_in(output)?;
        let making = scratch.path().join(self.name());
        self.fill(&making)?;
        let archive_name = format!("{}.tar.gz", self.name());
        let packed = scratch.path().join(&archive_name);
        pack(&making, &self.name(), &packed)?;

        let (folder, archive) = (output.join(self.name()), output.join(archive_name));
        if folder.exists() {
            fs::remove_dir_all(&folder).with_context(|| format!("cannot replace {}", folder.display()))?;
        }
        fs::rename(making, &folder)?;
        fs::rename(packed, &archive)?;
        Ok((folder, archive))
    }

    fn fill(&self, folder: &Path) -> Result<()> {
        let put = |name: &str, text: &str| write_file(&folder.join(name), text.as_bytes(), 0o644);
        copy(&self.program, &folder.join(PROGRAM), 0o755)?;
        for (library, name) in self.libraries.iter().zip(LIBRARIES) {
            copy(library, &folder.join("lib").join(name), 0o644)?;
        }
        copy(&cmd::root().join(HEADER), &folder.join("include/fused_collective.h"), 0o644)?;
        for license in LICENSES {
            copy(&cmd::root().join(license), &folder.join(license), 0o644)?;
        }
        put("THIRD-PARTY.txt", &self.third_party)?;
        put("README.md", &self.readme())
    }

    fn readme(&self) -> String {
        let processors: Vec<_> = self.processors.iter().map(|processor| processor.name()).collect();
        format!(
            "\
# fused-collective {version}

Fused all-reduce + residual add + RMSNorm + FP8/FP4 quantization: the program that verifies and benchmarks it, and its
C library, with kernels for GPUs ({processors}, and what runs their PTX).

It needs {needs}.

On GPUs it needs NVIDIA's driver (for CUDA 12 or later, for all of its speed) and two or more GPUs with peer access to each
other; no CUDA toolkit and no Rust. NCCL is compared with where it is found, and with Python so are packages:
`--peers flashinfer,torch`.

```sh
./{PROGRAM} verify --quick       # is it right on this machine?
./{PROGRAM} bench                # is it fast? on the GPUs, if there are two or more
./{PROGRAM} bench --backend cpu  # on two processes of this machine's CPU
./{PROGRAM} bench --help
```

For programs in C and C++, `include` has the header and `lib` the library, shared and static, of the same operations:

```sh
cc program.c -Iinclude -Llib -lfused_collective_capi -Wl,-rpath,$PWD/lib
cc program.c -Iinclude lib/libfused_collective_capi.a -lpthread -ldl -lm -lgcc_s
```

Program and library carry their kernels. Others, in a folder that `FUSED_COLLECTIVE_PTX` names, take their place.

Licensed under MIT or Apache 2.0, at your choice: `LICENSE-MIT`, `LICENSE-APACHE`. What it is built from has the licences
in `THIRD-PARTY.txt`.
",
            version = self.version,
            processors = processors.join(", "),
            needs = self.needs(),
        )
    }
}

fn copy(from: &Path, to: &Path, mode: u32) -> Result<()> {
    let bytes = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    write_file(to, &bytes, mode)
}

fn write_file(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let written = path.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::write(path, bytes));
    written
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// What `folder` holds, by name.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

/// Packs `folder` into `archive`, as a folder called `name`. The same files make the same bytes.
fn pack(folder: &Path, name: &str, archive: &Path) -> Result<()> {
    let file = File::create(archive).with_context(|| format!("cannot write {}", archive.display()))?;
    let mut tar = tar::Builder::new(GzEncoder::new(file, Compression::best()));
    // Without times and owners.
    tar.mode(tar::HeaderMode::Deterministic);
    let mut folders = vec![(folder.to_owned(), PathBuf::from(name))];
    while let Some((from, to)) = folders.pop() {
        tar.append_dir(&to, &from)?;
        for path in files(&from)? {
            let place = to.join(path.file_name().context("a file has a name")?);
            if path.is_dir() {
                folders.push((path, place));
            } else {
                tar.append_path_with_name(&path, &place)?;
            }
        }
    }
    tar.into_inner()?.finish()?.flush()?;
    Ok(())
}

/// The licences of every package that is linked into the program for `platform` (as rustc calls it), each text once.
fn third_party(platform: &str) -> Result<String> {
    let metadata = MetadataCommand::new()
        .manifest_path(cmd::root().join("Cargo.toml"))
        .other_options(["--filter-platform".to_owned(), platform.to_owned()])
        .exec()?;
    let resolve = metadata.resolve.as_ref().context("cargo names no dependencies")?;
    let nodes: HashMap<_, _> = resolve.nodes.iter().map(|node| (&node.id, node)).collect();
    let is_program = |package: &&Package| package.name.as_str() == PACKAGE && package.source.is_none();
    let program = metadata.packages.iter().find(is_program).context("the workspace has no program")?;
    let mut seen = HashSet::from([&program.id]);
    let mut waiting = vec![&program.id];
    while let Some(id) = waiting.pop() {
        let node = nodes.get(id).context("cargo's dependencies have a hole")?;
        for dependency in &node.deps {
            let linked = dependency.dep_kinds.iter().any(|kind| kind.kind == DependencyKind::Normal);
            if linked && seen.insert(&dependency.pkg) {
                waiting.push(&dependency.pkg);
            }
        }
    }
    let mut packages: Vec<&Package> =
        metadata.packages.iter().filter(|it| it.source.is_some() && seen.contains(&it.id)).collect();
    packages.sort_by_key(|package| (package.name.to_string(), package.version.clone()));

    let mut list = String::from(
        "What fused-collective is built from, each with its licence, and the licences' texts.\n\n",
    );
    list += "Rust's standard library: MIT OR Apache-2.0, https://github.com/rust-lang/rust\n";
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for package in packages {
        let name = format!("{} {}", package.name, package.version);
        let license = package.license.as_deref().unwrap_or("see its licence file");
        list += &format!("{name}: {license}, {}\n", package.repository.as_deref().unwrap_or("no repository"));
        for text in license_texts(package)? {
            texts.entry(text).or_default().push(name.clone());
        }
    }
    for (text, names) in texts {
        list += &format!("\n{}\n{}\n\n{}\n", "=".repeat(80), names.join(", "), text.trim_end());
    }
    Ok(list)
}

/// The licence files in a package's folder.
fn license_texts(package: &Package) -> Result<Vec<String>> {
    let folder = package.manifest_path.parent().context("a manifest is in a folder")?;
    let is_license = |path: &PathBuf| {
        let name = path.file_name().map(|name| name.to_string_lossy().to_uppercase()).unwrap_or_default();
        let known = ["LICENSE", "LICENCE", "COPYING", "NOTICE", "UNLICENSE"];
        path.is_file() && known.iter().any(|known| name.starts_with(known))
    };
    let read = |path: PathBuf| {
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(String::from_utf8_lossy(&bytes).replace("\r\n", "\n"))
    };
    files(folder.as_std_path())?.into_iter().filter(is_license).map(read).collect()
}

/// This machine, as rustc calls it.
fn host() -> Result<String> {
    let mut rustc = std::process::Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    let version = cmd::read(rustc.args(["--version", "--verbose"]))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc does not name its host")?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents(folder: &Path) -> Contents {
        let program = folder.join("built");
        write_file(&program, b"#!/bin/sh\necho \"$@\" from \"$PWD\"\n", 0o755).unwrap();
        let libraries = LIBRARIES.map(|name| folder.join(name));
        libraries.iter().for_each(|library| write_file(library, b"a library", 0o644).unwrap());
        Contents {
            version: "1.2.3".to_owned(),
            arch: "aarch64",
            program,
            libraries,
            processors: vec![Processor::Sm90],
            glibc: Some(Glibc(2, 34)),
            third_party: "everyone\n".to_owned(),
        }
    }

    #[test]
    fn the_archive_unpacks_elsewhere_into_a_program_that_runs() {
        let temporary = tempfile::tempdir().unwrap();
        let contents = contents(temporary.path());
        let output = temporary.path().join("a/b");
        let (folder, archive) = contents.write(&output).unwrap();
        let libraries = LIBRARIES.map(|name| format!("lib/{name}"));
        let others = ["README.md", "THIRD-PARTY.txt", "include/fused_collective.h"];
        for name in LICENSES.iter().chain(&others).copied().chain(libraries.iter().map(String::as_str)) {
            assert!(folder.join(name).is_file(), "{name}");
        }
        let readme = fs::read_to_string(folder.join("README.md")).unwrap();
        assert!(
            readme.contains("Linux on aarch64 with glibc 2.34 or later") && readme.contains("sm_90"),
            "{readme}"
        );

        let elsewhere = temporary.path().join("elsewhere");
        let unpacked = flate2::read::GzDecoder::new(File::open(&archive).unwrap());
        tar::Archive::new(unpacked).unpack(&elsewhere).unwrap();
        let root = elsewhere.join(contents.name());
        let mut program = std::process::Command::new(format!("./{PROGRAM}"));
        let said = cmd::read(program.arg("hello").current_dir(&root)).unwrap();
        assert_eq!(said, format!("hello from {}\n", root.canonicalize().unwrap().display()));

        // Again, over what is there: the same bytes, and nothing else is left.
        let before = fs::read(&archive).unwrap();
        contents.write(&output).unwrap();
        assert!(fs::read(&archive).unwrap() == before, "the archive differs from one run to the next");
        assert_eq!(files(&output).unwrap(), [folder, archive]);
    }

    #[test]
    fn a_program_that_does_not_carry_the_kernels_is_known() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| {
            let path = folder.path().join(name);
            fs::write(&path, bytes).unwrap();
            path
        };
        let program = write("program", b"code, kernels, more code");
        assert!(contains(&program, &write("current.zst", b"kernels")).unwrap());
        assert!(!contains(&program, &write("other.zst", b"kernels of another build")).unwrap());
        assert!(contains(&program, &write("empty.zst", b"")).is_err());
    }

    #[test]
    fn the_c_library_that_a_program_needs_is_read_from_it() {
        let needed = glibc_needed(&env::current_exe().unwrap()).unwrap();
        assert!(needed >= Some(Glibc(2, 2)), "{needed:?}");
        assert_eq!(parse_glibc("GLIBC_2.34"), Some(Glibc(2, 34)));
        assert_eq!(parse_glibc("GLIBC_2.2.5"), Some(Glibc(2, 2)));
        assert_eq!(parse_glibc("GCC_3.0"), None);
        assert!(Glibc(2, 34) > Glibc(2, 4));
        let error = glibc_needed(Path::new("/proc/version")).unwrap_err().to_string();
        assert_eq!(error, "/proc/version is not a program for Linux");
    }

    #[test]
    fn every_linked_package_is_named_and_no_licence_is_left_out() {
        let text = third_party(&host().unwrap()).unwrap();
        for package in ["half ", "libloading ", "serde_json ", "cust "] {
            assert!(text.lines().any(|line| line.starts_with(package)), "{package}");
        }
        assert!(text.contains("Permission is hereby granted") && text.contains("Apache License"));
        // For tests only.
        assert!(!text.lines().any(|line| line.starts_with("proptest ")));
    }
}
