//! The kernels that measure links, as they were compiled.

use std::{sync::atomic::Ordering, time::Duration};

use fused_collective_bench::{
    launch::{Meet, Pull, Push},
    links::WARM_UP_TRIPS,
    table::{PROBES, Probe},
};
use fused_collective_device::{
    launch::{Status, TIMED_OUT},
    simt::host::Launch,
};

use fused_collective_device_tests::{
    Buffer, bytes_of,
    ranks::{Ranks, patterns, ping},
};

use crate::{Compiled, gpus_of};

const ONE_WARP: Launch = Launch { blocks: 1, cluster: 1, threads: 32 };
/// Packs that a rank pushes to another, in memory for as many.
const PACKS: u32 = 200;

/// Kernels of ranks with memory for [`PACKS`], and a clock each.
struct Measured {
    compiled: Compiled,
    ranks: Ranks,
    clocks: Vec<Buffer>,
}

impl Measured {
    fn new(gpu: &str, size: u32) -> Measured {
        Measured {
            compiled: Compiled::read(gpu, PROBES, 8),
            ranks: Ranks::new(size, PACKS),
            clocks: (0..size).map(|_| Buffer::new(8, 0)).collect(),
        }
    }

    /// Runs a kernel of rank `rank`.
    fn launch<P>(&self, rank: u32, launch: Launch, kernel: Probe, params: &P) {
        let ranges = self.ranks.ranges(rank).chain([self.clocks[rank as usize].range()]).collect();
        self.compiled.run(rank, launch, kernel.name(), &bytes_of(params), ranges);
    }

    fn meet(&self, rank: u32) {
        let meet = Meet { group: self.ranks.group(rank), count: 1, reserved: 0 };
        self.launch(rank, ONE_WARP, Probe::LinksMeet, &meet);
    }

    fn ping(&self, rank: u32, trips: u32) {
        self.launch(
            rank,
            ONE_WARP,
            Probe::LinksPing,
            &ping(&self.ranks, rank, &self.clocks[rank as usize], 1, trips),
        );
    }

    /// Pushes to as many ranks, itself the first.
    fn push(&self, rank: u32, targets: u32, run: u32, passes: u32) {
        let (group, place_bytes) = (self.ranks.group(rank), self.ranks.place_bytes);
        let push = Push { group, place_bytes, packs: PACKS, first: 0, targets, run, passes, reserved: 0 };
        self.launch(rank, Launch { blocks: 4, cluster: 1, threads: 64 }, Probe::LinksPush, &push);
    }

    fn assert_place(&self, rank: u32, source: u32, written_by: u32, run: u32) {
        let place = self.ranks.place(rank, source);
        assert!(place.into_iter().eq(patterns(written_by, run, PACKS)), "rank {rank}, from {source}");
    }
}

#[test]
fn kernels_that_measure_links_are_right() {
    for gpu in gpus_of(PROBES) {
        let three = Measured::new(gpu, 3);
        three.ranks.run(|rank| {
            three.meet(rank);
            three.push(rank, 3, 5, 2);
        });
        for (rank, source) in (0..3).flat_map(|rank| (0..3).map(move |source| (rank, source))) {
            three.assert_place(rank, source, source, 5);
        }
        three.ranks.assert_guards();

        let two = Measured::new(gpu, 2);
        two.ranks.run(|rank| {
            // What the other one reads, once it knows that it is there.
            two.push(rank, 1, 6, 1);
            two.ping(rank, WARM_UP_TRIPS + 20);
            let (group, place_bytes, source) = (two.ranks.group(rank), two.ranks.place_bytes, 1 - rank);
            let pull = Pull { group, place_bytes, packs: PACKS, source, passes: 2, reserved: 0 };
            two.launch(rank, Launch { blocks: 3, cluster: 1, threads: 32 }, Probe::LinksPull, &pull);
        });
        for rank in 0..2 {
            two.assert_place(rank, 1 - rank, 1 - rank, 6);
            assert!(two.clocks[rank as usize].get::<u64>()[0] > 0);
            let flag = two.ranks.flag(rank, 1 - rank).map(|word| word.load(Ordering::Relaxed));
            assert_eq!((flag, two.ranks.status(rank, Status::FAILED)), ([WARM_UP_TRIPS + 20; 4], 0));
        }
        two.ranks.assert_guards();
    }
}

#[test]
fn a_rank_that_measures_alone_ends_at_its_deadline() {
    for gpu in gpus_of(PROBES) {
        for meets in [false, true] {
            let mut alone = Measured::new(gpu, 2);
            alone.ranks.timeout = Duration::from_millis(20);
            if meets {
                alone.meet(1)
            } else {
                alone.ping(1, 100)
            }
            let status = |offset| alone.ranks.status(1, offset);
            assert_eq!([Status::FAILED, Status::MISSING_RANK].map(status), [TIMED_OUT, 0], "{gpu}: {meets}");
        }
    }
}
