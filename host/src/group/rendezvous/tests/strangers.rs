//! Strangers, who do not fit into a group or do not keep to the protocol: they speak to the sockets themselves.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
};

use proptest::prelude::{any, proptest};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};

use super::{
    super::{
        channel::Channel,
        frame::{Frame, HEADER_BYTES, PROTOCOL},
        join::address,
    },
    *,
};
use crate::fuzz::cases;

fn new_socket() -> OwnedFd {
    rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).expect("a socket")
}

/// A connection to where rank 0 of `key` listens, as soon as it does.
fn stranger(key: &str) -> UnixStream {
    stranger_at(&address(key).expect("an address"))
}

fn stranger_at(name: &SocketAddrUnix) -> UnixStream {
    let until = Instant::now() + DEADLINE;
    loop {
        let socket = new_socket();
        match rustix::net::connect(&socket, name) {
            Ok(()) => return socket.into(),
            Err(error) => assert!(Instant::now() < until, "rank 0 does not listen: {error}"),
        }
        thread::sleep(Duration::from_millis(1));
    }
}

fn hello(rank: u32, world_size: u32) -> Vec<u8> {
    let (version, config) = (env!("CARGO_PKG_VERSION").to_owned(), b"settings".to_vec());
    Frame::Hello { rank, world_size, version, host: String::new(), config }.encode()
}

#[test]
fn members_that_do_not_fit_are_named_to_all() {
    let key = &new_key();
    let fits = |rank| member(rank, 3, key);
    let cases = [
        ([fits(0), fits(1), fits(1)], 1, "started twice"),
        ([fits(0), fits(1), Membership { config: b"other", ..fits(2) }], 2, "other settings"),
        (
            [fits(0), Membership { world_size: 2, ..fits(1) }, fits(2)],
            1,
            "for a group of 2 ranks, rank 0 for 3",
        ),
        ([fits(0), fits(1), Membership { rank: 3, world_size: 4, ..fits(2) }], 3, "for a group of 4 ranks"),
    ];
    for (members, rank, detail) in cases {
        let started = Instant::now();
        assert_all_lose(join_all(&members, |group| group), rank, How::Refused, detail);
        assert!(started.elapsed() < DEADLINE / 2, "{detail}: {:?}", started.elapsed());
    }
}

#[test]
fn hellos_of_other_versions_or_impossible_ranks_are_refused_by_name() {
    let mut other_protocol = hello(1, 2);
    other_protocol[4..6].copy_from_slice(&(PROTOCOL + 1).to_le_bytes());
    let (version, host, config) = ("0.0.1".to_owned(), String::new(), b"settings".to_vec());
    let other_version = Frame::Hello { rank: 1, world_size: 2, version, host, config }.encode();
    let cases = [
        (other_protocol, 1, "protocol version 3"),
        (other_version, 1, "runs version \"0.0.1\""),
        (hello(2, 2), 2, "numbered from 0 to 1"),
        (hello(u32::MAX, 2), u32::MAX, "numbered from 0 to 1"),
        (hello(0, 2), 0, "started twice"),
    ];
    for (bytes, rank, detail) in cases {
        let key = new_key();
        thread::scope(|scope| {
            let root = scope.spawn(|| Group::join(&member(0, 2, &key)));
            let mut other = stranger(&key);
            other.write_all(&bytes).expect("sent");
            other.set_nonblocking(true).expect("non-blocking");
            let mut answers = Channel::new(other.into(), MAX_MESSAGE);
            assert_all_lose(vec![root.join().expect("no panic")], rank, How::Refused, detail);
            answers.fill();
            let answer = answers.next().expect("a message");
            assert!(
                matches!(&answer, Some(Frame::Failed(lost)) if lost.detail.contains(detail)),
                "{answer:?}"
            );
        });
    }
}

#[test]
fn strangers_do_not_keep_a_group_from_coming_together() {
    let key = new_key();
    let long = [&hello(1, 2)[..12], &u32::MAX.to_le_bytes()].concat();
    let noise: [&[u8]; 6] = [
        b"",
        b"GET / HTTP/1.0\r\n\r\n",
        b"FCRV",
        &hello(1, 2)[..30],
        &long,
        &Frame::Welcome { hosts: Vec::new() }.encode(),
    ];
    thread::scope(|scope| {
        let root = scope.spawn(|| Group::join(&member(0, 2, &key)));
        // Some stay, some leave; more than rank 0 keeps.
        let mut staying = Vec::new();
        for round in 0..40 {
            for bytes in noise {
                let mut other = stranger(&key);
                // Rank 0 may have sent it away already.
                let _ = other.write_all(bytes);
                if round % 2 == 0 {
                    staying.push(other);
                }
            }
        }
        let other = Group::join(&member(1, 2, &key)).expect("joined");
        let root = root.join().expect("no panic").expect("joined");
        thread::scope(|scope| {
            scope.spawn(|| root.farewell().expect("farewell"));
            other.farewell().expect("farewell");
        });
    });
}

#[test]
fn a_rank_that_leaves_during_the_rendezvous_is_named() {
    let key = new_key();
    thread::scope(|scope| {
        let root = scope.spawn(|| Group::join(&member(0, 3, &key)));
        let mut other = stranger(&key);
        other.write_all(&hello(2, 3)).expect("sent");
        drop(other);
        assert_all_lose(vec![root.join().expect("no panic")], 2, How::Ended, "");
    });
}

/// Joins as rank 1 while a false rank 0 answers with `answer` and stays if `stays`: what comes of it, and in what time.
fn join_false_rank_0(answer: &[u8], stays: bool) -> (Result<Group, Error>, Duration) {
    let key = new_key();
    let listener = new_socket();
    rustix::net::bind(&listener, &address(&key).expect("an address")).expect("bound");
    rustix::net::listen(&listener, 1).expect("listening");
    thread::scope(|scope| {
        let started = Instant::now();
        let rank = scope.spawn(|| Group::join(&Membership { deadline: SHORT, ..member(1, 2, &key) }));
        let mut root = UnixStream::from(rustix::net::accept(&listener).expect("accepted"));
        // The rank may have heard enough before all is sent.
        let _ = root.write_all(answer);
        let open = stays.then_some(root);
        let result = rank.join().expect("no panic");
        drop(open);
        (result, started.elapsed())
    })
}

#[test]
fn a_false_rank_0_that_says_nothing_or_half_a_message_is_late() {
    let other = Frame::Failed(Lost { rank: 0, how: How::Late, detail: "x".repeat(100) }).encode();
    for answer in [&b""[..], b"F", &Frame::Welcome { hosts: Vec::new() }.encode()[..15], &other[..60]] {
        let (result, time) = join_false_rank_0(answer, true);
        assert_all_lose(vec![result], 0, How::Late, "the rendezvous within 400.0ms");
        assert!(time < 4 * SHORT, "{time:?}");
    }
}

#[test]
fn a_false_rank_0_that_sends_more_than_was_asked_for_ends_the_group() {
    let part = Frame::Part { rank: 0, operation: Operation::Barrier, bytes: vec![0; 1 << 10] }.encode();
    // None was asked for yet; or one, and then there is no end of them.
    for (asks, parts) in [(false, 1), (true, 1000)] {
        let key = new_key();
        let listener = new_socket();
        rustix::net::bind(&listener, &address(&key).expect("an address")).expect("bound");
        rustix::net::listen(&listener, 1).expect("listening");
        thread::scope(|scope| {
            let rank = scope.spawn(|| {
                let group = Group::join(&member(1, 2, &key)).expect("joined");
                if asks {
                    // May still have come to its end.
                    let _ = group.barrier();
                }
                let end = Instant::now() + DEADLINE;
                while group.lost().is_none() && Instant::now() < end {
                    thread::sleep(Duration::from_millis(1));
                }
                let lost = group.lost().expect("rank 0 is out of step");
                assert_eq!((lost.rank, lost.how), (0, How::OutOfStep), "{lost}");
                assert!(group.shared.lock().parts.len() <= 1);
            });
            let mut root = UnixStream::from(rustix::net::accept(&listener).expect("accepted"));
            let hear = |mut root: &UnixStream| {
                let mut header = [0; HEADER_BYTES];
                root.read_exact(&mut header).expect("a message");
                let length = u32::from_le_bytes(header[12..].try_into().expect("four bytes"));
                root.read_exact(&mut vec![0; length as usize]).expect("a payload");
            };
            hear(&root);
            root.write_all(&Frame::Welcome { hosts: Vec::new() }.encode()).expect("sent");
            if asks {
                hear(&root);
            }
            // The rank may have heard enough before all is sent.
            let _ = root.write_all(&part.repeat(parts));
            rank.join().expect("no panic");
        });
    }
}

#[test]
fn a_part_without_a_color_is_of_no_group() {
    let key = new_key();
    thread::scope(|scope| {
        let rank = |rank| {
            let group = Group::join(&member(rank, 3, &key)).expect("joined");
            let own = group.split(Some(1)).expect("split").expect("a group");
            own.barrier().expect("a barrier");
            own.farewell().expect("farewell");
            group
        };
        let ranks = [0, 1].map(|number| scope.spawn(move || rank(number)));
        let mut other = stranger(&key);
        other.write_all(&hello(2, 3)).expect("sent");
        other.read_exact(&mut [0; 16]).expect("a welcome");
        let offer = Frame::Offer { operation: Operation::AllGather, bytes: Vec::new() };
        other.write_all(&offer.encode()).expect("sent");
        // Both are kept until both are done: one that ends takes the group with it.
        let groups = ranks.map(|rank| rank.join().expect("no panic"));
        assert!(groups.iter().all(|group| group.lost().is_none()));
    });
}

#[test]
fn a_member_that_never_stops_talking_or_says_half_a_message_does_not_hold_the_others_up() {
    let flood: Vec<u8> = Frame::Welcome { hosts: Vec::new() }.encode().repeat(10_000);
    let half = Frame::Offer { operation: Operation::Barrier, bytes: vec![0; 100] }.encode();
    for (talk, how) in [(&flood[..], How::OutOfStep), (&half[..50], How::Late)] {
        let key = new_key();
        let started = Instant::now();
        thread::scope(|scope| {
            let root = scope.spawn(|| {
                Group::join(&Membership { deadline: SHORT, ..member(0, 2, &key) }).expect("joined").barrier()
            });
            let mut other = stranger(&key);
            other.write_all(&hello(1, 2)).expect("sent");
            other.read_exact(&mut [0; 16]).expect("a welcome");
            let _ = other.write_all(talk);
            let lost = loss(root.join().expect("no panic"));
            assert_eq!((lost.rank, lost.how), (1, how), "{lost}");
        });
        assert!(started.elapsed() < 4 * SHORT, "{:?}", started.elapsed());
    }
}

#[test]
fn an_answer_that_is_no_message_is_an_error() {
    let key = new_key();
    let listener = new_socket();
    rustix::net::bind(&listener, &address(&key).expect("an address")).expect("bound");
    rustix::net::listen(&listener, 1).expect("listening");
    thread::scope(|scope| {
        let rank = scope.spawn(|| Group::join(&member(1, 2, &key)));
        let mut root = UnixStream::from(rustix::net::accept(&listener).expect("accepted"));
        root.write_all(b"220 mail.example.org").expect("sent");
        let error = rank.join().expect("no panic").expect_err("no group");
        assert!(matches!(error, Error::Protocol(FrameError::Magic)), "{error}");
    });
}

/// Runs `work` on a thread of another user; `None` where this process may not change its user.
fn as_another_user<T: Send>(work: impl FnOnce() -> T + Send) -> Option<T> {
    let nobody = rustix::process::Uid::from_raw(65_534);
    thread::scope(|scope| {
        // The system call changes the calling thread alone, which ends with the work.
        let thread = scope.spawn(|| rustix::thread::set_thread_uid(nobody).ok().map(|()| work()));
        thread.join().expect("no panic")
    })
}

#[test]
fn another_users_process_cannot_join() {
    let key = new_key();
    thread::scope(|scope| {
        let root = scope.spawn(|| Group::join(&member(0, 2, &key)));
        let name = address(&key).expect("an address");
        let other = as_another_user(|| {
            let mut other = stranger_at(&name);
            // Rank 0 may have sent it away already.
            let _ = other.write_all(&hello(1, 2));
            assert_eq!(other.read(&mut [0; 16]).unwrap_or(0), 0, "sent away without a word");
        });
        if other.is_none() {
            eprintln!("not tested: this process may not act as another user");
        }
        Group::join(&member(1, 2, &key)).expect("the seat is free").abort("done");
        root.join().expect("no panic").expect("joined");
    });
}

#[test]
fn another_users_process_cannot_take_rank_0s_place() {
    let key = new_key();
    let name = address(&key).expect("an address");
    let listener = as_another_user(|| {
        let listener = new_socket();
        rustix::net::bind(&listener, &name).expect("bound");
        rustix::net::listen(&listener, 1).expect("listening");
        listener
    });
    let Some(_listener) = listener else {
        return eprintln!("not tested: this process may not act as another user");
    };
    let error = Group::join(&member(1, 2, &key)).expect_err("no group");
    assert!(matches!(error, Error::Foreign { uid: 65_534 }), "{error}");
}

#[test]
fn a_key_in_use_is_an_error_at_the_deadline() {
    let key = new_key();
    let listener = new_socket();
    rustix::net::bind(&listener, &address(&key).expect("an address")).expect("bound");
    let error = Group::join(&Membership { deadline: SHORT, ..member(0, 2, &key) }).expect_err("no group");
    assert!(matches!(&error, Error::NameTaken { .. }) && error.to_string().contains(&key), "{error}");
}

proptest! {
    // Threads and sockets take their time: fewer cases than usual, and as many more as are asked for.
    #![proptest_config(cases(64))]

    /// Bytes of every kind, and right messages with some bytes changed.
    #[test]
    fn whatever_a_false_rank_0_answers_before_it_goes_is_an_error(
        noise: Vec<u8>,
        right in any::<bool>(),
        changes in proptest::collection::vec((0usize..60, any::<u8>()), 0..4),
    ) {
        let lost = Lost { rank: 0, how: How::Late, detail: "a detail of some length".to_owned() };
        let mut answer = if right { Frame::Failed(lost).encode() } else { noise };
        for (at, byte) in changes {
            if let Some(changed) = answer.get_mut(at) {
                *changed = byte;
            }
        }
        let (result, time) = join_false_rank_0(&answer, false);
        assert!(matches!(result, Err(Error::Lost(_) | Error::Protocol(_))), "{result:?}");
        assert!(time < DEADLINE, "{time:?}");
    }

    /// After a right hello: what a member may say during operations, rank 0 survives and names it.
    #[test]
    fn a_member_that_talks_nonsense_ends_the_group(noise: Vec<u8>, kind: u8, code in 0_u8..8, rank in any::<u32>()) {
        let key = new_key();
        thread::scope(|scope| {
            let root = scope.spawn(|| Group::join(&member(0, 2, &key)).expect("joined").barrier());
            let mut other = stranger(&key);
            other.write_all(&hello(1, 2)).expect("sent");
            other.read_exact(&mut [0; 16]).expect("a welcome");
            let mut frame = Frame::Welcome { hosts: Vec::new() }.encode();
            frame[6] = kind;
            frame[7] = code;
            frame[8..12].copy_from_slice(&rank.to_le_bytes());
            frame[12..16].copy_from_slice(&(noise.len() as u32).to_le_bytes());
            frame.extend(noise);
            // Rank 0 may have seen enough before all is sent.
            let _ = other.write_all(&frame);
            drop(other);
            // Ended where the message is an offer that fits; otherwise out of step, or whom it says is lost.
            let result = root.join().expect("no panic");
            if let Err(error) = result {
                assert!(matches!(error, Error::Lost(_)), "{error}");
            }
        });
    }
}
