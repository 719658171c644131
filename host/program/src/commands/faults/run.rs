//! The part of one rank in a test of faults, which runs on real processes and must never hang.
//!
//! A [`Case`] is a [`Phase`] of a group's life, a [`Fault`] and a rank. Every rank [plays](play) the same part; the faulty
//! one has its fault in that phase. The case is judged from outside, by the processes: every surviving rank must report in
//! time, and give a reason that fits.

use std::{
    io::{self, Write as _},
    process, thread,
    time::{Duration, Instant},
};

use fused_collective::group::rendezvous::Group;
use fused_collective_core::{
    dtype::DType,
    fusion::{Mode, Norm, PartialSums},
};
use rustix::process::{Signal, getpid, kill_process};

use super::case::{Case, Fault, NO_ERROR, Phase};
use crate::{
    backend::{self, collective::Collective, problem::Problem, steps::Step},
    check::{
        inputs::Numbers,
        variants::{that_span, variants},
        verify::{verify, write_inputs},
    },
    exit,
    job::ranks::{Error, hosts},
    pattern::Pattern,
    quant_mode::QuantMode,
    wire::Wire,
};

/// The line that a rank writes just before its fault.
pub const MARK: &str = "fault";
/// The start of the line in which a rank reports the end of its group.
pub const OUTCOME: &str = "outcome: ";
/// The start of the line in which a rank reports on a new group.
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
        pattern: Pattern::AllReduceNorm,
        quantization: QuantMode::Fp8.quantization(),
        scale: QuantMode::Fp8.scale(),
        partial_sums: PartialSums::F32,
    }
}

/// The steps of all ranks on one host.
const STEPS: [Step; 2] = [Step::fused(Mode::OneShot), Step::fused(Mode::TwoShot)];
/// Those of ranks on several, between which there is one mode.
const STEPS_OF_HOSTS: [Step; 2] = [Step::fused(Mode::TwoShot); 2];

/// The problem and the steps of the rank that is out of step with `steps`.
fn mismatch(fault: Fault, steps: [Step; 2]) -> (Problem, [Step; 2]) {
    let (problem, [first, second]) = (problem(), steps);
    let fp4 = QuantMode::Fp4;
    match fault {
        Fault::OtherShape => (Problem { tokens: 65, ..problem }, steps),
        Fault::OtherDtype => (Problem { dtype: DType::F16, ..problem }, steps),
        Fault::OtherQuant => {
            (Problem { quantization: fp4.quantization(), scale: fp4.scale(), ..problem }, steps)
        }
        Fault::OtherMode => (problem, [second, second]),
        _ => (problem, [second, first]),
    }
}

/// Operations before a fault that happens between two operations.
const BEFORE: u32 = 5;
/// Repetitions of the steps in a replay.
const REPEATS: u32 = 4;
/// The longest time that operations go on if the fault does not end them.
const MOST: Duration = Duration::from_secs(120);

/// The key of the group that the same processes form after the first.
pub fn again_key(key: &str) -> String {
    format!("{key}/again")
}

/// The access of one rank to its group, which may be formed again.
pub trait Script {
    /// Meets the other ranks, for the first time or `again`.
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

/// Plays the part of rank `rank` in a case. `say` gets a line as soon as the group has ended for this rank. If all ranks
/// survive, it gets another line on a new group of theirs.
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
    // Shared memory is freed once the operations of all ranks have ended and they have met again.
    let again = script.meet(true).and_then(|new| {
        // This fails, as the old group has no barrier any more. It has unmapped the other ranks' memory by then.
        let _ = backend.leave();
        new.barrier()?;
        drop(backend);
        check_again(script, &new)?;
        Ok(new.farewell()?)
    });
    say(line(AGAIN, again))
}

fn line(what: &str, result: Result<(), Error>) -> String {
    // The error may have several lines.
    let text = result.map_or_else(|error| error.to_string(), |()| NO_ERROR.to_owned());
    format!("{what}{}", text.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// Verifies operations in a new group of the same processes.
fn check_again(script: &impl Script, group: &Group) -> Result<(), Error> {
    let (mut backend, problem) = (script.join(group)?, problem());
    backend.prepare(&problem)?;
    write_inputs(&mut *backend, &problem, Numbers::random(1), group)?;
    let all = variants(
        problem.pattern,
        QuantMode::Fp8,
        problem.residual,
        problem.sharded,
        true,
        &[Wire::Exact],
        &[],
    );
    for variant in that_span(hosts(group).count(), all) {
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
        let all_steps = if hosts(group).count() == 1 { STEPS } else { STEPS_OF_HOSTS };
        let other = self.case.fault.is_mismatch().then(|| (1, mismatch(self.case.fault, all_steps).0));
        for (slot, problem) in other.into_iter().chain([(0, problem())]) {
            backend.select(slot)?;
            backend.prepare(&problem)?;
            write_inputs(backend, &problem, Numbers::random(0), group)?;
        }
        self.amid(Phase::Operations, backend, &all_steps, |backend, steps| backend.run(steps))?;
        let replay = |backend: &mut dyn Collective, steps: &[Step]| backend.time(steps, REPEATS).map(drop);
        self.amid(Phase::Replays, backend, &all_steps, replay)?;
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

    /// Has the fault here, between two calls, if it is due.
    fn between(&self, phase: Phase, backend: Option<&dyn Collective>) {
        if self.is_due(phase) {
            mark();
            match self.case.fault {
                Fault::Abort => backend.into_iter().for_each(|backend| backend.aborter()()),
                fault => strike(fault),
            }
        }
    }

    /// Runs operations, with the fault amid them if it is due. In the phase of the fault they go on until they fail.
    fn amid(
        &self,
        phase: Phase,
        backend: &mut dyn Collective,
        steps: &[Step],
        run: impl Fn(&mut dyn Collective, &[Step]) -> Result<(), backend::error::Error>,
    ) -> Result<(), Error> {
        let (began, fault) = (Instant::now(), self.case.fault);
        let other_steps = [steps[0], steps[1]];
        let run_other = |backend: &mut dyn Collective| {
            backend.select(1)?;
            run(backend, &mismatch(fault, other_steps).1)?;
            backend.select(0)
        };
        if fault.is_mismatch() && self.case.phase == phase {
            // All ranks run it once, which does the set-up of first use. A sequence is captured after its first run, and
            // the replay should be out of step.
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
                    // From another thread, so that the fault comes at any moment of an operation.
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
    // The reader may be gone.
    let _ = writeln!(stdout, "{MARK}").and_then(|()| stdout.flush());
}

/// Ends this process, or blocks this thread for ever.
fn strike(fault: Fault) {
    let signal = |signal| {
        // This process exists, so the signal can be sent.
        let _ = kill_process(getpid(), signal);
    };
    match fault {
        Fault::Kill => signal(Signal::KILL),
        Fault::Crash => process::abort(),
        Fault::Stop => signal(Signal::STOP),
        Fault::Exit => process::exit(exit::SUCCESS.into()),
        _ => {}
    }
    // A signal may take a moment, and a stopped process may be continued.
    loop {
        thread::sleep(Duration::from_secs(1));
    }
}
