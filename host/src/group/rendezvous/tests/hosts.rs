//! Groups of several hosts, all of which are this one: they meet over TCP on the loopback address.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
};

use proptest::prelude::{any, prop, proptest};

use super::{
    super::{
        frame::Frame,
        secret::{Challenge, key_digest},
        stranger::{Said, Stranger},
    },
    *,
};
use crate::fuzz::cases;

const SECRET: &str = "0123456789abcdef0123456789abcdef";

/// An address of this test's own, below the ports that the kernel gives to connections.
fn new_address() -> Address {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let port = 10_000 + (std::process::id() * 100 + COUNT.fetch_add(1, Ordering::Relaxed)) % 20_000;
    Address::new("127.0.0.1", port as u16).expect("an address")
}

fn network(address: &Address, host: &str) -> Network {
    let secret = Secret::new(SECRET).expect("a secret");
    Network { address: address.clone(), secret, host: host.to_owned() }
}

/// Two ranks a host.
fn host(rank: u32) -> String {
    format!("host-{}", rank / 2)
}

fn short(rank: u32, world_size: u32) -> Membership<'static> {
    Membership { deadline: SHORT, ..member(rank, world_size, "a key") }
}

/// For tests in which an end may be a deadline, and that are many.
fn shortest(rank: u32) -> Membership<'static> {
    Membership { deadline: SHORT / 4, ..member(rank, 2, "a key") }
}

/// Runs `rank` as each of `ranks` of a group over `address`, each on a thread; the results in the same order.
fn at<T: Send>(
    address: &Address,
    ranks: &[Membership<'_>],
    rank: impl Fn(Result<Group, Error>) -> T + Sync,
) -> Vec<T> {
    let join =
        |member: &Membership<'_>| rank(Group::join_over(member, &network(address, &host(member.rank))));
    thread::scope(|scope| {
        let threads: Vec<_> = ranks.iter().map(|member| scope.spawn(|| join(member))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no rank panics")).collect()
    })
}

fn on_hosts<T: Send>(world_size: u32, rank: impl Fn(Group) -> T + Sync) -> Vec<T> {
    let members: Vec<_> = (0..world_size).map(|rank| member(rank, world_size, "a key")).collect();
    at(&new_address(), &members, |group| rank(group.expect("the group comes together")))
}

/// A connection to rank 0, as soon as it listens.
fn stranger(address: &Address) -> TcpStream {
    let until = Instant::now() + DEADLINE;
    loop {
        match TcpStream::connect(("127.0.0.1", address.port())) {
            Ok(stranger) => return stranger,
            Err(error) => assert!(Instant::now() < until, "rank 0 does not listen: {error}"),
        }
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn every_operation_works_among_2_5_and_64_ranks_and_all_know_the_hosts() {
    for world_size in [2, 5, 64] {
        on_hosts(world_size, |group| {
            let hosts: Vec<_> = (0..world_size).map(host).collect();
            assert_eq!(group.hosts(), hosts);
            assert_eq!(Bootstrap::host(&group).expect("a name"), host(group.rank()).into_bytes());
            for round in 0..3 {
                let gathered = group.all_gather(&vec![group.rank() as u8; round]).expect("gathered");
                assert!((0..).zip(gathered).all(|(rank, part)| part == vec![rank as u8; round]));
                let given = (group.rank() == 0).then_some(&b"text"[..]);
                assert_eq!(group.broadcast(given).expect("broadcast"), b"text");
                group.barrier().expect("barrier");
            }
            group.farewell().expect("farewell");
        });
    }
}

#[test]
fn ranks_meet_by_version_6_of_the_protocol() {
    if TcpListener::bind("[::1]:0").is_err() {
        return eprintln!("not tested: there is no IPv6 here");
    }
    let address = Address::new("::1", new_address().port()).expect("an address");
    at(&address, &[0, 1].map(|rank| member(rank, 2, "a key")), |group| {
        let group = group.expect("the group comes together");
        group.barrier().expect("barrier");
        group.farewell().expect("farewell");
    });
}

#[test]
fn the_longest_contribution_crosses_hosts() {
    on_hosts(3, |group| {
        let gathered = group.all_gather(&vec![group.rank() as u8; MAX_MESSAGE]).expect("gathered");
        assert!((0..3).all(|rank| gathered[rank] == vec![rank as u8; MAX_MESSAGE]));
        group.farewell().expect("farewell");
    });
}

#[test]
fn groups_follow_each_other_at_one_address() {
    let address = new_address();
    let members = [0, 1, 2].map(|rank| member(rank, 3, "a key"));
    at(&address, &members, |first| {
        let first = first.expect("the first group");
        for _ in 0..10 {
            let member = member(first.rank(), 3, "another key");
            let second =
                Group::join_over(&member, &network(&address, "a")).expect("a group beside the first");
            second.barrier().expect("barrier");
            second.farewell().expect("farewell");
        }
        first.farewell().expect("farewell");
    });
}

#[test]
fn a_file_is_shared_within_a_host_and_not_between_hosts() {
    let share = |group: &Group| {
        let own = (group.rank() == 0).then(|| memfd_create("shared", MemfdFlags::CLOEXEC).expect("a file"));
        group.share_fd(own.as_ref().map(|file| file.as_fd()))
    };
    on_hosts(2, |group| {
        share(&group).expect("shared");
        group.farewell().expect("farewell");
    });
    on_hosts(3, |group| {
        let error = share(&group).expect_err("another host");
        assert_eq!(
            error.to_string(),
            "a file is shared within a host, and rank 2 is on another (host host-1)"
        );
        let own = group.split(Some(group.rank() / 2).filter(|host| *host == 0)).expect("split");
        if let Some(own) = own {
            share(&own).expect("shared");
            own.farewell().expect("farewell");
        }
        group.farewell().expect("farewell");
    });
}

#[test]
fn a_group_splits_within_hosts_and_across_them() {
    let results = on_hosts(8, |world| {
        let rank = world.rank();
        // Those of a host, those of a place on each host, and some whose first is not on the host of rank 0.
        let colors = [Some(rank / 2), Some(rank % 2), (2..7).contains(&rank).then_some(0)];
        let groups = colors.map(|color| world.split(color).expect("split"));
        let members = groups.map(|group| {
            let Some(group) = group else { return Vec::new() };
            let members = group.all_gather(&[rank as u8]).expect("gathered").concat();
            group.farewell().expect("farewell");
            members
        });
        world.farewell().expect("farewell");
        members
    });
    assert_eq!(results[0], [vec![0, 1], vec![0, 2, 4, 6], vec![]]);
    assert_eq!(results[5], [vec![4, 5], vec![1, 3, 5, 7], vec![2, 3, 4, 5, 6]]);
}

#[test]
fn a_lost_or_late_rank_is_named_to_all_with_its_host() {
    let results = on_hosts(4, |mut group| match group.rank() {
        3 => {
            // As if the process had been killed: the connection ends without a word.
            group.shared.command(Command::Stop);
            if let Some(monitor) = group.monitor.take() {
                monitor.join().expect("no panic");
            }
            Ok(())
        }
        _ => group.barrier(),
    });
    assert_all_lose(results.into_iter().take(3).collect(), 3, How::Ended, "a farewell (host host-1)");

    let members = [0, 1, 2].map(|rank| short(rank, 3));
    let results = at(&new_address(), &members, |group| {
        let group = group.expect("the group comes together");
        if group.rank() == 2 {
            thread::sleep(2 * SHORT);
        }
        group.barrier()
    });
    assert_all_lose(results, 2, How::Late, "the barrier within 400.0ms (host host-1)");
}

#[test]
fn a_rank_that_declines_is_named_to_all_at_once() {
    for declining in 0..3 {
        let (address, started) = (new_address(), Instant::now());
        let lost: Vec<Lost> = thread::scope(|scope| {
            let rank = |rank: u32| {
                let (member, network) = (member(rank, 3, "a key"), network(&address, "a"));
                if rank == declining {
                    Group::decline(&member, Some(&network), "a reason")
                } else {
                    loss(Group::join_over(&member, &network))
                }
            };
            let threads = [0, 1, 2].map(|number| scope.spawn(move || rank(number)));
            threads.map(|thread| thread.join().expect("no rank panics")).into()
        });
        let expected = Lost { rank: declining, how: How::GaveUp, detail: "a reason".to_owned() };
        assert!(lost.iter().all(|lost| *lost == expected), "{lost:?}");
        assert!(started.elapsed() < DEADLINE / 2, "{:?}", started.elapsed());
    }
}

#[test]
fn a_rank_that_does_not_come_is_named_with_the_address() {
    let started = Instant::now();
    let members = [0, 1].map(|rank| short(rank, 4));
    let address = new_address();
    let expected = format!(
        "the rendezvous within 400.0ms, nor did rank 3: rank 0 on host host-0 listened at {address} under the key 'a key'"
    );
    assert_all_lose(at(&address, &members, |group| group), 2, How::Late, &expected);
    assert!(started.elapsed() < 4 * SHORT, "{:?}", started.elapsed());
    let results = at(&address, &[short(3, 4)], |group| group);
    assert_all_lose(results, 0, How::Late, "rank 3 on host host-1 looked for rank 0 at 127.0.0.1:");
}

#[test]
fn a_rank_with_another_secret_is_told_at_once_and_does_not_end_the_group() {
    let address = new_address();
    thread::scope(|scope| {
        let root = scope.spawn(|| at(&address, &[member(0, 2, "a key")], |group| group));
        let other = Network {
            secret: Secret::new(&SECRET.replace('f', "0")).expect("a secret"),
            ..network(&address, "b")
        };
        let started = Instant::now();
        let error = Group::join_over(&member(1, 2, "a key"), &other).expect_err("no group");
        assert!(matches!(&error, Error::Unproven { address: at } if *at == address), "{error}");
        assert!(started.elapsed() < DEADLINE / 2, "{:?}", started.elapsed());
        // The seat is free.
        at(&address, &[member(1, 2, "a key")], |group| group.expect("joined").abort("done"));
        root.join().expect("no panic").remove(0).expect("joined");
    });
}

#[test]
fn rank_0_says_why_it_turned_ranks_away() {
    let cases = [
        ("a key", SECRET.replace('f', "0"), "it does not have this rank's secret"),
        ("its own key", SECRET.to_owned(), "it is a rank of a job or group with another key"),
    ];
    for (key, secret, why) in cases {
        let address = new_address();
        let other = Network { secret: Secret::new(&secret).expect("a secret"), ..network(&address, "b") };
        let lost = thread::scope(|scope| {
            let root = scope.spawn(|| at(&address, &[short(0, 2)], |group| group));
            let member = Membership { deadline: SHORT, ..member(1, 2, key) };
            Group::join_over(&member, &other).expect_err("no group");
            loss(root.join().expect("no panic").remove(0))
        });
        assert_eq!((lost.rank, lost.how), (1, How::Late));
        assert!(lost.detail.contains("turned away, the last from 127.0.0.1: "), "{lost}");
        assert!(lost.detail.contains(why), "{lost}");
    }
}

#[test]
fn members_that_do_not_fit_are_named_to_all_with_their_host() {
    let fits = |rank| member(rank, 3, "a key");
    let cases = [
        ([fits(0), fits(1), fits(1)], 1, "started twice"),
        ([fits(0), fits(1), Membership { config: b"other", ..fits(2) }], 2, "same options (host host-1)"),
        (
            [fits(0), Membership { world_size: 2, ..fits(1) }, fits(2)],
            1,
            "for a group of 2 ranks, rank 0 for 3",
        ),
    ];
    for (members, rank, detail) in cases {
        let results = at(&new_address(), &members, |group| group);
        assert_all_lose(results, rank, How::Refused, detail);
    }
}

#[test]
fn a_rank_0_that_ends_while_ranks_gather_is_named_at_once() {
    let (address, started) = (new_address(), Instant::now());
    let listener = TcpListener::bind(("127.0.0.1", address.port())).expect("a listener");
    thread::scope(|scope| {
        let rank = scope.spawn(|| at(&address, &[member(1, 3, "a key")], |group| group));
        let (socket, _) = listener.accept().expect("a connection");
        socket.set_nonblocking(true).expect("non-blocking");
        let mut rank_1 = Stranger::of_network(socket.into());
        while !matches!(
            rank_1.hear(Some(&network(&address, "a")), "a key", MAX_MESSAGE).expect("heard"),
            Said::Word(_)
        ) {
            assert!(started.elapsed() < DEADLINE, "no hello");
            thread::yield_now();
        }
        drop((listener, rank_1));
        assert_all_lose(rank.join().expect("no panic"), 0, How::Ended, "");
    });
    assert!(started.elapsed() < DEADLINE / 2, "{:?}", started.elapsed());
}

#[test]
fn strangers_neither_end_nor_delay_a_group() {
    let address = new_address();
    let challenge = Challenge { rank: 1, world_size: 2, key: [0; 32], nonce: [0; 32] };
    let hello = Frame::Hello {
        rank: 1,
        world_size: 2,
        version: String::new(),
        host: String::new(),
        config: Vec::new(),
    };
    let failed = Frame::Failed(Lost { rank: 1, how: How::GaveUp, detail: "a lie".to_owned() });
    let noise: [Vec<u8>; 7] = [
        Vec::new(),
        b"GET / HTTP/1.0\r\n\r\n".to_vec(),
        b"FCRV".to_vec(),
        Frame::Challenge(challenge).encode(),
        hello.encode(),
        failed.encode(),
        Frame::Proof([0; 32]).encode(),
    ];
    thread::scope(|scope| {
        let root = scope.spawn(|| at(&address, &[member(0, 2, "a key")], |group| group));
        // Some stay, some leave; more than rank 0 keeps.
        let mut staying = Vec::new();
        for round in 0..40 {
            for bytes in &noise {
                let mut other = stranger(&address);
                // Rank 0 may have sent it away already.
                let _ = other.write_all(bytes);
                if round % 2 == 0 {
                    staying.push(other);
                }
            }
        }
        let started = Instant::now();
        at(&address, &[member(1, 2, "a key")], |group| group.expect("joined").abort("done"));
        assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
        root.join().expect("no panic").remove(0).expect("joined");
    });
}

#[test]
fn a_stranger_that_says_nothing_is_sent_away_in_time() {
    let address = new_address();
    thread::scope(|scope| {
        let root = scope.spawn(|| at(&address, &[member(0, 2, "a key")], |group| group));
        let mut silent = stranger(&address);
        let started = Instant::now();
        silent.set_read_timeout(Some(DEADLINE)).expect("a limit");
        assert_eq!(silent.read(&mut [0; 16]).expect("an end"), 0);
        assert!((2..5).contains(&started.elapsed().as_secs()), "{:?}", started.elapsed());
        at(&address, &[member(1, 2, "a key")], |group| group.expect("joined").abort("done"));
        root.join().expect("no panic").remove(0).expect("joined");
    });
}

/// Joins as rank 1 while a false rank 0 answers with `answer` and leaves.
fn join_false_rank_0(answer: &[u8]) -> Result<Group, Error> {
    let address = new_address();
    let listener = TcpListener::bind(("127.0.0.1", address.port())).expect("a listener");
    thread::scope(|scope| {
        let rank = scope.spawn(|| at(&address, &[shortest(1)], |group| group));
        let (mut root, _) = listener.accept().expect("a connection");
        // The rank may have heard enough before all is sent.
        let _ = root.write_all(answer);
        // All of it is there before the end, whatever the rank has sent.
        let _ = root.shutdown(Shutdown::Write);
        drop(listener);
        let result = rank.join().expect("no panic").remove(0);
        drop(root);
        result
    })
}

#[test]
fn a_rank_believes_nobody_who_has_not_the_secret() {
    let lie = Frame::Failed(Lost { rank: 0, how: How::GaveUp, detail: "a lie".to_owned() });
    let answers = [
        lie,
        Frame::Welcome { hosts: vec![host(0), host(1)] },
        Frame::Answer { nonce: [0; 32], proof: [0; 32] },
    ];
    for answer in answers {
        let error = join_false_rank_0(&answer.encode()).expect_err("no group");
        assert!(matches!(error, Error::Unproven { .. }), "{answer:?}: {error}");
    }
}

/// Forwards a rank's connection to rank 0, and changes one byte, at `at` of those that go `up` or down, by `change`.
fn forward_changed(listener: &TcpListener, root: u16, up: bool, at: usize, change: u8) {
    let (rank, _) = listener.accept().expect("a connection");
    // On a machine with too much to do, rank 0 may have waited its whole time and be gone.
    let until = Instant::now() + SHORT;
    let root = loop {
        match TcpStream::connect(("127.0.0.1", root)) {
            Ok(root) => break root,
            Err(_) if Instant::now() < until => thread::sleep(Duration::from_millis(1)),
            Err(_) => return,
        }
    };
    let copy = |mut from: &TcpStream, mut to: &TcpStream, changes: bool| {
        let (mut buffer, mut before) = ([0; 4096], 0);
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            if changes && (before..before + length).contains(&at) {
                buffer[at - before] ^= change;
            }
            before += length;
            if to.write_all(&buffer[..length]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    };
    thread::scope(|scope| {
        scope.spawn(|| copy(&rank, &root, up));
        copy(&root, &rank, !up);
    });
}

proptest! {
    // Threads and sockets take their time: fewer cases than usual, and as many more as are asked for.
    #![proptest_config(cases(16))]

    /// A byte that is changed on the way is never taken for what was sent: the group does not form or is lost, or the byte was
    /// past all that was said.
    #[test]
    fn any_change_on_the_way_is_an_error_and_no_other_result(up: bool, at in 0_usize..700, change in 1_u8..) {
        let (address, way) = (new_address(), new_address());
        let listener = TcpListener::bind(("127.0.0.1", way.port())).expect("a listener");
        let work = |group: Result<Group, Error>| {
            let group = group?;
            let gathered = group.all_gather(&[group.rank() as u8; 100])?;
            assert_eq!(gathered, [vec![0; 100], vec![1; 100]]);
            group.farewell()
        };
        thread::scope(|scope| {
            scope.spawn(|| forward_changed(&listener, address.port(), up, at, change));
            let rank = scope.spawn(|| {
                let results = Group::join_over(&shortest(1), &network(&way, "b"));
                work(results)
            });
            let root = work(Group::join_over(&shortest(0), &network(&address, "a")));
            let rank = rank.join().expect("no panic");
            // More bytes than these go either way before the farewell.
            if at < 300 {
                assert!(root.is_err() && rank.is_err(), "{root:?} {rank:?}");
            }
        });
    }

    /// Bytes of every kind, and right messages with some bytes changed.
    #[test]
    fn any_answer_of_a_false_rank_0_is_an_error(
        noise: Vec<u8>,
        right in any::<bool>(),
        changes in prop::collection::vec((0usize..90, any::<u8>()), 0..4),
    ) {
        let mut answer =
            if right { Frame::Answer { nonce: [1; 32], proof: [2; 32] }.encode() } else { noise };
        for (at, byte) in changes {
            if let Some(changed) = answer.get_mut(at) {
                *changed = byte;
            }
        }
        let error = join_false_rank_0(&answer).expect_err("no group");
        assert!(matches!(error, Error::Lost(_) | Error::Protocol(_) | Error::Unproven { .. }), "{error}");
    }

    /// Bytes of every kind, and a right challenge with some bytes changed and anything after it.
    #[test]
    fn any_bytes_of_a_stranger_leave_the_group_as_it_was(
        noise: Vec<u8>,
        right in any::<bool>(),
        changes in prop::collection::vec((0usize..90, any::<u8>()), 0..4),
    ) {
        let address = new_address();
        let key = key_digest("a key");
        let mut bytes = Vec::new();
        if right {
            bytes = Frame::Challenge(Challenge { rank: 1, world_size: 2, key, nonce: [7; 32] }).encode();
        }
        for (at, byte) in changes {
            if let Some(changed) = bytes.get_mut(at) {
                *changed = byte;
            }
        }
        bytes.extend(noise);
        thread::scope(|scope| {
            let root = scope.spawn(|| at(&address, &[member(0, 2, "a key")], |group| group));
            let mut other = stranger(&address);
            let _ = other.write_all(&bytes);
            at(&address, &[member(1, 2, "a key")], |group| group.expect("joined").abort("done"));
            root.join().expect("no panic").remove(0).expect("joined");
        });
    }
}
