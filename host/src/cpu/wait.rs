//! Bounded waiting: spin, then yield, and never past a deadline.
//!
//! A wait ends when its data is there, when the deadline has passed, when a rank is known to be lost or has given up,
//! when ranks are found to make different calls, or when this rank is told to give up.

use std::{
    hint,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use crate::group::{
    Monitor,
    calls::CallLog,
    failure::{Awaited, Cause, Failure, What},
};

/// The reasons that end a rank's waits: deadline, losses, aborts, mismatched calls.
#[derive(Debug)]
pub struct WaitGuard {
    pub(crate) rank: u32,
    pub(crate) deadline: Duration,
    /// Notices lost ranks, where something does.
    pub(crate) monitor: Option<Arc<dyn Monitor>>,
    /// The calls that ranks tell each other of, where they can.
    pub(crate) log: Option<CallLog>,
}

impl WaitGuard {
    /// Why not to wait any longer, if there is a reason other than the deadline.
    fn look(&self) -> Option<Cause> {
        if let Some(log) = &self.log {
            if log.is_aborted() {
                return Some(Cause::Aborted);
            }
            // Ahead of who has given up because of it: every rank should name the calls.
            if let Some(disagreement) = log.disagreement() {
                return Some(Cause::OutOfStep(disagreement));
            }
            if let Some(peer) = log.gave_up() {
                return Some(Cause::GaveUp(peer));
            }
        }
        self.monitor.as_ref()?.lost().map(Cause::Lost)
    }
}

/// Pauses before the processor is offered to another process: a peer on a core of its own answers in less.
const SPINS: u32 = 2_000;
/// Pauses between looks at the clock and at the others.
const LOOK_EVERY: u32 = 64;

/// One wait of one rank for another.
pub struct Wait<'a> {
    guard: &'a WaitGuard,
    from: u32,
    what: What,
    operation: u64,
    pauses: u32,
    began: Option<Instant>,
}

impl<'a> Wait<'a> {
    /// Begins to wait for `what` from rank `from`, in `operation` of the group.
    pub fn new(guard: &'a WaitGuard, from: u32, what: What, operation: u64) -> Self {
        Wait { guard, from, what, operation, pauses: 0, began: None }
    }

    /// Lets some time pass; an error once there is a reason to wait no longer.
    #[cold]
    pub fn pause(&mut self) -> Result<(), Box<Failure>> {
        self.pauses = self.pauses.wrapping_add(1);
        if self.pauses < SPINS {
            hint::spin_loop();
            return Ok(());
        }
        if self.pauses.is_multiple_of(LOOK_EVERY) {
            let began = *self.began.get_or_insert_with(Instant::now);
            if let Some(cause) = self.guard.look() {
                return Err(self.failure(cause));
            }
            if began.elapsed() >= self.guard.deadline {
                return Err(self.failure(Cause::Deadline(self.guard.deadline)));
            }
        }
        thread::yield_now();
        Ok(())
    }

    fn failure(&self, cause: Cause) -> Box<Failure> {
        let call = self.guard.log.as_ref().and_then(CallLog::call);
        let wait = Awaited { from: self.from, what: self.what, operation: self.operation, call };
        Box::new(Failure { rank: self.guard.rank, wait: Some(wait), cause })
    }
}
