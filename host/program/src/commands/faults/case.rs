//! The faults, and the phases in which they can happen.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

/// The phase of a group's life in which a fault happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Before the rank has met the others.
    Start,
    /// After all have met, before they share memory.
    Joined,
    /// After they share memory, before the first operation.
    Ready,
    /// In the middle of operations.
    Operations,
    /// In the middle of repeated sequences; on GPUs, launches of captured graphs.
    Replays,
    /// In the middle of separate operations with NCCL's all-reduce, single and in captured graphs. On GPUs only.
    Nccl,
    /// After all operations, before the ranks part.
    End,
}

/// The fault of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fault {
    /// It is killed: SIGKILL.
    Kill,
    /// It crashes: SIGABRT.
    Crash,
    /// It is stopped, and never continued: SIGSTOP.
    Stop,
    /// It exits, with status 0.
    Exit,
    /// It makes no progress, though its process lives.
    Stuck,
    /// Another of its threads aborts the group.
    Abort,
    /// It calls operations of another shape.
    OtherShape,
    /// It calls operations in the other mode.
    OtherMode,
    /// It calls operations on another element type, whose rows have as many bytes.
    OtherDtype,
    /// It calls operations with another quantization, for which ranks send each other the same bytes.
    OtherQuant,
    /// It calls the same operations in another order.
    OtherOrder,
}

impl Phase {
    /// Every phase, in order.
    pub const ALL: [Phase; 7] = [
        Phase::Start,
        Phase::Joined,
        Phase::Ready,
        Phase::Operations,
        Phase::Replays,
        Phase::Nccl,
        Phase::End,
    ];

    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Phase::Start => "start",
            Phase::Joined => "joined",
            Phase::Ready => "ready",
            Phase::Operations => "operations",
            Phase::Replays => "replays",
            Phase::Nccl => "nccl",
            Phase::End => "end",
        }
    }

    /// True if ranks wait in it for data of each other, and not for each other at the rendezvous.
    pub(super) const fn is_amid_operations(self) -> bool {
        matches!(self, Phase::Operations | Phase::Replays | Phase::Nccl)
    }
}

impl Fault {
    /// Every fault.
    pub const ALL: [Fault; 11] = [
        Fault::Kill,
        Fault::Crash,
        Fault::Stop,
        Fault::Exit,
        Fault::Stuck,
        Fault::Abort,
        Fault::OtherShape,
        Fault::OtherMode,
        Fault::OtherDtype,
        Fault::OtherQuant,
        Fault::OtherOrder,
    ];

    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Fault::Kill => "kill",
            Fault::Crash => "crash",
            Fault::Stop => "stop",
            Fault::Exit => "exit",
            Fault::Stuck => "stuck",
            Fault::Abort => "abort",
            Fault::OtherShape => "other-shape",
            Fault::OtherMode => "other-mode",
            Fault::OtherDtype => "other-dtype",
            Fault::OtherQuant => "other-quant",
            Fault::OtherOrder => "other-order",
        }
    }

    /// True if the rank calls another operation than the others.
    pub const fn is_mismatch(self) -> bool {
        matches!(
            self,
            Fault::OtherShape | Fault::OtherMode | Fault::OtherDtype | Fault::OtherQuant | Fault::OtherOrder
        )
    }

    /// True if the faulty rank survives and reports the fault, like the others.
    pub const fn is_survived(self) -> bool {
        matches!(self, Fault::Abort) || self.is_mismatch()
    }

    /// True if it can happen in `phase`.
    pub const fn happens_in(self, phase: Phase) -> bool {
        match self {
            Fault::Abort => matches!(phase, Phase::Ready) || phase.is_amid_operations(),
            fault if fault.is_mismatch() => matches!(phase, Phase::Operations | Phase::Replays),
            _ => true,
        }
    }
}

/// A fault of a rank in a phase. In text: `operations/kill/1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Case {
    /// The phase.
    pub phase: Phase,
    /// The fault.
    pub fault: Fault,
    /// The faulty rank.
    pub rank: u32,
}

impl Case {
    /// All cases of a rank.
    pub fn all(rank: u32) -> impl Iterator<Item = Case> {
        let of = move |phase| Fault::ALL.map(|fault| Case { phase, fault, rank });
        Phase::ALL.into_iter().flat_map(of).filter(|case| case.fault.happens_in(case.phase))
    }

    /// True if a connection or an announcement shows the fault, so that no rank has to wait for a deadline. A rank that
    /// never came is missed at the deadline, whatever its fault.
    pub(super) const fn shows_at_once(&self) -> bool {
        !matches!(self.fault, Fault::Stop | Fault::Stuck) && !matches!(self.phase, Phase::Start)
    }

    /// The deadline of the case, at least `asked`. A fault that shows at once has a long one, so that a report at the
    /// deadline would be late.
    pub fn deadline(&self, asked: Duration) -> Duration {
        const LONG: Duration = Duration::from_secs(60);
        if self.shows_at_once() { asked.max(LONG) } else { asked }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.phase.name(), self.fault.name(), self.rank)
    }
}

/// The text is no case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownCase;

impl fmt::Display for UnknownCase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = |names: Vec<&str>| names.join(", ");
        write!(
            f,
            "not a case: use PHASE/FAULT/RANK with a phase of {}, a fault of {} that can happen in it, and a rank",
            names(Phase::ALL.iter().map(|phase| phase.name()).collect()),
            names(Fault::ALL.iter().map(|fault| fault.name()).collect())
        )
    }
}

impl std::error::Error for UnknownCase {}

impl FromStr for Case {
    type Err = UnknownCase;

    fn from_str(text: &str) -> Result<Self, UnknownCase> {
        let mut parts = text.split('/');
        let mut next = || parts.next().ok_or(UnknownCase);
        let (phase, fault, rank) = (next()?, next()?, next()?);
        let case = Case {
            phase: Phase::ALL.into_iter().find(|known| known.name() == phase).ok_or(UnknownCase)?,
            fault: Fault::ALL.into_iter().find(|known| known.name() == fault).ok_or(UnknownCase)?,
            rank: rank.parse().map_err(|_| UnknownCase)?,
        };
        let is_case = parts.next().is_none() && case.fault.happens_in(case.phase);
        if is_case { Ok(case) } else { Err(UnknownCase) }
    }
}

/// The report of a rank whose group ended without an error.
pub const NO_ERROR: &str = "no error";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_is_read_back_from_its_name() {
        let (ends, aborts, mismatches) = (7 * 5, 4, 2 * 5);
        assert_eq!(Case::all(1).count(), ends + aborts + mismatches);
        Case::all(3).for_each(|known| assert_eq!(known.to_string().parse(), Ok(known)));
        for text in
            ["", "operations", "operations/kill", "operations/kill/x", "start/abort/1", "end/kill/1/2"]
        {
            assert_eq!(text.parse::<Case>(), Err(UnknownCase), "{text}");
        }
    }
}
