//! GPU kernels written in Rust, from a crate to checked PTX: for build scripts and tools.
//!
//! rustc's own `nvptx64-nvidia-cuda` target compiles them. What it takes beyond `cargo build` is done here: a toolchain that
//! has the target's `core` or its source, rustc's flags for each [`Processor`], launch [`Bounds`] for each entry point, and
//! checks that kernels never panic, spill registers or use local memory.
//!
//! # A build script
//! ```no_run
//! use fused_collective_build::{Bounds, Kernels, Processor};
//!
//! fn main() -> Result<(), fused_collective_build::Error> {
//!     let kernels = Kernels::new("kernels")
//!         .processors(&[Processor::Sm90])
//!         .bounds(|_entry| Bounds { threads: 1024, blocks: 1 });
//!     for module in kernels.build()? {
//!         // `include_str!(env!("OWN_KERNELS"))` is the PTX.
//!         println!("cargo::rustc-env={}={}", module.name.to_uppercase(), module.path.display());
//!     }
//!     Ok(())
//! }
//! ```
//!
//! # A crate of kernels
//! `kernels/Cargo.toml` is a workspace of its own, since nothing else in the workspace builds for GPUs:
//! ```toml
//! [package]
//! name = "own_kernels"
//! edition = "2024"
//!
//! [workspace]
//!
//! [lib]
//! crate-type = ["staticlib"]
//!
//! [dependencies]
//! fused-collective-device = "0.1"
//! ```
//! and `kernels/src/lib.rs` is `#![no_std]`, has a panic handler, and functions that are `extern "ptx-kernel"`. Every library
//! or example of crate-type `staticlib` becomes a [`Module`]. Optimization and linking need no profile: they are set here.
//! The crate has no build script. Its dependencies may have: they are compiled without a processor's features, as `core` is.

#[cfg(not(unix))]
compile_error!("fused-collective-build runs on Unix only: use it on Linux, or in a container");

mod bounds;
mod check;
mod command;
mod compile;
mod error;
mod module;
mod package;
mod processor;
mod ptxas;
mod toolchain;

use std::{
    env, fmt,
    panic::resume_unwind,
    path::{Path, PathBuf},
    thread,
};

pub use bounds::Entry;
pub use check::Assembly;
pub use error::{Error, Fault, FaultKind};
pub use fused_collective_core::kernels::Bounds;
pub use module::{Function, Module, Report};
pub use processor::{Processor, UnknownProcessor};
pub use ptxas::Ptxas;
pub use toolchain::{TARGET, Toolchain};

use bounds::BoundsOf;
use compile::Compiler;
use package::Package;

/// A crate of kernels to build. See the [crate] for a build script.
pub struct Kernels {
    folder: PathBuf,
    processors: Vec<Processor>,
    bounds: Option<BoundsOf>,
    assembly: Assembly,
    output: Option<PathBuf>,
    cache: Option<PathBuf>,
    lock_file: Option<PathBuf>,
    install: bool,
}

impl Kernels {
    /// The kernels of the package in `folder`, for every [`Processor`] and without launch bounds. A build script's relative
    /// paths start at its own package.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Kernels {
            folder: folder.into(),
            processors: Processor::ALL.to_vec(),
            bounds: None,
            assembly: Assembly::default(),
            output: None,
            cache: None,
            lock_file: None,
            install: false,
        }
    }

    /// Builds for these processors.
    pub fn processors(mut self, processors: &[Processor]) -> Self {
        self.processors = processors.to_vec();
        self
    }

    /// Gives every entry point the launch bounds that `bounds` answers for it. Without bounds the assembler takes as many
    /// registers as it likes, and a launch with large blocks may fail.
    pub fn bounds(mut self, bounds: impl Fn(&Entry<'_>) -> Bounds + 'static) -> Self {
        self.bounds = Some(Box::new(bounds));
        self
    }

    /// Uses ptxas in this way.
    pub fn assembly(mut self, assembly: Assembly) -> Self {
        self.assembly = assembly;
        self
    }

    /// Writes modules into a folder for each processor in `folder`: by default `ptx` in a build script's `OUT_DIR`.
    pub fn output(mut self, folder: impl Into<PathBuf>) -> Self {
        self.output = Some(folder.into());
        self
    }

    /// Keeps in `folder` what makes the next build fast: cargo's outputs (in `cross/ptx`), and a ptxas that was fetched (in
    /// `ptxas`). By default that is a build script's `OUT_DIR`.
    pub fn cache(mut self, folder: impl Into<PathBuf>) -> Self {
        self.cache = Some(folder.into());
        self
    }

    /// Gives the kernels' workspace a copy of this lock file, so that both use the same versions of other crates.
    pub fn lock_file(mut self, file: impl Into<PathBuf>) -> Self {
        self.lock_file = Some(file.into());
        self
    }

    /// Lets the build install a toolchain (by rustup, or Debian's packages as root) and fetch ptxas (from PyPI) where they
    /// are missing. By default nothing is installed, and the error says what would help.
    pub fn install(mut self, install: bool) -> Self {
        self.install = install;
        self
    }

    /// Compiles and checks every module for every processor: while one processor's are checked, the next one's compile. Only
    /// what has changed is compiled again.
    ///
    /// In a build script, cargo is told to run it again when the kernels' source changes.
    ///
    /// # Errors
    /// A tool is missing, a module does not compile or assemble, or kernels are [not as they must be](Error::Refused).
    pub fn build(self) -> Result<Vec<Module>, Error> {
        let out = env::var_os("OUT_DIR").map(PathBuf::from).ok_or(Error::NoOutput);
        let in_build_script = self.output.is_none();
        let output = match &self.output {
            Some(folder) => folder.clone(),
            None => out.as_ref().map_err(|_| Error::NoOutput)?.join("ptx"),
        };
        let cache = self.cache.clone().map_or(out, Ok)?;
        let ptxas = self.ptxas(&cache)?;
        let keep = self.assembly == Assembly::Keep;
        let compiler = Compiler {
            toolchain: Toolchain::find(&[TARGET], self.install)?,
            package: self.package()?,
            cache: &cache,
            output: &output,
            bounds: self.bounds.as_ref(),
        };
        if in_build_script {
            for source in &compiler.package.sources {
                println!("cargo::rerun-if-changed={}", source.display());
            }
        }
        let (faults, modules) =
            thread::scope(|scope| {
                let mut checks = Vec::new();
                for (compiled_for, processors) in processor::by_compilation(&self.processors) {
                    let mut modules = compiler.compile(compiled_for, &processors)?;
                    let ptxas = ptxas.as_ref();
                    checks.push(scope.spawn(move || {
                        check::check(&mut modules, ptxas, keep).map(|faults| (faults, modules))
                    }));
                }
                let (mut faults, mut modules) = (Vec::new(), Vec::new());
                for check in checks {
                    let checked = check.join().unwrap_or_else(|panic| resume_unwind(panic))?;
                    faults.extend(checked.0);
                    modules.extend(checked.1);
                }
                Ok::<_, Error>((faults, modules))
            })?;
        if faults.is_empty() { Ok(modules) } else { Err(Error::Refused { faults, modules }) }
    }

    fn ptxas(&self, cache: &Path) -> Result<Option<Ptxas>, Error> {
        let find = || Ptxas::find(&cache.join("ptxas"), self.install);
        match self.assembly {
            Assembly::Skip => Ok(None),
            Assembly::CheckIfFound => Ok(find().ok()),
            Assembly::Check | Assembly::Keep => find().map(Some),
        }
    }

    fn package(&self) -> Result<Package, Error> {
        if let Some(from) = &self.lock_file {
            let to = self.folder.join("Cargo.lock");
            std::fs::copy(from, &to).map_err(Error::io("copy", from))?;
        }
        Package::read(&self.folder)
    }
}

impl fmt::Debug for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernels")
            .field("folder", &self.folder)
            .field("processors", &self.processors)
            .finish_non_exhaustive()
    }
}
