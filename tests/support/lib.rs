//! Support for the tests across crates: the program, built once; runs of it that cannot hang a test or leave a process
//! behind; and the reports that it writes.
//!
//! ```no_run
//! use fused_collective_tests::{bench, run};
//!
//! let outcome = run(&mut bench("--num-tokens 1 --trials 1"));
//! assert_eq!(outcome.code, Some(0), "{outcome}");
//! ```

mod forward;
mod process;
pub mod report;

use std::{
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
    time::Duration,
};

use escargot::{CargoBuild, error::CargoError};

pub use process::{Outcome, Running};
use report::Report;

/// The longest run of the program, far more than any test needs on two busy cores.
pub const LIMIT: Duration = Duration::from_secs(120);

/// The path of the program: that in `FUSED_COLLECTIVE_TESTED_PROGRAM`, or else of a build. The first call of a test binary
/// builds it, with the tests' own profile, so that its overflow checks and debug assertions are tested as well.
///
/// # Panics
/// The program does not build.
pub fn program() -> &'static Path {
    static PROGRAM: OnceLock<Result<PathBuf, CargoError>> = OnceLock::new();
    let program = PROGRAM.get_or_init(|| {
        if let Some(program) = std::env::var_os("FUSED_COLLECTIVE_TESTED_PROGRAM") {
            return Ok(program.into());
        }
        let profile = if cfg!(debug_assertions) { "test" } else { "release" };
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("Cargo.toml");
        let build = CargoBuild::new()
            .manifest_path(workspace)
            .package("fused-collective-cli")
            .bin("fused-collective");
        Ok(build.profile(profile).run()?.path().to_owned())
    });
    program.as_ref().unwrap_or_else(|error| panic!("the program does not build: {error}"))
}

/// The program with `args`. The caller may add an environment or a folder before [`Running::start`].
///
/// Variables that make a process a rank of some launcher's job are not inherited.
pub fn command(args: &[&str]) -> Command {
    const STARTERS: [&str; 11] = [
        "RANK",
        "WORLD_SIZE",
        "LOCAL_",
        "MASTER_",
        "TORCHELASTIC_",
        "OMPI_",
        "PMI",
        "MPI_",
        "SLURM_",
        "FUSED_COLLECTIVE_",
        "NCCL_HOSTID",
    ];
    let mut command = Command::new(program());
    command.args(args);
    for (name, _) in std::env::vars_os() {
        if STARTERS.iter().any(|prefix| name.to_string_lossy().starts_with(prefix)) {
            command.env_remove(name);
        }
    }
    command
}

/// `bench` on the CPU backend with `options`, separated by spaces. The deadline is long enough for a busy machine, unless
/// `options` has its own.
pub fn bench(options: &str) -> Command {
    let mut command = command(&["bench", "--backend", "cpu"]);
    command.args(options.split_whitespace());
    if !options.contains("--deadline") {
        command.args(["--deadline", "60"]);
    }
    command
}

/// Tells the reader of the tests' output, and `cargo xtask test`, which counts them, that a test was skipped, and why.
///
/// # Panics
/// The output cannot be written.
pub fn skip(why: &str) {
    // Not `println!`, whose text the test harness keeps.
    writeln!(io::stdout(), "skipped: {why}").expect("an output");
}

/// Runs the program to its end.
///
/// # Panics
/// It takes longer than [`LIMIT`].
pub fn run(command: &mut Command) -> Outcome {
    Running::start(command).wait(LIMIT)
}

/// Runs [`bench()`] with `options` and returns what it wrote with `--json`.
///
/// # Panics
/// The run fails, writes to the standard error, or leaves a process behind.
pub fn measure(options: &str) -> Report {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("report.json");
    let outcome = run(bench(options).arg("--json").arg(&file));
    outcome.assert_success();
    Report::read(&file)
}
