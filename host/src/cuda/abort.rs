//! Ending a rank's waits from other threads.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{
        AtomicBool,
        Ordering::{Acquire, Relaxed, Release},
    },
};

use fused_collective_core::launch::Status;

use super::memory::MappedStatus;
use crate::rendezvous::Control;

/// Ends the waits of a rank's kernels, as long as its communicator lives.
#[derive(Debug)]
pub(super) struct Switch {
    /// Taken out when the communicator goes: the memory goes with it.
    status: Mutex<Option<Arc<MappedStatus>>>,
    thrown: AtomicBool,
}

impl Switch {
    pub(super) fn new(status: &Arc<MappedStatus>) -> Arc<Switch> {
        Arc::new(Switch { status: Mutex::new(Some(Arc::clone(status))), thrown: AtomicBool::new(false) })
    }

    /// Ends all waits of this rank's kernels, running and to come.
    pub(super) fn throw(&self) {
        self.thrown.store(true, Release);
        // The memory is not freed while the lock is held, nor this the last to use it when it is let go.
        if let Some(status) = &*self.status.lock().unwrap_or_else(PoisonError::into_inner) {
            status.word(Status::ABORT).store(1, Relaxed);
        }
    }

    pub(super) fn is_thrown(&self) -> bool {
        self.thrown.load(Acquire)
    }

    /// Lets go of the memory.
    pub(super) fn part(&self) {
        drop(self.status.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

/// Makes a rank give its group up, from any thread: every wait of its kernels ends, and of the other ranks'.
#[derive(Clone, Debug)]
pub struct Aborter {
    pub(super) switch: Arc<Switch>,
    pub(super) control: Control,
}

impl Aborter {
    /// Ends the operations under way and to come, on all ranks, and the communicators' use. Does nothing the second
    /// time.
    pub fn abort(&self) {
        self.switch.throw();
        self.control.abort("the group was aborted on this rank");
    }
}
