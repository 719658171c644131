//! What the program does once its arguments are understood.
//!
//! A program that was started plainly checks everything it can, then starts itself once per rank; each rank
//! checks again, which costs nothing, and takes part. Only rank 0 writes to the standard output.

mod bench;
mod faults;
mod job;
mod links;
mod soak;
mod verify;

use std::{
    env,
    io::{self, Write},
    process::ExitCode,
};

use crate::{
    cli::{self, Invocation, PROGRAM, UsageError},
    launch,
    report::table,
};

/// How a run ended, if not well.
enum Failure {
    /// Nothing was run: the line says what is wrong with what was asked.
    Usage(String),
    /// Something failed; the line says what. Empty if the report has said it.
    Failed(String),
    /// Something failed on another rank, which says so.
    Elsewhere,
}

impl From<UsageError> for Failure {
    fn from(error: UsageError) -> Self {
        Failure::Usage(error.to_string())
    }
}

/// Runs the program with the process's arguments and environment.
pub fn main() -> ExitCode {
    if let Err(error) = launch::tie_to_parent() {
        complain(&error);
        return ExitCode::from(launch::FAILURE);
    }
    let status = match run() {
        Ok(status) => status,
        Err(Failure::Usage(line)) => {
            complain(&line);
            launch::USAGE
        }
        Err(Failure::Failed(line)) => {
            if !line.is_empty() {
                complain(&line);
            }
            launch::FAILURE
        }
        Err(Failure::Elsewhere) => launch::SECONDARY,
    };
    ExitCode::from(status)
}

fn complain(what: &dyn std::fmt::Display) {
    // Nobody is left to tell if stderr is gone.
    let _ = writeln!(io::stderr(), "{PROGRAM}: {what}");
}

fn run() -> Result<u8, Failure> {
    match cli::parse(env::args_os().skip(1))? {
        Invocation::Print(text) => {
            print(&text)?;
            Ok(launch::SUCCESS)
        }
        Invocation::Bench(settings) => bench::Bench::new(*settings)?.run(),
        Invocation::Verify(settings) => verify::Verify::new(settings)?.run(),
        Invocation::Links(settings, json) => links::Links::new(settings, json)?.run(),
        Invocation::Soak(settings) => soak::Soak::new(settings)?.run(),
        Invocation::Faults(settings) => faults::Faults::new(settings)?.run(),
    }
}

/// Writes to stdout. A reader who has gone away is a failure, not a panic.
fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    written.map_err(|error| Failure::Failed(format!("cannot write to the standard output: {error}")))
}

/// Columns of the terminal, or of the tables where there is none.
fn width() -> u16 {
    rustix::termios::tcgetwinsize(io::stdout()).map_or(table::WIDTH, |size| size.ws_col.max(40))
}
