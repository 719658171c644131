//! The kernels that measure links, as they were compiled.

use std::{array, sync::atomic::Ordering, thread, time::Duration};

use fused_collective_core::{
    links::{PLACES_OFFSET, WARM_UP_TRIPS, flag_offset, pattern, region_bytes},
    pack::Pack,
};
use fused_collective_device::{
    params::{Address, Group, Meet, Ping, Pull, Push, RankState, Status, TIMED_OUT},
    simt::host::Launch,
};

use crate::{
    Compiled, gpus_of,
    support::{Buffer, bytes_of},
};

const MODULE: &str = "bf16_local";
const ONE_WARP: Launch = Launch { blocks: 1, cluster: 1, threads: 32 };
/// Packs that a rank pushes to another, in memory for as many.
const PACKS: u32 = 200;
const PLACE_BYTES: u64 = PACKS as u64 * Pack::BYTES;

/// Ranks with memory to measure links with.
struct Ranks {
    regions: Vec<Buffer>,
    states: Vec<Buffer>,
    statuses: Vec<Buffer>,
    clocks: Vec<Buffer>,
    timeout: Duration,
}

impl Ranks {
    fn new(size: u32) -> Ranks {
        let buffers = |bytes| (0..size).map(|_| Buffer::new(bytes, 0)).collect::<Vec<_>>();
        Ranks {
            regions: buffers(region_bytes(size, PLACE_BYTES).unwrap() as usize),
            states: buffers(size_of::<RankState>()),
            statuses: buffers(size_of::<Status>()),
            clocks: buffers(8),
            timeout: Duration::from_secs(60),
        }
    }

    fn group(&self, rank: u32) -> Group {
        Group {
            regions: array::from_fn(|rank| self.regions.get(rank).map_or(Address::NULL, Buffer::address)),
            state: self.states[rank as usize].address(),
            status: self.statuses[rank as usize].address(),
            slot_bytes: 0,
            timeout_ns: self.timeout.as_nanos() as u64,
            world_size: self.regions.len() as u32,
            rank,
        }
    }

    /// Runs a kernel of rank `rank`.
    fn launch<P>(&self, compiled: &Compiled, rank: u32, launch: Launch, name: &str, params: &P) {
        let own = [&self.states, &self.statuses, &self.clocks].map(|buffers| &buffers[rank as usize]);
        let ranges = self.regions.iter().chain(own).map(Buffer::range).collect();
        compiled.run(rank, launch, &format!("links_{name}"), &bytes_of(params), ranges);
    }

    /// Runs `rank` for every rank at the same time.
    fn run(&self, rank: impl Fn(u32) + Sync) {
        thread::scope(|scope| {
            for index in 0..self.regions.len() as u32 {
                let rank = &rank;
                scope.spawn(move || rank(index));
            }
        });
    }

    /// What rank `source` has pushed to rank `rank`.
    fn place(&self, rank: u32, source: u32) -> Vec<Pack> {
        let first = (PLACES_OFFSET + u64::from(source) * PLACE_BYTES) / Pack::BYTES;
        self.regions[rank as usize].get::<Pack>()[first as usize..][..PACKS as usize].to_vec()
    }

    fn ping(&self, rank: u32, trips: u32) -> Ping {
        Ping {
            group: self.group(rank),
            nanoseconds: self.clocks[rank as usize].address(),
            peer: 1 - rank,
            leads: u32::from(rank == 0),
            count: 1,
            trips,
        }
    }

    fn status(&self, rank: u32, offset: u64) -> u32 {
        self.statuses[rank as usize].atomic(offset).load(Ordering::Acquire)
    }
}

#[test]
fn kernels_that_measure_links_are_right() {
    for gpu in gpus_of(MODULE) {
        let compiled = Compiled::read(gpu, MODULE, 8);
        let ranks = Ranks::new(3);
        ranks.run(|rank| {
            let meet = Meet { group: ranks.group(rank), count: 1, reserved: 0 };
            ranks.launch(&compiled, rank, ONE_WARP, "meet", &meet);
            let (group, place_bytes) = (ranks.group(rank), PLACE_BYTES);
            let push = Push {
                group,
                place_bytes,
                packs: PACKS,
                first: 0,
                targets: 3,
                run: 5,
                passes: 2,
                reserved: 0,
            };
            ranks.launch(&compiled, rank, Launch { blocks: 4, cluster: 1, threads: 64 }, "push", &push);
        });
        for (rank, source) in (0..3).flat_map(|rank| (0..3).map(move |source| (rank, source))) {
            let expected = (0..PACKS).map(|index| pattern(source, 5, index));
            assert!(ranks.place(rank, source).into_iter().eq(expected), "{gpu}: rank {rank}");
        }

        let ranks = Ranks::new(2);
        ranks.run(|rank| {
            // What the other one reads.
            let (group, place_bytes) = (ranks.group(rank), PLACE_BYTES);
            let fill = Push {
                group,
                place_bytes,
                packs: PACKS,
                first: 0,
                targets: 1,
                run: 6,
                passes: 1,
                reserved: 0,
            };
            ranks.launch(&compiled, rank, ONE_WARP, "push", &fill);
            let ping = ranks.ping(rank, WARM_UP_TRIPS + 20);
            ranks.launch(&compiled, rank, ONE_WARP, "ping", &ping);
            let (source, passes) = (1 - rank, 2);
            let pull = Pull { group, place_bytes, packs: PACKS, source, passes, reserved: 0 };
            ranks.launch(&compiled, rank, Launch { blocks: 3, cluster: 1, threads: 32 }, "pull", &pull);
        });
        for rank in 0..2 {
            let expected = (0..PACKS).map(|index| pattern(1 - rank, 6, index));
            assert!(ranks.place(rank, 1 - rank).into_iter().eq(expected), "{gpu}: rank {rank}");
            assert!(ranks.clocks[rank as usize].get::<u64>()[0] > 0);
            let flag = ranks.regions[rank as usize].atomic(flag_offset(1 - rank));
            assert_eq!(flag.load(Ordering::Relaxed), WARM_UP_TRIPS + 20);
            assert_eq!(ranks.status(rank, Status::FAILED), 0);
        }
    }
}

#[test]
fn a_rank_that_measures_alone_ends_at_its_deadline() {
    for gpu in gpus_of(MODULE) {
        let compiled = Compiled::read(gpu, MODULE, 9);
        for name in ["meet", "ping"] {
            let mut ranks = Ranks::new(2);
            ranks.timeout = Duration::from_millis(20);
            let meet = Meet { group: ranks.group(1), count: 1, reserved: 0 };
            match name {
                "meet" => ranks.launch(&compiled, 1, ONE_WARP, name, &meet),
                _ => ranks.launch(&compiled, 1, ONE_WARP, name, &ranks.ping(1, 100)),
            }
            let status = |offset| ranks.status(1, offset);
            assert_eq!([Status::FAILED, Status::MISSING_RANK].map(status), [TIMED_OUT, 0], "{gpu}: {name}");
        }
    }
}
