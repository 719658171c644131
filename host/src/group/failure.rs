//! Failures of a group's operations: the waiting rank, the awaited one, and the reason.

use std::{fmt, time::Duration};

use fused_collective_core::agreement::Call;

pub use super::calls::{Disagreement, Fault, GaveUp};
use super::loss::Lost;

/// A failure of a call: the waiting rank, the awaited one, and the reason.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    /// The rank that this is told of: the one that made the call.
    pub rank: u32,
    /// The wait that it was in; `None` if it was in none.
    pub wait: Option<Awaited>,
    /// The reason.
    pub cause: Cause,
}

/// A wait for another rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Awaited {
    /// The rank that it should have come from.
    pub from: u32,
    /// The awaited thing.
    pub what: What,
    /// The operation of the group, counted from 0; a round of a large operation counts as one.
    pub operation: u64,
    /// The call.
    pub call: Option<Call>,
}

/// Things that ranks wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// A rank's readiness, at set-up.
    Region,
    /// A rank's arrival at a barrier.
    Barrier,
    /// A token's input, in one-shot or as its owner. Tokens are counted from the operation's first.
    Input(u64),
    /// A token's sum, from its owner.
    Sum(u64),
    /// A token's sum of a host's ranks, which another host's gather: the rank is that of this rank's place there.
    HostSum(u64),
    /// The sums of all other hosts; the rank is that of this rank's place on one of them.
    HostSums,
    /// A rank's sign, where links are measured.
    Flag,
}

/// The reason that a call failed.
#[derive(Clone, Debug, PartialEq)]
pub enum Cause {
    /// The deadline passed.
    Deadline(Duration),
    /// A rank of the group is known to be gone.
    Lost(Lost),
    /// This rank was told to give up.
    Aborted,
    /// Another rank has given up.
    GaveUp(GaveUp),
    /// A wait failed on another host: that of this rank.
    OtherHost(u32),
    /// Another rank made another call.
    OutOfStep(Disagreement),
    /// This rank's GPU could not launch its work, failed, or did not end; the text says which.
    Gpu(String),
}

/// Without the rank that made the call: whoever shows it knows which one that is.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.cause, &self.wait) {
            (Cause::Deadline(deadline), Some(wait)) => {
                let seconds = deadline.as_secs_f64();
                write!(f, "waited {seconds:.1} s for {wait}: it is stuck, or slower than the deadline")?;
                // NCCL may wait for as many bytes as the other has not sent.
                f.write_str(if wait.what == What::HostSums { ", or has made another call" } else { "" })
            }
            (Cause::Deadline(deadline), None) => {
                write!(f, "the deadline of {:.1} s passed", deadline.as_secs_f64())
            }
            (cause, wait) => {
                match cause {
                    Cause::Deadline(_) => {}
                    Cause::Lost(lost) => lost.fmt(f)?,
                    Cause::Gpu(what) => f.write_str(what)?,
                    Cause::Aborted => f.write_str("the group was aborted on this rank")?,
                    Cause::GaveUp(peer) => peer.fmt(f)?,
                    Cause::OtherHost(rank) => write!(f, "a wait failed on the host of rank {rank}")?,
                    Cause::OutOfStep(disagreement) => disagreement.fmt(f)?,
                }
                match wait {
                    Some(wait) => write!(f, "; this rank waited for {wait}"),
                    None => Ok(()),
                }
            }
        }
    }
}

impl fmt::Display for Awaited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Awaited { from, what, operation, call } = self;
        match what {
            What::Region => write!(f, "rank {from} to join"),
            What::Barrier => write!(f, "rank {from} at a barrier"),
            What::Input(token) => write!(f, "rank {from}'s input of token {token} in operation {operation}"),
            What::Flag => write!(f, "rank {from} in a measurement of links"),
            What::Sum(token) => write!(f, "rank {from}'s sum of token {token} in operation {operation}"),
            What::HostSum(token) => {
                write!(f, "the sum of token {token} by rank {from}'s host in operation {operation}")
            }
            What::HostSums => {
                write!(f, "the sums of other hosts, as that of rank {from}, in operation {operation}")
            }
        }?;
        match call {
            Some(call @ Call::Operation { .. }) => write!(f, " ({call})"),
            _ => Ok(()),
        }
    }
}

impl std::error::Error for Failure {}

impl Failure {
    /// The rank that the failure is about: the one that is out of step, lost or has given up, else the one that was
    /// waited for.
    pub fn peer(&self) -> Option<u32> {
        match &self.cause {
            Cause::Lost(lost) => Some(lost.rank),
            Cause::GaveUp(peer) => Some(peer.rank),
            Cause::OtherHost(rank) => Some(*rank),
            Cause::OutOfStep(disagreement) => Some(disagreement.rank),
            Cause::Deadline(_) | Cause::Aborted | Cause::Gpu(_) => self.wait.map(|wait| wait.from),
        }
    }

    /// The fault that the other ranks are told; `None` where they know better.
    pub(crate) fn fault(&self) -> Option<(Fault, u32)> {
        let from = self.wait.map_or(self.rank, |wait| wait.from);
        match &self.cause {
            Cause::Deadline(_) => Some((Fault::Late, from)),
            // It may have been waited for by a rank that was waited for.
            Cause::Lost(lost) => Some((Fault::Lost, lost.rank)),
            Cause::OtherHost(rank) => Some((Fault::Lost, *rank)),
            Cause::Aborted | Cause::Gpu(_) => Some((Fault::Aborted, self.rank)),
            Cause::OutOfStep(disagreement) => Some((Fault::OutOfStep, disagreement.rank)),
            Cause::GaveUp(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::How;

    #[test]
    fn a_failure_says_who_was_waited_for_in_which_operation_and_leaves_this_rank_to_whoever_shows_it() {
        let wait = Awaited { from: 1, what: What::Sum(17), operation: 1234, call: None };
        let failure =
            Failure { rank: 3, wait: Some(wait), cause: Cause::Deadline(Duration::from_millis(2500)) };
        assert_eq!(
            failure.to_string(),
            "waited 2.5 s for rank 1's sum of token 17 in operation 1234: it is stuck, or slower than the deadline"
        );
        let wait = Awaited { what: What::Input(0), ..wait };
        let aborted = Failure { wait: Some(wait), cause: Cause::Aborted, ..failure.clone() };
        assert_eq!(
            aborted.to_string(),
            "the group was aborted on this rank; this rank waited for rank 1's input of token 0 in operation 1234"
        );
        let told = GaveUp { rank: 2, fault: Fault::Late, because_of: 1 };
        let told = Failure { wait: None, cause: Cause::GaveUp(told), ..failure };
        assert_eq!(told.to_string(), "rank 2 gave up: it waited for rank 1 past the deadline");
        assert_eq!(told.fault(), None, "the others know from rank 2");
        let lost = Lost { rank: 2, how: How::Ended, detail: String::new() };
        let lost = Failure { wait: Some(wait), cause: Cause::Lost(lost), ..told.clone() };
        assert_eq!(
            lost.to_string(),
            "rank 2 was lost: it ended without a farewell; this rank waited for rank 1's input of token 0 in operation 1234"
        );
        assert_eq!(
            lost.fault(),
            Some((Fault::Lost, 2)),
            "the others are told who was lost, not who was waited for"
        );
        let elsewhere = Awaited { from: 5, what: What::HostSum(3), ..wait };
        let elsewhere = Failure { wait: Some(elsewhere), cause: Cause::OtherHost(5), ..told.clone() };
        assert_eq!(
            elsewhere.to_string(),
            "a wait failed on the host of rank 5; this rank waited for the sum of token 3 by rank 5's host in operation 1234"
        );
        assert_eq!(elsewhere.peer(), Some(5));
        let gather = Awaited { from: 2, what: What::HostSums, ..wait };
        let late = Cause::Deadline(Duration::from_secs(21));
        let gather = Failure { wait: Some(gather), cause: late, ..told.clone() };
        assert_eq!(
            gather.to_string(),
            "waited 21.0 s for the sums of other hosts, as that of rank 2, in operation 1234: it is stuck, or slower than the \
             deadline, or has made another call"
        );
        let gpu = Failure { cause: Cause::Gpu("could not launch a kernel: no".to_owned()), ..told };
        assert_eq!(gpu.to_string(), "could not launch a kernel: no");
        assert_eq!(gpu.fault(), Some((Fault::Aborted, 3)));
    }
}
