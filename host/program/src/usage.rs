//! The error of an invalid command line.

use std::fmt;

use crate::bounded::one_line;

/// The program's name, which starts every line on the standard error.
pub const PROGRAM: &str = "fused-collective";

/// An invalid option or variable: one line that names the value and the valid ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageError(String);

impl UsageError {
    /// An error with this text. Control characters are escaped, as the text may quote a file name.
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
