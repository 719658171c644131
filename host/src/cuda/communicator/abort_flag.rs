//! Ending a rank's waits from other threads.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{
        AtomicBool,
        Ordering::{Acquire, Relaxed, Release},
    },
};

use fused_collective_core::launch::Status;

use super::super::memory::MappedStatus;

/// Ends the waits of a rank's kernels, as long as its communicator lives.
#[derive(Debug)]
pub(super) struct AbortFlag {
    /// Taken out when the communicator goes: the memory goes with it.
    status: Mutex<Option<Arc<MappedStatus>>>,
    set: AtomicBool,
}

impl AbortFlag {
    pub(super) fn new(status: &Arc<MappedStatus>) -> Arc<AbortFlag> {
        Arc::new(AbortFlag { status: Mutex::new(Some(Arc::clone(status))), set: AtomicBool::new(false) })
    }

    /// Ends all waits of this rank's kernels, running and to come.
    pub(super) fn set(&self) {
        self.set.store(true, Release);
        // The memory is not freed while the lock is held, nor this the last to use it when it is let go.
        if let Some(status) = &*self.status.lock().unwrap_or_else(PoisonError::into_inner) {
            status.word(Status::ABORT).store(1, Relaxed);
        }
    }

    pub(super) fn is_set(&self) -> bool {
        self.set.load(Acquire)
    }

    /// Lets go of the memory.
    pub(super) fn detach(&self) {
        drop(self.status.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}
