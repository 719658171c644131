//! The library's error: one type for every backend, which a program matches on and a person can act on.

use std::{fmt, io, sync::Arc};

use fused_collective_core::{
    plan::PlanError,
    quant::ScaleError,
    workspace::{HeaderError, LayoutError},
};

use crate::group::{
    BootstrapError,
    failure::{Cause, Failure},
    rendezvous,
};

/// `CUDA_ERROR_OUT_OF_MEMORY`.
const OUT_OF_MEMORY: u32 = 2;

/// A failure of a call. [`kind`](Self::kind), [`rank`](Self::rank) and [`peer`](Self::peer) say what a program needs to go
/// on; the text is for a person.
#[non_exhaustive]
#[derive(Clone, Debug)]
pub enum Error {
    /// The operation is invalid, or too large for the communicator.
    Plan(PlanError),
    /// The group is too small or too large, or its sizes exceed 64 bits.
    Layout(LayoutError),
    /// The backend has no kernels for the operation.
    Unsupported(&'static str),
    /// A tensor does not fit the operation; nothing was launched or sent.
    Tensor {
        /// The tensor's role.
        tensor: &'static str,
        /// Its problem.
        problem: TensorProblem,
    },
    /// The bootstrap failed, or the ranks of the group do not fit together; the source says why.
    Bootstrap(Arc<dyn std::error::Error + Send + Sync>),
    /// Two ranks cannot share memory.
    Pair {
        /// This rank.
        rank: u32,
        /// The other rank.
        peer: u32,
        /// The reason.
        why: String,
    },
    /// A peer's region of the shared memory is of another version or shape.
    Header {
        /// The peer.
        peer: u32,
        /// The difference.
        source: HeaderError,
    },
    /// The per-tensor or global scale is not valid; nothing was sent.
    Scale(ScaleError),
    /// The memory has no room.
    Memory {
        /// The use of the memory.
        what: String,
        /// Bytes that it takes.
        needed: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// The operating system refused something.
    System {
        /// The action; completes "could not".
        doing: &'static str,
        /// The system's answer.
        source: Arc<io::Error>,
    },
    /// There is no CUDA driver that can be used; the text says why.
    NoDriver(String),
    /// The CUDA driver refused something.
    Driver {
        /// The action; completes "could not".
        doing: &'static str,
        /// The driver's `CUresult`.
        code: u32,
        /// The driver's words for it.
        what: String,
    },
    /// The options are none that the backend can have; the text says why.
    Options(String),
    /// The GPU cannot be used; the text says why.
    Device(String),
    /// Kernels are missing or unusable; the text says where and why.
    Kernels(String),
    /// NCCL is missing, too old or failed; the text completes "NCCL".
    Nccl(String),
    /// An operation failed while it ran, or the group is known to be over.
    Failed(Box<Failure>),
    /// An earlier operation failed so, and what peers sent for it may lie in any slot: make a new communicator.
    Poisoned(Box<Failure>),
    /// This rank has left the group.
    Left,
}

/// A tensor's mismatch with its operation.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TensorProblem {
    /// The operation has the tensor, and none was given.
    Missing,
    /// The tensor was given, and the operation has none.
    Superfluous,
    /// Its elements are of another type.
    Type {
        /// The given type.
        given: &'static str,
        /// The operation's.
        needed: &'static str,
    },
    /// It has another length, in elements, or in bytes of codes.
    Length {
        /// The given length.
        given: u64,
        /// The operation's.
        needed: u64,
    },
    /// It is not whole rows of the hidden size.
    Rows {
        /// The given length.
        given: u64,
        /// The hidden size.
        hidden: u64,
    },
    /// The row of a token's expert is not in the tensor of rows.
    Index {
        /// The token.
        token: u64,
        /// The row.
        index: i32,
        /// Rows of the tensor.
        rows: u64,
    },
    /// Its address is null or not a multiple of the alignment, in bytes.
    Misaligned {
        /// The address.
        address: u64,
        /// The alignment.
        alignment: u64,
    },
    /// It is to be in place of an output that the operation does not write.
    NoPlace {
        /// The output.
        output: &'static str,
    },
    /// It is written, and its memory is another tensor's as well. Only `norm_out` may be all of the input's memory, and
    /// `residual_out` all of the residual's.
    Overlap {
        /// Its address.
        address: u64,
        /// The other tensor.
        other: &'static str,
        /// The address of that.
        other_address: u64,
    },
    /// A range of bytes does not lie in it.
    Range {
        /// Bytes of the tensor.
        bytes: u64,
        /// The range's first byte.
        offset: u64,
        /// The range's length.
        length: u64,
    },
}

/// A class of errors, for programs that treat all of one class alike.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The call is invalid: an operation, a tensor, an option. Nothing was sent.
    Invalid,
    /// The backend cannot do it. Nothing was sent.
    Unsupported,
    /// Driver, device or kernels are missing or unusable.
    Unavailable,
    /// Memory has no room.
    OutOfMemory,
    /// The ranks could not form a group.
    Bootstrap,
    /// The operating system or the driver refused something.
    System,
    /// A rank did not come within the deadline.
    TimedOut,
    /// A rank was lost, or gave up.
    Lost,
    /// The group was aborted.
    Aborted,
    /// Ranks made different calls.
    Mismatch,
}

impl Error {
    /// Wraps a bootstrap's error.
    pub(crate) fn bootstrap(error: BootstrapError) -> Error {
        Error::Bootstrap(Arc::from(error))
    }

    /// For `map_err`: the operating system refused `doing`.
    pub(crate) fn system<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> Error {
        move |error| Error::System { doing, source: Arc::new(error.into()) }
    }

    /// The error's class; of a [poisoned](Error::Poisoned) communicator the first failure's.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Plan(_)
            | Error::Layout(_)
            | Error::Tensor { .. }
            | Error::Scale(_)
            | Error::Options(_)
            | Error::Left => ErrorKind::Invalid,
            Error::Unsupported(_) => ErrorKind::Unsupported,
            Error::NoDriver(_) | Error::Device(_) | Error::Kernels(_) | Error::Nccl(_) => {
                ErrorKind::Unavailable
            }
            Error::Memory { .. } | Error::Driver { code: OUT_OF_MEMORY, .. } => ErrorKind::OutOfMemory,
            Error::System { source, .. } if source.kind() == io::ErrorKind::OutOfMemory => {
                ErrorKind::OutOfMemory
            }
            Error::Bootstrap(_) | Error::Pair { .. } | Error::Header { .. } => ErrorKind::Bootstrap,
            Error::System { .. } | Error::Driver { .. } => ErrorKind::System,
            Error::Failed(failure) | Error::Poisoned(failure) => match failure.cause {
                Cause::Deadline(_) => ErrorKind::TimedOut,
                Cause::Lost(_) | Cause::GaveUp(_) | Cause::OtherHost(_) => ErrorKind::Lost,
                Cause::Aborted => ErrorKind::Aborted,
                Cause::OutOfStep(_) => ErrorKind::Mismatch,
                Cause::Gpu(_) => ErrorKind::System,
            },
        }
    }

    /// The failure of an operation of the group while it ran, now or [earlier](Self::is_poisoned), if there was one.
    pub fn failure(&self) -> Option<&Failure> {
        match self {
            Error::Failed(failure) | Error::Poisoned(failure) => Some(failure),
            _ => None,
        }
    }

    /// True if an earlier operation failed, and nothing was tried.
    pub fn is_poisoned(&self) -> bool {
        matches!(self, Error::Poisoned(_))
    }

    /// The rank that reports the error, where it is known.
    pub fn rank(&self) -> Option<u32> {
        match self {
            Error::Pair { rank, .. } => Some(*rank),
            error => error.failure().map(|failure| failure.rank),
        }
    }

    /// The rank that the error is about: awaited, lost, or out of step.
    pub fn peer(&self) -> Option<u32> {
        match self {
            Error::Pair { peer, .. } | Error::Header { peer, .. } => Some(*peer),
            Error::Bootstrap(source) => match source.downcast_ref() {
                Some(rendezvous::Error::Lost(lost)) => Some(lost.rank),
                _ => None,
            },
            error => error.failure().and_then(Failure::peer),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Plan(error) => error.fmt(f),
            Error::Scale(error) => error.fmt(f),
            Error::Layout(error) => error.fmt(f),
            Error::Unsupported(what) => write!(f, "there are no kernels for {what}"),
            Error::Tensor { tensor, problem } => write!(f, "{tensor} {problem}"),
            Error::Bootstrap(source) => source.fmt(f),
            Error::Pair { rank, peer, why } => {
                // The same on both ranks.
                let (first, second) = (rank.min(peer), rank.max(peer));
                write!(f, "ranks {first} and {second} cannot share memory: {why}")
            }
            Error::Header { peer, source } => write!(f, "rank {peer}: {source}"),
            Error::Memory { what, needed, free } => {
                let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
                write!(
                    f,
                    "{what} takes {needed} bytes of GPU memory ({:.1} GiB), and {free} are free ({:.1} GiB)",
                    gib(*needed),
                    gib(*free)
                )
            }
            Error::System { doing, source } => write!(f, "could not {doing}: {source}"),
            Error::NoDriver(why) => write!(f, "no CUDA driver here: {why}"),
            Error::Driver { doing, what, .. } => write!(f, "could not {doing}: {what}"),
            Error::Options(what) | Error::Device(what) | Error::Kernels(what) => f.write_str(what),
            Error::Nccl(what) => write!(f, "NCCL {what}"),
            Error::Failed(failure) => failure.fmt(f),
            Error::Poisoned(failure) => write!(f, "an earlier operation failed: {failure}"),
            Error::Left => f.write_str("this rank has left the group"),
        }
    }
}

impl fmt::Display for TensorProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TensorProblem::Missing => f.write_str("is missing: the operation has one"),
            TensorProblem::Superfluous => f.write_str("is given, and the operation has none"),
            TensorProblem::Type { given, needed } => {
                write!(f, "holds {given}, the operation needs {needed}")
            }
            TensorProblem::Length { given, needed } => {
                write!(f, "has length {given}, the operation needs {needed}")
            }
            TensorProblem::Rows { given, hidden } => {
                write!(f, "has length {given}, which is not a multiple of the hidden size {hidden}")
            }
            TensorProblem::Index { token, index, rows } => {
                write!(f, "has row {index} for token {token}: use ")?;
                match rows {
                    0 => f.write_str("-1, as there are no rows"),
                    _ => write!(f, "0 to {}, or -1 for an expert on another rank", rows - 1),
                }
            }
            TensorProblem::Misaligned { address, alignment } => {
                write!(f, "is at {address:#x}, which is not a multiple of {alignment} above 0")
            }
            TensorProblem::NoPlace { output } => {
                write!(f, "is to be in the memory of {output}, which the operation does not write")
            }
            TensorProblem::Overlap { address, other, other_address } => {
                write!(
                    f,
                    "is at {address:#x} and overlaps {other} at {other_address:#x}: norm_out may be the input, and \
                     residual_out the residual, address for address"
                )
            }
            TensorProblem::Range { bytes, offset, length } => {
                write!(f, "has {bytes} bytes: {length} at {offset} are not in it")
            }
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Plan(source) => Some(source),
            Error::Scale(source) => Some(source),
            Error::Layout(source) => Some(source),
            Error::Bootstrap(source) => Some(&**source),
            Error::Header { source, .. } => Some(source),
            Error::System { source, .. } => Some(&**source),
            Error::Failed(source) | Error::Poisoned(source) => Some(&**source),
            _ => None,
        }
    }
}

impl From<PlanError> for Error {
    fn from(error: PlanError) -> Self {
        Error::Plan(error)
    }
}

impl From<LayoutError> for Error {
    fn from(error: LayoutError) -> Self {
        Error::Layout(error)
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;
    use crate::group::{How, Lost};

    #[test]
    fn memory_that_is_not_there_is_told_in_bytes() {
        let error = Error::Memory { what: "the workspace".to_owned(), needed: 3 << 30, free: 1 << 29 };
        assert_eq!(
            error.to_string(),
            "the workspace takes 3221225472 bytes of GPU memory (3.0 GiB), and 536870912 are free (0.5 GiB)"
        );
        assert_eq!((error.kind(), error.rank(), error.peer()), (ErrorKind::OutOfMemory, None, None));
    }

    #[test]
    fn a_rank_that_does_not_join_is_the_error_s_peer() {
        let lost = Lost { rank: 3, how: How::Late, detail: "join the group".to_owned() };
        let error = Error::bootstrap(rendezvous::Error::Lost(lost).into());
        assert_eq!((error.kind(), error.rank(), error.peer()), (ErrorKind::Bootstrap, None, Some(3)));
    }

    #[test]
    fn a_program_learns_kind_rank_and_peer_of_a_failure_now_and_later() {
        let lost = Lost { rank: 2, how: How::Ended, detail: String::new() };
        let failure = Box::new(Failure { rank: 1, wait: None, cause: Cause::Lost(lost) });
        for error in [Error::Failed(failure.clone()), Error::Poisoned(failure.clone())] {
            assert_eq!((error.kind(), error.rank(), error.peer()), (ErrorKind::Lost, Some(1), Some(2)));
            assert_eq!(error.source().unwrap().to_string(), failure.to_string());
        }
    }
}
