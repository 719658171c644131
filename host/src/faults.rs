//! Faults, one at a time, and what the ranks that live on must say: the promise that nothing hangs, put to the test on
//! real processes.
//!
//! A [`Case`] is a [`Phase`] of a group's life, a [`Fault`] and the rank that it happens to. Every rank plays the same
//! [script](play); the faulty one has its fault when the phase comes. A case is [judged](judge) by what the processes
//! did: every rank that lives on must report in time, and what it says must fit.

use std::{
    fmt,
    io::{self, Write as _},
    process,
    str::FromStr,
    thread,
    time::{Duration, Instant},
};

use fused_collective_core::{
    dtype::DType,
    fusion::{Mode, Norm},
};
use rustix::process::{Signal, getpid, kill_process};
use serde::{Deserialize, Serialize};

use crate::{
    bench::{
        Error, Numbers, variants,
        verify::{verify, write_inputs},
    },
    collective::{Collective, Problem, Step},
    rendezvous::Group,
    settings::{BackendChoice, QuantMode},
};

/// Everything that the command line says about a test of faults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// The cases, in order.
    pub cases: Vec<Case>,
    /// Longest wait for a peer, in seconds; finite and above 0.
    pub deadline_seconds: f64,
    /// The backend asked for.
    pub backend: BackendChoice,
    /// Whether ranks may share a GPU.
    pub oversubscribe: bool,
    /// Ranks asked for; `None` leaves it to the backend.
    pub nproc_per_node: Option<u32>,
}

impl Settings {
    /// Longest wait for a peer.
    pub fn deadline(&self) -> Duration {
        Duration::from_secs_f64(self.deadline_seconds)
    }
}

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
    /// It calls an operation of another shape.
    OtherShape,
    /// It calls the operation in the other mode.
    OtherMode,
}

impl Phase {
    /// All of them, in order.
    pub const ALL: [Phase; 6] =
        [Phase::Start, Phase::Joined, Phase::Ready, Phase::Operations, Phase::Replays, Phase::End];

    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Phase::Start => "start",
            Phase::Joined => "joined",
            Phase::Ready => "ready",
            Phase::Operations => "operations",
            Phase::Replays => "replays",
            Phase::End => "end",
        }
    }
}

impl Fault {
    /// All of them.
    pub const ALL: [Fault; 8] = [
        Fault::Kill,
        Fault::Crash,
        Fault::Stop,
        Fault::Exit,
        Fault::Stuck,
        Fault::Abort,
        Fault::OtherShape,
        Fault::OtherMode,
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
        }
    }

    /// Whether the rank itself lives on and learns of it, like the others.
    pub const fn is_survived(self) -> bool {
        matches!(self, Fault::Abort | Fault::OtherShape | Fault::OtherMode)
    }

    /// Whether there is a connection or an announcement that tells of it, so that nobody has to wait for a deadline.
    const fn shows_at_once(self) -> bool {
        !matches!(self, Fault::Stop | Fault::Stuck)
    }

    /// Whether it can happen in `phase`.
    pub const fn happens_in(self, phase: Phase) -> bool {
        match self {
            Fault::Abort => matches!(phase, Phase::Ready | Phase::Operations | Phase::Replays),
            Fault::OtherShape | Fault::OtherMode => matches!(phase, Phase::Operations),
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

/// What a rank writes on its standard output just before its fault.
pub const MARK: &str = "fault";
/// What starts the line in which a rank says how its group ended for it.
pub const OUTCOME: &str = "outcome: ";
/// What starts the line in which a rank says how a new group did.
pub const AGAIN: &str = "again: ";

/// The problem of all operations.
pub fn problem() -> Problem {
    Problem {
        dtype: DType::Bf16,
        tokens: 64,
        hidden: 1024,
        residual: true,
        sharded: false,
        norm: Norm::default(),
        quantization: QuantMode::Fp8.quantization(),
        scale: QuantMode::Fp8.scale(),
    }
}

/// What the rank that is out of step computes.
fn other_problem() -> Problem {
    Problem { tokens: 65, ..problem() }
}

/// Operations before a fault that the rank itself has between two operations.
const BEFORE: u32 = 20;
/// How long operations go on at most where a fault should have ended them.
const MOST: Duration = Duration::from_secs(120);

/// A rank's end of a group that may be joined again.
pub trait Script {
    /// Meets the other ranks, the first time or `again`.
    ///
    /// # Errors
    /// As [`Group::join`].
    fn meet(&self, again: bool) -> Result<Group, Error>;

    /// Joins the backend.
    ///
    /// # Errors
    /// The backend's.
    fn join<'a>(&self, group: &'a Group) -> Result<Box<dyn Collective + 'a>, Error>;
}

/// Plays rank `rank`'s part of a case. `say` gets a line at once when the group has ended for it, and where all ranks live
/// on another one for a new group of theirs.
///
/// # Errors
/// Those of `say`.
pub fn play<F>(
    case: &Case,
    rank: u32,
    script: &impl Script,
    mut say: impl FnMut(String) -> Result<(), F>,
) -> Result<(), F> {
    let part = Part { case, is_faulty: rank == case.rank };
    part.between(Phase::Start, None);
    let group = match script.meet(false) {
        Ok(group) => group,
        Err(error) => return say(line(OUTCOME, Err(error))),
    };
    part.between(Phase::Joined, None);
    let mut backend = match script.join(&group) {
        Ok(backend) => backend,
        Err(error) => return say(line(OUTCOME, Err(error))),
    };
    let worked = part.work(&mut *backend, &group);
    if !case.fault.is_survived() {
        let left = worked.and_then(|()| {
            part.between(Phase::End, None);
            Ok(backend.leave()?)
        });
        drop(backend);
        return say(line(OUTCOME, left.and_then(|()| Ok(group.farewell()?))));
    }
    say(line(OUTCOME, worked))?;
    // What is shared with peers is let go of when the operations of all have ended, and they have met again.
    let again = script.meet(true).and_then(|new| {
        // It fails, as the old group has no barrier any more, but has closed the other ranks' memory by then.
        let _ = backend.leave();
        new.barrier()?;
        drop(backend);
        check_again(script, &new)?;
        Ok(new.farewell()?)
    });
    say(line(AGAIN, again))
}

fn line(what: &str, result: Result<(), Error>) -> String {
    // One line, whatever is in it.
    let text = result.map_or_else(|error| error.to_string(), |()| NO_ERROR.to_owned());
    format!("{what}{}", text.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// All ranks live: a new group of the same processes must be right.
fn check_again(script: &impl Script, group: &Group) -> Result<(), Error> {
    let (mut backend, problem) = (script.join(group)?, problem());
    backend.prepare(&problem)?;
    write_inputs(&mut *backend, &problem, Numbers::random(1), group)?;
    for variant in variants(QuantMode::Fp8, problem.residual, problem.sharded, true, &[]) {
        if let Err(why) = verify(&mut *backend, group, &problem, &variant, Numbers::random(1))? {
            return Err(Error::Failed(why));
        }
    }
    Ok(())
}

struct Part<'a> {
    case: &'a Case,
    is_faulty: bool,
}

impl Part<'_> {
    fn work(&self, backend: &mut dyn Collective, group: &Group) -> Result<(), Error> {
        self.between(Phase::Ready, Some(backend));
        for (slot, problem) in [(1, other_problem()), (0, problem())] {
            backend.select(slot)?;
            backend.prepare(&problem)?;
            write_inputs(backend, &problem, Numbers::random(0), group)?;
        }
        self.amid(Phase::Operations, backend, |backend, steps| backend.run(steps))?;
        self.amid(Phase::Replays, backend, |backend, steps| backend.time(steps, 10).map(drop))
    }

    fn is_due(&self, phase: Phase) -> bool {
        self.is_faulty && self.case.phase == phase
    }

    /// A fault between two calls.
    fn between(&self, phase: Phase, backend: Option<&dyn Collective>) {
        if self.is_due(phase) {
            mark();
            match self.case.fault {
                Fault::Abort => backend.into_iter().for_each(|backend| backend.aborter()()),
                fault => strike(fault),
            }
        }
    }

    /// Operations, and a fault amid them if it is due. If it is any rank's, they go on until they fail.
    fn amid(
        &self,
        phase: Phase,
        backend: &mut dyn Collective,
        run: impl Fn(&mut dyn Collective, &[Step]) -> Result<(), crate::collective::Error>,
    ) -> Result<(), Error> {
        let steps = [Step::Fused(Mode::OneShot), Step::Fused(Mode::TwoShot)];
        let (began, fault) = (Instant::now(), self.case.fault);
        for operation in 0u32.. {
            if self.is_due(phase) && operation == BEFORE {
                match fault {
                    Fault::Stuck => {
                        mark();
                        strike(fault);
                    }
                    Fault::OtherShape => {
                        mark();
                        backend.select(1)?;
                    }
                    Fault::OtherMode => {
                        mark();
                        run(backend, &[Step::Fused(Mode::TwoShot), Step::Fused(Mode::OneShot)])?;
                    }
                    // From another thread, so that it comes at any moment of an operation.
                    _ => {
                        let aborter = backend.aborter();
                        thread::spawn(move || {
                            thread::sleep(Duration::from_millis(30));
                            mark();
                            if fault == Fault::Abort { aborter() } else { strike(fault) }
                        });
                    }
                }
            }
            run(backend, &steps)?;
            if self.case.phase != phase && operation == 2 {
                break;
            }
            if began.elapsed() > MOST {
                return Err(Error::Failed(format!("operations went on for {MOST:?} past the fault")));
            }
        }
        Ok(())
    }
}

fn mark() {
    let mut stdout = io::stdout();
    // Whoever reads it may be gone.
    let _ = writeln!(stdout, "{MARK}").and_then(|()| stdout.flush());
}

/// Ends this process, or holds this thread up for ever.
fn strike(fault: Fault) {
    let signal = |signal| {
        // This process is there.
        let _ = kill_process(getpid(), signal);
    };
    match fault {
        Fault::Kill => signal(Signal::KILL),
        Fault::Crash => process::abort(),
        Fault::Stop => signal(Signal::STOP),
        Fault::Exit => process::exit(0),
        Fault::Stuck | Fault::Abort | Fault::OtherShape | Fault::OtherMode => {}
    }
    // A signal may take a moment, and a stopped process that is continued after all stays where it is.
    loop {
        thread::sleep(Duration::from_secs(1));
    }
}

/// What was seen of a rank.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    /// How its group ended for it, as it said itself.
    pub outcome: Option<String>,
    /// How a new group did, if it said so.
    pub again: Option<String>,
    /// When it reported, counted from the fault; `None` if it did not.
    pub after: Option<Duration>,
}

/// For processes to be noticed and to end on a busy machine, beyond a deadline.
pub const SLACK: Duration = Duration::from_secs(8);

/// Whether a case went as promised: the time that the last rank took to report, or what is wrong. `observed` is by rank.
pub fn judge(case: &Case, deadline: Duration, observed: &[Observed]) -> Result<Duration, String> {
    let mut slowest = Duration::ZERO;
    let mut named = false;
    // A rank that never came is missed at the deadline, whatever became of it.
    let at_once = case.fault.shows_at_once() && case.phase != Phase::Start;
    let limit = if at_once { SLACK } else { deadline + SLACK };
    for (rank, seen) in (0u32..).zip(observed) {
        if rank == case.rank && !case.fault.is_survived() {
            continue;
        }
        let (Some(outcome), Some(after)) = (&seen.outcome, seen.after) else {
            return Err(format!("rank {rank} reported nothing"));
        };
        if outcome == NO_ERROR {
            return Err(format!("rank {rank} noticed nothing"));
        }
        if after > limit {
            return Err(format!("rank {rank} reported after {:.1} s only: {outcome}", after.as_secs_f64()));
        }
        let fits = match case.fault {
            Fault::Abort => outcome.contains("abort"),
            Fault::OtherShape | Fault::OtherMode => {
                outcome.contains("called (") || outcome.contains("other call")
            }
            _ => true,
        };
        if !fits {
            return Err(format!("rank {rank} gave another reason: {outcome}"));
        }
        if case.fault.is_survived() && seen.again.as_deref() != Some(NO_ERROR) {
            let again = seen.again.as_deref().unwrap_or("it said nothing");
            return Err(format!("rank {rank}, in a new group: {again}"));
        }
        named |= names_rank(outcome, case.rank);
        slowest = slowest.max(after);
    }
    if !named {
        return Err(format!("no rank named rank {}", case.rank));
    }
    Ok(slowest)
}

/// What a rank says whose group ended well.
pub const NO_ERROR: &str = "no error";

/// Whether `text` names this rank and not just one whose number starts with the same digit.
fn names_rank(text: &str, rank: u32) -> bool {
    let name = format!("rank {rank}");
    text.match_indices(&name)
        .any(|(at, _)| !text[at + name.len()..].starts_with(|c: char| c.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEADLINE: Duration = Duration::from_secs(2);

    fn case(text: &str) -> Case {
        text.parse().unwrap()
    }

    fn saw(outcome: &str, seconds: u64) -> Observed {
        Observed { outcome: Some(outcome.to_owned()), again: None, after: Some(Duration::from_secs(seconds)) }
    }

    #[test]
    fn every_case_is_read_back_from_its_name() {
        assert_eq!(Case::all(1).count(), 6 * 5 + 3 + 2);
        Case::all(3).for_each(|known| assert_eq!(case(&known.to_string()), known));
        for text in
            ["", "operations", "operations/kill", "operations/kill/x", "start/abort/1", "end/kill/1/2"]
        {
            assert_eq!(text.parse::<Case>(), Err(UnknownCase), "{text}");
        }
    }

    #[test]
    fn a_case_is_right_if_every_other_rank_reports_in_time() {
        let lost = || saw("rank 1 was lost: it ended without a farewell", 0);
        let dead = Observed::default();
        assert_eq!(
            judge(&case("operations/kill/1"), DEADLINE, &[lost(), dead.clone(), lost()]),
            Ok(Duration::ZERO)
        );
        let late = saw("waited 2.0 s for rank 1's input", 3);
        assert_eq!(
            judge(&case("operations/stop/1"), DEADLINE, &[late.clone(), dead, late]),
            Ok(Duration::from_secs(3))
        );
    }

    #[test]
    fn whatever_breaks_the_promise_is_found() {
        let lost = || saw("rank 1 was lost: it ended without a farewell", 0);
        let (dead, kill) = (Observed::default(), case("operations/kill/1"));
        let wrong = |case: &Case, observed: &[Observed]| judge(case, DEADLINE, observed).unwrap_err();
        assert_eq!(wrong(&kill, &[lost(), dead.clone(), dead.clone()]), "rank 2 reported nothing");
        assert_eq!(wrong(&kill, &[lost(), dead.clone(), saw(NO_ERROR, 0)]), "rank 2 noticed nothing");
        assert!(wrong(&kill, &[saw("rank 1 was lost", 9), dead.clone()]).contains("after 9.0 s only"));
        assert!(
            wrong(&case("operations/stop/1"), &[saw("rank 1", 11), dead.clone()]).contains("after 11.0 s")
        );
        assert_eq!(wrong(&kill, &[saw("rank 12 was lost", 0), dead]), "no rank named rank 1");
        let again =
            |text: &str| Observed { again: Some(text.to_owned()), ..saw("rank 1 aborted the group", 0) };
        let abort = case("ready/abort/1");
        assert!(judge(&abort, DEADLINE, &[again(NO_ERROR), again(NO_ERROR)]).is_ok());
        assert_eq!(wrong(&abort, &[again(NO_ERROR), again("wrong")]), "rank 1, in a new group: wrong");
        assert!(wrong(&abort, &[lost(), again(NO_ERROR)]).contains("another reason"));
    }
}
