//! The handle that ends a group's operations from any thread.

use std::{fmt, sync::Arc};

/// Ends a rank's operations, and its group's, from any thread. It may outlive the communicator.
#[derive(Clone)]
pub struct Aborter(Arc<dyn Fn() + Send + Sync>);

impl Aborter {
    pub(crate) fn new(abort: impl Fn() + Send + Sync + 'static) -> Aborter {
        Aborter(Arc::new(abort))
    }

    /// Ends the operations under way and to come, on all ranks, and the communicators' use. Returns at once; the second
    /// call does nothing.
    pub fn abort(&self) {
        (self.0)();
    }
}

impl fmt::Debug for Aborter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Aborter")
    }
}
