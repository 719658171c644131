//! The end of the program: its exit statuses, and the lines on the standard error that give the reason.

use std::{
    fmt::Display,
    io::{self, Write as _},
    process::ExitCode,
};

use crate::usage::{PROGRAM, UsageError};

/// Exit status of success.
pub const SUCCESS: u8 = 0;
/// Exit status of a failure whose reason the process has printed.
pub const FAILURE: u8 = 1;
/// Exit status of an invalid command line or environment. The process has printed the reason.
pub const USAGE: u8 = 2;
/// Exit status by which a rank tells this program's own launcher that it failed because another rank did, and printed nothing.
/// Other launchers show it to the user, so under them such a rank exits with [`FAILURE`].
pub const SECONDARY: u8 = 90;

/// Exit status of a program that a signal has interrupted, as shells report it.
pub(crate) const fn of_signal(signal: u8) -> u8 {
    128 + signal
}

/// The end of a run that was not a success.
pub(crate) enum Failure {
    /// The program was started with invalid options, so nothing has run. The line names the value and the valid ones,
    /// and is empty if another rank prints it.
    Usage(String),
    /// A failure with its reason. The line is empty if the report has the reason, or another rank prints it.
    Failed(String),
    /// A failure of another rank, which prints the reason. For this program's own launcher.
    Elsewhere,
}

impl From<UsageError> for Failure {
    fn from(error: UsageError) -> Self {
        Failure::Usage(error.to_string())
    }
}

/// Prints the reason of a failure, and returns the exit status of the process.
pub(crate) fn code(result: Result<u8, Failure>) -> ExitCode {
    let (status, line) = match result {
        Ok(status) => (status, String::new()),
        Err(Failure::Usage(line)) => (USAGE, line),
        Err(Failure::Failed(line)) => (FAILURE, line),
        Err(Failure::Elsewhere) => (SECONDARY, String::new()),
    };
    if !line.is_empty() {
        complain(&line);
    }
    status.into()
}

/// Writes a line to the standard error, after the program's name.
pub(crate) fn complain(line: &dyn Display) {
    // If the standard error is closed, nobody reads it.
    let _ = writeln!(io::stderr(), "{PROGRAM}: {line}");
}

/// Writes to the standard output. A reader that has gone away is a failure, not a panic.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    written.map_err(|error| Failure::Failed(format!("cannot write to the standard output: {error}")))
}
