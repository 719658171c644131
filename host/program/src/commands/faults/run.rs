//! Faults, one at a time, and what the ranks that live on must say: the promise that nothing hangs, put to the test on
//! real processes.
//!
//! A [`Case`] is a [`Phase`] of a group's life, a [`Fault`] and the rank that it happens to. Every rank plays the same
//! [script](play); the faulty one has its fault when the phase comes. A case is [judged](judge) by what the processes
//! did: every rank that lives on must report in time, and what it says must fit.

use std::{
    io::{self, Write as _},
    process, thread,
    time::{Duration, Instant},
};

use fused_collective_core::{
    dtype::DType,
    fusion::{Mode, Norm},
};
use rustix::process::{Signal, getpid, kill_process};
use serde::{Deserialize, Serialize};

use super::case::{Case, Fault, NO_ERROR, Phase};
use fused_collective::group::rendezvous::Group;

use crate::{
    backend::{collective::Collective, problem::Problem, steps::Step},
    check::{
        inputs::Numbers,
        variants::variants,
        verify::{verify, write_inputs},
    },
    job::{options::BackendChoice, ranks::Error},
    quant_mode::QuantMode,
};

/// Everything that the command line says about a test of faults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// The cases, in order; `None` for all of ranks 0 and 1 that the backend can have.
    pub cases: Option<Vec<Case>>,
    /// Longest wait for a peer, in seconds; finite and above 0. A [case](Case::deadline) may have a longer one.
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

/// What all ranks run.
const STEPS: [Step; 2] = [Step::Fused(Mode::OneShot), Step::Fused(Mode::TwoShot)];

/// What the rank that is out of step computes, and how.
fn mismatch(fault: Fault) -> (Problem, [Step; 2]) {
    let (problem, [first, second]) = (problem(), STEPS);
    let fp4 = QuantMode::Fp4;
    match fault {
        Fault::OtherShape => (Problem { tokens: 65, ..problem }, STEPS),
        Fault::OtherDtype => (Problem { dtype: DType::F16, ..problem }, STEPS),
        Fault::OtherQuant => {
            (Problem { quantization: fp4.quantization(), scale: fp4.scale(), ..problem }, STEPS)
        }
        Fault::OtherMode => (problem, [second, second]),
        _ => (problem, [second, first]),
    }
}

/// Operations before a fault that the rank itself has between two operations.
const BEFORE: u32 = 5;
/// Times that the sequence is repeated in a replay.
const REPEATS: u32 = 4;
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
        let other = self.case.fault.is_mismatch().then(|| (1, mismatch(self.case.fault).0));
        for (slot, problem) in other.into_iter().chain([(0, problem())]) {
            backend.select(slot)?;
            backend.prepare(&problem)?;
            write_inputs(backend, &problem, Numbers::random(0), group)?;
        }
        self.amid(Phase::Operations, backend, &STEPS, |backend, steps| backend.run(steps))?;
        let replay = |backend: &mut dyn Collective, steps: &[Step]| backend.time(steps, REPEATS).map(drop);
        self.amid(Phase::Replays, backend, &STEPS, replay)?;
        if self.case.phase != Phase::Nccl {
            return Ok(());
        }
        let separate = [Step::NcclAllReduce, Step::AddRmsNormQuantize];
        self.amid(Phase::Nccl, backend, &separate, |backend, steps| {
            backend.run(steps)?;
            replay(backend, steps)
        })
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
        steps: &[Step],
        run: impl Fn(&mut dyn Collective, &[Step]) -> Result<(), crate::backend::error::Error>,
    ) -> Result<(), Error> {
        let (began, fault) = (Instant::now(), self.case.fault);
        let run_other = |backend: &mut dyn Collective| {
            backend.select(1)?;
            run(backend, &mismatch(fault).1)?;
            backend.select(0)
        };
        if fault.is_mismatch() && self.case.phase == phase {
            // All ranks, so that whatever is set up at first use is so: a graph of a sequence is captured after it was
            // run once, and it is the replay that should be out of step.
            run_other(backend)?;
        }
        for operation in 0u32.. {
            if self.is_due(phase) && operation == BEFORE {
                match fault {
                    Fault::Stuck => {
                        mark();
                        strike(fault);
                    }
                    fault if fault.is_mismatch() => {
                        mark();
                        run_other(backend)?;
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
            run(backend, steps)?;
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
        _ => {}
    }
    // A signal may take a moment, and a stopped process that is continued after all stays where it is.
    loop {
        thread::sleep(Duration::from_secs(1));
    }
}
