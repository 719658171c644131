//! `cargo xtask test`: every check of the project. A failed one does not keep the next from running, and the last line
//! counts them all, together with every test that `cargo test` ran.
//!
//! `--quick` is the inner loop's part of it, `--target` another architecture's, and `--embedded` the specification on
//! processors of every kind.

use std::{
    ffi::OsStr,
    io::{self, IsTerminal},
    panic::resume_unwind,
    path::PathBuf,
    process::{Command, ExitCode},
    thread,
    time::Instant,
};

use anyhow::Result;
use fused_collective_build::{Assembly, Processor, Toolchain};

use crate::{
    cmd,
    cross::{Target, Tools},
    embedded,
    gnu_ld::Program,
    kernels, library, packages, races,
    select::{EMULATED, QUICK},
    structure, wheel,
};

/// What `core` has to build for besides GPUs, which the kernels show: microcontrollers with and without a floating-point
/// unit and compare-and-swap, and a browser.
const CORE_TARGETS: [&str; 3] = ["thumbv7em-none-eabihf", "thumbv6m-none-eabi", "wasm32-unknown-unknown"];

/// Names the program that tests run; without it they have cargo build one.
const TESTED_PROGRAM: &str = "FUSED_COLLECTIVE_TESTED_PROGRAM";

/// The tests that compile kernels or run compiled ones. They are none of `cargo test`'s, which does not build kernels.
const COMPILED_KERNELS: [&str; 2] = ["--test", "compiled"];

/// The part of the checks that is asked for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    All,
    Quick,
    Target(Target),
    Embedded,
}

/// Runs what `scope` has. The exit status is 1 if anything failed.
pub(crate) fn run(scope: Scope) -> ExitCode {
    let mut tally = Tally::default();
    match scope {
        Scope::All => {
            source(&mut tally);
            tally.check("docs", || {
                cmd::run(
                    cmd::cargo("doc").args(["--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings"),
                )
            });
            native(&mut tally);
            core_elsewhere(&mut tally);
        }
        Scope::Quick => {
            source(&mut tally);
            quick(&mut tally);
        }
        Scope::Target(target) => emulated(&mut tally, target),
        Scope::Embedded => {
            for (name, digest) in embedded::PROCESSORS {
                tally.check(name, || embedded::hold(&digest()?));
            }
        }
    }
    tally.close()
}

/// Checks of the source.
fn source(tally: &mut Tally) {
    tally.check("format", || {
        cmd::require_component("fmt", "rustfmt")?;
        // rustfmt colours its diff even where it goes to a file.
        let color = if io::stdout().is_terminal() { "--color=auto" } else { "--color=never" };
        cmd::run(cmd::cargo("fmt").args(["--all", "--check", "--", color]))
    });
    tally.check("clippy", || {
        cmd::require_component("clippy", "clippy")?;
        for targets in [&["--all-targets"][..], &COMPILED_KERNELS] {
            cmd::run(cmd::cargo("clippy").arg("--workspace").args(targets).args(["--", "-D", "warnings"]))?;
        }
        Ok(())
    });
    tally.check("which crate depends on which", structure::dependencies);
    tally.check("which file and folder uses which", structure::files);
    tally.check("core without alloc, std and unsafe", structure::core);
}

/// All tests, the kernels, and what is to be published.
fn native(tally: &mut Tally) {
    tally.check("the library's crates", library::crates);
    tally.check("the library with each feature alone", library::features);
    let program = tally.check("the tests' build", || {
        cmd::run(cmd::cargo("test").args(["--workspace", "--no-run"]).args(COMPILED_KERNELS))?;
        build_tests(&["--workspace"])
    });
    tally.check("the library's symbols", library::symbols);
    tally.check("packages to publish", packages::check);
    // Most tests wait for something most of the time: the kernels are built meanwhile.
    let kernels = thread::spawn(build_kernels);
    if let Some(program) = program {
        tally.check("the program, linked by GNU ld", || program.link());
        let mut tests = cmd::cargo("test");
        tests
            .args(["--workspace", "--no-fail-fast"])
            // Tests of the program would have cargo build it once more, for nothing but itself.
            .env(TESTED_PROGRAM, program.executable)
            // Fuzzing and soaking go on for a minute.
            .env("FUSED_COLLECTIVE_LONG_TESTS", "1");
        tally.tests("tests", &mut tests);
    }
    if let Some(mut tests) = tally.check("the Python package", wheel::tests) {
        tally.tests("tests of the Python package", &mut tests);
    }
    let kernels = kernels.join().unwrap_or_else(|panic| resume_unwind(panic));
    if let Some(folder) = tally.check("kernels", || kernels) {
        let mut tests = cmd::cargo("test");
        tests
            .args(["--workspace", "--no-fail-fast"])
            .args(COMPILED_KERNELS)
            .env("FUSED_COLLECTIVE_PTX", folder);
        tally.tests("kernels, compiled", &mut tests);
    }
    if let Some(mut tests) = tally.check("ThreadSanitizer's command", races::tests) {
        tally.tests("the CPU backend under ThreadSanitizer", &mut tests);
        tally.check("a planted race is found", races::find_planted);
    }
}

/// The tests of the inner loop.
fn quick(tally: &mut Tally) {
    let built = tally.check("the tests' build", || {
        let arguments = QUICK.arguments()?;
        Ok((build_tests(&arguments)?, arguments))
    });
    if let Some((program, arguments)) = built {
        let mut tests = cmd::cargo("test");
        tests.args(arguments).arg("--no-fail-fast").arg("--").args(QUICK.skips());
        tally.tests("quick tests", tests.env(TESTED_PROGRAM, program.executable));
    }
}

/// `core` for each of its targets.
fn core_elsewhere(tally: &mut Tally) {
    let Some(toolchain) =
        tally.check("a toolchain for core's targets", || Ok(Toolchain::find(&CORE_TARGETS, true)?))
    else {
        return;
    };
    for target in CORE_TARGETS {
        tally.check(&format!("core for {target}"), || {
            let manifest = cmd::root().join("core/Cargo.toml");
            let folder = cmd::target_directory()?.join("cross/core");
            let mut build = toolchain.cargo(&manifest, "build", target, &folder);
            // That it builds is all that is asked, and Rust's own `core` may have to be built with it.
            build.envs([("CARGO_PROFILE_DEV_OPT_LEVEL", "0"), ("CARGO_PROFILE_DEV_DEBUG", "0")]);
            cmd::run(&mut build)
        });
    }
}

/// The program for another architecture, and tests under emulation.
fn emulated(tally: &mut Tally, target: Target) {
    let arch = target.arch();
    let Some(tools) = tally.check(&format!("tools for {arch}"), || Tools::find(target)) else { return };
    let tests = |arguments: &[String]| {
        let mut tests = tools.cargo("test")?;
        // Nobody debugs them, and without the tests' heaviest dependencies they are built in half the time.
        tests.args(arguments).env("CARGO_PROFILE_DEV_DEBUG", "0").env("RUSTFLAGS", "--cfg emulated");
        Ok(tests)
    };
    // Integration tests have cargo build and link their package's program.
    let built = tally.check(&format!("program and tests for {arch}"), || {
        let arguments = EMULATED.arguments()?;
        cmd::run(tests(&arguments)?.arg("--no-run"))?;
        tests(&arguments)
    });
    if let Some(mut tests) = built {
        tests.arg("--no-fail-fast").arg("--").args(EMULATED.skips());
        tally.tests(&format!("tests, emulating {arch}"), &mut tests);
    }
}

/// Builds and checks the kernels for every processor, out of the way of what runs beside it, and shows what they take.
/// Returns the folder that they are in.
fn build_kernels() -> Result<PathBuf> {
    // Of this thread alone, and of the programs that it starts. Without it they only get in the way.
    let _ = rustix::process::nice(10);
    let began = Instant::now();
    let modules = kernels::build(&Processor::ALL, Assembly::Keep)?;
    let examples = kernels::build_examples(&Processor::ALL, Assembly::Check)?;
    // An archive is read back when it is made. The lowest preset makes it in seconds.
    kernels::archive(&modules, 0)?;
    modules.iter().chain(&examples).for_each(|module| print!("{module}"));
    eprintln!("== kernels, beside the tests: {:.1} s", began.elapsed().as_secs_f64());
    kernels::folder()
}

/// Builds the tests that `arguments` of `cargo test` choose, and the program that some of them run.
fn build_tests(arguments: &[impl AsRef<OsStr>]) -> Result<Program> {
    let mut build = cmd::cargo("test");
    build.args(arguments).args(["--no-run", "--message-format=json-render-diagnostics"]);
    Program::among(&cmd::read(&mut build)?, "fused-collective")
}

/// What passed and what failed, a check counting as much as a test.
#[derive(Default)]
struct Tally {
    passed: usize,
    failed: usize,
    /// Tests among those that passed which this machine has not what it takes for.
    skipped: usize,
    /// The checks that failed, for the end of the output.
    failed_checks: Vec<String>,
}

impl Tally {
    /// Runs one check; what it returns, if it passed.
    fn check<T>(&mut self, name: &str, check: impl FnOnce() -> Result<T>) -> Option<T> {
        eprintln!("\n== {name}");
        let began = Instant::now();
        let result = check();
        eprintln!("== {name}: {:.1} s", began.elapsed().as_secs_f64());
        match result {
            Ok(value) => {
                self.passed += 1;
                Some(value)
            }
            Err(error) => {
                eprintln!("error: {error:#}");
                self.failed += 1;
                self.failed_checks.push(name.to_owned());
                None
            }
        }
    }

    /// Runs a `cargo test` command and counts its tests.
    fn tests(&mut self, name: &str, command: &mut Command) {
        eprintln!("\n== {name}");
        let mut counts = Counts::default();
        let began = Instant::now();
        let result = cmd::run_lines(command, |line| counts.add(line));
        eprintln!("== {name}: {:.1} s", began.elapsed().as_secs_f64());
        self.passed += counts.passed;
        self.failed += counts.failed;
        self.skipped += counts.skipped;
        if let Err(error) = result {
            eprintln!("error: {error:#}");
            // Without a failed test, something did not compile or a test program died.
            self.failed += usize::from(counts.failed == 0);
            self.failed_checks.push(name.to_owned());
        }
    }

    /// Prints what failed and, last, the counts.
    fn close(self) -> ExitCode {
        if !self.failed_checks.is_empty() {
            println!("\nfailed: {}", self.failed_checks.join(", "));
        }
        let skipped = match self.skipped {
            0 => String::new(),
            count => format!(" ({count} skipped, each with a line that says why)"),
        };
        println!("\n{} passed, {} failed{skipped}", self.passed, self.failed);
        if self.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// Counts of tests, as the programs that `cargo test` ran, or pytest, report them.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    passed: usize,
    failed: usize,
    /// Tests that said so.
    skipped: usize,
}

/// The start of the line that a test writes in place of testing.
const SKIPPED: &str = "skipped: ";

impl Counts {
    /// Adds a line of `cargo test`'s output, if it is one that closes a test program or a crate's doctests, or a test's that
    /// it was skipped.
    fn add(&mut self, line: &str) {
        // With one test at a time, the test's name stands before it.
        self.skipped += usize::from(line.starts_with(SKIPPED) || line.contains(&format!(" ... {SKIPPED}")));
        let of_cargo = line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". "));
        let counts: Vec<&str> = match of_cargo {
            Some((_, counts)) => counts.split("; ").collect(),
            // Pytest's last line: "1 failed, 20 passed, 2 skipped in 26.85s".
            None => match line.rsplit_once(" in ") {
                Some((counts, seconds)) if seconds.ends_with('s') => counts.split(", ").collect(),
                _ => return,
            },
        };
        for count in counts {
            match count.split_once(' ').map(|(number, what)| (number.parse::<usize>(), what)) {
                Some((Ok(number), "passed")) => self.passed += number,
                Some((Ok(number), "failed" | "error" | "errors")) => self.failed += number,
                Some((Ok(number), "skipped")) => self.skipped += number,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tests_of_every_program_are_counted() {
        let mut counts = Counts::default();
        for line in [
            "running 3 tests",
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.01s",
            "test pack::tests::result ... ok",
            "skipped: there is no GPU here",
            "test starters::mpirun ... skipped: there is no mpirun here",
            "test result: FAILED. 2 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.50s",
            "all doctests ran in 0.30s; merged doctests compilation took 0.29s",
            "1 failed, 20 passed, 2 skipped, 1 error in 26.85s",
        ] {
            counts.add(line);
        }
        assert_eq!(counts, Counts { passed: 34, failed: 5, skipped: 4 });
    }

    #[test]
    fn a_failed_check_is_counted_and_the_next_one_runs() {
        let mut tally = Tally::default();
        assert_eq!(tally.check("broken", || -> Result<()> { anyhow::bail!("broken") }), None);
        assert_eq!(tally.check("sound", || Ok(7)), Some(7));
        assert_eq!((tally.passed, tally.failed), (1, 1));
        assert_eq!(tally.failed_checks, ["broken"]);
    }

    #[test]
    fn a_test_command_that_ends_badly_counts_as_a_failure_even_without_a_failed_test() {
        let mut tally = Tally::default();
        let script = |text| {
            let mut shell = Command::new("sh");
            shell.args(["-c", text]);
            shell
        };
        tally.tests("dies", &mut script("echo 'test result: ok. 5 passed; 0 failed; 0 ignored'; exit 101"));
        assert_eq!((tally.passed, tally.failed), (5, 1));
        tally.tests(
            "fails",
            &mut script("echo 'test result: FAILED. 1 passed; 2 failed; 0 ignored'; exit 101"),
        );
        assert_eq!((tally.passed, tally.failed), (6, 3));
        tally.tests("passes", &mut script("echo 'test result: ok. 4 passed; 0 failed; 0 ignored'"));
        assert_eq!((tally.passed, tally.failed), (10, 3));
        assert_eq!(tally.failed_checks, ["dies", "fails"]);
    }
}
