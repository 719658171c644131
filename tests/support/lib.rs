//! What the tests across crates share: the program, built once, and runs of it that cannot hang a test or leave a
//! process behind.
//!
//! ```no_run
//! let outcome = fused_collective_tests::run(&["bench", "--num-tokens", "1"]);
//! assert_eq!(outcome.code, Some(0), "{outcome}");
//! ```

mod process;

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
    time::Duration,
};

use escargot::CargoBuild;

pub use process::{Outcome, Running};

/// How long a run of the program may take: far more than any test's takes on two busy cores.
pub const LIMIT: Duration = Duration::from_secs(120);

/// The program's file. The first call of a test binary has cargo build it, with the profile that the tests themselves
/// have, so that its overflow checks and debug assertions are tested as well.
///
/// # Panics
/// When it does not build.
pub fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let profile = if cfg!(debug_assertions) { "test" } else { "release" };
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("Cargo.toml");
        let build =
            CargoBuild::new().manifest_path(workspace).package("fused-collective").bin("fused-collective");
        build.profile(profile).run().expect("the program builds").path().to_owned()
    })
}

/// The program with `args`, to be given an environment or a folder before [`Running::start`].
///
/// What says to a program that it is a rank of some launcher's job is not inherited: the tests decide on that.
pub fn command(args: &[&str]) -> Command {
    let mut command = Command::new(program());
    command.args(args);
    for (name, _) in std::env::vars_os() {
        let launcher = |prefix: &&str| name.to_string_lossy().starts_with(prefix);
        if ["RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMPI_", "PMI", "SLURM_"].iter().any(launcher) {
            command.env_remove(name);
        }
    }
    command
}

/// Runs the program with `args` to its end.
///
/// # Panics
/// When it takes longer than [`LIMIT`].
pub fn run(args: &[&str]) -> Outcome {
    Running::start(&mut command(args)).wait(LIMIT)
}
