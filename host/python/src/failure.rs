//! The library's errors as exceptions of the package.

use fused_collective::{Error, ErrorKind};
use pyo3::prelude::*;

/// The name of a kind: `fused_collective._errors` has an exception for each.
fn name(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Invalid => "invalid",
        ErrorKind::Unsupported => "unsupported",
        ErrorKind::Unavailable => "unavailable",
        ErrorKind::OutOfMemory => "out_of_memory",
        ErrorKind::Bootstrap => "bootstrap",
        ErrorKind::TimedOut => "timed_out",
        ErrorKind::Lost => "lost",
        ErrorKind::Aborted => "aborted",
        ErrorKind::Mismatch => "mismatch",
        // Kinds that the library gains are of the system until they have an exception of their own.
        _ => "system",
    }
}

/// The exception of an error, which keeps kind, rank and peer.
pub(crate) fn exception(py: Python<'_>, error: &Error) -> PyErr {
    make(py, name(error.kind()), &error.to_string(), error.rank(), error.peer())
}

/// The exception of an argument that cannot be.
pub(crate) fn invalid(py: Python<'_>, text: &str) -> PyErr {
    make(py, "invalid", text, None, None)
}

fn make(py: Python<'_>, kind: &str, text: &str, rank: Option<u32>, peer: Option<u32>) -> PyErr {
    let made = py
        .import("fused_collective._errors")
        .and_then(|errors| errors.getattr("make"))
        .and_then(|make| make.call1((kind, text, rank, peer)));
    made.map_or_else(|error| error, PyErr::from_value)
}
