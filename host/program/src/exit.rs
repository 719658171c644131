//! How the program ends: its exit statuses, and the lines that say why.

use std::io::{self, Write as _};

use crate::usage::{PROGRAM, UsageError};

/// Exit status of success.
pub const SUCCESS: u8 = 0;
/// Exit status of a failure that the process has told the user about.
pub const FAILURE: u8 = 1;
/// Exit status of a mistake in how the program was started, which the process has told the user about.
pub const USAGE: u8 = 2;
/// Exit status of a rank that failed because another one did, and said nothing about it.
pub const SECONDARY: u8 = 90;

/// How a run ended, if not well.
pub(crate) enum Failure {
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

/// Writes a line to stderr, after the program's name.
pub(crate) fn complain(what: &dyn std::fmt::Display) {
    // Nobody is left to tell if stderr is gone.
    let _ = writeln!(io::stderr(), "{PROGRAM}: {what}");
}

/// Writes to stdout. A reader who has gone away is a failure, not a panic.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    written.map_err(|error| Failure::Failed(format!("cannot write to the standard output: {error}")))
}
