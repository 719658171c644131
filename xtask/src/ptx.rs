//! `cargo xtask ptx`: the kernels as PTX, one module for each processor, element type and set of kernels.
//!
//! rustc compiles the crate in `device/ptx`, of type `staticlib`, and `--emit=asm` gives all of it linked as one PTX
//! file. Every module is then assembled, and held to what a kernel must not have: a path that panics, local memory,
//! spilled registers. The examples in `device/examples` are built and held to the same, so that what they show is true.

use std::{fs, panic::resume_unwind, path::PathBuf, thread};

use anyhow::{Context, Result, ensure};
use fused_collective_core::launch::{LAYOUT, layout_of};

use crate::{cmd, ptxas::Ptxas, toolchain::Toolchain};

/// The GPU, as rustc calls it.
pub(crate) const TARGET: &str = "nvptx64-nvidia-cuda";
/// The features of `device/ptx` that choose a module: the element type ...
const ELEMENTS: [&str; 3] = ["f32", "f16", "bf16"];
/// ... and the set of kernels.
const SETS: [&str; 4] = ["w2", "w4", "w8", "local"];

/// One PTX file to make.
struct Module {
    /// The file's name, without `.ptx`.
    name: String,
    /// The crate that it is made of, from the workspace's root.
    manifest: &'static str,
    /// The crate's features.
    features: Option<String>,
    /// The set of kernels that its registers are those of.
    set: &'static str,
    /// The folder under `target` that has a folder for each processor.
    folder: &'static str,
}

/// What programs load: `target/ptx/sm_90/bf16_w4.ptx`, for instance.
fn kernels() -> impl Iterator<Item = Module> {
    let of_element = |element| SETS.map(|set| (element, set));
    ELEMENTS.into_iter().flat_map(of_element).map(|(element, set)| Module {
        name: format!("{element}_{set}"),
        manifest: "device/ptx/Cargo.toml",
        features: Some(format!("{element},{set}")),
        set,
        folder: "ptx",
    })
}

/// What shows how to write kernels of one's own. In another folder, since no program loads it.
fn examples() -> impl Iterator<Item = Module> {
    [Module {
        name: "custom_epilogue".to_owned(),
        manifest: "device/examples/custom-epilogue/Cargo.toml",
        features: None,
        // Its kernel is for four ranks.
        set: "w4",
        folder: "ptx-examples",
    }]
    .into_iter()
}

/// A kind of GPU to build for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Gpu {
    /// What rustc is given as `target-cpu`, which decides on the instructions in use.
    pub(crate) cpu: &'static str,
    /// The PTX version, as the target feature that asks for it.
    version: &'static str,
    /// What the module is assembled for in the check.
    arch: &'static str,
}

/// Ampere, Hopper and the two kinds of Blackwell. The driver assembles the PTX of the first two for later GPUs as well;
/// that of the others has instructions that no other kind has.
pub(crate) const GPUS: [Gpu; 4] = [
    Gpu { cpu: "sm_80", version: "ptx86", arch: "sm_80" },
    Gpu { cpu: "sm_90", version: "ptx86", arch: "sm_90a" },
    Gpu { cpu: "sm_100a", version: "ptx86", arch: "sm_100a" },
    Gpu { cpu: "sm_120a", version: "ptx87", arch: "sm_120a" },
];

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
        for gpu in gpus {
            for module in kernels() {
                self.compile(gpu, &module)?;
            }
        }
        Ok(self.target_directory.join("ptx"))
    }

    /// Compiles one module to a file.
    fn compile(&self, gpu: &Gpu, module: &Module) -> Result<PathBuf> {
        let folder = self.target_directory.join(module.folder).join(gpu.cpu);
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let file = folder.join(format!("{}.ptx", module.name));
        let manifest = cmd::root().join(module.manifest);
        let mut cargo = self.toolchain.cargo(&manifest, "rustc", TARGET, gpu.cpu)?;
        cargo.arg("--release");
        if let Some(features) = &module.features {
            cargo.args(["--features", features]);
        }
        // Kernels use unstable features of the language. The flags are for `core` and every other crate as well: a
        // function compiled for another processor would not be inlined.
        cargo.env("RUSTC_BOOTSTRAP", "1");
        cargo.env("RUSTFLAGS", format!("-Ctarget-cpu={} -Ctarget-feature=+{}", gpu.cpu, gpu.version));
        cargo.arg("--").arg(format!("--emit=asm={}", file.display()));
        cmd::run_quietly(&mut cargo)?;
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let bounded =
            bound_blocks(&text, gpu.cpu, module.name.split('_').next().unwrap_or_default(), module.set);
        fs::write(&file, bounded).with_context(|| format!("cannot write {}", file.display()))?;
        Ok(file)
    }
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

    /// Builds and checks every module for each of `gpus`, all at once. For each, a report of every kernel's registers.
    ///
    /// # Errors
    /// For a GPU with a module that does not build, or a kernel that is not as it must be: what is wrong with each.
    pub(crate) fn build<'a>(&self, gpus: &[&'a Gpu]) -> Vec<(&'a Gpu, Result<String>)> {
        eprintln!("building for {}", gpus.iter().map(|gpu| gpu.cpu).collect::<Vec<_>>().join(", "));
        thread::scope(|scope| {
            let builds: Vec<_> =
                gpus.iter().map(|&gpu| (gpu, scope.spawn(move || self.build_one(gpu)))).collect();
            let joined = builds.into_iter().map(|(gpu, build)| {
                let result = build.join().unwrap_or_else(|panic| resume_unwind(panic));
                (gpu, result)
            });
            joined.collect()
        })
    }

    fn build_one(&self, gpu: &Gpu) -> Result<String> {
        let mut report = String::new();
        let mut wrong = String::new();
        for module in kernels().chain(examples()) {
            let file = self.compiler.compile(gpu, &module)?;
            let text =
                fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
            let name = format!("{}/{}", gpu.cpu, module.name);
            if let Some(what) = panic_path(&text) {
                wrong += &format!("\n  {name}: {what}");
            }
            if layout_of(&text) != Some(LAYOUT) {
                wrong += &format!("\n  {name}: its launch layout is {:?}, not {LAYOUT}", layout_of(&text));
            }
            for function in self.ptxas.assemble(&file, gpu.arch)? {
                report += &format!("{name}: {function}\n");
                if function.uses_local_memory() {
                    wrong += &format!("\n  {name}: {function}");
                }
            }
        }
        ensure!(
            wrong.is_empty(),
            "\n{report}kernels must not panic, spill or use local memory, and must say their layout:{wrong}"
        );
        Ok(report)
    }
}

/// Adds to each entry point the size of its largest block, which tells the assembler how many registers it may use.
/// rustc has no way to say so; the device crate's table of entry points has the sizes. A module that cargo found
/// fresh has the lines already, and keeps them.
fn bound_blocks(ptx: &str, cpu: &str, element: &str, set: &str) -> String {
    // Without clusters and dependent launch, addresses and indices take up more registers.
    let ampere = cpu == "sm_80";
    let mut bounded = String::with_capacity(ptx.len());
    let mut bounds = None;
    for line in ptx.lines().filter(|line| !line.starts_with(".maxntid") && !line.starts_with(".minnctapersm"))
    {
        if let Some((_, name)) = line.split_once(".entry ") {
            let name = name.trim_end_matches(['(', ')', ' ']);
            let large = set == "w8"
                || name.ends_with("_p2")
                || name.ends_with("_streamed")
                || (element == "f32" && set == "w4" && name.contains("shot_nvfp4"));
            // Twice on a multiprocessor where 64 registers do.
            let twice = set == "w2"
                && name.starts_with("two_shot")
                && name.ends_with("_p2")
                && !name.contains("nvfp4");
            let threads = match (ampere, set) {
                (true, "w8") => 256,
                (true, "w2" | "w4") => 512,
                _ if large => 512,
                _ => 1024,
            };
            bounds = Some((threads, if twice && !ampere { 2 } else { 1 }));
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

    #[test]
    fn every_example_is_built() {
        let folders = fs::read_dir(cmd::root().join("device/examples")).unwrap();
        let found: Vec<PathBuf> = folders.map(|folder| folder.unwrap().path().join("Cargo.toml")).collect();
        let built: Vec<PathBuf> = examples().map(|module| cmd::root().join(module.manifest)).collect();
        assert_eq!(built, found);
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
        let two_shot = ptx.replace("fill", "two_shot_norm");
        let bounded = bound_blocks(&two_shot, "sm_90", "bf16", "w2");
        assert!(bounded.ends_with(".maxntid 512, 1, 1\n.minnctapersm 2\n{\n}\n"));
        assert!(
            bound_blocks(&two_shot.replace("norm", "nvfp4"), "sm_90", "bf16", "w2")
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
