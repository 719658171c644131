//! `cargo xtask ptx`: the kernels as PTX, one module for each processor, element type and set of kernels.
//!
//! A module is a crate of type `staticlib` in the workspace of `device/ptx`, and `--emit=asm` gives all of it linked as one
//! PTX file. One run of cargo builds all of a processor's, as many at a time as there are cores, and only those whose
//! source has changed. Every module is then assembled, and held to what a kernel must not have: a path that panics, local
//! memory, spilled registers. The examples in `device/examples` are built and held to the same, so that what they show is
//! true.

use std::{
    fs, io,
    panic::resume_unwind,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use cargo_metadata::Message;
use fused_collective_bench::{launch as bench, table};
use fused_collective_core::launch::{LAYOUT, layout_of};

use crate::{cmd, ptxas::Ptxas, toolchain::Toolchain};

/// The GPU, as rustc calls it.
pub(crate) const TARGET: &str = "nvptx64-nvidia-cuda";
/// The workspace of all that is built for it.
const MANIFEST: &str = "device/ptx/Cargo.toml";
/// Its package with the modules ...
const PACKAGE: &str = "fused-collective-ptx";
/// ... which are named by the element type ...
const ELEMENTS: [&str; 3] = ["f32", "f16", "bf16"];
/// ... and the set of kernels.
const SETS: [&str; 4] = ["w2", "w4", "w8", "local"];
/// Its packages that are examples.
const EXAMPLES: [&str; 1] = ["custom-epilogue"];
/// The packages outside of it that have device code.
const LIBRARIES: [&str; 3] = ["fused-collective-bench", "fused-collective-core", "fused-collective-device"];
/// How long all modules for one processor may take to build: minutes, on two cores.
const BUILD_LIMIT: Duration = Duration::from_secs(3600);

/// One PTX file to make.
struct Module {
    /// The file's name, without `.ptx`, and that of what cargo builds it from.
    name: String,
    /// The set of kernels that its registers are those of.
    set: &'static str,
    /// The folder under `target` that has a folder for each processor.
    folder: &'static str,
}

impl Module {
    /// Where it is for a processor.
    fn file(&self, target_directory: &Path, gpu: &Gpu) -> PathBuf {
        target_directory.join(self.folder).join(gpu.cpu).join(format!("{}.ptx", self.name))
    }
}

/// What programs load: `target/ptx/sm_90/bf16_w4.ptx`, for instance.
fn kernels() -> Vec<Module> {
    let of_element = |element| SETS.map(|set| (element, set));
    let module = |(element, set)| Module { name: format!("{element}_{set}"), set, folder: "ptx" };
    let benchmark =
        table::modules().map(|name| Module { name: name.to_owned(), set: "local", folder: "ptx" });
    ELEMENTS.into_iter().flat_map(of_element).map(module).chain(benchmark).collect()
}

/// What shows how to write kernels of one's own. In another folder, since no program loads it.
fn examples() -> Vec<Module> {
    // Their kernels are for four ranks.
    let module =
        |package: &str| Module { name: package.replace('-', "_"), set: "w4", folder: "ptx-examples" };
    EXAMPLES.into_iter().map(module).collect()
}

/// A kind of GPU to build for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Gpu {
    /// The processor, as PTX and rustc's `target-cpu` name it.
    pub(crate) cpu: &'static str,
    /// The PTX version.
    version: &'static str,
    /// The processor that rustc compiles for, which decides on the instructions in use: another one's PTX may be right.
    compiled_for: &'static str,
    /// What the module is assembled for in the check.
    arch: &'static str,
}

/// Ampere, Hopper and the two kinds of Blackwell. The driver assembles the PTX of the first two for later GPUs as well;
/// that of the others has instructions that no other kind has, and both have the same.
pub(crate) const GPUS: [Gpu; 4] = [
    Gpu { cpu: "sm_80", version: "8.6", compiled_for: "sm_80", arch: "sm_80" },
    Gpu { cpu: "sm_90", version: "8.6", compiled_for: "sm_90", arch: "sm_90a" },
    Gpu { cpu: "sm_100a", version: "8.6", compiled_for: "sm_100a", arch: "sm_100a" },
    Gpu { cpu: "sm_120a", version: "8.7", compiled_for: "sm_100a", arch: "sm_120a" },
];

impl Gpu {
    /// The first lines of a module for it.
    fn header(&self) -> String {
        format!(".version {}\n.target {}\n", self.version, self.cpu)
    }

    /// rustc's flags for device code.
    fn flags(&self) -> [String; 2] {
        let feature = self.version.replace('.', "");
        [format!("-Ctarget-cpu={}", self.cpu), format!("-Ctarget-feature=+ptx{feature}")]
    }
}

/// The one of [`GPUS`] whose processor is called `cpu`.
pub(crate) fn parse_gpu(cpu: &str) -> Result<&'static Gpu, String> {
    GPUS.iter().find(|gpu| gpu.cpu == cpu).ok_or_else(|| {
        let cpus: Vec<&str> = GPUS.iter().map(|gpu| gpu.cpu).collect();
        format!("there are no kernels for `{cpu}`, only for {}", cpus.join(", "))
    })
}

/// The processor to build for, of [`GPUS`], to run on a GPU of compute capability `capability` (90 is 9.0).
pub(crate) fn gpu_for(capability: u32) -> Option<&'static Gpu> {
    let cpu = match capability {
        120 => "sm_120a",
        100 => "sm_100a",
        90.. => "sm_90",
        80.. => "sm_80",
        _ => return None,
    };
    GPUS.iter().find(|gpu| gpu.cpu == cpu)
}

/// `gpus` by the processor that rustc compiles for.
fn by_compilation<'a>(gpus: &[&'a Gpu]) -> Vec<(&'static Gpu, Vec<&'a Gpu>)> {
    let compiled_for = |one: &'static Gpu| {
        let of_it: Vec<_> = gpus.iter().copied().filter(|gpu| gpu.compiled_for == one.cpu).collect();
        (!of_it.is_empty()).then_some((one, of_it))
    };
    GPUS.iter().filter_map(compiled_for).collect()
}

/// Where kernels are, in a folder for each processor, once they are built.
///
/// # Errors
/// When cargo does not say where this workspace is built.
pub(crate) fn folder() -> Result<PathBuf> {
    Ok(cmd::metadata()?.target_directory.into_std_path_buf().join("ptx"))
}

/// What it takes to build kernels.
pub(crate) struct Compiler {
    toolchain: Toolchain,
    /// Where the folders with the modules are.
    target_directory: PathBuf,
}

impl Compiler {
    /// Finds or installs the compiler.
    ///
    /// # Errors
    /// When there is none, and none can be had.
    pub(crate) fn new() -> Result<Self> {
        let target_directory = cmd::metadata()?.target_directory.into_std_path_buf();
        Ok(Compiler { toolchain: Toolchain::find(&[TARGET])?, target_directory })
    }

    /// Builds every module that programs load for each of `gpus`. Returns the folder that they are in.
    ///
    /// # Errors
    /// A module does not build.
    pub(crate) fn build(&self, gpus: &[&Gpu]) -> Result<PathBuf> {
        for (compiled_for, gpus) in by_compilation(gpus) {
            self.compile(compiled_for, &gpus, &[PACKAGE], &kernels())?;
        }
        folder()
    }

    /// Compiles `packages`, which make `modules`, and writes the files for each of `gpus`.
    fn compile(
        &self,
        compiled_for: &Gpu,
        gpus: &[&Gpu],
        packages: &[&str],
        modules: &[Module],
    ) -> Result<()> {
        share_lock()?;
        let mut cargo = self.toolchain.cargo(&cmd::root().join(MANIFEST), "build", TARGET, "ptx")?;
        cargo.args(["--release", "--lib", "--examples", "--message-format=json-render-diagnostics"]);
        for package in packages {
            cargo.args(["--package", package]);
        }
        // Kernels use unstable features of the language, and a package's flags are one of cargo's.
        cargo.env("RUSTC_BOOTSTRAP", "1").arg("-Zprofile-rustflags");
        // Only device code depends on the processor. What it uses of other crates, `core` among them, is generic or
        // inline, and so compiled with it: those crates are built once for all processors.
        cargo.env("RUSTFLAGS", "").env_remove("CARGO_ENCODED_RUSTFLAGS");
        let mut flags = |package, flags: &[String]| {
            cargo.arg("--config").arg(format!("profile.release.package.{package}.rustflags={flags:?}"));
        };
        let [cpu, feature] = compiled_for.flags();
        for package in LIBRARIES {
            flags(package, &[cpu.clone(), feature.clone()]);
        }
        for package in packages {
            flags(package, &[cpu.clone(), feature.clone(), "--emit=asm".to_owned()]);
        }
        let built = static_libraries(&cmd::output_within(&mut cargo, BUILD_LIMIT)?)?;
        for module in modules {
            let library = built.iter().find(|(name, _)| *name == module.name);
            let (_, library) =
                library.with_context(|| format!("{MANIFEST} has no module {}", module.name))?;
            let assembly = assembly(library, &module.name)?;
            let text = fs::read_to_string(&assembly)
                .with_context(|| format!("cannot read {}", assembly.display()))?;
            let element = module.name.split('_').next().unwrap_or_default();
            for gpu in gpus {
                ensure!(
                    text.contains(&compiled_for.header()),
                    "{} is not for {}, PTX version {}",
                    assembly.display(),
                    compiled_for.cpu,
                    compiled_for.version
                );
                let text = text.replacen(&compiled_for.header(), &gpu.header(), 1);
                let file = module.file(&self.target_directory, gpu);
                let cannot = || format!("cannot write {}", file.display());
                fs::create_dir_all(file.parent().unwrap_or(&file)).with_context(cannot)?;
                fs::write(&file, bound_blocks(&text, gpu.cpu, element, module.set)).with_context(cannot)?;
            }
        }
        Ok(())
    }
}

/// Gives the workspace of [`MANIFEST`] the versions that this one's lock file has. What it needs of other crates is what
/// `core` and `device` need, so nothing is missing; cargo drops what is not needed.
fn share_lock() -> Result<()> {
    let (from, to) =
        (cmd::root().join("Cargo.lock"), cmd::root().join(MANIFEST).with_file_name("Cargo.lock"));
    fs::copy(&from, &to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

/// The static libraries that cargo's messages name, with their targets' names.
fn static_libraries(messages: &str) -> Result<Vec<(String, PathBuf)>> {
    let mut libraries = Vec::new();
    for message in Message::parse_stream(messages.as_bytes()) {
        let Message::CompilerArtifact(artifact) = message? else { continue };
        let library = artifact.filenames.iter().find(|file| file.extension() == Some("a"));
        libraries.extend(library.map(|library| (artifact.target.name.clone(), library.into())));
    }
    Ok(libraries)
}

/// The assembly that rustc left with the static library `library` of the crate `name`. Both have a hash in their name, and
/// older ones may lie beside them; `library` is a copy of the current one.
fn assembly(library: &Path, name: &str) -> Result<PathBuf> {
    let cannot = |path: &Path| format!("cannot read {}", path.display());
    let current = fs::read(library).with_context(|| cannot(library))?;
    let beside = library.parent().unwrap_or(library);
    for folder in [beside, &beside.join("deps")] {
        let entries = match fs::read_dir(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries.with_context(|| cannot(folder))?,
        };
        for entry in entries {
            let path = entry.with_context(|| cannot(folder))?.path();
            let stem =
                path.file_name().and_then(|file| file.to_str()?.strip_prefix("lib")?.strip_suffix(".a"));
            let Some(stem) =
                stem.filter(|stem| stem.strip_prefix(name).is_some_and(|hash| hash.starts_with('-')))
            else {
                continue;
            };
            if fs::read(&path).with_context(|| cannot(&path))? == current {
                return Ok(folder.join(format!("{stem}.s")));
            }
        }
    }
    bail!("no assembly for {}", library.display())
}

/// What it takes to build and check kernels.
pub(crate) struct Builder {
    compiler: Compiler,
    ptxas: Ptxas,
}

impl Builder {
    /// Finds or installs the tools.
    ///
    /// # Errors
    /// When there is no compiler or no ptxas, and none can be had.
    pub(crate) fn new() -> Result<Self> {
        let target_directory = cmd::metadata()?.target_directory.into_std_path_buf();
        Ok(Builder { compiler: Compiler::new()?, ptxas: Ptxas::find(&target_directory)? })
    }

    /// Builds and checks every module for each of `gpus`: while one is checked, the next is built. For each, a report of
    /// every kernel's registers.
    ///
    /// # Errors
    /// For a GPU with a module that does not build, or a kernel that is not as it must be: what is wrong with each.
    pub(crate) fn build<'a>(&self, gpus: &[&'a Gpu]) -> Vec<(&'a Gpu, Result<String>)> {
        eprintln!("building for {}", gpus.iter().map(|gpu| gpu.cpu).collect::<Vec<_>>().join(", "));
        let packages = [&[PACKAGE], &EXAMPLES[..]].concat();
        let modules: Vec<Module> = kernels().into_iter().chain(examples()).collect();
        thread::scope(|scope| {
            let mut checks = Vec::new();
            for (compiled_for, gpus) in by_compilation(gpus) {
                let compiled = self.compiler.compile(compiled_for, &gpus, &packages, &modules);
                let failed = compiled.err().map(|error| format!("{error:#}"));
                for gpu in gpus {
                    let (failed, modules) = (failed.clone(), &modules);
                    let check =
                        move || failed.map_or_else(|| self.check(gpu, modules), |why| Err(anyhow!(why)));
                    checks.push((gpu, scope.spawn(check)));
                }
            }
            let joined = checks.into_iter().map(|(gpu, check)| {
                let result = check.join().unwrap_or_else(|panic| resume_unwind(panic));
                (gpu, result)
            });
            joined.collect()
        })
    }

    /// Holds the modules for `gpu` to what kernels must be, several at a time.
    fn check(&self, gpu: &Gpu, modules: &[Module]) -> Result<String> {
        let at_once = thread::available_parallelism().map_or(1, usize::from);
        let parts: Vec<_> = thread::scope(|scope| {
            let parts = modules.chunks(modules.len().div_ceil(at_once));
            let parts: Vec<_> = parts
                .map(|part| {
                    scope.spawn(move || part.iter().map(|module| self.check_one(gpu, module)).collect())
                })
                .collect();
            parts.into_iter().map(|part| part.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
        });
        let checked: Vec<Vec<Result<(String, String)>>> = parts;
        let (mut report, mut wrong) = (String::new(), String::new());
        for module in checked.into_iter().flatten() {
            let (of_module, wrong_with_it) = module?;
            report += &of_module;
            wrong += &wrong_with_it;
        }
        ensure!(
            wrong.is_empty(),
            "\n{report}kernels must not panic, spill or use local memory, and must say their layout:{wrong}"
        );
        Ok(report)
    }

    /// The report of one module, and what is wrong with it.
    fn check_one(&self, gpu: &Gpu, module: &Module) -> Result<(String, String)> {
        let (mut report, mut wrong) = (String::new(), String::new());
        let file = module.file(&self.compiler.target_directory, gpu);
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let name = format!("{}/{}", gpu.cpu, module.name);
        if let Some(what) = panic_path(&text) {
            wrong += &format!("\n  {name}: {what}");
        }
        if layout_of(&text) != Some(LAYOUT) {
            wrong += &format!("\n  {name}: its launch layout is {:?}, not {LAYOUT}", layout_of(&text));
        }
        let is_benchmark = table::modules().any(|name| name == module.name);
        if is_benchmark && bench::layout_of(&text) != Some(bench::LAYOUT) {
            wrong += &format!("\n  {name}: its benchmark layout is {:?}", bench::layout_of(&text));
        }
        for function in self.ptxas.assemble(&file, gpu.arch)? {
            report += &format!("{name}: {function}\n");
            if function.uses_local_memory() {
                wrong += &format!("\n  {name}: {function}");
            }
        }
        Ok((report, wrong))
    }
}

/// Adds to each entry point the size of its largest block, which tells the assembler how many registers it may use.
/// rustc has no way to say so; the device crate's table of entry points has the sizes. A module that cargo found
/// fresh has the lines already, and keeps them.
fn bound_blocks(ptx: &str, cpu: &str, element: &str, set: &str) -> String {
    // Without clusters and dependent launch, addresses and indices take up more registers; and for sm_120a the assembler
    // finds fewer to share.
    let ampere = cpu == "sm_80";
    let wide = ampere || cpu == "sm_120a";
    let mut bounded = String::with_capacity(ptx.len());
    let mut bounds = None;
    for line in ptx.lines().filter(|line| !line.starts_with(".maxntid") && !line.starts_with(".minnctapersm"))
    {
        if let Some((_, name)) = line.split_once(".entry ") {
            let name = name.trim_end_matches(['(', ')', ' ']);
            let large = set == "w8"
                || name.ends_with("_p2")
                || name.ends_with("_streamed")
                || (set == "w4" && name.contains("shot_nvfp4") && (element == "f32" || cpu == "sm_100a"));
            // Twice on a multiprocessor where 64 registers do.
            let twice = set == "w2" && name.ends_with("_p2") && !name.starts_with("one_shot");
            let threads = match set {
                "w8" if ampere => 256,
                "w2" | "w4" if wide => 512,
                _ if large => 512,
                _ => 1024,
            };
            bounds = Some((threads, if twice && !wide { 2 } else { 1 }));
        }
        if line.trim_start().starts_with('{')
            && let Some((threads, blocks)) = bounds.take()
        {
            bounded += &format!(".maxntid {threads}, 1, 1\n.minnctapersm {blocks}\n");
        }
        bounded += line;
        bounded.push('\n');
    }
    bounded
}

/// The first trace of a path that panics in a module, if there is one: a function of `core` that panics, or the
/// endless loop that inlining makes of the panic handler.
fn panic_path(ptx: &str) -> Option<String> {
    let mut label = "";
    for line in ptx.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("//")) {
        if line.contains("panicking") {
            return Some(format!("a panic path: {line}"));
        }
        if let Some(target) = line.strip_prefix("bra.uni").map(|rest| rest.trim().trim_end_matches(';'))
            && target == label
        {
            return Some(format!("an endless loop, as a panic ends in: {line}"));
        }
        // A comment may follow the label.
        label = line.split_once(':').map_or("", |(label, _)| label);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names of what is in a folder, sorted.
    fn names(folder: &str) -> Vec<String> {
        let entries = fs::read_dir(cmd::root().join(folder)).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn every_module_and_every_example_is_built() {
        assert_eq!(names("device/examples"), EXAMPLES);
        let mut built: Vec<String> = kernels().iter().map(|module| format!("{}.rs", module.name)).collect();
        built.sort();
        assert_eq!(names("device/ptx/modules"), built);
    }

    #[test]
    fn processors_with_the_same_instructions_are_compiled_for_once() {
        let compiled: Vec<_> = by_compilation(&GPUS.each_ref())
            .into_iter()
            .map(|(one, of_it)| (one.cpu, of_it.iter().map(|gpu| gpu.cpu).collect::<Vec<_>>()))
            .collect();
        let expected =
            [("sm_80", vec!["sm_80"]), ("sm_90", vec!["sm_90"]), ("sm_100a", vec!["sm_100a", "sm_120a"])];
        assert_eq!(compiled, expected);
        assert_eq!(by_compilation(&[parse_gpu("sm_120a").unwrap()])[0].0.flags()[0], "-Ctarget-cpu=sm_100a");
        // What the device code asks of the compiler must then be the same as well.
        for (one, of_it) in by_compilation(&GPUS.each_ref()) {
            for other in of_it.iter().filter(|gpu| gpu.cpu != one.cpu) {
                for folder in ["device/src", "core/src"] {
                    for (file, line) in lines(&cmd::root().join(folder)) {
                        let asks = |gpu: &Gpu| line.contains(&format!("target_feature = \"{}\"", gpu.cpu));
                        assert_eq!(asks(one), asks(other), "{}: {line}", file.display());
                    }
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
        assert_eq!(assembly(&library, "bf16_w2").unwrap(), folder.path().join("bf16_w2-1b.s"));
        write("libbf16_w2.a", "newer");
        assert!(assembly(&library, "bf16_w2").is_err());
        // As cargo has it for a package's library.
        fs::create_dir(folder.path().join("deps")).unwrap();
        write("deps/libbf16_w2-4e.a", "newer");
        assert_eq!(assembly(&library, "bf16_w2").unwrap(), folder.path().join("deps/bf16_w2-4e.s"));
    }

    #[test]
    fn a_gpu_gets_the_kernels_that_run_on_it() {
        let cpu = |capability| gpu_for(capability).map(|gpu| gpu.cpu);
        assert_eq!([75, 80, 89, 90].map(cpu), [None, Some("sm_80"), Some("sm_80"), Some("sm_90")]);
        assert_eq!([100, 103, 120].map(cpu), [Some("sm_100a"), Some("sm_90"), Some("sm_120a")]);
    }

    #[test]
    fn entry_points_are_told_their_largest_block_before_their_body() {
        let ptx = ".visible .entry one_shot_norm_p1(\n\t.param .u64 a\n)\n{\n\t{\n\tret;\n\t}\n}\n.visible .entry fill_p2()\n{\n}\n";
        let bounded = bound_blocks(ptx, "sm_90", "bf16", "w4");
        let expected = ".visible .entry one_shot_norm_p1(\n\t.param .u64 a\n)\n.maxntid 1024, 1, 1\n.minnctapersm 1\n{\n\t{\n\tret;\n\t}\n}\n\
            .visible .entry fill_p2()\n.maxntid 512, 1, 1\n.minnctapersm 1\n{\n}\n";
        assert_eq!(bounded, expected);
        assert_eq!(bound_blocks(&bounded, "sm_90", "bf16", "w4"), bounded);
        assert_eq!(
            bound_blocks(ptx, "sm_80", "bf16", "w8").matches("maxntid 256, 1, 1\n.minnctapersm 1").count(),
            2
        );
        assert_eq!(bound_blocks(ptx, "sm_90", "bf16", "w8").matches("maxntid 512").count(), 2);
        let nvfp4 = ptx.replace("norm", "nvfp4");
        for (cpu, element, count) in [("sm_90", "bf16", 1), ("sm_100a", "bf16", 2), ("sm_90", "f32", 2)] {
            let bounded = bound_blocks(&nvfp4, cpu, element, "w4");
            assert_eq!(bounded.matches("maxntid 512").count(), count, "{cpu} {element}");
        }
        assert_eq!(bound_blocks(ptx, "sm_120a", "bf16", "w4").matches("maxntid 512").count(), 2);
        let two_shot = ptx.replace("fill", "two_shot_norm");
        let bounded = bound_blocks(&two_shot, "sm_90", "bf16", "w2");
        assert!(bounded.ends_with(".maxntid 512, 1, 1\n.minnctapersm 2\n{\n}\n"));
        assert!(
            bound_blocks(&two_shot.replace("two_shot", "one_shot"), "sm_90", "bf16", "w2")
                .matches("minnctapersm 2")
                .count()
                == 0
        );
    }

    #[test]
    fn processors_are_known_by_name() {
        assert_eq!(parse_gpu("sm_90").unwrap().arch, "sm_90a");
        let error = parse_gpu("sm_75").unwrap_err();
        assert_eq!(error, "there are no kernels for `sm_75`, only for sm_80, sm_90, sm_100a, sm_120a");
    }

    #[test]
    fn a_loop_that_makes_progress_is_no_panic_path() {
        let ptx = "$L__BB0_1:  // %bb1\n\tld.b32 \t%r1, [%rd1];\n\t@%p1 bra \t$L__BB0_1;\n\tbra.uni \t$L__BB0_2;\n\
                   $L__BB0_2:\n\tret;\n";
        assert_eq!(panic_path(ptx), None);
    }

    #[test]
    fn panic_paths_are_found_by_name_and_by_their_endless_loop() {
        let named = ".func _ZN4core9panicking9panic_fmt17h0123456789abcdefE()\n";
        assert!(panic_path(named).is_some_and(|what| what.starts_with("a panic path: .func")));
        let inlined = "\tret;\n$L__BB0_3:  // %panic\n                        // =>This Inner Loop Header: Depth=1\n\
                       \tbra.uni \t$L__BB0_3;\n";
        assert!(panic_path(inlined).is_some_and(|what| what.starts_with("an endless loop")));
    }
}
