//! Work of others on a stream of the group's.

use std::time::Duration;

/// Work on a stream that waits for other ranks with no deadline of its own.
pub struct ExternalWork<'a> {
    /// Its description, for a reader.
    pub what: String,
    /// The most time that it may take.
    pub limit: Duration,
    /// Ends it, from any moment on. Returns at once.
    pub end: &'a mut dyn FnMut(),
}
