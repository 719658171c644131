//! A check that a dependent kernel sees finished outputs.

use fused_collective_core::pack::Pack;
use fused_collective_device::simt;

use crate::launch::Audit;

/// The kernel: any grid. It reads what the kernel before wrote, holds it to what that should be, and writes poison over
/// it, so that the next one that writes there is held to its own writing and not to an earlier one's.
///
/// # Safety
/// Called once by every thread of a grid, with parameters as their documentation says.
#[inline(always)]
pub unsafe fn audit(params: &Audit) {
    simt::wait_for_prerequisites();
    simt::launch_dependents();
    let step = simt::blocks() as u64 * simt::threads() as u64;
    let mut pack = simt::block() as u64 * simt::threads() as u64 + simt::thread() as u64;
    while pack < params.packs {
        let at = pack * Pack::BYTES;
        // SAFETY: inside the memory to compare; each pack is one thread's.
        unsafe {
            let Pack([a, b, c, d]) = simt::load(params.actual.offset(at));
            let Pack([e, f, g, h]) = simt::load(params.expected.offset(at));
            if (a ^ e) | (b ^ f) | (c ^ g) | (d ^ h) != 0 {
                simt::replace_zero(params.found, (pack as u32).wrapping_add(1));
            }
            simt::store(params.actual.offset(at), Pack([params.poison; 4]));
        }
        pack += step;
    }
}
