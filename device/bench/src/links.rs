//! Memory to measure the links between ranks with: where in a rank's each peer writes, and what it writes.
//!
//! The memory is no workspace's, whose slots must hold the sentinel between operations. It has the same
//! [header](fused_collective_core::workspace::Header), in whose `slot_bytes` are the bytes of a place:
//! ```text
//! 0                  header
//! HEADER_BYTES       a flag for each rank that writes here, at the start of a control line of its own
//! PLACES_OFFSET      a place for each rank, place_bytes long
//! ```
//! A flag counts: it is only ever replaced by a larger count. A place is filled with a [pattern](pattern()) that tells
//! who wrote it, in which run and where, so that what arrived can be held to what was sent.

use fused_collective_core::{
    MAX_WORLD_SIZE,
    pack::Pack,
    workspace::{CONTROL_BYTES, HEADER_BYTES, LINE_BYTES, SLOTS_OFFSET},
};

/// Where the places start.
pub const PLACES_OFFSET: u64 = SLOTS_OFFSET;

/// Round trips of a word before those that are timed: both ranks have begun by then.
pub const WARM_UP_TRIPS: u32 = 16;

/// The number of a wait for a flag: [`Status::hop`](fused_collective_core::launch::Status::hop).
pub const HOP: u32 = 4;

const _: () = assert!(MAX_WORLD_SIZE as u64 * LINE_BYTES <= CONTROL_BYTES);

/// Where rank `source` sets its flag in another rank's memory.
#[inline(always)]
pub const fn flag_offset(source: u32) -> u64 {
    HEADER_BYTES + source as u64 * LINE_BYTES
}

/// Bytes of a rank's memory, in a group of `world_size` ranks; `None` past 64 bits.
pub const fn region_bytes(world_size: u32, place_bytes: u64) -> Option<u64> {
    match place_bytes.checked_mul(world_size as u64) {
        Some(places) => places.checked_add(PLACES_OFFSET),
        None => None,
    }
}

/// Pack `index` of what rank `source` writes in run `run`.
///
/// No two packs of a place are alike, and hardly any of two ranks or two runs in the same position. No word is the
/// [sentinel](fused_collective_core::lamport::SENTINEL).
#[inline(always)]
pub const fn pattern(source: u32, run: u32, index: u32) -> Pack {
    // Odd factors, which lose no bit; the first is that of Knuth's multiplicative hash.
    let word =
        index.wrapping_mul(0x9e37_79b1) ^ run.wrapping_mul(0x85eb_ca6b) ^ source.wrapping_mul(0xc2b2_ae35);
    const POSITIVE: u32 = 0x7fff_ffff;
    Pack([
        word & POSITIVE,
        (word ^ 0x5555_5555) & POSITIVE,
        (word ^ 0x3333_3333) & POSITIVE,
        (word ^ 0x0f0f_0f0f) & POSITIVE,
    ])
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, vec::Vec};

    use super::*;

    #[test]
    fn no_two_packs_of_a_place_are_alike_nor_do_other_ranks_or_runs_write_them_there() {
        let of = |source, run| (0..1 << 16).map(|index| pattern(source, run, index)).collect::<Vec<_>>();
        let own = of(1, 7);
        assert_eq!(own.iter().map(|pack| pack.0).collect::<HashSet<_>>().len(), own.len());
        for (source, run) in [(0, 7), (2, 7), (1, 6), (1, 8)] {
            assert!(own.iter().zip(of(source, run)).all(|(own, other)| *own != other), "{source}, {run}");
        }
        assert!(own.iter().all(|pack| pack.is_complete()));
    }

    #[test]
    fn flags_and_places_do_not_overlap() {
        assert!(flag_offset(0) >= HEADER_BYTES);
        assert!(flag_offset(MAX_WORLD_SIZE - 1) + LINE_BYTES <= PLACES_OFFSET);
        assert_eq!(region_bytes(3, 1 << 20), Some(PLACES_OFFSET + (3 << 20)));
        assert_eq!(region_bytes(2, u64::MAX / 2), None);
    }
}
