//! The kernels that measure links, run by the host's threads.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use fused_collective_bench::{
    kernels::links,
    launch::{Meet, Pull, Push},
    links::{HOP, WARM_UP_TRIPS},
};
use fused_collective_core::pack::Pack;
use fused_collective_device::{
    launch::{ABORTED, Status, TIMED_OUT},
    simt::host::{Launch, launch},
};
use fused_collective_device_tests::{
    Buffer,
    ranks::{Ranks, UNTOUCHED, patterns, ping},
};

const ONE_WARP: Launch = Launch { blocks: 1, cluster: 1, threads: 32 };

#[test]
fn a_push_fills_the_place_of_its_rank_in_every_target_and_nothing_else() {
    // Rows that come out even and that do not; grids with more blocks than rows, and that share a factor with the targets.
    for (packs, blocks, threads) in [(256, 2, 64), (200, 4, 32), (65, 3, 64), (31, 4, 32)] {
        let ranks = Ranks::new(3, 256);
        for (first, targets) in [(1, 2), (1, 1), (2, 1), (0, 1)] {
            let run = 10 * first + targets;
            ranks.run(|rank| {
                let params = Push {
                    group: ranks.group(rank),
                    place_bytes: ranks.place_bytes,
                    packs,
                    first,
                    targets,
                    run,
                    passes: 2,
                    reserved: 0,
                };
                // SAFETY: the parameters are as their documentation says.
                launch(Launch { blocks, cluster: 1, threads }, || unsafe { links::push(&params) });
            });
            for rank in 0..3 {
                for source in 0..3 {
                    let distance = (rank + 3 - source) % 3;
                    if (first..first + targets).contains(&distance) {
                        let place = ranks.place(rank, source);
                        let (written, rest) = place.split_at(packs as usize);
                        assert!(written.iter().copied().eq(patterns(source, run, packs)));
                        assert!(rest.iter().all(|pack| *pack == Pack([UNTOUCHED; 4])));
                    }
                }
                // Nobody's but those of the runs so far.
                assert!(
                    first == 0 || ranks.place(rank, rank).iter().all(|pack| *pack == Pack([UNTOUCHED; 4]))
                );
            }
        }
        ranks.assert_guards();
    }
}

#[test]
fn a_pull_reads_what_its_source_wrote() {
    let ranks = Ranks::new(2, 300);
    for (packs, run) in [(300, 1), (33, 2)] {
        ranks.run(|rank| {
            let group = ranks.group(rank);
            let place_bytes = ranks.place_bytes;
            let fill = Push { group, place_bytes, packs, first: 0, targets: 1, run, passes: 1, reserved: 0 };
            // SAFETY: the parameters are as their documentation says.
            launch(ONE_WARP, || unsafe { links::push(&fill) });
        });
        let before = ranks.place(1, 0);
        let params = Pull {
            group: ranks.group(1),
            place_bytes: ranks.place_bytes,
            packs,
            source: 0,
            passes: 2,
            reserved: 0,
        };
        // SAFETY: as above; nobody writes meanwhile.
        launch(Launch { blocks: 3, cluster: 1, threads: 32 }, || unsafe { links::pull(&params) });
        let (read, rest) = (ranks.place(1, 0), &before[packs as usize..]);
        assert!(read[..packs as usize].iter().copied().eq(patterns(0, run, packs)));
        assert_eq!(&read[packs as usize..], rest);
    }
    ranks.assert_guards();
}

#[test]
fn a_ping_makes_all_its_trips_and_counts_on_where_the_last_one_ended() {
    let ranks = Ranks::new(2, 1);
    let clocks: Vec<Buffer> = (0..2).map(|_| Buffer::new(8, 0)).collect();
    let trips = WARM_UP_TRIPS + 20;
    for round in 0..3 {
        ranks.run(|rank| {
            let params = ping(&ranks, rank, &clocks[rank as usize], 1 + round * trips, trips);
            // SAFETY: the parameters are as their documentation says.
            launch(ONE_WARP, || unsafe { links::ping(&params) });
        });
        for (rank, clock) in (0..).zip(&clocks) {
            let flag = ranks.flag(rank, 1 - rank).map(|word| word.load(Ordering::Relaxed));
            assert_eq!((flag, ranks.status(rank, Status::FAILED)), ([(round + 1) * trips; 4], 0));
            assert!(clock.get::<u64>()[0] > 0);
        }
    }
    ranks.assert_guards();
}

#[test]
fn nobody_leaves_a_meeting_before_everybody_has_come() {
    let ranks = Ranks::new(3, 1);
    let come = AtomicU32::new(0);
    for count in 1..=4 {
        ranks.run(|rank| {
            // One comes late, and not always the same.
            if rank == count % 3 {
                thread::sleep(Duration::from_millis(20));
            }
            come.fetch_add(1, Ordering::SeqCst);
            let params = Meet { group: ranks.group(rank), count, reserved: 0 };
            // SAFETY: the parameters are as their documentation says.
            launch(ONE_WARP, || unsafe { links::meet(&params) });
            assert!(come.load(Ordering::SeqCst) >= 3 * count, "rank {rank} left meeting {count} early");
        });
    }
    assert!((0..3).all(|rank| ranks.status(rank, Status::FAILED) == 0));
    // One that is further already has come to all meetings before.
    let params = Meet { group: ranks.group(0), count: 5, reserved: 0 };
    ranks.set_flag(0, 1, 7);
    ranks.set_flag(0, 2, 5);
    // SAFETY: as above.
    launch(ONE_WARP, || unsafe { links::meet(&params) });
    assert_eq!(ranks.status(0, Status::FAILED), 0);
    ranks.assert_guards();
}

#[test]
fn a_wait_for_a_rank_that_does_not_come_ends_at_the_deadline_and_says_so() {
    let clock = Buffer::new(8, 0);
    for meets in [false, true] {
        let mut ranks = Ranks::new(2, 1);
        ranks.timeout = Duration::from_millis(50);
        let run = || {
            if meets {
                let params = Meet { group: ranks.group(1), count: 1, reserved: 0 };
                // SAFETY: the parameters are as their documentation says.
                launch(ONE_WARP, || unsafe { links::meet(&params) });
            } else {
                let params = ping(&ranks, 1, &clock, 1, 100);
                // SAFETY: as above.
                launch(ONE_WARP, || unsafe { links::ping(&params) });
            }
        };
        run();
        let status = |offset| ranks.status(1, offset);
        assert_eq!([Status::FAILED, Status::MISSING_RANK, Status::HOP].map(status), [TIMED_OUT, 0, HOP]);
        assert_eq!([Status::CALL, Status::CALL + 4].map(status), [u32::MAX; 2]);
        // The rank that answers has sent nothing, nor does it send or wait from now on.
        let sent = |rank: u32| ranks.flag(rank, 1 - rank)[0].load(Ordering::Relaxed);
        let before = sent(0);
        assert_eq!(before, u32::from(meets));
        run();
        assert_eq!(sent(0), before);
        ranks.assert_guards();
    }
}

#[test]
fn the_host_s_word_ends_a_wait() {
    let ranks = Ranks::new(2, 1);
    let clock = Buffer::new(8, 0);
    thread::scope(|scope| {
        scope.spawn(|| {
            let params = ping(&ranks, 0, &clock, 1, 100);
            // SAFETY: the parameters are as their documentation says.
            launch(ONE_WARP, || unsafe { links::ping(&params) });
        });
        thread::sleep(Duration::from_millis(20));
        ranks.statuses[0].atomic(Status::ABORT).store(1, Ordering::Relaxed);
    });
    assert_eq!([Status::FAILED, Status::MISSING_RANK].map(|offset| ranks.status(0, offset)), [ABORTED, 1]);
    // The first trip of all was under way.
    assert_eq!(ranks.status(0, Status::TOKEN), 0);
    assert_eq!(ranks.flag(1, 0)[0].load(Ordering::Relaxed), 1);
    ranks.assert_guards();
}
