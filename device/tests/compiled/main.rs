//! The kernels as they were compiled, for every kind of GPU, run by the emulator, against `core::reference`.
//!
//! `cargo xtask test` builds them, and says where they are in `FUSED_COLLECTIVE_PTX`: in a folder for each kind.

mod collectives;
mod local;
mod necessary;
#[path = "../support/mod.rs"]
mod support;

use std::{
    collections::BTreeMap,
    env, fs,
    mem::MaybeUninit,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use fused_collective_device::simt::host::Launch;
use fused_collective_emulator::{Entry, Geometry, Grid, Memory, Module};
use support::{Buffer, Kernel, Rows};

const KERNELS: [Kernel; 3] = [Kernel::OneShot, Kernel::TwoShot, Kernel::Sharded];
const ROWS: [Rows; 3] = [Rows::P1, Rows::P2, Rows::Streamed];

/// The folders of the kinds of GPUs.
fn gpus() -> Vec<PathBuf> {
    let folder = env::var_os("FUSED_COLLECTIVE_PTX").expect("`cargo xtask test` says where the kernels are");
    let mut gpus: Vec<PathBuf> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    gpus.sort();
    assert!(!gpus.is_empty(), "there are no kernels in {}", folder.display());
    gpus
}

/// Whether GPUs of the kind have clusters of blocks.
fn has_clusters(gpu: &Path) -> bool {
    !gpu.ends_with("sm_80")
}

/// A module of kernels for one kind of GPU.
struct Compiled {
    file: PathBuf,
    module: Module,
    /// The entry points that have been run.
    ran: Mutex<BTreeMap<String, Arc<Entry>>>,
    /// Of the next grid: each has another order of threads.
    seed: AtomicU64,
}

impl Compiled {
    fn read(gpu: &Path, module: &str) -> Compiled {
        Compiled::read_changed(gpu, module, |ptx| ptx)
    }

    /// The module with a change that is to show.
    fn read_changed(gpu: &Path, module: &str, change: impl FnOnce(String) -> String) -> Compiled {
        let file = gpu.join(format!("{module}.ptx"));
        let ptx = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let module =
            Module::parse(&change(ptx)).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        Compiled { file, module, ran: Mutex::default(), seed: AtomicU64::new(1) }
    }

    /// Runs an entry point to its end.
    ///
    /// # Panics
    /// If it does what a kernel must not do.
    fn run(&self, launch: Launch, name: &str, parameter: &[MaybeUninit<u8>]) {
        let file = self.file.display();
        let decode = || {
            let entry = self.module.entry(name).unwrap_or_else(|| panic!("{file} has no {name}"));
            Arc::new(entry.unwrap_or_else(|error| panic!("{file}, {error}")))
        };
        let entry = Arc::clone(self.ran.lock().unwrap().entry(name.to_owned()).or_insert_with(decode));
        // SAFETY: buffers live while kernels run with them, and are accessed by those alone. Of a buffer of another
        // test, whose address it does not know, a kernel could at worst break the contents.
        let memory = unsafe { Memory::new(Buffer::allocations()) };
        let grid = Grid {
            entry: &entry,
            geometry: Geometry { blocks: launch.blocks, cluster: launch.cluster, threads: launch.threads },
            parameter,
            memory: &memory,
            seed: self.seed.fetch_add(1, Ordering::Relaxed),
            timeout: Duration::from_secs(60),
        };
        // SAFETY: kernels load fields of the parameter, which are initialized.
        unsafe { grid.run() }.unwrap_or_else(|fault| panic!("{file}: {fault}"));
    }

    /// Every entry point has been run, but for those whose names start with `except`.
    fn assert_all_ran(&self, except: &str) {
        let ran = self.ran.lock().unwrap();
        let left = self.module.names().filter(|name| !ran.contains_key(*name) && !name.starts_with(except));
        let left: Vec<&str> = left.collect();
        assert!(left.is_empty(), "{}: {left:?} did not run", self.file.display());
    }
}
