//! Bounded waiting: spin, then yield, and never past a deadline.
//!
//! A wait ends when its data is there, when the deadline has passed, when a rank is known to be lost or has given up,
//! when ranks are found to make different calls, or when this rank is told to give up.

use std::{
    fmt, hint,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use crate::{
    board::Board,
    failure::{Awaited, Cause, Failure, What},
    rendezvous::Lost,
};

/// Tells whether a rank of the group is known to be gone, and how it was lost.
#[derive(Clone)]
pub struct Watch(Arc<dyn Fn() -> Option<Lost> + Send + Sync>);

impl Watch {
    /// A watch that asks `lost`. It is called from inside waits, so it should cost no more than an atomic load.
    pub fn new(lost: impl Fn() -> Option<Lost> + Send + Sync + 'static) -> Self {
        Watch(Arc::new(lost))
    }

    /// A watch that never tells of a loss: only deadlines end waits.
    pub fn nobody() -> Self {
        Watch::new(|| None)
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watch")
    }
}

/// What ends a rank's waits.
#[derive(Debug)]
pub(crate) struct Vigil {
    pub(crate) rank: u32,
    pub(crate) deadline: Duration,
    pub(crate) watch: Watch,
    /// What the ranks tell each other, where they can.
    pub(crate) board: Option<Board>,
}

impl Vigil {
    /// Why not to wait any longer, if there is a reason other than the deadline.
    fn look(&self) -> Option<Cause> {
        if let Some(board) = &self.board {
            if board.is_aborted() {
                return Some(Cause::Aborted);
            }
            // Ahead of who has given up because of it: every rank should name the calls.
            if let Some(disagreement) = board.disagreement() {
                return Some(Cause::OutOfStep(disagreement));
            }
            if let Some(peer) = board.gave_up() {
                return Some(Cause::GaveUp(peer));
            }
        }
        (self.watch.0)().map(Cause::Lost)
    }
}

/// Pauses before the processor is offered to another process: a peer on a core of its own answers in less.
const SPINS: u32 = 2_000;
/// Pauses between looks at the clock and at the others.
const LOOK_EVERY: u32 = 64;

/// One wait of one rank for another.
pub(crate) struct Wait<'a> {
    vigil: &'a Vigil,
    from: u32,
    what: What,
    operation: u64,
    pauses: u32,
    began: Option<Instant>,
}

impl<'a> Wait<'a> {
    pub(crate) fn new(vigil: &'a Vigil, from: u32, what: What, operation: u64) -> Self {
        Wait { vigil, from, what, operation, pauses: 0, began: None }
    }

    /// Lets some time pass; an error once there is a reason to wait no longer.
    #[cold]
    pub(crate) fn pause(&mut self) -> Result<(), Box<Failure>> {
        self.pauses = self.pauses.wrapping_add(1);
        if self.pauses < SPINS {
            hint::spin_loop();
            return Ok(());
        }
        if self.pauses.is_multiple_of(LOOK_EVERY) {
            let began = *self.began.get_or_insert_with(Instant::now);
            if let Some(cause) = self.vigil.look() {
                return Err(self.failure(cause));
            }
            if began.elapsed() >= self.vigil.deadline {
                return Err(self.failure(Cause::Deadline(self.vigil.deadline)));
            }
        }
        thread::yield_now();
        Ok(())
    }

    fn failure(&self, cause: Cause) -> Box<Failure> {
        let call = self.vigil.board.as_ref().and_then(Board::call);
        let wait = Awaited { from: self.from, what: self.what, operation: self.operation, call };
        Box::new(Failure { rank: self.vigil.rank, wait: Some(wait), cause })
    }
}
