//! The ranks of a group: peers, regions and slots, and the tokens that are dealt out.

use fused_collective_core::{
    plan::{owned_index, owner},
    workspace::SLOTS_OFFSET,
};

use crate::{
    launch::{Address, Group, MAX_RANKS},
    simt,
};
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
pub(super) fn first_slot<const N: usize>(group: &Group, rank: u32) -> Address {
    region::<N>(group, rank).offset(SLOTS_OFFSET)
}

/// The group, of whose regions a compiler knows nothing: one that reads parameters at a selected address copies them all to local
/// memory first.
#[inline(always)]
pub(super) fn opaque(group: &Group) -> Group {
    Group { regions: group.regions.map(|region| Address(simt::black_box_u64(region.0))), ..*group }
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
pub(super) fn for_peers<const N: usize>(group: &Group, mut each: impl FnMut(u32)) {
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

/// The row that rank `source` sent: rank 0's is at `first`, and each is `stride` bytes after the one before.
#[inline(always)]
pub(super) fn row_of(first: Address, source: u32, stride: u64) -> Address {
    // `black_box`, so that addresses are computed in the loop: kept, they would take up registers.
    Address(simt::black_box_u64(first.0)).offset(source as u64 * simt::black_box_u64(stride))
}

/// A token's owner, and which of its tokens it is.
#[inline(always)]
pub(super) fn dealt(token: u32, world_size: u32) -> (u32, u32) {
    let (owner, index) = (owner(token as u64, world_size), owned_index(token as u64, world_size));
    (owner, index as u32)
}
