//! Errors between ranks: each names the rank, the phase and the reason.

use std::{fmt, io, time::Duration};

/// The most ranks that meet over a network. Those of one host are [`MAX_WORLD_SIZE`] at most.
pub use fused_collective_core::MAX_RANKS;
use fused_collective_core::MAX_WORLD_SIZE;

use super::{super::loss::Lost, address::Address, frame::FrameError};

/// The fewest ranks that meet: one alone has nobody to meet.
pub const MIN_RANKS: u32 = 2;

/// A failure to join a group, or to do an operation of it.
#[derive(Debug)]
pub enum Error {
    /// A rank was lost. The group is over: every later operation fails with the same loss.
    Lost(Lost),
    /// There is no such rank, or no such group.
    Membership {
        /// The rank asked for.
        rank: u32,
        /// The size asked for.
        world_size: u32,
    },
    /// A message is larger than ranks may send.
    TooLong {
        /// The message.
        what: &'static str,
        /// Its bytes.
        bytes: usize,
        /// The most it may have.
        limit: usize,
    },
    /// Rank 0 gave nothing to share, or another rank gave something.
    Root {
        /// The operation.
        operation: &'static str,
        /// This rank.
        rank: u32,
    },
    /// Another group holds this group's name.
    NameTaken {
        /// The key that the name is made from.
        key: String,
        /// The time that rank 0 waited for it.
        waited: Duration,
    },
    /// The process that listens under this group's name belongs to another user.
    Foreign {
        /// That user's number.
        uid: u32,
    },
    /// Rank 0 does not speak this rank's protocol.
    Protocol(FrameError),
    /// Another program listens where rank 0 is to listen.
    AddressTaken {
        /// The address.
        address: Address,
        /// The time that rank 0 waited for it.
        waited: Duration,
    },
    /// The process that listens in rank 0's place has not proven that it has this rank's secret.
    Unproven {
        /// The address that it listens at.
        address: Address,
    },
    /// A file is to be shared with a rank on another host.
    OtherHost {
        /// The rank.
        rank: u32,
        /// Its host.
        host: String,
    },
    /// A file descriptor was shared and did not arrive.
    NoDescriptor,
    /// The operating system refused something.
    System {
        /// The action; completes "could not".
        doing: &'static str,
        /// Its answer.
        source: io::Error,
    },
}

impl Error {
    /// For `map_err`: the operating system refused `doing`.
    pub(super) fn system<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> Error {
        move |source| Error::System { doing, source: source.into() }
    }
}

impl From<Lost> for Error {
    fn from(lost: Lost) -> Self {
        Error::Lost(lost)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Lost(lost) => lost.fmt(f),
            Error::Membership { rank, world_size } => write!(
                f,
                "there is no rank {rank} in a group of {world_size}: a group has {MIN_RANKS} to {MAX_WORLD_SIZE} \
                 ranks, over several hosts {MAX_RANKS}, numbered from 0"
            ),
            Error::TooLong { what, bytes, limit } => {
                write!(f, "{what} of {bytes} bytes is too long: at most {limit} bytes can be sent")
            }
            Error::Root { operation, rank: 0 } => write!(f, "rank 0 gave nothing for {operation}: rank 0 is its source"),
            Error::Root { operation, rank } => {
                write!(f, "rank {rank} gave something for {operation}: only rank 0 is its source")
            }
            Error::NameTaken { key, waited } => write!(
                f,
                "rendezvous: another group has used the key '{key}' for {waited:.1?}: give each job a key of its own"
            ),
            Error::Foreign { uid } => {
                write!(f, "rendezvous: the process that listens in rank 0's place belongs to user {uid}, not to this one")
            }
            Error::Protocol(error) => write!(f, "rendezvous: rank 0 answered what this rank cannot read: {error}"),
            Error::AddressTaken { address, waited } => write!(
                f,
                "rendezvous: another program has listened at {address} for {waited:.1?}: give rank 0 a free port"
            ),
            Error::Unproven { address } => write!(
                f,
                "rendezvous: the process that listens at {address} has another secret than this rank: give all ranks of \
                 the job the same one, and no other program this address"
            ),
            Error::OtherHost { rank, host } => {
                write!(f, "a file is shared within a host, and rank {rank} is on another (host {host})")
            }
            Error::NoDescriptor => f.write_str(
                "the file descriptor that rank 0 shared did not arrive: this process may have reached its limit of \
                 open files (ulimit -n)",
            ),
            Error::System { doing, source } => write!(f, "could not {doing}: {source}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Lost(lost) => Some(lost),
            Error::Protocol(error) => Some(error),
            Error::System { source, .. } => Some(source),
            _ => None,
        }
    }
}
