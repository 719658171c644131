//! The meeting of ranks: rank 0 listens, the others say hello, and rank 0 welcomes all or refuses all.
//!
//! Rank 0 takes connections until every rank has said hello. Whoever is not of this user, says something
//! else than a hello, or ends, is sent away and changes nothing; whoever says nothing waits at no one's cost.
//! A hello that does not fit (a rank twice, another group size, version or configuration) is a mistake in
//! how the job was started, so no rank may go on: rank 0 tells all of them which rank it was. For that it
//! waits for the others' hellos a little longer. A rank that has a reason not to join says so in place of a hello, and
//! its reason is told in the same way.
//!
//! Between hosts, over a [`Network`], both sides first prove that they have the job's [secret](super::secret). A connection that
//! ends before is tried again until the deadline, as rank 0 may have sent it away with strangers.
//!
//! The listening socket is closed before the first welcome is sent, so that a later group may use the key.

use std::{
    net::IpAddr,
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
    frame::{Frame, FrameError, MAX_PAYLOAD, MAX_UNPROVEN},
    membership::{MARGIN, Membership, saturating_add},
    network::{self, Network, connect_to, ended, watch},
    peer_user::peer_user,
    stranger::{Said, Stranger, prove},
};

/// The version that all ranks must have.
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The most bytes of a configuration.
pub(super) const MAX_CONFIG: usize = 64 << 10;
/// The most bytes of the name of a host.
pub(super) const MAX_HOST: usize = 255;
/// The most bytes of a hello's payload.
const MAX_HELLO: usize = MAX_CONFIG + 1024;
/// Connections that are kept without a hello, at most: all ranks may come at once. The oldest goes first, of those from the
/// address that has the most, so that one address does not keep the others out.
const MAX_STRANGERS: usize = 128;
/// Connections that the kernel keeps for rank 0, and that it takes at once.
pub(super) const BACKLOG: u16 = 128;
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

/// A group that has come together.
pub(super) struct Gathered {
    /// On rank 0 the connections to ranks 1, 2, ... in this order; on another rank the one to rank 0.
    pub(super) channels: Vec<Channel>,
    /// Between hosts, the host of each rank.
    pub(super) hosts: Vec<String>,
}

/// Rank 0's side, between hosts if there is a `network`. All are welcomed.
pub(super) fn gather(
    membership: &Membership<'_>,
    network: Option<&Network>,
    until: Instant,
) -> Result<Gathered, Error> {
    gather_on(become_listener(membership, network, until)?, membership, network, until, None)
}

/// Like [`gather`], with a socket that listens already. With a `problem` of its own, rank 0 tells it to all who come.
pub(super) fn gather_on(
    listener: OwnedFd,
    membership: &Membership<'_>,
    network: Option<&Network>,
    until: Instant,
    problem: Option<Lost>,
) -> Result<Gathered, Error> {
    let mut gathering = Gathering {
        membership,
        network,
        seats: (1..membership.world_size).map(|_| None).collect(),
        strangers: Vec::new(),
        refused: Vec::new(),
        problem: problem.map(|lost| (lost, until)),
        turned_away: String::new(),
        times: 0,
    };
    let mut end = until;
    loop {
        gathering.accept(&listener)?;
        gathering.hear()?;
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

fn become_listener(
    membership: &Membership<'_>,
    network: Option<&Network>,
    until: Instant,
) -> Result<OwnedFd, Error> {
    if let Some(Network { address, .. }) = network {
        return network::listen_at(address, address.port(), BACKLOG, until).map_err(|error| match error {
            Errno::ADDRINUSE => Error::AddressTaken { address: address.clone(), waited: membership.deadline },
            error => Error::system("listen for ranks of other hosts")(error),
        });
    }
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
    network: Option<&'a Network>,
    /// Of rank 1, 2, ...: its connection, once it said hello.
    seats: Vec<Option<Seat>>,
    /// Said nothing yet, oldest first.
    strangers: Vec<Stranger>,
    /// Said a hello that does not fit, as this rank.
    refused: Vec<(u32, Channel)>,
    /// The first thing that rules the group out, and when it was seen.
    problem: Option<(Lost, Instant)>,
    /// The last of the strangers that proved nothing, and how many there were.
    turned_away: String,
    times: u64,
}

struct Seat {
    channel: Channel,
    /// Between hosts.
    host: String,
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
                Ok(socket) if self.network.is_some() => {
                    // Fails only for a connection that has ended.
                    if watch(&socket, self.membership.deadline).is_ok() {
                        self.strangers.push(Stranger::of_network(socket));
                    }
                }
                Ok(socket) if peer_user(&socket).is_ok_and(|user| user == geteuid().as_raw()) => {
                    self.strangers.push(Stranger::of_this_host(socket, MAX_HELLO));
                }
                Ok(_) | Err(Errno::INTR | Errno::CONNABORTED) => {}
                // Linux passes on what has befallen the connection meanwhile: see accept(2).
                Err(
                    Errno::NETDOWN
                    | Errno::PROTO
                    | Errno::NOPROTOOPT
                    | Errno::HOSTDOWN
                    | Errno::NONET
                    | Errno::HOSTUNREACH
                    | Errno::OPNOTSUPP
                    | Errno::NETUNREACH,
                ) if self.network.is_some() => {}
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(Error::system("accept a rank's connection")(error)),
            }
        }
        Ok(())
    }

    /// Takes in all that has arrived.
    fn hear(&mut self) -> Result<(), Error> {
        for mut stranger in std::mem::take(&mut self.strangers) {
            match stranger.hear(self.network, self.membership.key, MAX_HELLO)? {
                Said::Nothing => self.strangers.push(stranger),
                Said::Word(frame) => self.heed(frame, stranger.channel),
                Said::Noise(error @ FrameError::Protocol { rank, .. }) => {
                    self.fail(rank, How::Refused, format!("it sent {error}"));
                    self.refused.push((rank, stranger.channel));
                }
                Said::Noise(_) | Said::Gone => {}
                Said::Unproven(why) => {
                    self.times += 1;
                    let from = stranger
                        .from
                        .map_or_else(|| "an unknown address".to_owned(), |from| from.to_string());
                    self.turned_away = format!("{from}: {why}");
                }
            }
        }
        self.limit_strangers();
        for index in 0..self.seats.len() {
            let Some(Seat { channel, host }) = &mut self.seats[index] else { continue };
            // A rank that has said hello waits for its welcome: anything else it says is a mistake.
            let (connected, next) = (channel.fill(), channel.next());
            let rank = index as u32 + 1;
            let host = self.network.map(|_| host.as_str());
            match next {
                Ok(None) if connected => continue,
                Ok(None) => {
                    let detail = ended(channel.is_silent(), host, self.membership.deadline);
                    self.fail(rank, How::Ended, detail);
                }
                _ => self.fail(rank, How::OutOfStep, "it went on before the group was complete".to_owned()),
            }
            self.seats[index] = None;
        }
        Ok(())
    }

    /// Heeds the first message of what may be a rank.
    fn heed(&mut self, frame: Frame, channel: Channel) {
        match frame {
            Frame::Hello { rank, world_size, version, host, config } => {
                match self.refusal(rank, world_size, &version, &config) {
                    None => self.seats[rank as usize - 1] = Some(Seat { channel, host }),
                    Some(detail) => {
                        let of = self.network.map_or_else(String::new, |_| format!(" (host {host})"));
                        self.fail(rank, How::Refused, format!("{detail}{of}"));
                        self.refused.push((rank, channel));
                    }
                }
            }
            Frame::Failed(Lost { rank, how: How::GaveUp, detail })
                if (1..self.membership.world_size).contains(&rank) =>
            {
                self.fail(rank, How::GaveUp, detail);
                self.refused.push((rank, channel));
            }
            _ => {}
        }
    }

    /// Sends strangers away until there are no more than [`MAX_STRANGERS`].
    fn limit_strangers(&mut self) {
        while self.strangers.len() > MAX_STRANGERS {
            let of = |from: Option<IpAddr>| self.strangers.iter().filter(|other| other.from == from).count();
            // The first of the largest, so the oldest: `max_by_key` takes the last.
            let most = (0..self.strangers.len()).rev().max_by_key(|&index| of(self.strangers[index].from));
            self.strangers.remove(most.unwrap_or(0));
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
        fds.extend(self.strangers.iter().map(|stranger| stranger.channel.poll_fd()));
        fds.extend(self.seats.iter().flatten().map(|seat| seat.channel.poll_fd()));
        let due = self.strangers.iter().filter_map(Stranger::due).min();
        wait_for(&mut fds, Some(due.map_or(end, |due| due.min(end))))
    }

    /// Welcomes all, or tells all why not. A reason is short enough for a socket's buffer; the monitor sends what is left of a
    /// welcome.
    fn conclude(mut self) -> Result<Gathered, Error> {
        let missing: Vec<_> =
            (1..).zip(&self.seats).filter(|(_, seat)| seat.is_none()).map(|(rank, _)| rank).collect();
        if let [first, others @ ..] = missing.as_slice() {
            let others: String = others.iter().map(|rank| format!(", nor did rank {rank}")).collect();
            let mut found = String::new();
            if self.times > 0 {
                let (times, last) = (self.times, &self.turned_away);
                let were = if times == 1 { "connection was" } else { "connections were" };
                found = format!("{times} {were} turned away, the last from {last}");
            }
            self.fail(*first, How::Late, missed(self.membership, self.network, &others, &found));
        }
        let seats = self.seats.into_iter().flatten();
        let (mut channels, mut hosts): (Vec<_>, Vec<_>) =
            seats.map(|Seat { channel, host }| (channel, host)).unzip();
        let Some((lost, _)) = self.problem else {
            match self.network {
                Some(network) => hosts.insert(0, network.host.clone()),
                None => hosts.clear(),
            }
            for channel in &mut channels {
                channel.set_limit(MAX_PAYLOAD);
                channel.queue(&Frame::Welcome { hosts: hosts.clone() });
                channel.flush();
            }
            return Ok(Gathered { channels, hosts });
        };
        for channel in channels.iter_mut().chain(self.refused.iter_mut().map(|(_, channel)| channel)) {
            channel.queue(&Frame::Failed(lost.clone()));
            channel.flush();
        }
        Err(lost.into())
    }
}

/// The side of ranks 1, 2, ... Returns the connection to rank 0 once the group is complete.
pub(super) fn call(
    membership: &Membership<'_>,
    network: Option<&Network>,
    until: Instant,
) -> Result<Gathered, Error> {
    let hello = Frame::Hello {
        rank: membership.rank,
        world_size: membership.world_size,
        version: VERSION.to_owned(),
        host: network.map_or_else(String::new, |network| network.host.clone()),
        config: membership.config.to_vec(),
    };
    ask(membership, network, until, &hello)
}

/// Says `word` to rank 0. Returns the connection once rank 0 has answered with a welcome.
fn ask(
    membership: &Membership<'_>,
    network: Option<&Network>,
    until: Instant,
    word: &Frame,
) -> Result<Gathered, Error> {
    match network {
        None => converse(Channel::new(reach(membership, until)?, MAX_PAYLOAD), membership, None, until, word),
        Some(network) => ask_over(membership, network, until, word),
    }
}

/// Like [`ask`], of a rank 0 on another host.
fn ask_over(
    membership: &Membership<'_>,
    network: &Network,
    until: Instant,
    word: &Frame,
) -> Result<Gathered, Error> {
    let &Membership { rank, world_size, key, deadline, .. } = membership;
    let (mut addresses, mut found, mut has_met) = (Vec::new(), String::new(), false);
    loop {
        if addresses.is_empty() {
            match network.address.resolve(until) {
                Ok(resolved) => addresses = resolved,
                Err(error) => found = error,
            }
        }
        match connect_to(&addresses, until) {
            Ok(socket) => {
                watch(&socket, deadline)?;
                let channel = Channel::new(socket, MAX_UNPROVEN);
                let end = saturating_add(until, MARGIN);
                if let Some(mut channel) = prove(channel, network, (rank, world_size, key), end)? {
                    has_met = true;
                    channel.set_limit(MAX_PAYLOAD);
                    match converse(channel, membership, Some(network), until, word) {
                        Err(Error::Lost(Lost { rank: 0, how: How::Ended, .. })) => {}
                        other => return other,
                    }
                }
                found = "the connection ended".to_owned();
                thread::sleep(RETRY);
            }
            // Whoever listened has left: until the group is complete rank 0 does not, unless it ends.
            Err(error) if has_met && error.kind() == std::io::ErrorKind::ConnectionRefused => {
                return Err(Lost { rank: 0, how: How::Ended, detail: String::new() }.into());
            }
            Err(_) if addresses.is_empty() => {}
            Err(error) => found = error.to_string(),
        }
        if Instant::now() >= until {
            let detail = missed(membership, Some(network), "", &found);
            return Err(Lost { rank: 0, how: How::Late, detail }.into());
        }
    }
}

/// Says `word` over `channel`, and waits for the answer.
fn converse(
    mut channel: Channel,
    membership: &Membership<'_>,
    network: Option<&Network>,
    until: Instant,
    word: &Frame,
) -> Result<Gathered, Error> {
    channel.queue(word);
    // Rank 0 knows best what is missing, so it may speak first.
    let end = saturating_add(until, MARGIN);
    let all = network.map_or(0, |_| membership.world_size as usize);
    loop {
        channel.flush();
        let connected = channel.fill();
        match channel.next() {
            Ok(Some(Frame::Welcome { hosts })) if hosts.len() == all => {
                return Ok(Gathered { channels: vec![channel], hosts });
            }
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
            let detail = missed(membership, network, "", "");
            return Err(Lost { rank: 0, how: How::Late, detail }.into());
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
            Err(Errno::CONNREFUSED | Errno::AGAIN | Errno::INTR) => {
                let detail = missed(membership, None, "", "");
                return Err(Lost { rank: 0, how: How::Late, detail }.into());
            }
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
pub(super) fn decline(membership: &Membership<'_>, network: Option<&Network>, reason: &str) -> Lost {
    let own = Lost { rank: membership.rank, how: How::GaveUp, detail: reason.to_owned() };
    if membership.world_size > MOST_TOLD || membership.rank >= membership.world_size {
        return own;
    }
    let until = Instant::now() + DECLINE;
    let told = if membership.rank == 0 {
        become_listener(membership, network, until)
            .and_then(|listener| gather_on(listener, membership, network, until, Some(own.clone())))
            .map(drop)
    } else {
        ask(membership, network, until, &Frame::Failed(own.clone())).map(drop)
    };
    match told {
        // A rank 0 that did not come or did not stay has told nobody anything.
        Err(Error::Lost(lost)) if lost.rank != 0 || lost.how == How::GaveUp => lost,
        _ => own,
    }
}

/// The rendezvous to which a rank did not come, `nor` others, what was `found` in its place, and what would keep it from being
/// found.
fn missed(membership: &Membership<'_>, network: Option<&Network>, nor: &str, found: &str) -> String {
    let &Membership { rank, key, deadline, .. } = membership;
    if let Some(Network { address, host, .. }) = network {
        let waited = if rank == 0 { "listened" } else { "looked for rank 0" };
        let found = if found.is_empty() { String::new() } else { format!(" ({found})") };
        return format!(
            "the rendezvous within {deadline:.1?}{nor}: rank {rank} on host {host} {waited} at {address} under the key \
             '{key}'{found}"
        );
    }
    let network = std::fs::read_link("/proc/self/ns/net");
    let network = network.map_or_else(|_| "that is not known".to_owned(), |name| name.display().to_string());
    format!(
        "the rendezvous within {deadline:.1?}{nor}: rank {rank} waited under the key '{key}', as user {}, in the network \
         namespace {network}, and all ranks must have these in common",
        geteuid().as_raw()
    )
}
