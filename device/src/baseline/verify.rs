//! Conversions of consecutive `f32` bit patterns, as the kernels do them on this GPU.

use crate::{convert, params::Conversions, simt};

/// E4M3: one byte for each pattern.
///
/// # Safety
/// Called once by every thread of a grid, with parameters as their documentation says.
#[inline(always)]
pub unsafe fn encode_e4m3(params: &Conversions) {
    for_each_four(params, |index, [a, b, c, d]| {
        let codes = convert::e4m3_pair(a, b) as u32 | (convert::e4m3_pair(c, d) as u32) << 16;
        // SAFETY: a byte for each pattern; each four are one thread's.
        unsafe { simt::store_value(params.out.offset(index as u64), codes) };
    });
}

/// E2M1: half a byte for each pattern, the first in the low half.
///
/// # Safety
/// As [`encode_e4m3`].
#[inline(always)]
pub unsafe fn encode_e2m1(params: &Conversions) {
    for_each_four(params, |index, [a, b, c, d]| {
        let codes = convert::e2m1_pair(a, b) as u16 | (convert::e2m1_pair(c, d) as u16) << 8;
        // SAFETY: half a byte for each pattern; each four are one thread's.
        unsafe { simt::store_value(params.out.offset(index as u64 / 2), codes) };
    });
}

#[inline(always)]
fn for_each_four(params: &Conversions, store: impl Fn(u32, [f32; 4])) {
    simt::wait_for_prerequisites();
    simt::launch_dependents();
    let step = simt::blocks() * simt::threads();
    let mut four = simt::block() * simt::threads() + simt::thread();
    while four < params.count / 4 {
        let index = four * 4;
        let value = |lane| f32::from_bits(params.first.wrapping_add(index + lane));
        store(index, [value(0), value(1), value(2), value(3)]);
        four += step;
    }
}
