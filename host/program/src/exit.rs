//! The end of the program: its exit statuses, and the lines on the standard error that give the reason.

use std::{
    fmt::Display,
    io::{self, Write as _},
    process::ExitCode,
};

use rustix::termios::tcgetwinsize;

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
    Stream::Output.print(text)
}

/// A stream for text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    /// The standard output.
    Output,
    /// The standard error.
    Error,
}

impl Stream {
    /// The stream for what a person reads, if some file may take the standard output.
    pub(crate) const fn beside(file_takes_output: bool) -> Stream {
        if file_takes_output { Stream::Error } else { Stream::Output }
    }

    /// Writes `text`. A reader that has gone away is a failure, not a panic.
    pub(crate) fn print(self, text: &str) -> Result<(), Failure> {
        let name = match self {
            Stream::Output => "output",
            Stream::Error => "error",
        };
        self.write(text)
            .map_err(|error| Failure::Failed(format!("cannot write to the standard {name}: {error}")))
    }

    /// Writes `text`.
    pub(crate) fn write(self, text: &str) -> io::Result<()> {
        fn all(mut stream: impl io::Write, text: &str) -> io::Result<()> {
            stream.write_all(text.as_bytes())?;
            stream.flush()
        }
        match self {
            Stream::Output => all(io::stdout().lock(), text),
            Stream::Error => all(io::stderr().lock(), text),
        }
    }

    /// Columns of the terminal that the stream is; `None` if it is none, or one that does not say.
    pub(crate) fn columns(self) -> Option<u16> {
        let size = match self {
            Stream::Output => tcgetwinsize(io::stdout()),
            Stream::Error => tcgetwinsize(io::stderr()),
        };
        Some(size.ok()?.ws_col).filter(|columns| *columns > 0)
    }
}
