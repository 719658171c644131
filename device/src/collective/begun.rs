//! The state of a rank in one operation, and its turn.

use fused_collective_core::{lamport::SLOTS, pack::Pack};

use super::{ranks::first_slot, wait::Waiter};
use crate::{
    launch::{Address, Group, MAX_BLOCKS, RankState},
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
    /// Where this block's turn is.
    #[inline(always)]
    pub fn turn(group: &Group) -> Address {
        group.state.offset(RankState::turn(simt::block()))
    }

    /// Reads the state: after the dependent-launch wait.
    ///
    /// # Safety
    /// The addresses in `group` are as its documentation says, and `turn` is [this block's](Self::turn).
    #[inline(always)]
    pub unsafe fn read(group: &'a Group, turn: Address) -> Self {
        // SAFETY: the block's turn, and a word of the state. Relaxed: see the module's "Order and scope".
        let (Pack([low, high, slot, _]), poisoned) =
            unsafe { (simt::poll(turn), simt::load_relaxed(group.state.offset(RankState::POISONED))) };
        let operation = u64::from(high) << 32 | u64::from(low);
        Begun { group, operation, waiter: Waiter::new(group, slot, poisoned != 0) }
    }

    /// How far after the first slot of a region the operation's is.
    #[inline(always)]
    pub(super) fn slot_offset(&self) -> u64 {
        self.waiter.slot as u64 * self.group.slot_bytes
    }

    /// Where the operation's slot is in the region of rank `rank`, of a kernel for at most `N` ranks.
    #[inline(always)]
    pub(super) fn slot_of<const N: usize>(&self, rank: u32) -> Address {
        // Opaque, so that addresses are computed in the loop over tokens: kept, they would take up registers, and only
        // kernels for two ranks have those.
        let rank = if N == 2 { rank } else { simt::opaque_u64(rank as u64) as u32 };
        first_slot::<N>(self.group, rank).offset(self.slot_offset())
    }

    /// Makes the next operation's turns. Every thread of the block calls this once, when it has what it needs of this
    /// operation's.
    #[inline(always)]
    pub(super) fn advance(&mut self) {
        // What the barrier asks needs the turn: no thread still reads it when another writes.
        self.waiter.failed = simt::block_any(self.waiter.failed || self.waiter.slot as u64 >= SLOTS);
        let operation = self.operation + 1;
        let slot = self.waiter.slot + 1;
        let slot = if slot as u64 == SLOTS { 0 } else { slot };
        let next = Pack([operation as u32, (operation >> 32) as u32, slot, 0]);
        let mut block = simt::block() + simt::thread() * simt::blocks();
        while block < MAX_BLOCKS {
            // SAFETY: a turn of the state: this block's own, or one that no block of the grid has.
            unsafe { simt::push(self.group.state.offset(RankState::turn(block)), next) };
            block += simt::threads() * simt::blocks();
        }
        simt::warp_barrier();
    }
}
