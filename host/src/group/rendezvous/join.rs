//! The meeting of ranks: rank 0 listens, the others say hello, and rank 0 welcomes all or refuses all.
//!
//! Rank 0 takes connections until every rank has said hello. Whoever is not of this user, says something
//! else than a hello, or ends, is sent away and changes nothing; whoever says nothing waits at no one's cost.
//! A hello that does not fit (a rank twice, another group size, version or configuration) is a mistake in
//! how the job was started, so no rank may go on: rank 0 tells all of them which rank it was. For that it
//! waits for the others' hellos a little longer. A rank that has a reason not to join says so in place of a hello, and
//! its reason is told in the same way.
//!
//! The listening socket is closed before the first welcome is sent, so that a later group may use the key.

use std::{
    os::fd::OwnedFd,
    thread,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags},
    io::Errno,
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
        socket_with,
    },
    process::geteuid,
};

use super::{
    super::loss::{How, Lost},
    channel::{Channel, wait_for},
    error::Error,
    frame::{Frame, FrameError, MAX_PAYLOAD},
    membership::{MARGIN, Membership},
    peer_user::peer_user,
};

/// The version that all ranks must have.
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The most bytes of a configuration.
pub(super) const MAX_CONFIG: usize = 64 << 10;
/// The most bytes of a hello's payload.
const MAX_HELLO: usize = MAX_CONFIG + 1024;
/// Connections that are kept without a hello, at most; the oldest goes first.
const MAX_STRANGERS: usize = 64;
/// Connections that the kernel keeps for rank 0, and that it takes at once.
const BACKLOG: u16 = 128;
/// After a hello that does not fit: how long the others have to connect and be told.
const SETTLE: Duration = Duration::from_secs(1);
/// The time for which a rank that does not join tries to tell the others.
const DECLINE: Duration = Duration::from_secs(5);
/// The most ranks that it tells.
const MOST_TOLD: u32 = 4096;
/// Between two attempts to reach or to become the listener.
const RETRY: Duration = Duration::from_millis(5);

/// The address of a group: in the abstract namespace, which ends with the socket and is no file.
///
/// Keys may be of any length and an address is at most 107 bytes, so it holds the key's FNV-1a hash, 128 bits.
pub(super) fn address(key: &str) -> Result<SocketAddrUnix, Error> {
    let hash = key.bytes().fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d_u128, |hash, byte| {
        (hash ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
    });
    let name = format!("fused-collective/{}/{hash:032x}", geteuid().as_raw());
    SocketAddrUnix::new_abstract_name(name.as_bytes()).map_err(Error::system("name the group's socket"))
}

fn socket() -> Result<OwnedFd, Error> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(Error::system("open a socket"))
}

/// Rank 0's side. Returns the connections to ranks 1, 2, ... in this order, all welcomed.
pub(super) fn gather(membership: &Membership<'_>, until: Instant) -> Result<Vec<Channel>, Error> {
    gather_unless(membership, until, None)
}

/// Like [`gather`]. With a `problem` of its own, rank 0 tells it to all who come.
fn gather_unless(
    membership: &Membership<'_>,
    until: Instant,
    problem: Option<Lost>,
) -> Result<Vec<Channel>, Error> {
    let listener = become_listener(membership, until)?;
    let mut gathering = Gathering {
        membership,
        seats: (1..membership.world_size).map(|_| None).collect(),
        strangers: Vec::new(),
        refused: Vec::new(),
        problem: problem.map(|lost| (lost, until)),
    };
    let mut end = until;
    loop {
        gathering.accept(&listener)?;
        gathering.hear();
        if let Some((_, seen)) = &gathering.problem {
            end = end.min(*seen + SETTLE);
        }
        if gathering.has_heard_all() || Instant::now() >= end {
            break;
        }
        gathering.wait(&listener, end)?;
    }
    drop(listener);
    gathering.conclude()
}

fn become_listener(membership: &Membership<'_>, until: Instant) -> Result<OwnedFd, Error> {
    let address = address(membership.key)?;
    let listener = socket()?;
    loop {
        match bind(&listener, &address) {
            Ok(()) => break,
            // The group before this one may be about to let go of the name.
            Err(Errno::ADDRINUSE) if Instant::now() < until => thread::sleep(RETRY),
            Err(Errno::ADDRINUSE) => {
                return Err(Error::NameTaken { key: membership.key.to_owned(), waited: membership.deadline });
            }
            Err(error) => return Err(Error::system("bind the group's socket")(error)),
        }
    }
    listen(&listener, BACKLOG.into()).map_err(Error::system("listen on the group's socket"))?;
    Ok(listener)
}

/// Rank 0's knowledge while the group comes together.
struct Gathering<'a> {
    membership: &'a Membership<'a>,
    /// Of rank 1, 2, ...: its connection, once it said hello.
    seats: Vec<Option<Channel>>,
    /// Said nothing yet, oldest first.
    strangers: Vec<Channel>,
    /// Said a hello that does not fit, as this rank.
    refused: Vec<(u32, Channel)>,
    /// The first thing that rules the group out, and when it was seen.
    problem: Option<(Lost, Instant)>,
}

impl Gathering<'_> {
    fn has_heard_all(&self) -> bool {
        (1..)
            .zip(&self.seats)
            .all(|(rank, seat)| seat.is_some() || self.refused.iter().any(|(other, _)| *other == rank))
    }

    fn fail(&mut self, rank: u32, how: How, detail: String) {
        self.problem.get_or_insert_with(|| (Lost { rank, how, detail }, Instant::now()));
    }

    fn accept(&mut self, listener: &OwnedFd) -> Result<(), Error> {
        for _ in 0..BACKLOG {
            match accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(socket) if peer_user(&socket).is_ok_and(|user| user == geteuid().as_raw()) => {
                    self.strangers.push(Channel::new(socket, MAX_HELLO));
                }
                Ok(_) | Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(Error::system("accept a rank's connection")(error)),
            }
        }
        Ok(())
    }

    /// Takes in all that has arrived.
    fn hear(&mut self) {
        for mut stranger in std::mem::take(&mut self.strangers) {
            let connected = stranger.fill();
            match stranger.next() {
                Ok(Some(Frame::Hello { rank, world_size, version, config })) => {
                    match self.refusal(rank, world_size, &version, &config) {
                        None => self.seats[rank as usize - 1] = Some(stranger),
                        Some(detail) => {
                            self.fail(rank, How::Refused, detail);
                            self.refused.push((rank, stranger));
                        }
                    }
                }
                Ok(Some(Frame::Failed(Lost { rank, how: How::GaveUp, detail })))
                    if (1..self.membership.world_size).contains(&rank) =>
                {
                    self.fail(rank, How::GaveUp, detail);
                    self.refused.push((rank, stranger));
                }
                Err(error @ FrameError::Protocol { rank, .. }) => {
                    self.fail(rank, How::Refused, format!("it sent {error}"));
                    self.refused.push((rank, stranger));
                }
                Ok(None) if connected => self.strangers.push(stranger),
                _ => {}
            }
        }
        let excess = self.strangers.len().saturating_sub(MAX_STRANGERS);
        self.strangers.drain(..excess);
        for index in 0..self.seats.len() {
            let Some(seat) = &mut self.seats[index] else { continue };
            // A rank that has said hello waits for its welcome: anything else it says is a mistake.
            let (connected, next) = (seat.fill(), seat.next());
            let rank = index as u32 + 1;
            match next {
                Ok(None) if connected => continue,
                Ok(None) => self.fail(rank, How::Ended, String::new()),
                _ => self.fail(rank, How::OutOfStep, "it went on before the group was complete".to_owned()),
            }
            self.seats[index] = None;
        }
    }

    /// Why this hello does not fit, if it does not.
    fn refusal(&self, rank: u32, world_size: u32, version: &str, config: &[u8]) -> Option<String> {
        let ours = self.membership;
        if version != VERSION {
            Some(format!("it runs version {version:?} of this program, rank 0 version {VERSION:?}"))
        } else if world_size != ours.world_size {
            Some(format!("it was started for a group of {world_size} ranks, rank 0 for {}", ours.world_size))
        } else if rank >= world_size {
            Some(format!("ranks of a group of {world_size} are numbered from 0 to {}", world_size - 1))
        } else if rank == 0 || self.seats[rank as usize - 1].is_some() {
            Some(format!(
                "there are two of it: it was started twice, or two jobs share the key {:?}",
                ours.key
            ))
        } else if config != ours.config {
            Some(
                "it was started with other settings than rank 0: give every rank the same options".to_owned(),
            )
        } else {
            None
        }
    }

    fn wait(&self, listener: &OwnedFd, end: Instant) -> Result<(), Error> {
        let mut fds = vec![PollFd::new(listener, PollFlags::IN)];
        fds.extend(self.strangers.iter().chain(self.seats.iter().flatten()).map(Channel::poll_fd));
        wait_for(&mut fds, Some(end))
    }

    /// Welcomes all, or tells all why not. A message this short fits into a socket's buffer.
    fn conclude(mut self) -> Result<Vec<Channel>, Error> {
        let missing: Vec<_> =
            (1..).zip(&self.seats).filter(|(_, seat)| seat.is_none()).map(|(rank, _)| rank).collect();
        if let [first, others @ ..] = missing.as_slice() {
            let others: String = others.iter().map(|rank| format!(", nor did rank {rank}")).collect();
            self.fail(*first, How::Late, missed(self.membership, &others));
        }
        let mut seats: Vec<_> = self.seats.into_iter().flatten().collect();
        let Some((lost, _)) = self.problem else {
            for seat in &mut seats {
                seat.set_limit(MAX_PAYLOAD);
                seat.queue(&Frame::Welcome);
                seat.flush();
            }
            return Ok(seats);
        };
        for channel in seats.iter_mut().chain(self.refused.iter_mut().map(|(_, channel)| channel)) {
            channel.queue(&Frame::Failed(lost.clone()));
            channel.flush();
        }
        Err(lost.into())
    }
}

/// The side of ranks 1, 2, ... Returns the connection to rank 0 once the group is complete.
pub(super) fn call(membership: &Membership<'_>, until: Instant) -> Result<Channel, Error> {
    let hello = Frame::Hello {
        rank: membership.rank,
        world_size: membership.world_size,
        version: VERSION.to_owned(),
        config: membership.config.to_vec(),
    };
    ask(membership, until, &hello)
}

/// Says `word` to rank 0. Returns the connection once rank 0 has answered with a welcome.
fn ask(membership: &Membership<'_>, until: Instant, word: &Frame) -> Result<Channel, Error> {
    let mut channel = Channel::new(reach(membership, until)?, MAX_PAYLOAD);
    channel.queue(word);
    // Rank 0 knows best what is missing, so it may speak first.
    let end = until + MARGIN;
    loop {
        channel.flush();
        let connected = channel.fill();
        match channel.next() {
            Ok(Some(Frame::Welcome)) => return Ok(channel),
            Ok(Some(Frame::Failed(lost))) => return Err(lost.into()),
            Ok(Some(_)) => {
                let detail = "it answered a hello with something else than a welcome".to_owned();
                return Err(Lost { rank: 0, how: How::OutOfStep, detail }.into());
            }
            Ok(None) if connected => {}
            Ok(None) => return Err(Lost { rank: 0, how: How::Ended, detail: String::new() }.into()),
            Err(error) => return Err(Error::Protocol(error)),
        }
        if Instant::now() >= end {
            return Err(late(membership).into());
        }
        wait_for(&mut [channel.poll_fd()], Some(end))?;
    }
}

/// Connects to rank 0, which may not have started yet.
fn reach(membership: &Membership<'_>, until: Instant) -> Result<OwnedFd, Error> {
    let address = address(membership.key)?;
    loop {
        let socket = socket()?;
        match connect(&socket, &address) {
            Ok(()) => {
                let uid = peer_user(&socket).map_err(Error::system("ask whose process is rank 0"))?;
                return if uid == geteuid().as_raw() { Ok(socket) } else { Err(Error::Foreign { uid }) };
            }
            // Nobody listens, or too many wait to be accepted.
            Err(Errno::CONNREFUSED | Errno::AGAIN | Errno::INTR) if Instant::now() < until => {
                thread::sleep(RETRY)
            }
            Err(Errno::CONNREFUSED | Errno::AGAIN | Errno::INTR) => return Err(late(membership).into()),
            Err(error) => return Err(Error::system("connect to rank 0")(error)),
        }
    }
}

/// True if somebody listens under `key`.
pub(super) fn is_taken(key: &str) -> bool {
    let Ok((address, socket)) = address(key).and_then(|address| Ok((address, socket()?))) else {
        return false;
    };
    !matches!(connect(&socket, &address), Err(Errno::CONNREFUSED))
}

/// Tells the ranks of a group that this one does not join it, for `reason`. Returns the loss that they are told of: that of
/// this rank, unless another was first.
pub(super) fn decline(membership: &Membership<'_>, reason: &str) -> Lost {
    let own = Lost { rank: membership.rank, how: How::GaveUp, detail: reason.to_owned() };
    if membership.world_size > MOST_TOLD || membership.rank >= membership.world_size {
        return own;
    }
    let until = Instant::now() + DECLINE;
    let told = if membership.rank == 0 {
        gather_unless(membership, until, Some(own.clone())).map(drop)
    } else {
        ask(membership, until, &Frame::Failed(own.clone())).map(drop)
    };
    match told {
        // A rank 0 that did not come or did not stay has told nobody anything.
        Err(Error::Lost(lost)) if lost.rank != 0 || lost.how == How::GaveUp => lost,
        _ => own,
    }
}

fn late(membership: &Membership<'_>) -> Lost {
    Lost { rank: 0, how: How::Late, detail: missed(membership, "") }
}

/// The rendezvous to which a rank did not come, `nor` others, and what would keep it from being found.
fn missed(membership: &Membership<'_>, nor: &str) -> String {
    let &Membership { rank, key, deadline, .. } = membership;
    let network = std::fs::read_link("/proc/self/ns/net");
    let network = network.map_or_else(|_| "that is not known".to_owned(), |name| name.display().to_string());
    format!(
        "the rendezvous within {deadline:.1?}{nor}: rank {rank} waited under the key '{key}', as user {}, in the network \
         namespace {network}, and all ranks must have these in common",
        geteuid().as_raw()
    )
}
