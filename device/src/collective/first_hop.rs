//! The first of two hops: every rank pushes its addend of each token to the token's owner.

use fused_collective_core::{
    dtype::Element,
    pack::Pack,
    plan::{owned_index, owner},
    workspace::SlotRows,
};

use super::{
    ranks::row_of,
    sum::encode,
    wait::{Awaited, Waiter},
};
use crate::{
    epilogue::PackIndex,
    launch::{Address, Group, Shape},
    row::ThreadSlice,
    wire::Wire,
};

/// The first hop of a round, of addends in the form `wire`.
#[derive(Clone, Copy)]
pub(super) struct FirstHop<'a, W> {
    group: &'a Group,
    shape: &'a Shape,
    wire: &'a W,
    /// Bytes of a row.
    pub(super) row_bytes: u64,
    /// Bytes from a rank's first row to the next one's.
    pub(super) stride: u64,
}

impl<'a, W> FirstHop<'a, W> {
    #[inline(always)]
    pub(super) fn new<E: Element>(group: &'a Group, shape: &'a Shape, wire: &'a W) -> Self
    where
        W: Wire<E>,
    {
        let row_bytes = wire.row_bytes(shape);
        let rows = SlotRows::of_elements(group.world_size, shape.tokens as u64, row_bytes);
        FirstHop { group, shape, wire, row_bytes, stride: rows.first_hop(1, 0) }
    }

    /// The index of a pack in a row.
    #[inline(always)]
    pub(super) fn in_row(&self, pack: u32) -> PackIndex {
        PackIndex::new(0, pack, self.shape.row_packs)
    }

    /// Pushes this thread's packs of token `token`, unless this rank owns it: `own` has them, by the chunk, and `slot_of` the
    /// address of a rank's slot.
    ///
    /// # Safety
    /// The token is one of the round, and no other team pushes it; the addresses in the group are as its documentation says.
    #[inline(always)]
    pub(super) unsafe fn push<E, const P: usize, const RESIDENT: bool>(
        &self,
        waiter: &Waiter<'_>,
        slice: ThreadSlice<P, RESIDENT>,
        token: u32,
        own: impl Fn(u32) -> [Pack; P],
        slot_of: impl Fn(u32) -> Address,
    ) where
        E: Element,
        W: Wire<E>,
    {
        let &FirstHop { group, wire, row_bytes, stride, .. } = self;
        let (owner, index) = dealt(token, group.world_size);
        if owner == group.rank || waiter.failed {
            return;
        }
        // SAFETY: as this function's. Packs of `slice` are inside the slots, and this thread's alone.
        unsafe {
            let row = slot_of(owner).offset(group.rank as u64 * stride + index as u64 * row_bytes);
            slice.for_chunks(|chunk| {
                let packs = encode(wire, slice, chunk, own(chunk));
                slice.for_each(chunk, |p, pack| wire.push(row, 0, self.in_row(pack), packs[p]));
            });
        }
    }

    /// Waits for what the peers push of this thread's packs of chunk `chunk` of token `token`, the `index`-th that this rank owns,
    /// to its slot `slot`. As [`Waiter::all`].
    ///
    /// # Safety
    /// As [`push`](Self::push).
    #[inline(always)]
    pub(super) unsafe fn receive<E, const N: usize, const P: usize, const RESIDENT: bool>(
        &self,
        waiter: &mut Waiter<'_>,
        slice: ThreadSlice<P, RESIDENT>,
        chunk: u32,
        slot: Address,
        (token, index): (u32, u32),
    ) -> [[Pack; N]; P]
    where
        E: Element,
        W: Wire<E>,
    {
        let &FirstHop { shape, wire, row_bytes, stride, .. } = self;
        let row_at = slot.offset(index as u64 * row_bytes);
        // SAFETY: as this function's.
        unsafe {
            waiter.all::<N, P, RESIDENT>(
                slice,
                chunk,
                |source, _, pack| wire.poll(row_of(row_at, source, stride), 0, self.in_row(pack)),
                |source, _, pack| wire.refill(row_of(row_at, source, stride), 0, self.in_row(pack)),
                Awaited { shape, token, hop: 1 },
            )
        }
    }
}

/// A token's owner, and which of its tokens it is.
#[inline(always)]
pub(super) fn dealt(token: u32, world_size: u32) -> (u32, u32) {
    let (owner, index) = (owner(token as u64, world_size), owned_index(token as u64, world_size));
    (owner, index as u32)
}
