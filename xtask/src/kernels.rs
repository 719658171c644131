//! `cargo xtask ptx` and `cargo xtask kernels`: the project's kernels and the examples', by `fused-collective-build`, and the
//! archive of them that `fused-collective-kernels` has in it.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use fused_collective_bench::table;
use fused_collective_build::{Assembly, Bounds, Entry, Error, Kernels, Module, Processor};
use fused_collective_core::{
    dtype::DType,
    kernels::{self, Set},
    launch::LAYOUT,
};
use fused_collective_kernels::{Archive, DICTIONARY, Kind, Member, pack};
use lzma_rust2::{Lzma2Options, Lzma2Writer};

use crate::cmd;

/// The package whose modules programs load.
const MODULES: &str = "device/ptx";
/// The folder of packages that show how to write kernels of one's own.
const EXAMPLES: &str = "device/examples";
/// The archive that `fused-collective-kernels` embeds: the library's kernels.
const ARCHIVE: &str = "device/kernels/archive/kernels.archive";
/// The archive that the program embeds: the benchmark's kernels.
const BENCH_ARCHIVE: &str = "host/program/archive/kernels.archive";
/// LZMA's highest preset: the work is done once for each release.
const PRESET: u32 = 9;

/// The processor to build for, to run on a GPU of compute capability `capability` (90 is 9.0).
pub(crate) fn processor_for(capability: u32) -> Option<Processor> {
    kernels::Processor::for_capability(capability).next()?.name.parse().ok()
}

/// The folder of the modules that programs load, with a folder for each processor.
///
/// # Errors
/// When cargo does not say where this workspace is built.
pub(crate) fn folder() -> Result<PathBuf> {
    Ok(cmd::target_directory()?.join("ptx"))
}

/// Builds the modules that programs load, into [`folder`].
///
/// # Errors
/// A tool is missing, a module does not build, or kernels are not as they must be.
pub(crate) fn build(processors: &[Processor], assembly: Assembly) -> Result<Vec<Module>> {
    let bounds = |entry: &Entry<'_>| match kernels::Module::named(entry.module) {
        Some(module) => bounds(entry, module.dtype, module.set),
        None => table::BOUNDS,
    };
    let modules = complete(package(MODULES, processors, assembly)?.output(folder()?).bounds(bounds))?;
    for processor in processors {
        let built = |name: &str| modules.iter().any(|it| it.processor == *processor && it.name == name);
        let missing: Vec<_> = expected().filter(|name| !built(name)).collect();
        ensure!(missing.is_empty(), "{MODULES} lacks the modules {}", missing.join(", "));
    }
    if let Some(other) = modules.iter().find(|module| !expected().any(|name| name == module.name)) {
        bail!("{MODULES} has the module {}, which no table of kernels has", other.name);
    }
    for module in modules.iter().filter(|module| is_of_bench(module)) {
        let text = fs::read_to_string(&module.path)?;
        let layout = fused_collective_bench::launch::layout_of(&text);
        ensure!(
            layout == Some(fused_collective_bench::launch::LAYOUT),
            "{}/{} does not have the launch layout of the benchmark's kernels",
            module.processor,
            module.name
        );
    }
    Ok(modules)
}

/// The names of the library's modules and of the benchmark's.
fn expected() -> impl Iterator<Item = &'static str> {
    kernels::Module::all().map(kernels::Module::name).chain(table::modules())
}

fn is_of_bench(module: &Module) -> bool {
    table::modules().any(|name| name == module.name)
}

/// Builds the examples, into another folder, since no program of this project loads them.
///
/// # Errors
/// As [`build`].
pub(crate) fn build_examples(processors: &[Processor], assembly: Assembly) -> Result<Vec<Module>> {
    let mut modules = Vec::new();
    for entry in fs::read_dir(cmd::root().join(EXAMPLES)).context(EXAMPLES)? {
        let example = format!("{EXAMPLES}/{}", entry?.file_name().display());
        let kernels = package(&example, processors, assembly)?;
        let kernels = kernels.output(folder()?.with_file_name("ptx-examples"));
        // Theirs are for four ranks.
        modules.extend(complete(kernels.bounds(|entry| bounds(entry, DType::Bf16, Set::Group4)))?);
    }
    Ok(modules)
}

/// The build of a package of kernels, with this workspace's versions of other crates. What it needs of them is what `core`
/// and `device` need, so nothing is missing; cargo drops what is not needed.
fn package(folder: &str, processors: &[Processor], assembly: Assembly) -> Result<Kernels> {
    eprintln!(
        "building {folder} for {}",
        processors.iter().map(|it| it.name()).collect::<Vec<_>>().join(", ")
    );
    Ok(Kernels::new(cmd::root().join(folder))
        .processors(processors)
        .assembly(assembly)
        .cache(cmd::target_directory()?)
        .lock_file(cmd::root().join("Cargo.lock"))
        .install(true))
}

fn bounds(entry: &Entry<'_>, dtype: DType, set: Set) -> Bounds {
    kernels::bounds(entry.processor.name(), dtype, set, entry.name)
}

/// Builds, and sees that every module has the launch layout. Of kernels that are refused, all are shown.
fn complete(kernels: Kernels) -> Result<Vec<Module>> {
    let modules = kernels.build().inspect_err(|error| {
        if let Error::Refused { modules, .. } = error {
            modules.iter().for_each(|module| eprint!("{module}"));
        }
    })?;
    for Module { name, processor, report, .. } in &modules {
        ensure!(
            report.layout == Some(LAYOUT),
            "{processor}/{name} does not have the launch layout {LAYOUT:#010x}"
        );
    }
    Ok(modules)
}

/// Builds the modules that programs load and puts them, with machine code, into the archives of `fused-collective-kernels`
/// and of the program: these files. Prints their sizes.
///
/// # Errors
/// As [`build`]; an archive cannot be written.
pub(crate) fn embed(processors: &[Processor]) -> Result<[PathBuf; 2]> {
    let (of_bench, of_library): (Vec<_>, Vec<_>) =
        build(processors, Assembly::Keep)?.into_iter().partition(is_of_bench);
    eprintln!("compressing");
    let archives = [ARCHIVE, BENCH_ARCHIVE].map(|archive| cmd::root().join(archive));
    write(&archives[0], &of_library)?;
    write(&archives[1], &of_bench)?;
    Ok(archives)
}

/// Writes an archive of `modules`. The one that is there stays until the new one is whole.
fn write(file: &Path, modules: &[Module]) -> Result<()> {
    let (archive, sizes) = archive(modules, PRESET)?;
    let folder = file.parent().context("the archive is in a folder")?;
    let scratch = tempfile::NamedTempFile::new_in(folder)
        .with_context(|| format!("cannot write to {}", folder.display()))?;
    fs::write(scratch.path(), &archive)?;
    scratch.persist(file)?;
    print!("{sizes}");
    println!("{}: {} KB", file.display(), archive.len() / 1000);
    Ok(())
}

/// The modules as an archive, and a line on the size of each frame in it.
///
/// # Errors
/// A file of a module cannot be read, or is not read from the archive as it was put there.
pub(crate) fn archive(modules: &[Module], preset: u32) -> Result<(Vec<u8>, String)> {
    let mut frames: BTreeMap<_, Vec<Member>> = BTreeMap::new();
    for module in modules {
        let set = module.name.split_once('_').map_or(&*module.name, |(_, set)| set);
        let mut add = |kind, label, alike: Processor, path: &Path| -> Result<()> {
            let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
            let (processor, name) = (module.processor.name().to_owned(), module.name.clone());
            let frame = frames.entry((alike, label, set)).or_default();
            frame.push(Member { processor, module: name, kind, bytes });
            Ok(())
        };
        if let Some(path) = &module.machine_code {
            add(Kind::MachineCode, "machine code", module.processor, path)?;
        }
        // PTX serves GPUs and drivers that have no use for the machine code. Where it runs on one kind of GPU alone, the PTX
        // of an older processor does that too.
        let stands_in = |it: &Module| runs_on_later(it.processor) && it.processor < module.processor;
        if module.machine_code.is_none() || runs_on_later(module.processor) || !modules.iter().any(stands_in)
        {
            // Processors that rustc compiles for as one have the same PTX, but for its first lines.
            add(Kind::Ptx, "PTX", module.processor.compiled_for(), &module.path)?;
        }
    }
    for members in frames.values_mut() {
        members.sort_by(|a, b| a.module.cmp(&b.module));
    }
    let (labels, frames): (Vec<_>, Vec<_>) = frames.into_iter().unzip();
    let mut labels = labels.into_iter();
    let mut sizes = String::new();
    let mut failed = None;
    let packed = pack(LAYOUT, &frames, |kind, content| {
        let frame = compress(kind, content, preset).unwrap_or_else(|error| {
            failed = Some(error);
            Vec::new()
        });
        if let Some((processor, label, set)) = labels.next() {
            let (from, to) = (content.len() / 1000, frame.len() / 1000);
            sizes += &format!("{processor} {set:<5} {label:<12} {from:>6} KB in {to:>4} KB\n");
        }
        frame
    });
    let archive = packed
        .map_err(|member| anyhow!("{}/{} is not PTX as LLVM writes it", member.processor, member.module))?;
    if let Some(error) = failed {
        return Err(error).context("cannot compress");
    }
    compare(&archive, frames.iter().flatten())?;
    Ok((archive, sizes))
}

/// The content, of members of one kind, as LZMA2.
fn compress(kind: Kind, content: &[u8], preset: u32) -> io::Result<Vec<u8>> {
    let mut options = Lzma2Options::with_preset(preset);
    let lzma = &mut options.lzma_options;
    lzma.dict_size = DICTIONARY;
    // An instruction has 16 bytes, and what a byte is depends on its place among them. Of text it depends on the bytes before.
    (lzma.lc, lzma.lp, lzma.pb) = match kind {
        Kind::MachineCode => (0, 4, 4),
        Kind::Ptx => (4, 0, 0),
    };
    let mut writer = Lzma2Writer::new(Vec::new(), options);
    writer.write_all(content)?;
    writer.finish()
}

/// True if code for the processor runs on later ones too.
fn runs_on_later(processor: Processor) -> bool {
    !processor.name().ends_with('a')
}

/// Reads every member from the archive, as programs do.
fn compare<'a>(archive: &[u8], members: impl IntoIterator<Item = &'a Member>) -> Result<()> {
    let archive = Archive::open(archive)?;
    for Member { processor, module, kind, bytes } in members {
        let read = archive.module(processor, module).context("a module is missing in the archive")?;
        let code = match kind {
            Kind::Ptx => read.ptx()?,
            Kind::MachineCode => {
                let known = kernels::Processor::ALL.into_iter().find(|known| known.name == *processor);
                read.machine_code(known.context("core has no such processor")?.capability)?
            }
        };
        ensure!(code.as_ref() == Some(bytes), "the archive has another {kind:?} of {processor}/{module}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn core_and_the_build_know_the_same_processors() {
        assert_eq!(Processor::ALL.map(Processor::name), kernels::Processor::ALL.map(|it| it.name));
        let name = |capability| processor_for(capability).map(Processor::name);
        assert_eq!([75, 80, 89, 90].map(name), [None, Some("sm_80"), Some("sm_80"), Some("sm_90")]);
        assert_eq!([100, 103, 120].map(name), [Some("sm_100a"), Some("sm_90"), Some("sm_120a")]);
    }

    #[test]
    fn processors_that_are_compiled_for_as_one_are_alike_in_the_source_too() {
        for processor in Processor::ALL.into_iter().filter(|it| it.compiled_for() != *it) {
            for folder in ["device/src", "core/src"] {
                for (file, line) in lines(&cmd::root().join(folder)) {
                    let asks = |it: Processor| line.contains(&format!("target_feature = \"{it}\""));
                    assert_eq!(asks(processor), asks(processor.compiled_for()), "{}: {line}", file.display());
                }
            }
        }
    }

    /// The lines of every file below a folder.
    fn lines(folder: &Path) -> Vec<(PathBuf, String)> {
        let mut lines = Vec::new();
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                lines.extend(self::lines(&path));
            } else {
                let text = fs::read_to_string(&path).unwrap();
                lines.extend(text.lines().map(|line| (path.clone(), line.to_owned())));
            }
        }
        lines
    }
}
