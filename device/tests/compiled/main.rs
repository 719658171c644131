//! The kernels as they were compiled, for every kind of GPU, run by the emulator, against `core::reference`.
//!
//! `cargo xtask test` builds them, and says where they are in `FUSED_COLLECTIVE_PTX`: in a folder for each kind. By hand:
//! `cargo xtask ptx`, then `FUSED_COLLECTIVE_PTX=$PWD/target/ptx cargo test -p fused-collective-device-tests --test compiled`.

mod bench;
mod collectives;
mod example;
mod hosts;
mod links;
mod local;
mod necessary;
mod table;

use std::{
    array,
    collections::BTreeMap,
    env, fs,
    mem::MaybeUninit,
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use fused_collective_core::kernels::Processor;
use fused_collective_device::{launch::MAX_RANKS, simt::host::Launch};
use fused_collective_device_tests::{Kernel, Rows};
use fused_collective_emulator::{Entry, Geometry, Grid, Memory, Module};

const KERNELS: [Kernel; 3] = [Kernel::OneShot, Kernel::TwoShot, Kernel::Sharded];
const ROWS: [Rows; 3] = [Rows::P1, Rows::P2, Rows::Streamed];

/// The kinds of GPUs that there are kernels for.
fn gpus() -> [&'static str; 4] {
    Processor::ALL.map(|processor| processor.name)
}

/// True for GPUs that have clusters of blocks.
fn has_clusters(gpu: &str) -> bool {
    Processor::ALL.iter().any(|processor| processor.name == gpu && processor.has_clusters())
}

fn folder() -> PathBuf {
    let folder = env::var_os("FUSED_COLLECTIVE_PTX");
    folder.expect("`FUSED_COLLECTIVE_PTX` says where the kernels are: see the top of this file").into()
}

/// Where the kernels of the examples are, beside the others.
fn examples() -> PathBuf {
    folder().with_file_name("ptx-examples")
}

/// The kinds of GPUs for which `module` is compiled to different instructions.
fn gpus_of(module: &str) -> Vec<&'static str> {
    let instructions = |gpu: &str| -> Vec<String> {
        let ptx = read(&folder().join(gpu).join(format!("{module}.ptx")));
        // Directives are the assembler's.
        ptx.lines().filter(|line| !line.starts_with('.')).map(str::to_owned).collect()
    };
    let mut different: Vec<(&str, Vec<String>)> = Vec::new();
    for gpu in gpus() {
        let of_gpu = instructions(gpu);
        if different.iter().all(|(_, of_other)| *of_other != of_gpu) {
            different.push((gpu, of_gpu));
        }
    }
    different.into_iter().map(|(gpu, _)| gpu).collect()
}

fn read(file: &Path) -> String {
    fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// A module of kernels for one kind of GPU.
struct Compiled {
    file: PathBuf,
    module: Module,
    /// Other modules of the same type that the ranks of its groups use: the first that has an entry point counts.
    beside: Vec<Module>,
    /// The entry points that have been run.
    ran: Mutex<BTreeMap<String, Arc<Entry>>>,
    /// How many grids each rank has run, which decides in which order the threads of the next take turns.
    grids: [AtomicU64; MAX_RANKS],
    seed: u64,
    /// What kernels were found to do that they must not.
    faults: Mutex<Vec<String>>,
}

impl Compiled {
    /// The module `name` for `gpu`. The order in which threads take turns is `seed`'s.
    fn read(gpu: &str, name: &str, seed: u64) -> Compiled {
        Compiled::read_from(&folder(), gpu, name, seed, |ptx| ptx)
    }

    /// The module in a folder of modules, perhaps with a change that is to show.
    fn read_from(
        folder: &Path,
        gpu: &str,
        name: &str,
        seed: u64,
        change: impl Fn(String) -> String,
    ) -> Compiled {
        let parse = |file: &Path, change: &dyn Fn(String) -> String| {
            Module::parse(&change(read(file))).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
        };
        let file = |name: &str| folder.join(gpu).join(format!("{name}.ptx"));
        let (dtype, set) = name.split_once('_').unwrap_or((name, ""));
        let beside = |set: &str| {
            let file = file(&format!("{dtype}_{set}"));
            file.exists().then(|| parse(&file, &|ptx| ptx))
        };
        Compiled {
            module: parse(&file(name), &change),
            // Two ranks have two-shot of the larger groups.
            beside: match set {
                "w2" => &["any2", "w4", "any8", "streamed"][..],
                "wire2" | "w4" | "w8" => &["any8", "streamed"],
                "hosts" => &[],
                _ => &["streamed"],
            }
            .iter()
            .filter_map(|set| beside(set))
            .collect(),
            file: file(name),
            ran: Mutex::default(),
            grids: array::from_fn(|_| AtomicU64::new(0)),
            seed,
            faults: Mutex::default(),
        }
    }

    /// True if there is an entry point, here or beside.
    fn has(&self, name: &str) -> bool {
        let mut names = self.module.names().chain(self.beside.iter().flat_map(Module::names));
        names.any(|it| it == name)
    }

    /// Runs an entry point to its end, which may access `ranges`.
    ///
    /// # Panics
    /// If it does what a kernel must not do.
    fn run(
        &self,
        rank: u32,
        launch: Launch,
        name: &str,
        parameter: &[MaybeUninit<u8>],
        ranges: Vec<Range<u64>>,
    ) {
        let file = self.file.display();
        let decode = || {
            let mut modules = [&self.module].into_iter().chain(&self.beside);
            let entry = modules.find_map(|module| module.entry(name));
            let entry = entry.unwrap_or_else(|| panic!("neither {file} nor what is beside it has {name}"));
            Arc::new(entry.unwrap_or_else(|error| panic!("{file}, {error}")))
        };
        let entry = Arc::clone(self.ran.lock().unwrap().entry(name.to_owned()).or_insert_with(decode));
        // SAFETY: callers hold the buffers until this returns, and only kernels access them meanwhile.
        let memory = unsafe { Memory::new(ranges) };
        let seed = (self.seed << 32)
            + (u64::from(rank) << 24)
            + self.grids[rank as usize].fetch_add(1, Ordering::Relaxed);
        let grid = Grid {
            entry: &entry,
            geometry: Geometry { blocks: launch.blocks, cluster: launch.cluster, threads: launch.threads },
            parameter,
            memory: &memory,
            seed,
            timeout: Duration::from_secs(60),
        };
        // SAFETY: kernels load fields of the parameter, which are initialized.
        if let Err(fault) = unsafe { grid.run() } {
            self.faults.lock().unwrap().push(fault.what.clone());
            panic!("{file}: {fault} (rank {rank}, seed {seed:#x})");
        }
    }

    /// Every entry point, of the modules beside too, has been run, but for those whose names `is_left_out`.
    fn assert_all_ran(&self, is_left_out: impl Fn(&str) -> bool) {
        let ran = self.ran.lock().unwrap();
        let names = self.module.names().chain(self.beside.iter().flat_map(Module::names));
        let left: Vec<&str> = names.filter(|name| !ran.contains_key(*name) && !is_left_out(name)).collect();
        assert!(left.is_empty(), "{}: {left:?} did not run", self.file.display());
    }
}

#[test]
fn every_kind_that_there_are_kernels_for_is_emulated() {
    let folders =
        fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let unknown: Vec<String> = folders.filter(|name| !gpus().contains(&name.as_str())).collect();
    assert!(unknown.is_empty(), "{unknown:?}: kinds that the table lacks, or of an earlier build");
}
