//! The primitive steps that an eager framework launches for RMSNorm and FP8 quantization.
//!
//! RMSNorm with a residual is `to_f32` of both, [`add`], [`round`] (the residual's output), [`to_f32`],
//! [`square`], [`mean_rsqrt`], [`scale_rows`], [`mul_weight`], [`round`]; FP8 is [`to_f32`], [`mul_inverse`], [`clamp`],
//! [`to_fp8`]. One after the other they compute what the epilogues do, bit for bit but for the order in which
//! squares are summed.
//!
//! Every step takes its rows from memory and returns them there. A block works on one row at a time, a thread on
//! four elements at a time.

use fused_collective_core::{
    dtype::Element,
    launch::Address,
    norm,
    pack::Pack,
    quant::{e4m3, scale},
};
use fused_collective_device::{convert, row::Team, simt};

use crate::launch::EagerStep;

/// Elements that a thread takes at a time.
const GROUP: u32 = 4;

/// `out = f32(a)`, `a` in the element type.
///
/// # Safety
/// Called once by every thread of a grid without clusters, with 16-byte aligned tensors of the shape and types that
/// this says.
#[inline(always)]
pub unsafe fn to_f32<E: Element>(step: &EagerStep) {
    // SAFETY: as this function's.
    for_each_group(step, |_, _, index| unsafe {
        store_f32(step.out, index, load_elements::<E>(step.a, index))
    });
}

/// `out = a + b`, all `f32`.
///
/// # Safety
/// As [`to_f32`].
#[inline(always)]
pub unsafe fn add(step: &EagerStep) {
    for_each_group(step, |_, _, index| {
        // SAFETY: as this function's.
        unsafe {
            let (a, b) = (load_f32(step.a, index), load_f32(step.b, index));
            store_f32(step.out, index, [a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]]);
        }
    });
}

/// `out = a` rounded to the element type, `a` in `f32`.
///
/// # Safety
/// As [`to_f32`].
#[inline(always)]
pub unsafe fn round<E: Element>(step: &EagerStep) {
    for_each_group(step, |_, _, index| {
        // SAFETY: as this function's.
        unsafe {
            let mut wide = E::WIDE_ZERO;
            for (wide, value) in wide.as_mut().iter_mut().zip(&load_f32(step.a, index)) {
                *wide = *value;
            }
            let Pack(words) = convert::narrow::<E>(wide);
            let out = step.out.offset(index as u64 * GROUP as u64 * size_of::<E>() as u64);
            match E::LANES {
                8 => simt::store_value(out, [words[0], words[1]]),
                _ => simt::store(out, Pack(words)),
            }
        }
    });
}

/// `out = a * a`, all `f32`.
///
/// # Safety
/// As [`to_f32`].
#[inline(always)]
pub unsafe fn square(step: &EagerStep) {
    // SAFETY: as this function's.
    for_each_group(step, |_, _, index| unsafe {
        store_f32(step.out, index, load_f32(step.a, index).map(|value| value * value));
    });
}

/// `out[token] = rsqrt(mean(a[token]) + value)`, all `f32`.
///
/// # Safety
/// As [`to_f32`].
#[inline(always)]
pub unsafe fn mean_rsqrt(step: &EagerStep) {
    let mut team = Team::join(true);
    team.clear::<true>(1);
    simt::wait_for_prerequisites();
    simt::launch_dependents();
    let groups = step.hidden / GROUP;
    let mut token = team.index;
    while token < step.tokens {
        let mut sum = 0.0;
        let mut group = team.thread;
        while group < groups {
            // SAFETY: as this function's.
            for value in unsafe { load_f32(step.a, token as usize * groups as usize + group as usize) } {
                sum += value;
            }
            group += team.threads;
        }
        team.add::<1, true>(0, [sum]);
        let mean = team.sum::<1, true>() / step.hidden as f32;
        if team.thread == 0 {
            // SAFETY: as this function's.
            unsafe {
                simt::store_value(
                    step.out.offset(token as u64 * 4),
                    norm::rsqrt(mean + step.value, simt::fma),
                )
            };
        }
        token += team.teams;
    }
}

/// `out = a * b[token]`, all `f32`.
///
/// # Safety
/// As [`to_f32`].
#[inline(always)]
pub unsafe fn scale_rows(step: &EagerStep) {
    for_each_group(step, |token, _, index| {
        // SAFETY: as this function's.
        unsafe {
            let factor: f32 = simt::load_value(step.b.offset(token as u64 * 4));
            store_f32(step.out, index, load_f32(step.a, index).map(|value| value * factor));
        }
    });
}

/// `out = a * (value + b[element])`, `b` in the element type, the others `f32`.
///
/// # Safety
/// As [`to_f32`].
#[inline(always)]
pub unsafe fn mul_weight<E: Element>(step: &EagerStep) {
    for_each_group(step, |_, group, index| {
        // SAFETY: as this function's.
        unsafe {
            let (a, gamma) = (load_f32(step.a, index), load_elements::<E>(step.b, group as usize));
            let weight = gamma.map(|gamma| step.value + gamma);
            store_f32(
                step.out,
                index,
                [a[0] * weight[0], a[1] * weight[1], a[2] * weight[2], a[3] * weight[3]],
            );
        }
    });
}

/// `out = a * (1 / b[0])`, all `f32`.
///
/// # Safety
/// As [`to_f32`].
#[inline(always)]
pub unsafe fn mul_inverse(step: &EagerStep) {
    for_each_group(step, |_, _, index| {
        // SAFETY: as this function's.
        unsafe {
            let factor = scale::fp8_multiplier(simt::load_value(step.b));
            store_f32(step.out, index, load_f32(step.a, index).map(|value| value * factor));
        }
    });
}

/// `out = a` limited to what E4M3 holds, all `f32`; NaN stays NaN.
///
/// # Safety
/// As [`to_f32`].
#[inline(always)]
pub unsafe fn clamp(step: &EagerStep) {
    // SAFETY: as this function's.
    for_each_group(step, |_, _, index| unsafe {
        store_f32(step.out, index, load_f32(step.a, index).map(|value| value.clamp(-e4m3::MAX, e4m3::MAX)));
    });
}

/// `out = a` as E4M3 codes, `a` in `f32`.
///
/// # Safety
/// As [`to_f32`].
#[inline(always)]
pub unsafe fn to_fp8(step: &EagerStep) {
    for_each_group(step, |_, _, index| {
        // SAFETY: as this function's.
        unsafe {
            let [a, b, c, d] = load_f32(step.a, index);
            let codes = convert::e4m3_pair(a, b) as u32 | (convert::e4m3_pair(c, d) as u32) << 16;
            simt::store_value(step.out.offset(index as u64 * GROUP as u64), codes);
        }
    });
}

/// Calls `each` with a row, a group of four in it, and the group's index in the whole tensor.
#[inline(always)]
fn for_each_group(step: &EagerStep, each: impl Fn(u32, u32, usize)) {
    simt::wait_for_prerequisites();
    simt::launch_dependents();
    let groups = step.hidden / GROUP;
    let mut token = simt::block();
    while token < step.tokens {
        let mut group = simt::thread();
        while group < groups {
            each(token, group, token as usize * groups as usize + group as usize);
            group += simt::threads();
        }
        token += simt::blocks();
    }
}

/// # Safety
/// Group `index` is inside the `f32` tensor, which nobody writes.
#[inline(always)]
unsafe fn load_f32(tensor: Address, index: usize) -> [f32; GROUP as usize] {
    // SAFETY: as this function's.
    unsafe { simt::load(tensor.offset(index as u64 * Pack::BYTES)) }.0.map(f32::from_bits)
}

/// # Safety
/// Group `index` is inside the `f32` tensor, and this thread's alone.
#[inline(always)]
unsafe fn store_f32(tensor: Address, index: usize, values: [f32; GROUP as usize]) {
    // SAFETY: as this function's.
    unsafe { simt::store(tensor.offset(index as u64 * Pack::BYTES), Pack(values.map(f32::to_bits))) }
}

/// # Safety
/// Group `index` is inside the tensor of elements, which nobody writes.
#[inline(always)]
unsafe fn load_elements<E: Element>(tensor: Address, index: usize) -> [f32; GROUP as usize] {
    let address = tensor.offset(index as u64 * GROUP as u64 * size_of::<E>() as u64);
    // SAFETY: as this function's. Groups of two-byte elements are aligned to 8.
    let pack = unsafe {
        match E::LANES {
            8 => {
                let [low, high] = simt::load_value::<[u32; 2]>(address);
                Pack([low, high, 0, 0])
            }
            _ => simt::load(address),
        }
    };
    let wide = convert::widen::<E>(pack);
    let mut values = [0.0; GROUP as usize];
    for (value, wide) in values.iter_mut().zip(wide.as_ref()) {
        *value = *wide;
    }
    values
}
