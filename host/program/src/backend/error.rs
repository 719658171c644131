//! The errors of backends.

use std::fmt;

use super::steps::Step;

/// A failure of a backend.
#[derive(Clone, Debug)]
pub enum Error {
    /// The group's collective failed.
    Collective(fused_collective::Error),
    /// A step cannot run on this problem.
    Step {
        /// The step.
        step: Step,
        /// The reason.
        why: &'static str,
    },
    /// The problem's tensors do not fit.
    Memory(String),
    /// NCCL failed; the text says in which call.
    Nccl(String),
    /// Another failure; the text is for the user.
    Other(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Collective(error) => error.fmt(f),
            Error::Step { step, why } => write!(f, "{step:?} cannot run: {why}"),
            Error::Memory(what) | Error::Other(what) => f.write_str(what),
            Error::Nccl(what) => write!(f, "NCCL {what}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Collective(error) => Some(error),
            _ => None,
        }
    }
}

impl Error {
    /// The error of an exchange between ranks.
    pub(crate) fn of_group(error: &fused_collective::group::rendezvous::Error) -> Error {
        Error::Other(error.to_string())
    }

    /// The failure of an operation that ran. `None` for other errors, and for an operation refused after an earlier failure.
    pub fn failure(&self) -> Option<&fused_collective::group::failure::Failure> {
        match self {
            Error::Collective(error) if !error.is_poisoned() => error.failure(),
            _ => None,
        }
    }

    /// True if the operation was refused because an earlier one failed.
    pub fn is_poisoned(&self) -> bool {
        matches!(self, Error::Collective(error) if error.is_poisoned())
    }
}

impl From<fused_collective::Error> for Error {
    fn from(error: fused_collective::Error) -> Self {
        match error {
            fused_collective::Error::Nccl(what) => Error::Nccl(what),
            error => Error::Collective(error),
        }
    }
}

impl From<fused_collective::group::rendezvous::Error> for Error {
    fn from(error: fused_collective::group::rendezvous::Error) -> Self {
        Error::of_group(&error)
    }
}
