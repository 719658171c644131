//! The wait of a host for its GPU.
//!
//! The deadline is for a wait for another rank, and kernels keep it themselves. A host that waits for its stream may have
//! queued any amount of work, so it does not count: it waits as long as operations come to their end, and ends what does
//! not go on. What waits for other ranks with no deadline of its own, [`ExternalWork`] work, has a limit.

use std::{
    hint, thread,
    time::{Duration, Instant},
};

use super::{
    super::driver::{Handle, is_ready},
    Communicator,
    external::ExternalWork,
};
use crate::{
    error::Error,
    group::failure::{Cause, Failure},
};

/// The time that a GPU may take to end its work once all waits in it have been ended, and beyond its kernels' deadlines, of
/// which several may each have lasted almost as long.
const GRACE: Duration = Duration::from_secs(10);
/// Looks at the stream before the host's processor is offered to others.
const SPINS: u32 = 10_000;
/// The time before a wait looks at the GPU's progress, and between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// A look's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    GoOn,
    /// All waits of this rank should be ended: once.
    End,
    /// They were, and the GPU does not come to an end.
    GiveUp,
}

/// The reason that waits were ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    /// Another rank, or another thread, has seen to it.
    Told,
    /// External work took longer than its limit.
    External,
    /// No operation came to its end.
    Stalled,
}

/// A wait as it goes on.
#[derive(Debug)]
struct WaitGuard {
    began: Instant,
    /// The time that it goes on without progress.
    stall: Duration,
    /// The time that it goes on with external work, whose progress cannot be seen.
    external: Option<Duration>,
    progressed: Instant,
    ended: Option<Why>,
}

impl WaitGuard {
    fn new(began: Instant, stall: Duration, external: Option<Duration>) -> WaitGuard {
        WaitGuard { began, stall, external, progressed: began, ended: None }
    }

    /// Looks at the wait at the time `now`: whether this rank was `told` to give up, and whether its GPU has `progressed`
    /// since the last look.
    fn look(&mut self, now: Instant, told: bool, progressed: bool) -> Verdict {
        if progressed {
            self.progressed = now;
        }
        let still = now.saturating_duration_since(self.progressed);
        let waited = now.saturating_duration_since(self.began);
        if self.ended.is_some() {
            return if still > GRACE { Verdict::GiveUp } else { Verdict::GoOn };
        }
        let why = match self.external {
            _ if told => Why::Told,
            Some(limit) if waited > limit => Why::External,
            None if still > self.stall => Why::Stalled,
            _ => return Verdict::GoOn,
        };
        self.ended = Some(why);
        self.progressed = now;
        Verdict::End
    }
}

impl Communicator {
    /// Waits until everything on `stream` has ended, and [checks](Self::check) it. If a rank of the group is lost
    /// meanwhile, has made another call, or the GPU ends no operation for longer than its deadlines allow, all waits are
    /// ended.
    ///
    /// Work of other kinds counts as none: a stream that has so much of it that for twice the deadline and ten seconds no
    /// operation of the group ends is waited for by other means, and then [checked](Self::check).
    ///
    /// # Errors
    /// As [`check`](Self::check); what the driver reports, as a failure of the group.
    ///
    /// # Safety
    /// `stream` is a stream of this rank's context.
    pub unsafe fn synchronize(&mut self, stream: Handle) -> Result<(), Error> {
        // SAFETY: the caller vouches for the stream, and no other work is on it.
        unsafe { self.synchronize_with(stream, None) }
    }

    /// As [`synchronize`](Self::synchronize), with `external` work on the stream.
    ///
    /// # Errors
    /// As [`synchronize`](Self::synchronize).
    ///
    /// # Safety
    /// As [`synchronize`](Self::synchronize).
    pub unsafe fn synchronize_with(
        &mut self,
        stream: Handle,
        external: Option<ExternalWork<'_>>,
    ) -> Result<(), Error> {
        // SAFETY: the caller vouches for the stream.
        match unsafe { self.wait(stream, external) } {
            Ok(()) => self.check(),
            Err(what) => Err(self.fail(what)),
        }
    }

    /// Waits for `stream`. An error says, for a reader, why its work is not done although no rank is to blame.
    ///
    /// # Safety
    /// As [`synchronize`](Self::synchronize).
    unsafe fn wait(&mut self, stream: Handle, mut external: Option<ExternalWork<'_>>) -> Result<(), String> {
        let text = |error: Error| error.to_string();
        let context = self.gpu.context().clone();
        let _entered = context.enter().map_err(text)?;
        let driver = context.driver();
        let began = Instant::now();
        let stall = self.deadline.saturating_mul(2).saturating_add(GRACE);
        let mut guard = WaitGuard::new(began, stall, external.as_ref().map(|external| external.limit));
        let (mut looks, mut next_look) = (0u32, began + LOOK_EVERY);
        // SAFETY: the caller vouches for the stream, and its context is current.
        while !is_ready("wait for the GPU", unsafe { (driver.cuStreamQuery)(stream) }).map_err(text)? {
            looks = looks.saturating_add(1);
            if looks < SPINS {
                hint::spin_loop();
                continue;
            }
            let now = Instant::now();
            let mut progressed = false;
            if now >= next_look {
                next_look = now + LOOK_EVERY;
                progressed = self.progress.look().map_err(text)?;
            }
            let told = match &self.monitor {
                Some(monitor) => monitor.lost().is_some(),
                None => self.log.gave_up().is_some(),
            };
            let told = told || self.abort.is_set() || self.log.disagreement().is_some();
            match guard.look(now, told, progressed) {
                Verdict::GoOn => thread::yield_now(),
                Verdict::End => {
                    self.abort.set();
                    if let Some(external) = &mut external {
                        (external.end)();
                    }
                }
                Verdict::GiveUp => {
                    return Err(format!(
                        "this rank's GPU did not finish within {:.1} s, though told to stop",
                        began.elapsed().as_secs_f64()
                    ));
                }
            }
        }
        match (guard.ended, external) {
            (Some(Why::External), Some(ExternalWork { what, limit, .. })) => Err(format!(
                "{what} did not end within {:.1} s: a rank is stuck, or slower than the deadline",
                limit.as_secs_f64()
            )),
            (Some(Why::Stalled), _) => {
                Err(format!("this rank's GPU ended no operation for {:.1} s", stall.as_secs_f64()))
            }
            _ => Ok(()),
        }
    }

    /// Gives the group up because this rank cannot go on: the others would wait for what does not come. `what` says why.
    pub fn fail(&mut self, what: impl ToString) -> Error {
        let cause = match self.end() {
            // That comes first, and this may come of it.
            lost @ Cause::Lost(_) => lost,
            _ => Cause::Gpu(what.to_string()),
        };
        self.poison(Failure { rank: self.rank, wait: None, cause })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STALL: Duration = Duration::from_secs(30);

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_queue_of_work_is_waited_for_as_long_as_operations_end() {
        let began = Instant::now();
        let mut guard = WaitGuard::new(began, STALL, None);
        for second in 1..1000 {
            let progressed = second % 29 == 0;
            assert_eq!(guard.look(began + seconds(second), false, progressed), Verdict::GoOn, "{second} s");
        }
    }

    #[test]
    fn what_does_not_go_on_is_ended_once_and_given_up_if_that_does_not_help() {
        let began = Instant::now();
        let mut guard = WaitGuard::new(began, STALL, None);
        assert_eq!(guard.look(began + STALL, false, false), Verdict::GoOn);
        let end = began + STALL + seconds(1);
        assert_eq!(guard.look(end, false, false), Verdict::End);
        assert_eq!(guard.ended, Some(Why::Stalled));
        assert_eq!(guard.look(end + GRACE, true, false), Verdict::GoOn);
        assert_eq!(guard.look(end + GRACE + seconds(1), true, false), Verdict::GiveUp);
    }

    #[test]
    fn a_rank_that_is_told_ends_its_waits_at_once_and_lets_its_queue_run_out() {
        let began = Instant::now();
        let mut guard = WaitGuard::new(began, STALL, None);
        assert_eq!(guard.look(began + seconds(1), true, false), Verdict::End);
        assert_eq!(guard.ended, Some(Why::Told));
        for second in 2..100 {
            assert_eq!(guard.look(began + seconds(second), true, true), Verdict::GoOn);
        }
        assert_eq!(guard.look(began + seconds(100) + GRACE, true, false), Verdict::GiveUp);
    }

    #[test]
    fn external_work_has_a_limit_whatever_else_goes_on() {
        let began = Instant::now();
        let limit = seconds(2);
        let mut guard = WaitGuard::new(began, STALL, Some(limit));
        assert_eq!(guard.look(began + limit, false, true), Verdict::GoOn);
        assert_eq!(guard.look(began + limit + seconds(1), false, true), Verdict::End);
        assert_eq!(guard.ended, Some(Why::External));
        // One that may take longer than an operation of this project's is left its time.
        let mut guard = WaitGuard::new(began, STALL, Some(2 * STALL));
        assert_eq!(guard.look(began + STALL + seconds(1), false, false), Verdict::GoOn);
        assert_eq!(guard.look(began + seconds(32), true, false), Verdict::End);
        assert_eq!(guard.ended, Some(Why::Told));
    }
}
