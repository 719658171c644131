//! `cargo xtask doctor`: what this machine has of all that the project can use, what each missing thing would enable,
//! and how to get it. It installs nothing, and a missing thing is no failure.

use std::{
    env, fmt, fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::Result;
use fused_collective_build::{Error, Processor, Ptxas, TARGET, Toolchain};
use fused_collective_core::launch::{LAYOUT, layout_of};
use fused_collective_kernels::Archive;

use crate::{cmd, kernels};

/// How long a program may take to say what it is: a driver in trouble may not answer at all.
const LIMIT: Duration = Duration::from_secs(20);

/// What was looked for, and what came of it.
#[derive(Debug, PartialEq, Eq)]
struct Item {
    name: &'static str,
    outcome: Outcome,
}

#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Found(String),
    Missing {
        /// Why it is not there, in a few words.
        why: String,
        /// What it would enable.
        enables: &'static str,
        /// How to get it.
        remedy: String,
    },
}

impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name;
        match &self.outcome {
            Outcome::Found(what) => {
                let mut lines = what.lines();
                write!(f, "  found    {name}: {}", lines.next().unwrap_or_default())?;
                lines.try_for_each(|line| write!(f, "\n           {line}"))
            }
            Outcome::Missing { why, enables, remedy } => write!(
                f,
                "  missing  {name}: {why}\n           it enables: {enables}\n           remedy: {remedy}"
            ),
        }
    }
}

fn found(name: &'static str, what: impl Into<String>) -> Item {
    Item { name, outcome: Outcome::Found(what.into()) }
}

fn missing(
    name: &'static str,
    why: impl fmt::Display,
    enables: &'static str,
    remedy: impl Into<String>,
) -> Item {
    // One line, whatever a program or the system has said.
    let why = format!("{why:#}").split_whitespace().collect::<Vec<_>>().join(" ");
    Item { name, outcome: Outcome::Missing { why, enables, remedy: remedy.into() } }
}

/// Looks at everything, and prints what it finds.
pub(crate) fn run() -> Result<()> {
    print!("{}", report(&cmd::target_directory()?));
    Ok(())
}

fn report(target: &Path) -> String {
    let python = python_items(&env::var_os("PYTHON").map_or("python3".into(), PathBuf::from));
    let sections = [
        ("To build", vec![rust(), kernel_compiler(), ptxas(target), built(&target.join("ptx")), embedded()]),
        ("To run on GPUs", [vec![driver()], gpus(), vec![nccl()]].into_iter().flatten().collect()),
        ("To compare with (bench --peers)", python),
    ];
    let mut text = String::new();
    for (heading, items) in sections {
        text += &format!("{heading}\n");
        for item in items {
            text += &format!("{item}\n");
        }
    }
    text
}

fn rust() -> Item {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    match cmd::output_within(Command::new(rustc).arg("--version"), LIMIT) {
        Ok(version) => found("Rust", version.trim()),
        Err(error) => missing("Rust", error, "everything", "https://rustup.rs"),
    }
}

fn kernel_compiler() -> Item {
    let name = "compiler for kernels";
    match Toolchain::find(&[TARGET], false) {
        Ok(toolchain) => found(name, toolchain.to_string()),
        Err(error) => missing(
            name,
            if let Error::NoToolchain { tried, .. } = error { tried } else { error.to_string() },
            "building the GPU kernels; `cargo xtask ptx` tries to install it",
            "rustup component add rust-src, or on Debian apt-get install rustc-web rust-web-src",
        ),
    }
}

fn ptxas(target: &Path) -> Item {
    match Ptxas::find(&target.join("ptxas"), false) {
        Ok(ptxas) => found("ptxas", ptxas.to_string()),
        Err(error) => missing(
            "ptxas",
            error,
            "the check of kernels for spills and local memory",
            "`cargo xtask ptx` fetches it from PyPI; or put CUDA 12.8 or later on PATH",
        ),
    }
}

/// The kernels that were built, and those of them that are of another version.
fn built(folder: &Path) -> Item {
    let (mut built, mut stale) = (Vec::new(), Vec::new());
    for processor in Processor::ALL.map(Processor::name) {
        let files = fs::read_dir(folder.join(processor)).into_iter().flatten();
        let files = files.filter_map(|file| Some(file.ok()?.path()));
        let modules: Vec<PathBuf> = files.filter(|file| file.extension() == Some("ptx".as_ref())).collect();
        let current =
            |module: &PathBuf| fs::read_to_string(module).is_ok_and(|text| layout_of(&text) == Some(LAYOUT));
        if !modules.is_empty() {
            let list = if modules.iter().all(current) { &mut built } else { &mut stale };
            list.push(processor);
        }
    }
    let (name, enables, remedy) = ("kernels", "the cuda backend", "cargo xtask ptx");
    if !stale.is_empty() {
        return missing(
            name,
            format!("those for {} are of another version", stale.join(", ")),
            enables,
            remedy,
        );
    }
    if built.is_empty() {
        return missing(name, format!("none in {}", folder.display()), enables, remedy);
    }
    found(name, format!("{} in {}", built.join(", "), folder.display()))
}

/// The kernels that the library carries, as far as this program was built with them.
fn embedded() -> Item {
    let (name, enables) = ("kernels in the library", "the cuda backend without a folder of kernels");
    let remedy = "cargo xtask kernels";
    match Archive::embedded() {
        Ok(archive) if archive.is_empty() => missing(name, "none", enables, remedy),
        Ok(archive) => found(name, archive.processors().collect::<Vec<_>>().join(", ")),
        Err(error) => missing(name, error, enables, remedy),
    }
}

fn driver() -> Item {
    let name = "driver library";
    // SAFETY: the driver's initialization does nothing that this process must be prepared for.
    match unsafe { libloading::Library::new("libcuda.so.1") } {
        Ok(library) => {
            let mut version = 0;
            // SAFETY: the function takes the address of a number and writes there.
            let asked = unsafe {
                library
                    .get::<unsafe extern "C" fn(*mut i32) -> u32>("cuDriverGetVersion")
                    .map(|ask| ask(&mut version))
            };
            match asked {
                Ok(0) => found(name, format!("for CUDA {}.{}", version / 1000, version % 1000 / 10)),
                _ => found(name, "of an unknown version"),
            }
        }
        Err(error) => missing(
            name,
            std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string),
            "the cuda backend",
            "install NVIDIA's driver; in a container, run it with the GPUs (docker run --gpus all)",
        ),
    }
}

/// The GPUs and the links between them, as `nvidia-smi` lists them.
fn gpus() -> Vec<Item> {
    let ask = |words: &[&str]| cmd::output_within(Command::new("nvidia-smi").args(words), LIMIT);
    let query = "--query-gpu=index,name,compute_cap,memory.total,driver_version";
    let enables = "the cuda backend, which takes two or more GPUs with peer access to each other";
    let list = match ask(&[query, "--format=csv,noheader"]) {
        Ok(list) if !list.trim().is_empty() => list,
        Ok(_) => {
            return vec![missing("GPUs", "nvidia-smi lists none", enables, "a machine with NVIDIA GPUs")];
        }
        Err(error) => {
            return vec![missing(
                "GPUs",
                error,
                enables,
                "a machine with NVIDIA GPUs, and nvidia-smi on PATH",
            )];
        }
    };
    let count = list.trim().lines().count();
    let mut items = vec![found("GPUs", describe_gpus(&list))];
    if count > 1 {
        items.push(match ask(&["topo", "--matrix"]).map(|matrix| describe_links(&matrix)) {
            Ok(links) if !links.is_empty() => found("links", links),
            Ok(_) => {
                missing("links", "nvidia-smi topo names none", "a prediction of the bandwidth", "none needed")
            }
            Err(error) => {
                missing("links", error, "a prediction of the bandwidth", "nvidia-smi topo --matrix")
            }
        });
    }
    items
}

/// A line for each GPU, with the kernels that it runs.
fn describe_gpus(csv: &str) -> String {
    let describe = |line: &str| {
        let fields: Vec<&str> = line.split(',').map(str::trim).collect();
        let [index, name, capability, memory, driver] = fields[..] else { return line.to_owned() };
        let kernels = capability.replace('.', "").parse().ok().and_then(kernels::processor_for);
        let kernels =
            kernels.map_or("none of the kernels".to_owned(), |processor| format!("kernels for {processor}"));
        format!("{index}: {name}, compute capability {capability} ({kernels}), {memory}, driver {driver}")
    };
    csv.trim().lines().map(describe).collect::<Vec<_>>().join("\n")
}

/// The pairs of GPUs in the matrix of `nvidia-smi topo`, by the link between them.
fn describe_links(matrix: &str) -> String {
    // Headings are underlined on a terminal and, in some releases, everywhere.
    let plain = matrix.replace("\u{1b}[4m", "").replace("\u{1b}[0m", "");
    let mut links: Vec<(String, Vec<String>)> = Vec::new();
    for line in plain.lines() {
        let mut cells = line.split_whitespace();
        let Some(row) = cells.next().and_then(|name| name.strip_prefix("GPU")?.parse::<usize>().ok()) else {
            continue;
        };
        for (column, kind) in cells.enumerate().take(row) {
            // The heading starts with GPU0 as well, and has no kinds of links.
            if kind.starts_with("GPU") || kind == "X" {
                continue;
            }
            let pair = format!("{column}-{row}");
            match links.iter_mut().find(|(known, _)| known == kind) {
                Some((_, pairs)) => pairs.push(pair),
                None => links.push((kind.to_owned(), vec![pair])),
            }
        }
    }
    let describe = |(kind, pairs): (String, Vec<String>)| {
        let what = match kind.strip_prefix("NV") {
            Some(count) => format!("{count} NVLinks"),
            None => match kind.as_str() {
                "PIX" | "PXB" => "PCIe, within a switch".to_owned(),
                "PHB" | "NODE" => "PCIe, through the processor".to_owned(),
                "SYS" => "PCIe, across processors".to_owned(),
                other => other.to_owned(),
            },
        };
        format!("{what}: {}", pairs.join(" "))
    };
    links.into_iter().map(describe).collect::<Vec<_>>().join("\n")
}

fn nccl() -> Item {
    match nccl_sys::Nccl::load() {
        Ok(nccl) => {
            let mut version = 0;
            // SAFETY: room for the answer.
            unsafe { (nccl.ncclGetVersion)(&mut version) };
            found("NCCL", format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100))
        }
        Err(error) => missing(
            "NCCL",
            error.looked,
            "comparing with NCCL's all-reduce (bench --allreduce nccl), and groups of several hosts",
            "pip install nvidia-nccl-cu13, and NCCL_LIBRARY=.../site-packages/nvidia/nccl/lib/libnccl.so.2",
        ),
    }
}

/// What the peers need of Python, in the order of [`python_items`].
const PACKAGES: [(&str, &str, &str); 4] = [
    ("torch", "comparing with torch.distributed and torch.compile", "pip install torch"),
    ("flashinfer-python", "comparing with FlashInfer's fused all-reduce", "pip install flashinfer-python"),
    ("ninja", "building FlashInfer's kernels, at their first use", "pip install ninja"),
    (
        "nvcc",
        "building FlashInfer's kernels, at their first use",
        "install the CUDA toolkit, and put its bin on PATH or set CUDA_HOME",
    ),
];

/// Prints a line for each of [`PACKAGES`], its version or nothing. It imports none of them, which could take long.
const PYTHON_PROGRAM: &str = "\
import importlib.metadata, os, shutil, sys
print(sys.version.split()[0], sys.executable)
for name in ('torch', 'flashinfer-python'):
    try:
        print(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print()
for name in ('ninja', 'nvcc'):
    home = os.environ.get('CUDA_HOME', '')
    print(shutil.which(name) or shutil.which(os.path.join(home, 'bin', name)) or '')
";

fn python_items(python: &Path) -> Vec<Item> {
    match cmd::output_within(Command::new(python).args(["-c", PYTHON_PROGRAM]), LIMIT) {
        Ok(answer) => describe_python(&answer),
        Err(error) => {
            let remedy = "install Python 3.10 or later as python3, or name another with PYTHON";
            vec![missing("Python", error, "comparing with torch and FlashInfer", remedy)]
        }
    }
}

fn describe_python(answer: &str) -> Vec<Item> {
    let mut lines = answer.lines();
    let mut items = vec![found("Python", lines.next().unwrap_or_default())];
    for (name, enables, remedy) in PACKAGES {
        items.push(match lines.next().unwrap_or_default() {
            "" => missing(name, "not found", enables, remedy),
            version => found(name, version),
        });
    }
    items
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As printed on a machine of four GPUs, two of which are on another processor; cut to what matters.
    const MATRIX: &str = "\
\t\u{1b}[4mGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tCPU Affinity\tNUMA Affinity\u{1b}[0m
GPU0\t X \tNV18\tNV18\tSYS\tPIX\t0-31\t0
GPU1\tNV18\t X \tNV18\tSYS\tNODE\t0-31\t0
GPU2\tNV18\tNV18\t X \tPHB\tSYS\t0-31\t0
GPU3\tSYS\tSYS\tPHB\t X \tSYS\t32-63\t1
NIC0\tPIX\tNODE\tSYS\tSYS\t X \t\t

Legend:
  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect
";

    #[test]
    fn links_are_listed_by_kind_each_pair_once() {
        assert_eq!(
            describe_links(MATRIX),
            "18 NVLinks: 0-1 0-2 1-2\nPCIe, across processors: 0-3 1-3\nPCIe, through the processor: 2-3"
        );
        assert_eq!(describe_links("no such command\n"), "");
    }

    #[test]
    fn each_gpu_is_listed_with_the_kernels_that_it_runs() {
        let csv = "0, NVIDIA H200, 9.0, 143771 MiB, 580.95.05\n1, Tesla T4, 7.5, 15360 MiB, 580.95.05\n";
        let expected = "0: NVIDIA H200, compute capability 9.0 (kernels for sm_90), 143771 MiB, driver 580.95.05\n\
                        1: Tesla T4, compute capability 7.5 (none of the kernels), 15360 MiB, driver 580.95.05";
        assert_eq!(describe_gpus(csv), expected);
    }

    #[test]
    fn a_package_that_is_missing_is_named_with_what_it_enables_and_the_remedy() {
        let items = describe_python("3.12.1 /usr/bin/python3\n2.11.0\n\n/usr/bin/ninja\n\n");
        let shown: Vec<String> = items.iter().map(ToString::to_string).collect();
        assert_eq!(shown[1], "  found    torch: 2.11.0");
        assert_eq!(
            shown[2],
            "  missing  flashinfer-python: not found\n           it enables: comparing with FlashInfer's \
             fused all-reduce\n           remedy: pip install flashinfer-python"
        );
        assert!(shown[3].starts_with("  found    ninja") && shown[4].starts_with("  missing  nvcc"));
        // No Python at all is no failure either.
        let none = python_items(Path::new("/nonexistent/python3"));
        assert!(matches!(&none[..], [Item { name: "Python", outcome: Outcome::Missing { .. } }]), "{none:?}");
    }

    #[test]
    fn kernels_of_another_version_are_told_from_this_one_s() {
        let folder = tempfile::tempdir().unwrap();
        let missing = |item: Item| match item.outcome {
            Outcome::Missing { why, .. } => why,
            Outcome::Found(what) => panic!("{what}"),
        };
        assert!(missing(built(folder.path())).starts_with("none in "));
        let module = folder.path().join("sm_90/f32_local.ptx");
        fs::create_dir(folder.path().join("sm_90")).unwrap();
        fs::write(&module, format!(".global .u32 fused_collective_layout = {LAYOUT};\n")).unwrap();
        assert!(built(folder.path()).to_string().starts_with("  found    kernels: sm_90 in "));
        fs::write(&module, ".visible .entry fill()\n").unwrap();
        assert_eq!(missing(built(folder.path())), "those for sm_90 are of another version");
    }

    #[test]
    fn whatever_this_machine_lacks_the_report_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let text = report(folder.path());
        for name in [
            "Rust",
            "compiler for kernels",
            "ptxas",
            "kernels",
            "kernels in the library",
            "driver library",
            "GPUs",
            "NCCL",
            "Python",
        ] {
            let listed = |line: &str| {
                ["  found    ", "  missing  "].iter().any(|how| line.starts_with(&format!("{how}{name}: ")))
            };
            assert!(text.lines().any(listed), "{name} in\n{text}");
        }
        let count = |what: &str| text.matches(what).count();
        assert!(
            count("\n  missing  ") == count("it enables: ") && count("it enables: ") == count("remedy: "),
            "{text}"
        );
    }
}
