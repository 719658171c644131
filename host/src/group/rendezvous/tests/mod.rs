//! Groups whose ranks are threads of this process. Ranks that are processes, and are killed, are in
//! `tests/rank_processes.rs`.

mod hosts;
mod strangers;

use std::{
    io::{Read as _, Seek as _, Write as _},
    os::fd::AsFd as _,
    sync::atomic::{AtomicU32, Ordering},
};

use rustix::fs::{MemfdFlags, memfd_create};

use super::*;

const DEADLINE: Duration = Duration::from_secs(10);
const SHORT: Duration = Duration::from_millis(400);

fn new_key() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("test {} {}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

fn member(rank: u32, world_size: u32, key: &str) -> Membership<'_> {
    Membership { rank, world_size, key, config: b"settings", deadline: DEADLINE }
}

/// Runs `rank` as every rank of a group, each on a thread; the results by rank.
fn on_ranks<T: Send>(world_size: u32, rank: impl Fn(Group) -> T + Sync) -> Vec<T> {
    on_members(&new_key(), world_size, DEADLINE, |group| rank(group.expect("the group comes together")))
}

fn on_members<T: Send>(
    key: &str,
    world_size: u32,
    deadline: Duration,
    rank: impl Fn(Result<Group, Error>) -> T + Sync,
) -> Vec<T> {
    let ranks: Vec<_> =
        (0..world_size).map(|rank| Membership { deadline, ..member(rank, world_size, key) }).collect();
    join_all(&ranks, rank)
}

/// Runs `rank` for every member at once, each on a thread.
fn join_all<T: Send>(members: &[Membership<'_>], rank: impl Fn(Result<Group, Error>) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let threads: Vec<_> =
            members.iter().map(|member| scope.spawn(|| rank(Group::join(member)))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no rank panics")).collect()
    })
}

fn loss<T: std::fmt::Debug>(result: Result<T, Error>) -> Lost {
    match result {
        Err(Error::Lost(lost)) => lost,
        other => panic!("a lost rank, not {other:?}"),
    }
}

fn assert_all_lose<T: std::fmt::Debug>(results: Vec<Result<T, Error>>, rank: u32, how: How, detail: &str) {
    for result in results {
        let lost = loss(result);
        assert_eq!((lost.rank, lost.how), (rank, how), "{lost}");
        assert!(lost.detail.contains(detail), "{lost}");
    }
}

#[test]
fn every_operation_works_among_2_3_and_16_ranks() {
    for world_size in [2, 3, 16] {
        on_ranks(world_size, |group| {
            let rank = group.rank();
            assert_eq!(group.world_size(), world_size);
            for round in 0..10_u32 {
                // Contributions of different lengths, none included.
                let gathered =
                    group.all_gather(&vec![rank as u8; (rank * round) as usize]).expect("gathered");
                let expected: Vec<_> =
                    (0..world_size).map(|rank| vec![rank as u8; (rank * round) as usize]).collect();
                assert_eq!(gathered, expected);

                let text = format!("round {round}");
                let given = (rank == 0).then_some(text.as_bytes());
                assert_eq!(group.broadcast(given).expect("broadcast"), text.as_bytes());

                let mut file = (rank == 0).then(|| {
                    std::fs::File::from(memfd_create("shared", MemfdFlags::CLOEXEC).expect("a file"))
                });
                if let Some(file) = &mut file {
                    file.write_all(text.as_bytes()).expect("written");
                }
                let shared = group.share_fd(file.as_ref().map(|file| file.as_fd())).expect("shared");
                // One rank after the other: they share the position in the file.
                for turn in 0..world_size {
                    if turn == rank {
                        let (mut shared, mut read) =
                            (std::fs::File::from(shared.try_clone().expect("a copy")), String::new());
                        shared.rewind().expect("rewound");
                        shared.read_to_string(&mut read).expect("read");
                        assert_eq!(read, text);
                    }
                    group.barrier().expect("barrier");
                }
            }
            assert_eq!(group.lost(), None);
            group.farewell().expect("farewell");
        });
    }
}

#[test]
fn the_longest_contribution_arrives_and_a_longer_one_is_an_error() {
    on_ranks(3, |group| {
        let longest = vec![group.rank() as u8; MAX_MESSAGE];
        let gathered = group.all_gather(&longest).expect("gathered");
        assert!((0..3).all(|rank| gathered[rank] == vec![rank as u8; MAX_MESSAGE]));
        let error = group.all_gather(&vec![0; MAX_MESSAGE + 1]).expect_err("too long");
        assert!(matches!(error, Error::TooLong { bytes, .. } if bytes == MAX_MESSAGE + 1));
        group.farewell().expect("farewell");
    });
}

#[test]
fn only_rank_0_is_a_source() {
    on_ranks(2, |group| {
        let wrong = (group.rank() != 0).then_some(&b"x"[..]);
        let error = group.broadcast(wrong).expect_err("the wrong source");
        assert!(matches!(error, Error::Root { rank, .. } if rank == group.rank()), "{error}");
        group.farewell().expect("farewell");
    });
}

#[test]
fn a_barrier_holds_until_the_last_rank_comes() {
    let come = AtomicU32::new(0);
    on_ranks(5, |group| {
        thread::sleep(Duration::from_millis(20) * group.rank());
        come.fetch_add(1, Ordering::SeqCst);
        group.barrier().expect("barrier");
        assert_eq!(come.load(Ordering::SeqCst), 5);
        group.farewell().expect("farewell");
    });
}

#[test]
fn groups_follow_each_other_under_one_key() {
    let key = new_key();
    on_members(&key, 3, DEADLINE, |first| {
        let first = first.expect("the first group");
        for _ in 0..20 {
            let second = Group::join(&member(first.rank(), 3, &key)).expect("a group beside the first");
            second.barrier().expect("barrier");
            second.farewell().expect("farewell");
        }
        first.farewell().expect("farewell");
    });
}

#[test]
fn a_rank_that_gives_up_is_heard_by_all_with_its_reason() {
    for quitter in [0, 2] {
        let results = on_ranks(4, |group| {
            if group.rank() == quitter {
                group.abort("the result is wrong");
            }
            group.barrier()
        });
        assert_all_lose(results, quitter, How::GaveUp, "the result is wrong");
    }
}

#[test]
fn a_group_dropped_without_farewell_raises_the_alarm() {
    for quitter in [0, 1] {
        on_ranks(3, |group| {
            if group.rank() == quitter {
                return drop(group);
            }
            let (alarm, until) = (group.alarm(), Instant::now() + DEADLINE);
            while alarm.lost_rank().is_none() {
                assert!(Instant::now() < until, "no alarm");
                thread::yield_now();
            }
            assert_eq!(alarm.lost_rank(), Some(quitter));
            let lost = group.lost().expect("a loss");
            assert_eq!((lost.rank, lost.how), (quitter, How::GaveUp));
        });
    }
}

#[test]
fn any_thread_can_end_the_group_and_every_rank_acts_on_it_once() {
    let acted = [const { AtomicU32::new(0) }; 3];
    let results = on_ranks(3, |group| {
        let rank = group.rank() as usize;
        // What is shared with the group's thread must live as long as it does.
        let counter = |count: &Arc<AtomicU32>| {
            let count = Arc::clone(count);
            move || {
                count.fetch_add(1, Ordering::SeqCst);
            }
        };
        let (count, dropped, late) = (Arc::default(), Arc::default(), Arc::default());
        let act = group.control().on_loss(Box::new(counter(&count)));
        drop(group.control().on_loss(Box::new(counter(&dropped))));
        let control = group.control();
        // Nobody aborts before every rank has come so far.
        group.barrier().expect("all are there");
        thread::scope(|scope| {
            if rank == 1 {
                scope.spawn(move || {
                    control.abort("told to");
                    control.abort("told to again");
                });
            }
            let until = Instant::now() + DEADLINE;
            // The thread that aborts may start after many a barrier.
            let mut result = group.barrier();
            while result.is_ok() && Instant::now() < until {
                result = group.barrier();
            }
            while count.load(Ordering::SeqCst) == 0 && Instant::now() < until {
                thread::yield_now();
            }
            acted[rank].fetch_add(count.load(Ordering::SeqCst), Ordering::SeqCst);
            drop(act);
            // After a loss, at once.
            drop(group.control().on_loss(Box::new(counter(&late))));
            assert_eq!((late.load(Ordering::SeqCst), dropped.load(Ordering::SeqCst)), (1, 0));
            result
        })
    });
    assert_all_lose(results, 1, How::GaveUp, "told to");
    assert!(acted.iter().all(|count| count.load(Ordering::SeqCst) == 1), "{acted:?}");
}

#[test]
fn a_late_rank_is_named_to_all_within_the_deadline() {
    for late in [0, 2] {
        let started = Instant::now();
        let results = on_members(&new_key(), 3, SHORT, |group| {
            let group = group.expect("the group comes together");
            if group.rank() == late {
                while group.lost().is_none() && started.elapsed() < DEADLINE {
                    thread::sleep(Duration::from_millis(5));
                }
            }
            group.barrier()
        });
        assert_all_lose(results, late, How::Late, "the barrier within 400.0ms");
        assert!(started.elapsed() < 4 * SHORT, "{:?}", started.elapsed());
    }
}

#[test]
fn ranks_at_different_operations_are_out_of_step() {
    let results =
        on_ranks(
            3,
            |group| {
                if group.rank() == 1 { group.broadcast(None).map(drop) } else { group.barrier() }
            },
        );
    for result in results {
        let lost = loss(result);
        assert_eq!(lost.how, How::OutOfStep);
        assert!(lost.detail.contains("the barrier") && lost.detail.contains("the broadcast"), "{lost}");
    }
}

#[test]
fn a_farewell_of_some_is_none() {
    let results = on_ranks(2, |group| if group.rank() == 0 { group.farewell() } else { group.barrier() });
    results.into_iter().for_each(|result| assert_eq!(loss(result).how, How::OutOfStep));
}

#[test]
fn a_missing_rank_is_named_at_the_deadline() {
    let key = new_key();
    let started = Instant::now();
    let members = [0, 1, 3].map(|rank| Membership { deadline: SHORT, ..member(rank, 5, &key) });
    let results = join_all(&members, |group| group);
    assert_all_lose(results, 2, How::Late, "the rendezvous within 400.0ms, nor did rank 4");
    assert!(started.elapsed() < 4 * SHORT, "{:?}", started.elapsed());
}

#[test]
fn a_missing_rank_0_is_named_at_the_deadline() {
    let key = new_key();
    let members = [1, 2].map(|rank| Membership { deadline: SHORT, ..member(rank, 3, &key) });
    assert_all_lose(join_all(&members, |group| group), 0, How::Late, "the rendezvous within 400.0ms");
}

#[test]
fn a_rank_that_declines_is_named_to_all_at_once() {
    for declining in 0..3 {
        let (key, started) = (&new_key(), Instant::now());
        let why = "an option is not valid";
        let lost: Vec<Lost> = thread::scope(|scope| {
            let rank = |rank: u32| {
                let member = member(rank, 3, key);
                if rank == declining {
                    Group::decline(&member, None, why)
                } else {
                    loss(Group::join(&member))
                }
            };
            let threads = [0, 1, 2].map(|number| scope.spawn(move || rank(number)));
            threads.map(|thread| thread.join().expect("no rank panics")).into()
        });
        let expected = Lost { rank: declining, how: How::GaveUp, detail: why.to_owned() };
        assert!(lost.iter().all(|lost| *lost == expected), "{lost:?}");
        assert!(started.elapsed() < DEADLINE / 2, "{:?}", started.elapsed());
    }
}

#[test]
fn ranks_that_all_decline_are_told_of_rank_0_however_many_they_are() {
    let key = &new_key();
    let lost: Vec<Lost> = thread::scope(|scope| {
        let decline =
            |rank| move || Group::decline(&member(rank, 100, key), None, &format!("rank {rank}'s reason"));
        let threads: Vec<_> = (0..100).rev().map(|rank| scope.spawn(decline(rank))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no rank panics")).collect()
    });
    assert!(lost.iter().all(|lost| lost.rank == 0 && lost.detail == "rank 0's reason"), "{lost:?}");
}

#[test]
fn a_rank_that_declines_alone_keeps_its_reason() {
    let declined = |rank, world_size| Group::decline(&member(rank, world_size, &new_key()), None, "a reason");
    let own = |rank| Lost { rank, how: How::GaveUp, detail: "a reason".to_owned() };
    assert_eq!(declined(1, 2), own(1));
    // Too many to be told, and one that is none of the group's.
    let started = Instant::now();
    assert_eq!([declined(0, u32::MAX), declined(7, 7)], [own(0), own(7)]);
    assert!(started.elapsed() < DEADLINE / 2, "{:?}", started.elapsed());
}

#[test]
fn impossible_memberships_are_errors() {
    for (rank, world_size) in [(0, 0), (0, 1), (0, 17), (2, 2), (u32::MAX, 4)] {
        let error = Group::join(&member(rank, world_size, "unused")).expect_err("no group");
        assert!(error.to_string().contains("2 to 16"), "{error}");
    }
}

#[test]
fn any_deadline_is_taken() {
    let key = new_key();
    let results = on_members(&key, 2, Duration::MAX, |group| group?.farewell());
    assert!(results.iter().all(Result::is_ok), "{results:?}");
    assert_all_lose(
        vec![Group::join(&Membership { deadline: Duration::ZERO, ..member(0, 2, &key) })],
        1,
        How::Late,
        "",
    );
}

#[test]
fn a_group_splits_into_groups_that_work_at_the_same_time() {
    // Colors by rank: two groups, and a rank in neither.
    let colors = [Some(7), Some(3), None, Some(7), Some(3), Some(3)];
    let results = on_ranks(6, |world| {
        let own = world.split(colors[world.rank() as usize]).expect("split");
        let Some(own) = own else {
            assert!(world.split(None).expect("split").is_none());
            world.farewell().expect("farewell");
            return None;
        };
        // Different operations in each, and so often that they overlap.
        for round in 0..if own.world_size() == 2 { 50 } else { 20_u8 } {
            let gathered = own.all_gather(&[world.rank() as u8, round]).expect("gathered");
            assert!(gathered.iter().all(|part| part[1] == round));
            own.barrier().expect("a barrier");
        }
        let members = own.all_gather(&[world.rank() as u8]).expect("gathered").concat();
        let place = (own.rank(), members);
        own.farewell().expect("farewell");
        // The group that was split is as good as ever, and can be split again.
        let all = world.split(Some(0)).expect("split").expect("a group");
        assert_eq!(all.world_size(), 5);
        all.farewell().expect("farewell");
        world.farewell().expect("farewell");
        Some(place)
    });
    let expected = [
        (0, [0, 3].to_vec()),
        (0, [1, 4, 5].to_vec()),
        (1, vec![0, 3]),
        (1, vec![1, 4, 5]),
        (2, vec![1, 4, 5]),
    ];
    assert_eq!(results.into_iter().flatten().collect::<Vec<_>>(), expected);
}

#[test]
fn a_rank_that_is_lost_to_one_group_is_not_lost_to_another() {
    on_ranks(4, |world| {
        let own = world.split(Some(world.rank() / 2)).expect("split").expect("a group");
        match world.rank() {
            0 => drop(own),
            1 => {
                let lost = loss(own.barrier());
                assert_eq!((lost.rank, lost.how), (0, How::GaveUp));
            }
            _ => {
                own.barrier().expect("nobody is lost to this group");
                own.farewell().expect("farewell");
            }
        }
        world.farewell().expect("nobody is lost to the world");
    });
}

#[test]
fn a_group_of_one_is_refused_on_every_rank() {
    for error in on_ranks(3, |world| {
        let error = world.split(Some(world.rank() / 2)).map(drop).expect_err("a rank alone");
        world.farewell().expect("farewell");
        error
    }) {
        assert!(matches!(error, Error::Membership { rank: 2, world_size: 1 }), "{error}");
    }
}
