//! Ranks whose links are measured.

use std::{
    array,
    ops::Range,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use fused_collective_bench::{
    launch::Ping,
    links::{PLACES_OFFSET, flag_offset, pattern, region_bytes},
};
use fused_collective_core::pack::Pack;
use fused_collective_device::launch::{Address, Group, RankState, Status};

use super::Buffer;

/// What memory holds that nobody has written.
pub const UNTOUCHED: u32 = 0x5a5a_5a5a;

/// Ranks with memory to measure links with.
pub struct Ranks {
    regions: Vec<Buffer>,
    states: Vec<Buffer>,
    pub statuses: Vec<Buffer>,
    pub place_bytes: u64,
    pub timeout: Duration,
}

impl Ranks {
    pub fn new(size: u32, place_packs: u32) -> Ranks {
        let place_bytes = u64::from(place_packs) * Pack::BYTES;
        let buffers = |bytes, fill| (0..size).map(|_| Buffer::new(bytes, fill)).collect::<Vec<_>>();
        let ranks = Ranks {
            regions: buffers(region_bytes(size, place_bytes).unwrap() as usize, UNTOUCHED),
            states: buffers(size_of::<RankState>(), 0),
            statuses: buffers(size_of::<Status>(), 0),
            place_bytes,
            timeout: Duration::from_secs(60),
        };
        for rank in 0..size {
            for source in 0..size {
                ranks.set_flag(rank, source, 0);
            }
        }
        ranks
    }

    pub fn size(&self) -> u32 {
        self.regions.len() as u32
    }

    pub fn group(&self, rank: u32) -> Group {
        Group {
            regions: array::from_fn(|rank| self.regions.get(rank).map_or(Address::NULL, Buffer::address)),
            state: self.states[rank as usize].address(),
            status: self.statuses[rank as usize].address(),
            slot_bytes: 0,
            timeout_ns: self.timeout.as_nanos() as u64,
            world_size: self.size(),
            rank,
        }
    }

    pub fn flag(&self, rank: u32, source: u32) -> [&AtomicU32; 4] {
        let region = &self.regions[rank as usize];
        array::from_fn(|word| region.atomic(flag_offset(source) + word as u64 * 4))
    }

    pub fn set_flag(&self, rank: u32, source: u32, count: u32) {
        self.flag(rank, source).iter().for_each(|word| word.store(count, Ordering::Relaxed));
    }

    /// The place of rank `source` in rank `rank`'s memory.
    pub fn place(&self, rank: u32, source: u32) -> Vec<Pack> {
        let packs = self.regions[rank as usize].get::<Pack>();
        let (first, length) = (PLACES_OFFSET / Pack::BYTES, self.place_bytes / Pack::BYTES);
        let start = (first + u64::from(source) * length) as usize;
        packs[start..start + length as usize].to_vec()
    }

    pub fn status(&self, rank: u32, offset: u64) -> u32 {
        self.statuses[rank as usize].atomic(offset).load(Ordering::Acquire)
    }

    /// The addresses that rank `rank`'s kernels may access, besides a clock.
    pub fn ranges(&self, rank: u32) -> impl Iterator<Item = Range<u64>> {
        let own = [&self.states[rank as usize], &self.statuses[rank as usize]];
        self.regions.iter().chain(own).map(Buffer::range)
    }

    pub fn assert_guards(&self) {
        self.regions.iter().chain(&self.states).chain(&self.statuses).for_each(Buffer::assert_guards);
    }

    /// Runs `rank` for every rank at the same time.
    pub fn run(&self, rank: impl Fn(u32) + Sync) {
        thread::scope(|scope| {
            for index in 0..self.size() {
                let rank = &rank;
                scope.spawn(move || rank(index));
            }
        });
    }
}

/// What rank `source` writes in a run.
pub fn patterns(source: u32, run: u32, packs: u32) -> impl Iterator<Item = Pack> {
    (0..packs).map(move |index| pattern(source, run, index))
}

/// Parameters of a ping between ranks 0 and 1, of which 0 leads.
pub fn ping(ranks: &Ranks, rank: u32, clock: &Buffer, count: u32, trips: u32) -> Ping {
    Ping {
        group: ranks.group(rank),
        nanoseconds: clock.address(),
        peer: 1 - rank,
        leads: u32::from(rank == 0),
        count,
        trips,
    }
}
