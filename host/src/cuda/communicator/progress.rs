//! The progress of a rank's kernels, seen from outside.

use fused_collective_core::launch::{Address, RankState};

use super::{
    super::{device::Context, driver::check, memory::PinnedMemory},
    stream::OwnStream,
};
use crate::error::Error;

const LOOKING: &str = "look at the GPU's progress";

/// Sees from outside whether a rank's kernels come to their ends: they advance the epochs of its [`RankState`], which
/// are copied to the host beside them. Nothing waits for the copy.
#[derive(Debug)]
pub(super) struct Progress {
    stream: OwnStream,
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
        let stream = OwnStream::new(context)?;
        Ok(Progress { stream, state, copied, last: Vec::new(), asked: false })
    }

    /// Tells whether a kernel has gone on between the last two copies, and asks for the next. The context is current.
    ///
    /// # Errors
    /// The driver's.
    pub(super) fn look(&mut self) -> Result<bool, Error> {
        let mut progressed = false;
        if self.asked {
            if !self.stream.has_ended(LOOKING)? {
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
            (self.stream.context().driver().cuMemcpyDtoHAsync_v2)(
                self.copied.address(),
                self.state.0,
                self.copied.length(),
                self.stream.handle(),
            )
        };
        check(LOOKING, code)?;
        self.asked = true;
        Ok(progressed)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        let Ok(_entered) = self.stream.context().clone().enter() else {
            self.copied.leak();
            return;
        };
        // A GPU that does not even copy may still do so later: the memory is left to it.
        if self.asked && !self.stream.has_ended(LOOKING).unwrap_or(false) {
            self.copied.leak();
        }
    }
}
