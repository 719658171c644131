//! Which faults there are, and when they can happen.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

/// When a fault happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Before the rank has met the others.
    Start,
    /// When all have met, before they share memory.
    Joined,
    /// When they share memory, before the first operation.
    Ready,
    /// In the middle of operations.
    Operations,
    /// In the middle of repeated sequences: on GPUs, launches of captured graphs.
    Replays,
    /// In the middle of separate operations with NCCL's all-reduce, single and in captured graphs. On GPUs alone.
    Nccl,
    /// When all is done, before the ranks part.
    End,
}

/// What happens to a rank.
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
    /// It does not go on, though its process lives.
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
    /// All of them, in order.
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

    /// Whether ranks wait for each other's data in it, and not for each other at the rendezvous.
    pub(super) const fn is_amid_operations(self) -> bool {
        matches!(self, Phase::Operations | Phase::Replays | Phase::Nccl)
    }
}

impl Fault {
    /// All of them.
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

    /// Whether the rank calls something else than the others.
    pub const fn is_mismatch(self) -> bool {
        matches!(
            self,
            Fault::OtherShape | Fault::OtherMode | Fault::OtherDtype | Fault::OtherQuant | Fault::OtherOrder
        )
    }

    /// Whether the rank itself lives on and learns of it, like the others.
    pub const fn is_survived(self) -> bool {
        matches!(self, Fault::Abort) || self.is_mismatch()
    }

    /// Whether it can happen in `phase`.
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
    /// When.
    pub phase: Phase,
    /// What.
    pub fault: Fault,
    /// To whom.
    pub rank: u32,
}

impl Case {
    /// All cases of a rank.
    pub fn all(rank: u32) -> impl Iterator<Item = Case> {
        let of = move |phase| Fault::ALL.map(|fault| Case { phase, fault, rank });
        Phase::ALL.into_iter().flat_map(of).filter(|case| case.fault.happens_in(case.phase))
    }

    /// Whether there is a connection or an announcement that tells of it, so that nobody has to wait for a deadline. A
    /// rank that never came is missed at the deadline, whatever became of it.
    pub(super) const fn shows_at_once(&self) -> bool {
        !matches!(self.fault, Fault::Stop | Fault::Stuck) && !matches!(self.phase, Phase::Start)
    }

    /// The deadline that the case is run with, where `asked` is that of the others. What shows at once is run with one so
    /// long that reports which came of the deadline would be late.
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
            "not a case: use PHASE/FAULT/RANK with a phase of {}, a fault of {} that can happen then, and a rank",
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

/// What a rank says whose group ended well.
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
