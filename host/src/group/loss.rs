//! The loss of a rank, as its group is told of it.

use std::fmt;

/// The way that a rank was lost to its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Its connection ended without a farewell: it was killed, crashed or exited. Between hosts the detail says so, and which
    /// host it was on, or that nothing was heard from there.
    Ended,
    /// It called [`Group::abort`](super::rendezvous::Group::abort); the detail is its reason.
    GaveUp,
    /// It did not come to an operation within the deadline; the detail names both.
    Late,
    /// It did something else than the others; the detail says what.
    OutOfStep,
    /// It is not a member that the group can have: duplicate, of another version or with other settings.
    Refused,
}

/// The end of a rank that says nothing of itself.
pub(crate) const ENDED: &str = "it ended without a farewell";

/// A rank that its group can no longer count on: the first one, as every rank of the group is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// The rank.
    pub rank: u32,
    /// The way that it was lost.
    pub how: How,
    /// Further details for a reader; may be empty.
    pub detail: String,
}

impl Lost {
    /// The one rank that should tell the user, so that a group reports a loss once.
    ///
    /// A rank that gave up knows best and reports itself; otherwise it is the lowest of the others.
    pub fn reporter(&self) -> u32 {
        match self.how {
            How::GaveUp => self.rank,
            _ => u32::from(self.rank == 0),
        }
    }
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Lost { rank, how, detail } = self;
        match how {
            How::Ended if detail.is_empty() => write!(f, "rank {rank} was lost: {ENDED}"),
            How::Ended => write!(f, "rank {rank} was lost: {detail}"),
            How::GaveUp => write!(f, "rank {rank} gave up: {detail}"),
            How::Late => write!(f, "rank {rank} did not come to {detail}"),
            How::OutOfStep => write!(f, "rank {rank} is out of step: {detail}"),
            How::Refused => write!(f, "rank {rank} cannot join the group: {detail}"),
        }
    }
}

impl std::error::Error for Lost {}
