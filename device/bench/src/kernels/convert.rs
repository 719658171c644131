//! Conversions of consecutive `f32` bit patterns, as the kernels do them on this GPU.

use core::array;

use fused_collective_device::{convert, simt};

use crate::launch::Conversions;

/// E4M3: one byte for each pattern.
///
/// # Safety
/// Called once by every thread of a grid, with parameters as their documentation says.
#[inline(always)]
pub unsafe fn encode_e4m3(params: &Conversions) {
    for_each(params, |index, [a, b, c, d]| {
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
    for_each(params, |index, values: [f32; 8]| {
        // SAFETY: half a byte for each pattern; each eight are one thread's.
        unsafe { simt::store_value(params.out.offset(index as u64 / 2), convert::e2m1_codes(&values, 1.0)) };
    });
}

#[inline(always)]
fn for_each<const N: usize>(params: &Conversions, store: impl Fn(u32, [f32; N])) {
    simt::wait_for_prerequisites();
    simt::launch_dependents();
    let step = simt::blocks() * simt::threads();
    let mut group = simt::block() * simt::threads() + simt::thread();
    while group < params.count / N as u32 {
        let index = group * N as u32;
        store(index, array::from_fn(|value| f32::from_bits(params.first.wrapping_add(index + value as u32))));
        group += step;
    }
}
