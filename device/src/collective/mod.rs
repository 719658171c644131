//! The collectives, each with an epilogue: one-shot and two-shot.
//!
//! Arrival is seen in the data itself, by [`lamport`](fused_collective_core::lamport)'s rules. What a kernel does:
//! 1. reads what is constant (gamma, scales, the table of regions);
//! 2. waits for the kernels before it, then reads the [`RankState`] and its first input together, and lets the next
//!    kernel start;
//! 3. takes a ticket; the last of the blocks to take one advances the state as it ends;
//! 4. pushes to its peers, waits for what they push, and completes its rows.
//!
//! One-shot takes the ticket before it pushes, two-shot after: the answer takes long, and nobody waits for it.
//!
//! # Order and scope
//! - *Pushed data* is written and polled word by word, relaxed, at system scope. Each word says by itself whether it
//!   has arrived, so no order between words is needed, and no fence.
//! - *A slot is refilled* with the sentinel by the thread that has read it, at once. Between operations a rank's
//!   slots hold nothing but the sentinel and what peers already sent for the next, so a slot needs no record of
//!   what used it last: any sequence of modes, shapes and element types is the same to it. The refill is coherent
//!   with the poll before it (same thread, same words), and a peer writes those words again three operations later.
//!   By then it has seen data that this rank sent in a later kernel than the refill, and the boundary between
//!   kernels on either side (the end of a grid, or `griddepcontrol.wait`) makes that chain a release and an acquire.
//! - *Inputs, residuals and outputs* are weak accesses: written by kernels before or after in the stream, and each
//!   element touched by one thread.
//! - *The state* is read by all threads of the grid before the last block writes it: each block takes a ticket after
//!   a barrier that all its threads reach when they have read it, and tickets acquire and release at the scope of the
//!   device. A wait that fails reads the operation's number later, atomically, and knows by its slot whether it has
//!   been advanced. The next kernel reads the state after its dependent-launch wait. One counter for the rank, not
//!   one for each block: grids of any size can follow each other, and none can fall out of step.
//!
//! # Programmatic dependent launch
//! `launch_dependents` promises nothing about memory. The next kernel may be resident early, and do step 1; its own
//! `griddepcontrol.wait` returns when this grid has completed and all it wrote is visible, so it can never see
//! unfinished outputs. Every thread here waits before it lets the next kernel start, so when a kernel starts, the
//! one before the last has completed: the order of a stream holds along the chain. And a grid starts only once
//! every block of the one before is running, so it takes no place that a block it depends on needs.
//!
//! # Waits
//! A rank waits for peers' data only, never for their blocks. Every block pushes all that it has to push before it
//! waits for a result that needs other ranks' waits to end, so ranks cannot wait in a circle. Waits are bounded: see
//! the `wait` module.
//!
//! [`RankState`]: crate::params::RankState

use core::num::NonZeroU32;

use fused_collective_core::{dtype::Element, lamport::SLOTS, pack::Pack, workspace::SLOTS_OFFSET};

use crate::{
    convert,
    epilogue::Place,
    params::{Address, Group, RankState},
    row::Share,
    simt,
};

mod one_shot;
mod two_shot;
mod wait;

pub use one_shot::one_shot;
pub use two_shot::two_shot;
use wait::Waiter;

/// The state of the rank as this operation found it.
struct Begun<'a> {
    group: &'a Group,
    /// What [`take_ticket`](Self::take_ticket) drew: meaningful in a block's first thread.
    ticket: u32,
    /// Bounds the waits of this thread.
    waiter: Waiter<'a>,
}

impl<'a> Begun<'a> {
    /// Reads the state: after the dependent-launch wait.
    ///
    /// # Safety
    /// The addresses in `group` are as its documentation says.
    #[inline(always)]
    unsafe fn read(group: &'a Group) -> Self {
        // SAFETY: the state's first 16 bytes. Relaxed, since another block may poison the rank meanwhile.
        let Pack([_, _, slot, poisoned]) = unsafe { simt::poll(group.state) };
        Begun { group, ticket: NO_TICKET, waiter: Waiter::new(group, slot, poisoned != 0) }
    }

    /// Where the operation's slot is in every region.
    #[inline(always)]
    fn slot_offset(&self) -> u64 {
        SLOTS_OFFSET + self.waiter.slot as u64 * self.group.slot_bytes
    }

    /// Where the operation's slot is in rank `rank`'s region.
    ///
    /// # Safety
    /// As [`region`].
    #[inline(always)]
    unsafe fn slot_of(&self, rank: u32) -> Address {
        // SAFETY: as this function's.
        unsafe { region(self.group, rank) }.offset(self.slot_offset())
    }

    /// Takes this block's ticket. Every thread of the block calls this once, after [`read`](Self::read).
    #[inline(always)]
    fn take_ticket(&mut self) {
        simt::block_barrier();
        if simt::thread() == 0 {
            // SAFETY: the state's count of tickets. Nobody waits for the answer before `end`.
            self.ticket = unsafe { simt::fetch_add(self.group.state.offset(RankState::TICKETS), 1) };
        }
    }

    /// Advances the state, if all blocks had taken their tickets when this one took its own.
    ///
    /// # Safety
    /// As [`read`](Self::read).
    #[inline(always)]
    unsafe fn end(self) {
        if self.ticket.wrapping_add(1) == simt::blocks() {
            let state = self.group.state;
            let slot = self.waiter.slot + 1;
            let next = if slot as u64 == SLOTS { 0 } else { slot };
            // SAFETY: the fields of the state. Past the last ticket no thread of this grid reads them, but for the
            // number of the operation, which is atomic.
            unsafe {
                simt::add_u64(state, 1);
                simt::store_value(state.offset(RankState::SLOT), next);
                simt::store_value(state.offset(RankState::TICKETS), 0u32);
            }
        }
    }
}

/// The ticket of a thread that has taken none: one less than no number of blocks.
const NO_TICKET: u32 = u32::MAX;

/// How many peers there are, if a kernel for at most `N` ranks can serve the group. One launched for another ends
/// at once, and its peers' waits say what is missing.
#[inline(always)]
fn peers<const N: usize>(group: &Group) -> Option<NonZeroU32> {
    if group.world_size as usize > N { None } else { NonZeroU32::new(group.world_size.saturating_sub(1)) }
}

/// The address of rank `rank`'s region.
///
/// # Safety
/// The table is as [`Group::regions`] says, and `rank` is one of the group.
#[inline(always)]
unsafe fn region(group: &Group, rank: u32) -> Address {
    let regions = Address(simt::opaque_u64(group.regions.0));
    // SAFETY: as this function's.
    Address(unsafe { simt::load_constant_u64(regions.offset(rank as u64 * 8)) })
}

/// The rank `distance` (less than the group's size) after this one. Ranks start with different peers, so that they
/// do not all write to one at the same time.
#[inline(always)]
fn peer(group: &Group, distance: u32) -> u32 {
    let rank = group.rank + distance;
    if rank >= group.world_size { rank - group.world_size } else { rank }
}

/// This thread's packs of a chunk of a row, from a tensor that may be absent: then zero.
///
/// # Safety
/// `place` gives places inside the tensor if there is one, and nobody writes it.
#[inline(always)]
unsafe fn load_row<const P: usize, const RESIDENT: bool>(
    tensor: Address,
    share: Share<P, RESIDENT>,
    chunk: u32,
    place: impl Fn(u32) -> Place,
) -> [Pack; P] {
    let mut packs = [Pack::default(); P];
    // Opaque, so that addresses are computed here and not ahead of a loop, where they would take up registers.
    let tensor = Address(simt::opaque_u64(tensor.0));
    if !tensor.is_null() {
        // SAFETY: as this function's.
        share.for_each(chunk, |p, pack| packs[p] = unsafe { simt::load(place(pack).of(tensor)) });
    }
    packs
}

/// `residual_out`: the packs of all ranks, `own` among the peers', summed in rank order, plus the residual, rounded,
/// and stripped of the sentinel: two-shot must strip it before it sends it, and both modes give the same bits.
#[inline(always)]
fn residual_out<E: Element, const N: usize>(
    group: &Group,
    peers: &[Pack; N],
    own: Pack,
    residual: Option<Pack>,
) -> Pack {
    // Peers stripped what they sent.
    let own = own.strip();
    let addend = |rank: usize| if rank as u32 == group.rank { own } else { peers[rank] };
    let mut sum = convert::widen::<E>(addend(0));
    // Written out: an array of registers needs constant indices, and a compiler may leave a long loop a loop.
    const { assert!(N <= 8) };
    macro_rules! add_rank {
        ($($rank:literal)*) => {$(
            if $rank < N && $rank < group.world_size {
                add::<E>(&mut sum, addend(if $rank < N { $rank } else { 0 }));
            }
        )*};
    }
    add_rank!(1 2 3 4 5 6 7);
    if let Some(residual) = residual {
        add::<E>(&mut sum, residual);
    }
    convert::narrow::<E>(sum).strip()
}

#[inline(always)]
fn add<E: Element>(sum: &mut E::Wide, pack: Pack) {
    for (sum, value) in sum.as_mut().iter_mut().zip(convert::widen::<E>(pack).as_ref()) {
        *sum += value;
    }
}
