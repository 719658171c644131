//! The collectives, each with an epilogue: one-shot, two-shot, and two-shot with a sharded residual.
//!
//! Arrival is seen in the data itself, by [`lamport`](fused_collective_core::lamport)'s rules. What a kernel does:
//! 1. waits for the kernels before it, then reads its block's [`Epoch`] and its first input together, and lets the next
//!    kernel start;
//! 2. pushes to its peers, then advances the epochs;
//! 3. reads what is constant (gamma, scales) while that is on its way;
//! 4. waits for what the peers push, and completes its rows.
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
//! - *Epochs*: every block reads one of its own, relaxed, and writes it, relaxed, after a barrier that all its threads
//!   reach when they have used what they read. The epochs that no block of this grid has are written by the blocks in
//!   shares, and read by nobody. So all epochs are the same when a grid ends, grids of any size can follow each other,
//!   and no block asks another how far it is. The next kernel reads after its dependent-launch wait. A wait that fails
//!   reads the operation's number again, and knows by its slot whether it has been advanced.
//! - *Poison* is a word that any thread may set once, and that all read as they begin: a kernel that starts on a
//!   poisoned rank pushes nothing, or it could run ahead of peers that are late and write over what they have not
//!   read.
//!
//! # Programmatic dependent launch
//! `launch_dependents` promises nothing about memory. The next kernel may be resident early, and compute addresses; its own
//! `griddepcontrol.wait` returns when this grid has completed and all it wrote is visible, so it can never see
//! unfinished outputs. Every thread here waits before it lets the next kernel start, so when a kernel starts, the
//! one before the last has completed: the order of a stream holds along the chain. And a grid starts only once
//! every block of the one before is running, so it takes no place that a block it depends on needs.
//!
//! # Waits
//! A rank waits for peers' data only, never for their blocks. In which order a block pushes and waits, and why ranks cannot
//! wait in a circle, each collective says for itself: `one_shot`, `two_shot`, and for a sharded residual `turns`. Waits
//! are bounded: see the `wait` module.
//!
//! # Protocols of one's own
//! [`Begun`], [`Waiter`], [`region`], [`peer`] and [`deal`] are what the collectives are made of, and what a kernel of
//! another protocol needs to keep their rules about poison, deadlines and the host's word.
//!
//! [`Epoch`]: crate::launch::Epoch

use fused_collective_core::{dtype::Element, lamport::SLOTS, pack::Pack, workspace::SLOTS_OFFSET};

use crate::{
    convert,
    epilogue::{Epilogue, PackIndex},
    launch::{Address, Group, MAX_BLOCKS, MAX_RANKS, RankState, Shape},
    row::{Prepared, Team, ThreadSlice},
    simt,
};

mod one_shot;
mod sharded;
mod turns;
mod two_shot;
mod wait;

pub use one_shot::one_shot;
pub use sharded::sharded;
pub use two_shot::two_shot;
pub use wait::{Awaited, Waiter};

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

    /// How far after the first slot of a region the operation's is.
    #[inline(always)]
    fn slot_offset(&self) -> u64 {
        self.waiter.slot as u64 * self.group.slot_bytes
    }

    /// Where the operation's slot is in the region of rank `rank`, of a kernel for at most `N` ranks.
    #[inline(always)]
    fn slot_of<const N: usize>(&self, rank: u32) -> Address {
        // `black_box`, so that addresses are computed in the loop over tokens: kept, they would take up registers, and
        // only kernels for two ranks have those.
        let rank = if N == 2 { rank } else { simt::black_box_u64(rank as u64) as u32 };
        first_slot::<N>(self.group, rank).offset(self.slot_offset())
    }

    /// Advances the epochs to the next operation. Every thread of the block calls this once, when it has what it needs
    /// of this one's.
    #[inline(always)]
    fn advance(&mut self) {
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

/// True if a kernel for at most `N` ranks can serve the group. One launched for another ends at once, and its peers'
/// waits say what is missing.
#[inline(always)]
fn serves<const N: usize>(group: &Group) -> bool {
    // Not `world_size > 1`, of which a compiler makes other code for more than two ranks, and nobody has timed that.
    group.world_size as usize <= N && group.world_size.saturating_sub(1) != 0
}

/// Reads what is constant and writes the outputs' padding. The links have work by then, and not before: where blocks
/// fill the multiprocessors, the next operation's start when these end.
///
/// # Safety
/// The addresses in `epilogue` are as its documentation says. Every thread of the grid calls this once, after the
/// dependent-launch wait.
#[inline(always)]
unsafe fn prepare<'a, E: Element, X: Epilogue<E>, const N: usize, const P: usize, const RESIDENT: bool>(
    epilogue: &'a X,
    shape: &Shape,
    slice: ThreadSlice<P, RESIDENT>,
    team: &Team,
) -> Prepared<'a, E, X, N, P, RESIDENT> {
    // SAFETY: the caller's promise.
    unsafe {
        let prepared = Prepared::new(epilogue, slice, team);
        epilogue.fill_padding(
            shape,
            simt::block() * simt::threads() + simt::thread(),
            simt::blocks() * simt::threads(),
        );
        prepared
    }
}

/// The region of rank `rank`, of a kernel for at most `N` ranks.
#[inline(always)]
pub fn region<const N: usize>(group: &Group, rank: u32) -> Address {
    // Selected with constant indices: parameters that are indexed at run time are copied to local memory first.
    const { assert!(N <= MAX_RANKS && MAX_RANKS == 8) };
    let mut at = group.regions[0];
    macro_rules! select {
        ($($index:literal)*) => {$(
            if $index < N && rank == $index {
                at = group.regions[$index];
            }
        )*};
    }
    select!(1 2 3 4 5 6 7);
    at
}

/// The first slot of rank `rank`'s region, of a kernel for at most `N` ranks.
#[inline(always)]
fn first_slot<const N: usize>(group: &Group, rank: u32) -> Address {
    region::<N>(group, rank).offset(SLOTS_OFFSET)
}

/// The rank `distance` (less than the group's size) after this one. Ranks start with different peers, so that they
/// do not all write to one at the same time.
#[inline(always)]
pub fn peer(group: &Group, distance: u32) -> u32 {
    let rank = group.rank + distance;
    if rank >= group.world_size { rank - group.world_size } else { rank }
}

/// Calls `each` for every other rank, by its distance: see [`peer`].
#[inline(always)]
fn for_peers<const N: usize>(group: &Group, mut each: impl FnMut(u32)) {
    const { assert!(N <= 8) };
    // Written out: an array of registers needs constant indices, and a compiler may leave a loop a loop.
    macro_rules! each {
        ($($distance:literal)*) => {$(
            if $distance < N && $distance < group.world_size {
                each($distance);
            }
        )*};
    }
    each!(1 2 3 4 5 6 7);
}

/// Calls `each` for the tokens of team `team`: one of every `teams` in turn, each time the next one of them, so that a team
/// is owner and receiver by turns whatever the numbers of teams and ranks have in common.
#[inline(always)]
pub fn deal(team: u32, teams: u32, tokens: u32, mut each: impl FnMut(u32)) {
    let (mut first, mut turn) = (0, team);
    while first < tokens {
        if first + turn < tokens {
            each(first + turn);
        }
        let next = turn + 1;
        first += teams;
        turn = if next == teams { 0 } else { next };
    }
}

/// A pack of the row that rank `source` sent: rank 0's is at `first`, and each is `stride` bytes after the one before.
#[inline(always)]
fn pack_of(first: Address, source: u32, stride: u64, pack: u32) -> Address {
    // `black_box`, so that addresses are computed in the loop: kept, they would take up registers.
    let row = Address(simt::black_box_u64(first.0)).offset(source as u64 * simt::black_box_u64(stride));
    row.offset(pack as u64 * Pack::BYTES)
}

/// This thread's packs of a chunk of a row, from a tensor that may be absent: then zero.
///
/// # Safety
/// `indices` are this thread's of the chunk, inside the tensor if there is one, and nobody writes it.
#[inline(always)]
unsafe fn load_row<const P: usize, const RESIDENT: bool>(
    tensor: Address,
    slice: ThreadSlice<P, RESIDENT>,
    chunk: u32,
    indices: &[PackIndex; P],
) -> [Pack; P] {
    let mut packs = [Pack::default(); P];
    // `black_box`, so that addresses are computed here and not ahead of a loop, where they would take up registers.
    let tensor = Address(simt::black_box_u64(tensor.0));
    if !tensor.is_null() {
        // SAFETY: as this function's.
        slice.for_each(chunk, |p, _| packs[p] = unsafe { simt::load(indices[p].of(tensor)) });
    }
    packs
}

/// `residual_out`: the packs of all ranks, stripped, `own` among the peers' as [`Waiter::all`] gives them, summed in
/// rank order, plus the residual, rounded, and stripped of the sentinel: two-shot must strip it before it sends it, and
/// both modes give the same bits.
#[inline(always)]
fn residual_out<E: Element, const N: usize>(
    group: &Group,
    peers: &[Pack; N],
    own: Pack,
    residual: Option<Pack>,
) -> Pack {
    let mut sum;
    if N == 2 {
        // Two addends give the same sum in either order.
        sum = convert::widen::<E>(peers[0]);
        add::<E>(&mut sum, own);
    } else {
        let addend = |rank: usize| if rank as u32 == group.rank { own } else { peers[rank] };
        sum = convert::widen::<E>(addend(0));
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
    }
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
