//! Reasons for kernels not to be built.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use crate::{Function, Module, Processor};

/// A reason for kernels not to be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No compiler has `core` for the targets.
    #[error(
        "no compiler with `core` for {targets}:{tried}\nAny of these helps:\n  rustup component add rust-src\n  \
         rustup target add {targets}\n  on Debian, as root: apt-get update && apt-get install \
         --no-install-recommends rustc-web rust-web-src"
    )]
    NoToolchain {
        /// The targets, with spaces between them.
        targets: String,
        /// A line for each toolchain that was tried, with the reason that it is none.
        tried: String,
    },
    /// ptxas is missing, or older than CUDA 12.8.
    #[error("no ptxas of CUDA 12.8 or later: {tried}")]
    NoPtxas {
        /// The places that were tried, and what would help.
        tried: String,
    },
    /// Another program could not be started or failed.
    #[error("`{command}`: {outcome}")]
    Command {
        /// The program, its arguments, and the environment that it was given.
        command: String,
        /// Its exit status and its standard error, or the reason that it was not started.
        outcome: String,
    },
    /// A file or folder could not be read or written.
    #[error("cannot {doing} {path}")]
    Io {
        /// The action that failed.
        doing: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The folder has no package whose static libraries could be compiled, or cargo does not understand it.
    #[error("{folder}: {problem}")]
    Package {
        /// The folder that was given.
        folder: PathBuf,
        /// The reason, and what would be valid.
        problem: String,
    },
    /// No folder for the PTX was named, and there is no `OUT_DIR`, as cargo gives it to a build script.
    #[error("no OUT_DIR, which a build script has: name the folders with `output` and `cache`")]
    NoOutput,
    /// The compiler left something other than the PTX that was asked of it.
    #[error("module {module}: {problem}")]
    Compiler {
        /// The module's name.
        module: String,
        /// The difference.
        problem: String,
    },
    /// ptxas does not take a module.
    #[error("{path} does not assemble for {processor}:\n{report}")]
    Assembler {
        /// The PTX.
        path: PathBuf,
        /// The processor that it was assembled for.
        processor: Processor,
        /// Everything that ptxas said.
        report: String,
    },
    /// Kernels compile, but are not as kernels must be.
    #[error("kernels must not panic, spill or use local memory, and must have this version's launch layout:{}", lines(.faults))]
    Refused {
        /// Faults, module by module.
        faults: Vec<Fault>,
        /// All modules that were built, sound ones included.
        modules: Vec<Module>,
    },
}

impl Error {
    /// For `map_err`: what was done to which file.
    pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Io { doing, path, source }
    }
}

fn lines(faults: &[Fault]) -> String {
    faults.iter().map(|fault| format!("\n  {fault}")).collect()
}

/// Something that is wrong with a module.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Fault {
    /// The processor that the module is for.
    pub processor: Processor,
    /// The module's name.
    pub module: String,
    /// The kind of fault.
    pub kind: FaultKind,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}: {}", self.processor, self.module, self.kind)
    }
}

/// A kind of fault of a module.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FaultKind {
    /// A kernel may panic. The line of PTX shows it.
    #[error("a panic path: {0}")]
    PanicPath(String),
    /// A kernel spills registers or has variables in local memory.
    #[error("{0}")]
    LocalMemory(Function),
    /// The structs that the kernels are launched with are of another version than this crate's
    /// [`LAYOUT`](fused_collective_core::launch::LAYOUT).
    #[error(
        "its launch layout is {found:#010x}, not {expected:#010x}: the versions of fused-collective-device and \
             fused-collective-build differ"
    )]
    Layout {
        /// The module's.
        found: u32,
        /// This crate's.
        expected: u32,
    },
}
