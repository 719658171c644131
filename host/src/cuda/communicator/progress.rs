//! The progress of a rank's kernels, seen from outside.

use std::ptr::null_mut;

use fused_collective_core::launch::{Address, RankState};

use super::super::{
    device::Context,
    driver::{Handle, check, is_ready},
    memory::PinnedMemory,
};
use crate::error::Error;

/// `CU_STREAM_NON_BLOCKING`.
const NON_BLOCKING: u32 = 1;

// SAFETY: a `CUstream` belongs to its context, and the driver takes it from any thread.
unsafe impl Send for Progress {}

/// Sees from outside whether a rank's kernels come to their ends: they advance the epochs of its [`RankState`], which
/// are copied to the host beside them. Nothing waits for the copy.
#[derive(Debug)]
pub(super) struct Progress {
    context: Context,
    stream: Handle,
    state: Address,
    copied: PinnedMemory,
    /// The copy at the last look.
    last: Vec<u8>,
    /// A copy is under way.
    asked: bool,
}

impl Progress {
    /// Watches the kernels that work with `state`.
    ///
    /// # Errors
    /// The driver's.
    pub(super) fn new(context: &Context, state: Address) -> Result<Progress, Error> {
        let copied = PinnedMemory::new(context, size_of::<RankState>())?;
        let _entered = context.enter()?;
        let mut stream = null_mut();
        // SAFETY: `stream` has room for the answer.
        check("make a stream", unsafe { (context.driver().cuStreamCreate)(&mut stream, NON_BLOCKING) })?;
        Ok(Progress { context: context.clone(), stream, state, copied, last: Vec::new(), asked: false })
    }

    /// The context is current.
    fn has_come(&self) -> Result<bool, Error> {
        // SAFETY: a stream of the current context.
        let code = unsafe { (self.context.driver().cuStreamQuery)(self.stream) };
        is_ready("look at the GPU's progress", code)
    }

    /// Tells whether a kernel has gone on between the last two copies, and asks for the next.
    ///
    /// # Errors
    /// The driver's.
    pub(super) fn look(&mut self) -> Result<bool, Error> {
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
            (self.context.driver().cuMemcpyDtoHAsync_v2)(
                self.copied.address(),
                self.state.0,
                self.copied.length(),
                self.stream,
            )
        };
        check("look at the GPU's progress", code)?;
        self.asked = true;
        Ok(progressed)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        let Ok(_entered) = self.context.enter() else {
            self.copied.leak();
            return;
        };
        // A GPU that does not even copy may still do so later: the memory is left to it.
        if self.asked && !self.has_come().unwrap_or(false) {
            self.copied.leak();
        }
        // SAFETY: made in `new`, and destroyed once; the driver lets what is on it end.
        unsafe { (self.context.driver().cuStreamDestroy_v2)(self.stream) };
    }
}
