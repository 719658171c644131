//! A stream of the communicator's own, beside the caller's.

use std::{
    ptr::null_mut,
    thread,
    time::{Duration, Instant},
};

use super::super::{
    device::Context,
    driver::{Handle, check, is_ready},
};
use crate::error::Error;

/// `CU_STREAM_NON_BLOCKING`.
const NON_BLOCKING: u32 = 1;

// SAFETY: a `CUstream` belongs to its context, and the driver takes it from any thread.
unsafe impl Send for OwnStream {}

/// A stream that waits for no other, destroyed with this.
#[derive(Debug)]
pub(super) struct OwnStream {
    context: Context,
    handle: Handle,
}

impl OwnStream {
    /// Makes the stream.
    ///
    /// # Errors
    /// The driver's.
    pub(super) fn new(context: &Context) -> Result<OwnStream, Error> {
        let _entered = context.enter()?;
        let mut handle = null_mut();
        // SAFETY: `handle` has room for the answer.
        check("make a stream", unsafe { (context.driver().cuStreamCreate)(&mut handle, NON_BLOCKING) })?;
        Ok(OwnStream { context: context.clone(), handle })
    }

    pub(super) fn context(&self) -> &Context {
        &self.context
    }

    pub(super) fn handle(&self) -> Handle {
        self.handle
    }

    /// Asks whether all that is on the stream has ended. The context is current. `doing` completes "could not".
    ///
    /// # Errors
    /// The driver's.
    pub(super) fn has_ended(&self, doing: &'static str) -> Result<bool, Error> {
        // SAFETY: a stream of the current context.
        let code = unsafe { (self.context.driver().cuStreamQuery)(self.handle) };
        is_ready(doing, code)
    }

    /// Waits until all that is on the stream has ended, for `limit` at most; `false` if it has not. The context is current.
    ///
    /// # Errors
    /// The driver's.
    pub(super) fn ends_within(&self, doing: &'static str, limit: Duration) -> Result<bool, Error> {
        let began = Instant::now();
        while !self.has_ended(doing)? {
            if began.elapsed() > limit {
                return Ok(false);
            }
            thread::yield_now();
        }
        Ok(true)
    }
}

impl Drop for OwnStream {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter() {
            // SAFETY: made in `new`, and destroyed once; the driver lets what is on it end.
            unsafe { (self.context.driver().cuStreamDestroy_v2)(self.handle) };
        }
    }
}
