//! The digest of memory.

use fused_collective_core::pack::Pack;
use fused_collective_device::simt;

use crate::{digest::part, launch::Digest};

/// The kernel: any grid. Each thread adds up the [parts](crate::digest::part) of its packs, and stores the sum.
///
/// # Safety
/// Called once by every thread of a grid, with parameters as their documentation says.
#[inline(always)]
pub unsafe fn digest(params: &Digest) {
    simt::wait_for_prerequisites();
    simt::launch_dependents();
    let threads = simt::blocks() as u64 * simt::threads() as u64;
    let thread = simt::block() as u64 * simt::threads() as u64 + simt::thread() as u64;
    let (mut pack, mut sum) = (thread, 0u64);
    while pack < params.packs {
        // SAFETY: inside the memory, which nobody writes meanwhile.
        let Pack([a, b, c, d]) = unsafe { simt::load(params.bytes.offset(pack * Pack::BYTES)) };
        // Written out: an array that a loop goes through is memory.
        sum = sum.wrapping_add(part(pack * 2, a as u64 | (b as u64) << 32));
        sum = sum.wrapping_add(part(pack * 2 + 1, c as u64 | (d as u64) << 32));
        pack += threads;
    }
    // SAFETY: a number for each thread of the grid.
    unsafe { simt::store_value(params.sums.offset(thread * size_of::<u64>() as u64), sum) };
}
