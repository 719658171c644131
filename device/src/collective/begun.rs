//! The state of a rank in one operation, and what every collective prepares before it begins.

use fused_collective_core::{dtype::Element, lamport::SLOTS, pack::Pack};

use super::{ranks::first_slot, wait::Waiter};
use crate::{
    epilogue::Epilogue,
    launch::{Address, Group, MAX_BLOCKS, RankState, Shape},
    simt,
};
/// The state of the rank as this operation found it.
pub struct Begun<'a> {
    group: &'a Group,
    operation: u64,
    /// Bounds the waits of this thread.
    pub waiter: Waiter<'a>,
}

impl<'a> Begun<'a> {
    /// The address of this block's epoch.
    #[inline(always)]
    pub fn epoch(group: &Group) -> Address {
        group.state.offset(RankState::epoch(simt::block()))
    }

    /// Reads the state: after the dependent-launch wait.
    ///
    /// # Safety
    /// The addresses in `group` are as its documentation says, and `epoch` is [this block's](Self::epoch).
    #[inline(always)]
    pub unsafe fn read(group: &'a Group, epoch: Address) -> Self {
        // SAFETY: the block's epoch, and a word of the state. Relaxed: see the module's "Order and scope".
        let (Pack([low, high, slot, _]), poisoned) =
            unsafe { (simt::poll(epoch), simt::load_relaxed(group.state.offset(RankState::POISONED))) };
        let operation = u64::from(high) << 32 | u64::from(low);
        Begun { group, operation, waiter: Waiter::new(group, slot, poisoned != 0) }
    }

    /// Offset of the operation's slot from the first of its region, in bytes.
    #[inline(always)]
    pub(super) fn slot_offset(&self) -> u64 {
        self.waiter.slot as u64 * self.group.slot_bytes
    }

    /// Address of the operation's slot in the region of rank `rank`, of a kernel for at most `N` ranks.
    #[inline(always)]
    pub(super) fn slot_of<const N: usize>(&self, rank: u32) -> Address {
        // `black_box`, so that addresses are computed in the loop over tokens: kept, they would take up registers, and
        // only kernels for two ranks have those.
        let rank = if N == 2 { rank } else { simt::black_box_u64(rank as u64) as u32 };
        first_slot::<N>(self.group, rank).offset(self.slot_offset())
    }

    /// Tells the host how far this rank is, in the word at `offset` of [`Status`](crate::launch::Status): one more than the
    /// operation's number. Every thread may call this; one of the grid writes.
    ///
    /// # Safety
    /// The addresses in the group are as its documentation says.
    #[inline(always)]
    pub(super) unsafe fn tell(&self, offset: u64) {
        if simt::block() == 0 && simt::thread() == 0 {
            let number = (self.operation as u32).wrapping_add(1);
            // SAFETY: a word of the status, which the host reads atomically. Relaxed: it orders nothing.
            unsafe { simt::push_words(self.group.status.offset(offset), Pack([number, 0, 0, 0]), 1) };
        }
    }

    /// Leaves the epochs as they are: another kernel of the same operation follows. In place of [`advance`](Self::advance).
    #[inline(always)]
    pub(super) fn stay(&mut self) {
        self.waiter.failed |= self.waiter.slot as u64 >= SLOTS;
    }

    /// Advances the epochs to the next operation. Every thread of the block calls this once, when it has what it needs
    /// of this one's.
    #[inline(always)]
    pub(super) fn advance(&mut self) {
        // What the barrier asks needs the epoch: no thread still reads it when another writes.
        self.waiter.failed = simt::block_any(self.waiter.failed || self.waiter.slot as u64 >= SLOTS);
        let operation = self.operation + 1;
        let slot = self.waiter.slot + 1;
        let slot = if slot as u64 == SLOTS { 0 } else { slot };
        let next = Pack([operation as u32, (operation >> 32) as u32, slot, 0]);
        let mut block = simt::block() + simt::thread() * simt::blocks();
        while block < MAX_BLOCKS {
            // SAFETY: an epoch of the state: this block's own, or one that no block of the grid has.
            unsafe { simt::push(self.group.state.offset(RankState::epoch(block)), next) };
            block += simt::threads() * simt::blocks();
        }
        simt::warp_barrier();
    }
}

/// True if a kernel for `least` to `N` ranks can serve the group. One launched for another ends at once, and its peers'
/// waits say what is missing.
#[inline(always)]
pub(super) fn serves<const N: usize>(group: &Group, least: u32) -> bool {
    // Not `world_size >= least`, of which a compiler makes other code for more than two ranks, and nobody has timed that.
    group.world_size as usize <= N && group.world_size.saturating_sub(least - 1) != 0
}

/// Writes the outputs' padding. The links have work by then, and not before: where blocks fill the multiprocessors, the next
/// operation's start when these end.
///
/// # Safety
/// The addresses in `epilogue` are as its documentation says. Every thread of the grid calls this once, after the
/// dependent-launch wait.
#[inline(always)]
pub(super) unsafe fn fill_padding<E: Element, X: Epilogue<E>>(epilogue: &X, shape: &Shape) {
    let (threads, blocks) = (simt::threads(), simt::blocks());
    // SAFETY: the caller's promise.
    unsafe { epilogue.fill_padding(shape, simt::block() * threads + simt::thread(), blocks * threads) }
}
