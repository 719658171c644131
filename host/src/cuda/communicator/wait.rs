//! How a host waits for its GPU.
//!
//! The deadline is for a wait for another rank, and kernels keep it themselves. A host that waits for its stream may have
//! queued any amount of work, so it does not count: it waits as long as operations come to their end, and ends what does
//! not go on. What waits for other ranks with no deadline of its own, [`Foreign`] work, has a limit.

use std::{
    hint, thread,
    time::{Duration, Instant},
};

use fused_collective_core::launch::{Address, RankState};

use super::{
    super::{
        Error,
        driver::{Functions, Handle, check, failed, is_ready, load},
        memory::PinnedMemory,
    },
    Communicator,
};
use crate::failure::{Cause, Failure};
use cust::stream::{Stream, StreamFlags};

/// How long a GPU may take to end its work once all waits in it have been ended, and beyond its kernels' deadlines, of
/// which several may each have lasted almost as long.
const PATIENCE: Duration = Duration::from_secs(10);
/// Looks at the stream before the host's processor is offered to others.
const SPINS: u32 = 10_000;
/// How long a wait lasts before the GPU's progress is looked at, and the time between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Work on a stream that waits for other ranks with no deadline of its own.
pub(crate) struct Foreign<'a> {
    /// What it is, for a reader.
    pub(crate) what: String,
    /// How long it may take.
    pub(crate) limit: Duration,
    /// Ends it, from any moment on. Returns at once.
    pub(crate) end: &'a mut dyn FnMut(),
}

/// What becomes of a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    GoOn,
    /// All waits of this rank should be ended: once.
    End,
    /// They were, and the GPU does not come to an end.
    GiveUp,
}

/// Why waits were ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    /// Another rank, or another thread, has seen to it.
    Told,
    /// Foreign work took longer than its limit.
    Foreign,
    /// No operation came to its end.
    Stalled,
}

/// A wait as it goes on.
#[derive(Debug)]
struct Vigil {
    began: Instant,
    /// How long it goes on without progress.
    stall: Duration,
    /// How long it goes on with foreign work, whose progress cannot be seen.
    foreign: Option<Duration>,
    progressed: Instant,
    ended: Option<Why>,
}

impl Vigil {
    fn new(began: Instant, stall: Duration, foreign: Option<Duration>) -> Vigil {
        Vigil { began, stall, foreign, progressed: began, ended: None }
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
            return if still > PATIENCE { Verdict::GiveUp } else { Verdict::GoOn };
        }
        let why = match self.foreign {
            _ if told => Why::Told,
            Some(limit) if waited > limit => Why::Foreign,
            None if still > self.stall => Why::Stalled,
            _ => return Verdict::GoOn,
        };
        self.ended = Some(why);
        self.progressed = now;
        Verdict::End
    }
}

/// Sees from outside whether a rank's kernels come to their ends: they advance the epochs of its [`RankState`], which
/// are copied to the host beside them. Nothing waits for the copy.
#[derive(Debug)]
pub(super) struct Progress {
    driver: &'static Functions,
    stream: Stream,
    state: Address,
    copied: PinnedMemory,
    /// What was there at the last look.
    last: Vec<u8>,
    /// A copy is under way.
    asked: bool,
}

impl Progress {
    /// Of the kernels that work with `state`.
    ///
    /// # Errors
    /// The driver's.
    pub(super) fn new(state: Address) -> Result<Progress, Error> {
        let stream = Stream::new(StreamFlags::NON_BLOCKING, None).map_err(failed("make a stream"))?;
        let copied = PinnedMemory::new(size_of::<RankState>())?;
        Ok(Progress { driver: load()?, stream, state, copied, last: Vec::new(), asked: false })
    }

    fn handle(&self) -> Handle {
        self.stream.as_inner().cast()
    }

    fn has_come(&self) -> Result<bool, Error> {
        // SAFETY: a stream of this rank's context.
        is_ready("look at the GPU's progress", unsafe { (self.driver.cuStreamQuery)(self.handle()) })
    }

    /// Whether a kernel has gone on between the last two copies that have come, and asks for the next.
    ///
    /// # Errors
    /// The driver's.
    fn look(&mut self) -> Result<bool, Error> {
        let mut progressed = false;
        if self.asked {
            if !self.has_come()? {
                return Ok(false);
            }
            self.asked = false;
            // SAFETY: the copy has come, and the next was not asked for.
            let bytes = unsafe { self.copied.bytes() };
            progressed = self.last != bytes;
            if progressed {
                self.last = bytes.to_vec();
            }
        }
        // SAFETY: both have so many bytes and live until the copy has ended: `drop` sees to it.
        let code = unsafe {
            (self.driver.cuMemcpyDtoHAsync_v2)(
                self.copied.address(),
                self.state.0,
                self.copied.len(),
                self.handle(),
            )
        };
        check("look at the GPU's progress", code)?;
        self.asked = true;
        Ok(progressed)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        // A GPU that does not even copy may still do so later: the memory is left to it.
        if self.asked && !self.has_come().unwrap_or(false) {
            self.copied.leak();
        }
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
        // SAFETY: as this function's.
        unsafe { self.synchronize_with(stream, None) }
    }

    /// As [`synchronize`](Self::synchronize), with `foreign` work on the stream.
    ///
    /// # Errors
    /// As [`synchronize`](Self::synchronize).
    ///
    /// # Safety
    /// As [`synchronize`](Self::synchronize).
    pub(crate) unsafe fn synchronize_with(
        &mut self,
        stream: Handle,
        foreign: Option<Foreign<'_>>,
    ) -> Result<(), Error> {
        // SAFETY: as this function's.
        match unsafe { self.wait(stream, foreign) } {
            Ok(()) => self.check(),
            Err(what) => Err(self.fail(what)),
        }
    }

    /// Waits for `stream`. An error says, for a reader, why its work is not done although no rank is to blame.
    ///
    /// # Safety
    /// As [`synchronize`](Self::synchronize).
    unsafe fn wait(&mut self, stream: Handle, mut foreign: Option<Foreign<'_>>) -> Result<(), String> {
        let text = |error: Error| error.to_string();
        let driver = load().map_err(text)?;
        let began = Instant::now();
        let stall = self.deadline.saturating_mul(2).saturating_add(PATIENCE);
        let mut vigil = Vigil::new(began, stall, foreign.as_ref().map(|foreign| foreign.limit));
        let (mut looks, mut next_look) = (0u32, began + LOOK_EVERY);
        // SAFETY: as this function's.
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
            let told = self.control.lost_rank().is_some()
                || self.switch.is_thrown()
                || self.board.disagreement().is_some();
            match vigil.look(now, told, progressed) {
                Verdict::GoOn => thread::yield_now(),
                Verdict::End => {
                    self.switch.throw();
                    if let Some(foreign) = &mut foreign {
                        (foreign.end)();
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
        match (vigil.ended, foreign) {
            (Some(Why::Foreign), Some(Foreign { what, limit, .. })) => Err(format!(
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
    pub(crate) fn fail(&mut self, what: impl ToString) -> Error {
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
        let mut vigil = Vigil::new(began, STALL, None);
        for second in 1..1000 {
            let progressed = second % 29 == 0;
            assert_eq!(vigil.look(began + seconds(second), false, progressed), Verdict::GoOn, "{second} s");
        }
    }

    #[test]
    fn what_does_not_go_on_is_ended_once_and_given_up_if_that_does_not_help() {
        let began = Instant::now();
        let mut vigil = Vigil::new(began, STALL, None);
        assert_eq!(vigil.look(began + STALL, false, false), Verdict::GoOn);
        let end = began + STALL + seconds(1);
        assert_eq!(vigil.look(end, false, false), Verdict::End);
        assert_eq!(vigil.ended, Some(Why::Stalled));
        assert_eq!(vigil.look(end + PATIENCE, true, false), Verdict::GoOn);
        assert_eq!(vigil.look(end + PATIENCE + seconds(1), true, false), Verdict::GiveUp);
    }

    #[test]
    fn a_rank_that_is_told_ends_its_waits_at_once_and_lets_its_queue_run_out() {
        let began = Instant::now();
        let mut vigil = Vigil::new(began, STALL, None);
        assert_eq!(vigil.look(began + seconds(1), true, false), Verdict::End);
        assert_eq!(vigil.ended, Some(Why::Told));
        for second in 2..100 {
            assert_eq!(vigil.look(began + seconds(second), true, true), Verdict::GoOn);
        }
        assert_eq!(vigil.look(began + seconds(100) + PATIENCE, true, false), Verdict::GiveUp);
    }

    #[test]
    fn foreign_work_has_a_limit_whatever_else_goes_on() {
        let began = Instant::now();
        let limit = seconds(2);
        let mut vigil = Vigil::new(began, STALL, Some(limit));
        assert_eq!(vigil.look(began + limit, false, true), Verdict::GoOn);
        assert_eq!(vigil.look(began + limit + seconds(1), false, true), Verdict::End);
        assert_eq!(vigil.ended, Some(Why::Foreign));
        // One that may take longer than an operation of this project's is left its time.
        let mut vigil = Vigil::new(began, STALL, Some(2 * STALL));
        assert_eq!(vigil.look(began + STALL + seconds(1), false, false), Verdict::GoOn);
        assert_eq!(vigil.look(began + seconds(32), true, false), Verdict::End);
        assert_eq!(vigil.ended, Some(Why::Told));
    }
}
