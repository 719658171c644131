//! The links alone: the collectives' own stores, polls and waits, and nothing else.
//!
//! These kernels reach the memory that [`links`] describes, not the workspace. They leave the epochs of the group's
//! operations as they are, and wait as the collectives do: never longer than the group allows, nor past the host's word.

use core::num::NonZeroU32;

use fused_collective_core::{
    launch::{Address, Group, MAX_RANKS, Shape},
    pack::Pack,
};
use fused_collective_device::{
    collective::{Awaited, Begun, deal, peer, region},
    simt,
};

use crate::{
    launch::{Meet, Ping, Pull, Push},
    links::{self, HOP, PLACES_OFFSET, WARM_UP_TRIPS},
};

/// Waits for flags are part of no call. Their tokens count trips.
const SHAPE: Shape = Shape { first_token: 0, total_tokens: 0, tokens: 0, row_packs: 0, call: u64::MAX };

/// Where rank `source` sets its flag in the memory of rank `rank`.
#[inline(always)]
fn flag(group: &Group, rank: u32, source: u32) -> Address {
    region::<MAX_RANKS>(group, rank).offset(links::flag_offset(source))
}

/// Where rank `source` writes in the memory of rank `rank`.
#[inline(always)]
fn place(group: &Group, rank: u32, source: u32, place_bytes: u64) -> Address {
    region::<MAX_RANKS>(group, rank).offset(PLACES_OFFSET + source as u64 * place_bytes)
}

/// Returns when every rank of the group has come: one warp.
///
/// # Safety
/// Called once by every thread of a grid, with parameters as their documentation says, while no other kernel uses the
/// flags. Every rank gives the same count, larger than any before.
#[inline(always)]
pub unsafe fn meet(params: &Meet) {
    let group = &params.group;
    simt::wait_for_prerequisites();
    simt::launch_dependents();
    let source = simt::thread();
    if simt::block() != 0 || source >= group.world_size || source == group.rank {
        return;
    }
    // SAFETY: the group is as its documentation says, and a flag is accessed by pushes and polls alone.
    unsafe {
        let mut begun = Begun::read(group, Begun::epoch(group));
        if !begun.waiter.failed {
            simt::push(flag(group, source, group.rank), Pack([params.count; 4]));
        }
        let own = flag(group, group.rank, source);
        let awaited = Awaited { shape: &SHAPE, token: 0, hop: HOP };
        // A peer may be further already.
        let has_come = |Pack([count, ..]): Pack| params.count.wrapping_sub(count) as i32 <= 0;
        begun.waiter.until(own, source, awaited, has_come);
    }
}

/// Sends a flag there and back, again and again, and tells how long that takes: one thread on either side.
///
/// # Safety
/// Called once by every thread of a grid, with parameters as their documentation says, on two ranks, while no other
/// kernel uses the flags. Both give the same counts, larger than any before, and one of them leads.
#[inline(always)]
pub unsafe fn ping(params: &Ping) {
    let group = &params.group;
    simt::wait_for_prerequisites();
    simt::launch_dependents();
    if simt::block() != 0 || simt::thread() != 0 {
        return;
    }
    let (own, theirs) = (flag(group, group.rank, params.peer), flag(group, params.peer, group.rank));
    let leads = params.leads != 0;
    // SAFETY: as in `meet`.
    unsafe {
        let mut begun = Begun::read(group, Begun::epoch(group));
        let (mut trip, mut began) = (0, simt::nanoseconds());
        while trip < params.trips && !begun.waiter.failed {
            if trip == WARM_UP_TRIPS {
                began = simt::nanoseconds();
            }
            let count = Pack([params.count.wrapping_add(trip); 4]);
            if leads {
                simt::push(theirs, count);
            }
            let awaited = Awaited { shape: &SHAPE, token: trip, hop: HOP };
            begun.waiter.until(own, params.peer, awaited, |pack| pack == count);
            if !leads && !begun.waiter.failed {
                simt::push(theirs, count);
            }
            trip += 1;
        }
        simt::store_value(params.nanoseconds, simt::nanoseconds().wrapping_sub(began));
    }
}

/// Fills this rank's place in the memory of every target, as two-shot sends its rows: a row of a pack for each thread
/// goes to one target, the next row to the next, and blocks deal the rows out among themselves. Any grid.
///
/// # Safety
/// Called once by every thread of a grid, with parameters as their documentation says, while nobody reads the places.
#[inline(always)]
pub unsafe fn push(params: &Push) {
    let group = &params.group;
    simt::wait_for_prerequisites();
    simt::launch_dependents();
    let (Some(threads), Some(targets)) = (NonZeroU32::new(simt::threads()), NonZeroU32::new(params.targets))
    else {
        return;
    };
    let rows = (params.packs + threads.get() - 1) / threads * params.targets;
    let mut pass = 0;
    while pass < params.passes {
        deal(simt::block(), simt::blocks(), rows, |row| {
            let (target, row) = (row % targets, row / targets);
            let pack = row * threads.get() + simt::thread();
            if pack < params.packs {
                let target = peer(group, params.first + target);
                let at = place(group, target, group.rank, params.place_bytes);
                let value = links::pattern(group.rank, params.run, pack);
                // SAFETY: inside this rank's place; each pack is one thread's.
                unsafe { simt::push(at.offset(pack as u64 * Pack::BYTES), value) };
            }
        });
        pass += 1;
    }
}

/// Reads the own place of another rank in that rank's memory, into its place in this rank's. Any grid.
///
/// # Safety
/// Called once by every thread of a grid, with parameters as their documentation says, while nobody writes the place
/// that is read.
#[inline(always)]
pub unsafe fn pull(params: &Pull) {
    let Pull { group, place_bytes, packs, source, .. } = params;
    simt::wait_for_prerequisites();
    simt::launch_dependents();
    let from = place(group, *source, *source, *place_bytes);
    let to = place(group, group.rank, *source, *place_bytes);
    let step = simt::blocks() * simt::threads();
    let mut pass = 0;
    while pass < params.passes {
        let mut pack = simt::block() * simt::threads() + simt::thread();
        while pack < *packs {
            let at = pack as u64 * Pack::BYTES;
            // SAFETY: inside the two places; each pack is one thread's. A poll, which no cache answers.
            unsafe { simt::store(to.offset(at), simt::poll(from.offset(at))) };
            pack += step;
        }
        pass += 1;
    }
}
