//! Memory: every access to it is atomic, as kernels of other ranks run at the same time.

use std::{
    array,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
    thread::yield_now,
};

use fused_collective_core::{lamport, pack::Pack};

use super::grid::pass;
use crate::{launch::Address, simt};

/// The four words at `address`, for atomic access.
///
/// # Safety
/// `address` is valid for 16 bytes and aligned to 16, for as long as the words are used.
unsafe fn words<'a>(address: Address) -> &'a [AtomicU32; 4] {
    debug_assert!(address.0.is_multiple_of(16));
    // SAFETY: as this function's; `AtomicU32` has the layout of `u32`.
    unsafe { &*std::ptr::with_exposed_provenance::<[AtomicU32; 4]>(address.0 as usize) }
}

/// The word at `address`, for atomic access.
///
/// # Safety
/// `address` is valid for four bytes and aligned to 4, for as long as the word is used.
unsafe fn word<'a>(address: Address) -> &'a AtomicU32 {
    // SAFETY: as this function's.
    unsafe { &*std::ptr::with_exposed_provenance::<AtomicU32>(address.0 as usize) }
}

/// # Safety
/// As the public function of this name.
pub(in crate::simt) unsafe fn prefetch(_address: Address) {}

/// # Safety
/// As the public function of this name.
pub(in crate::simt) unsafe fn load_if(condition: bool, address: Address) -> Pack {
    // SAFETY: as this function's.
    if condition { unsafe { load(address) } } else { Pack::default() }
}

/// # Safety
/// As the public function of this name.
pub(in crate::simt) unsafe fn load_u32_if(condition: bool, address: Address, otherwise: u32) -> u32 {
    // SAFETY: as this function's.
    if condition { unsafe { simt::load_value(address) } } else { otherwise }
}

/// # Safety
/// As the public function of this name.
pub(in crate::simt) unsafe fn load_u16_if(condition: bool, address: Address, otherwise: u32) -> u32 {
    // SAFETY: as this function's.
    if condition { u32::from(unsafe { simt::load_value::<u16>(address) }) } else { otherwise }
}

/// # Safety
/// As the public function of this name.
pub(in crate::simt) unsafe fn load_constant(address: Address) -> Pack {
    // SAFETY: as this function's.
    unsafe { load(address) }
}

/// # Safety
/// As the public function of this name.
pub(in crate::simt) unsafe fn load_constant_u32(address: Address) -> u32 {
    // SAFETY: as this function's.
    unsafe { simt::load_value(address) }
}

/// # Safety
/// As the public function of this name.
pub(in crate::simt) unsafe fn load(address: Address) -> Pack {
    debug_assert!(address.0.is_multiple_of(16));
    // SAFETY: as this function's.
    unsafe { simt::load_value(address) }
}

/// # Safety
/// As the public function of this name.
pub(in crate::simt) unsafe fn store(address: Address, pack: Pack) {
    pass();
    debug_assert!(address.0.is_multiple_of(16));
    // SAFETY: as this function's.
    unsafe { simt::store_value(address, pack) }
}

/// # Safety
/// As the public function of this name.
pub(in crate::simt) unsafe fn push(address: Address, pack: Pack) {
    pass();
    // SAFETY: as this function's.
    let words = unsafe { words(address) };
    for (word, value) in words.iter().zip(pack.0) {
        word.store(value, Ordering::Release);
    }
}

/// # Safety
/// As the public function of this name.
pub(in crate::simt) unsafe fn poll(address: Address) -> Pack {
    pass();
    // SAFETY: as this function's.
    let words = unsafe { words(address) };
    let pack = Pack(array::from_fn(|index| words[index].load(Ordering::Acquire)));
    if !pack.is_complete() {
        // There are more threads than processors: let those run that this one waits for.
        yield_now();
    }
    pack
}

/// # Safety
/// As [`push`], for eight bytes.
pub(in crate::simt) unsafe fn push_pair(address: Address, pair: [u32; 2]) {
    // SAFETY: as this function's.
    unsafe {
        push_word(address, pair[0]);
        push_word(address.offset(4), pair[1]);
    }
}

/// # Safety
/// As [`poll`], for eight bytes.
pub(in crate::simt) unsafe fn poll_pair(address: Address) -> [u32; 2] {
    // SAFETY: as this function's.
    unsafe { [poll_word(address), poll_word(address.offset(4))] }
}

/// # Safety
/// As [`push`], for four bytes.
pub(in crate::simt) unsafe fn push_word(address: Address, value: u32) {
    pass();
    // SAFETY: as this function's.
    unsafe { word(address) }.store(value, Ordering::Release);
}

/// # Safety
/// As [`poll`], for four bytes.
pub(in crate::simt) unsafe fn poll_word(address: Address) -> u32 {
    pass();
    // SAFETY: as this function's.
    let value = unsafe { word(address) }.load(Ordering::Acquire);
    if !lamport::is_complete(value) {
        // As in `poll`.
        yield_now();
    }
    value
}

/// # Safety
/// As the public function of this name.
pub(in crate::simt) unsafe fn replace_zero(address: Address, value: u32) -> bool {
    // SAFETY: as this function's.
    unsafe { word(address) }.compare_exchange(0, value, Ordering::Relaxed, Ordering::Relaxed).is_ok()
}

/// # Safety
/// As the public function of this name.
pub(in crate::simt) unsafe fn load_relaxed(address: Address) -> u32 {
    // SAFETY: as this function's.
    unsafe { word(address) }.load(Ordering::Relaxed)
}

/// The double word at `address`, for atomic access.
///
/// # Safety
/// `address` is valid for eight bytes and aligned to 8, for as long as the double word is used.
unsafe fn double_word<'a>(address: Address) -> &'a AtomicU64 {
    // SAFETY: as this function's.
    unsafe { &*std::ptr::with_exposed_provenance::<AtomicU64>(address.0 as usize) }
}

/// # Safety
/// As the public function of this name.
pub(in crate::simt) unsafe fn load_relaxed_u64(address: Address) -> u64 {
    // SAFETY: as this function's.
    unsafe { double_word(address) }.load(Ordering::Relaxed)
}

/// # Safety
/// As the public function of this name.
pub(in crate::simt) unsafe fn store_release(address: Address, value: u32) {
    // SAFETY: as this function's.
    unsafe { word(address) }.store(value, Ordering::Release);
}
