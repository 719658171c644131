//! The refusal of a command line: one line that names the value and what is valid.

use std::fmt;

use crate::bounded::one_line;

/// The program's name, which starts every line it writes to stderr.
pub const PROGRAM: &str = "fused-collective";
/// Why the program was refused: one line that names the value and what is valid. The program prints it after
/// its name and ends with [`USAGE`](crate::exit::USAGE).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageError(String);

impl UsageError {
    /// An error with this text. Control characters (the text may quote a file name) are escaped, so that it
    /// stays one line.
    pub fn new(text: impl fmt::Display) -> Self {
        UsageError(one_line(&text.to_string()))
    }
}

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UsageError {}
