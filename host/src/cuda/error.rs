//! What can go wrong on GPUs, told so that the user learns which rank, which operation and why.

use std::fmt;

use fused_collective_core::plan::PlanError;

use crate::failure::Failure;

/// Why a call of the CUDA backend failed.
#[derive(Clone, Debug)]
pub enum Error {
    /// There is no driver, or none that can be used; the text says why.
    NoDriver(String),
    /// The GPUs that are here do not make a group; the text says which and why.
    Devices(String),
    /// The driver refused something.
    Driver {
        /// What was being done.
        doing: &'static str,
        /// What the driver said.
        what: String,
    },
    /// The kernels are not there, or not usable; the text says where and what to do.
    Kernels(String),
    /// Two ranks cannot share memory.
    Pair {
        /// This rank.
        rank: u32,
        /// The other one.
        peer: u32,
        /// Why.
        why: String,
    },
    /// The rendezvous failed, or another rank could not be part of the group; the text says who and why.
    Group(String),
    /// The operation cannot be planned.
    Plan(PlanError),
    /// There are no kernels for the operation.
    Unsupported(&'static str),
    /// A tensor is not what the operation needs; nothing was launched.
    Tensor {
        /// Which.
        tensor: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// The GPU's memory has no room.
    Memory {
        /// For what.
        what: String,
        /// Bytes that it takes.
        needed: u64,
        /// Bytes that the GPU has free.
        free: u64,
    },
    /// An operation failed while it ran, or the group is known to be over.
    Failed(Box<Failure>),
    /// An earlier operation failed so, and what peers sent for it may lie in any slot: make a new communicator.
    Poisoned(Box<Failure>),
    /// NCCL failed; the text says at what.
    Nccl(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::NoDriver(why) => write!(f, "no CUDA driver here: {why}"),
            Error::Devices(what) | Error::Kernels(what) | Error::Group(what) => f.write_str(what),
            Error::Driver { doing, what } => write!(f, "could not {doing}: {what}"),
            Error::Pair { rank, peer, why } => {
                write!(f, "ranks {rank} and {peer} cannot share memory: {why}")
            }
            Error::Plan(error) => error.fmt(f),
            Error::Unsupported(what) => write!(f, "there are no GPU kernels for {what}"),
            Error::Tensor { tensor, why } => write!(f, "{tensor} {why}"),
            Error::Memory { what, needed, free } => {
                let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
                write!(
                    f,
                    "{what} takes {needed} bytes of GPU memory ({:.1} GiB), and {free} are free ({:.1} GiB)",
                    gib(*needed),
                    gib(*free)
                )
            }
            Error::Failed(failure) => failure.fmt(f),
            Error::Poisoned(failure) => write!(f, "an earlier operation failed: {failure}"),
            Error::Nccl(what) => write!(f, "NCCL {what}"),
        }
    }
}

impl std::error::Error for Error {}

impl From<PlanError> for Error {
    fn from(error: PlanError) -> Self {
        Error::Plan(error)
    }
}

impl From<crate::rendezvous::Error> for Error {
    fn from(error: crate::rendezvous::Error) -> Self {
        Error::Group(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_not_there_is_told_in_bytes() {
        let error = Error::Memory { what: "the workspace".to_owned(), needed: 3 << 30, free: 1 << 29 };
        assert_eq!(
            error.to_string(),
            "the workspace takes 3221225472 bytes of GPU memory (3.0 GiB), and 536870912 are free (0.5 GiB)"
        );
    }
}
