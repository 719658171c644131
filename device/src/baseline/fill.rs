//! One word, many times.

use fused_collective_core::pack::Pack;

use crate::{params::Fill, simt};

/// The kernel: any grid.
///
/// # Safety
/// Called once by every thread of a grid, with parameters as their documentation says.
#[inline(always)]
pub unsafe fn fill(params: &Fill) {
    simt::wait_for_prerequisites();
    simt::launch_dependents();
    let step = simt::blocks() as u64 * simt::threads() as u64;
    let mut pack = simt::block() as u64 * simt::threads() as u64 + simt::thread() as u64;
    while pack < params.packs {
        // SAFETY: inside the memory to fill; each pack is one thread's.
        unsafe { simt::store(params.out.offset(pack * Pack::BYTES), Pack([params.word; 4])) };
        pack += step;
    }
}
