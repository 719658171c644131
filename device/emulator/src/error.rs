//! The error of PTX that the emulator does not understand.

use std::{error::Error, fmt};

/// PTX that the emulator does not understand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParseError {
    /// The line of the file, counted from 1.
    pub line: usize,
    /// The fault, in words.
    pub what: String,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.what)
    }
}

impl Error for ParseError {}
