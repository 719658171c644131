//! The built-in bootstrap: processes find each other, exchange small messages and notice each other's end.
//!
//! Ranks of one host meet at a Unix socket in the abstract namespace, whose name is made from the user and the job's
//! key: nothing is left in the file system, whatever dies. Only processes of the same user
//! take part, which the kernel vouches for (`SO_PEERCRED`). Abstract names belong to a network namespace, so
//! the ranks of a group must share one.
//!
//! Ranks of several hosts meet over TCP, at the address of a [`Network`]. Only processes that have the job's [`Secret`] take
//! part: both sides prove it, and every message carries a tag of it. Until a connection has proven that, it is one of a bounded
//! number, for a few seconds, and nothing that it sends ends the group.
//!
//! What must hold:
//! - every wait ends within the deadline, with an error that names the rank that was missing;
//! - a rank that is killed, exits, gives up or falls out of step ends the group: every operation under way or
//!   to come fails at once on every rank, with the same [`Lost`];
//! - between hosts, so does a host of which nothing is heard, within the deadline, or two seconds if that is less. Then each
//!   side of a network that fell apart names the other;
//! - a job may have several groups: a group is who joined it, or who a [split](Group::split) put into it, and never
//!   simply everybody;
//! - an orderly end is a [farewell](Group::farewell) of all ranks; a connection that ends before is a loss;
//! - code that spins on shared memory can watch an [`Alarm`], at the price of one load.

use std::{
    any::Any,
    net::IpAddr,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
        mpsc::{self, Sender},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use fused_collective_core::MAX_WORLD_SIZE;

mod address;
mod channel;
mod error;
mod frame;
mod join;
mod membership;
mod monitor;
mod network;
mod peer_user;
mod secret;
mod stranger;
#[cfg(test)]
mod tests;

pub use address::{Address, AddressError};
pub use error::{Error, MAX_RANKS, MIN_RANKS};
pub use frame::FrameError;
pub use membership::Membership;
pub use monitor::Alarm;
pub use network::Network;
pub use secret::{Secret, SecretError};

use super::{
    bootstrap::{Bootstrap, BootstrapError, Monitor, share_by_path, this_host},
    hosts::Hosts,
    loss::{How, Lost},
};
use frame::{MAX_PAYLOAD, Operation};
use join::Gathered;
use membership::{MARGIN, saturating_add};
use monitor::{Command, Part, RankMonitor, Shared};

/// The most bytes that a rank may contribute to an operation.
pub const MAX_MESSAGE: usize = MAX_PAYLOAD;
/// The most bytes of the reason that a rank gives up for.
const MAX_REASON: usize = 4096;

/// A rank's membership in a group of processes.
///
/// Operations are collective: all ranks call the same ones in the same order, and none returns before all
/// have called it. Contributions are small, up to [`MAX_MESSAGE`]: this is for setting up, not for tensors.
///
/// A group that is dropped without a [farewell](Self::farewell) is lost to the other ranks. One process may
/// be in several groups, one after the other under the same key.
#[derive(Debug)]
pub struct Group {
    rank: u32,
    world_size: u32,
    deadline: Duration,
    key: String,
    /// Between hosts.
    network: Option<Network>,
    /// Between hosts, the host of each rank.
    hosts: Arc<[String]>,
    /// This end of the connection to rank 0, between hosts.
    own_address: Option<IpAddr>,
    /// Groups that this one was split into so far, to tell their keys apart.
    splits: AtomicU32,
    shared: Arc<Shared>,
    monitor: Option<JoinHandle<()>>,
    /// Held during an operation: they come one after the other.
    operation: Mutex<()>,
    farewell: bool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("alarm", &self.alarm).finish_non_exhaustive()
    }
}

impl Group {
    /// Waits for all ranks of the group to come, and joins them.
    ///
    /// # Errors
    /// [`Error::Lost`] with [`How::Late`] if a rank does not come within the deadline, with [`How::Refused`]
    /// (on every rank that has come) if one does not fit: a rank that comes twice, another group size,
    /// version or configuration. Other errors are this rank's own.
    pub fn join(membership: &Membership<'_>) -> Result<Self, Error> {
        Self::meet(membership, None, None)
    }

    /// Like [`join`](Self::join), of ranks on one host or several that meet over a network. There may be up to [`MAX_RANKS`].
    ///
    /// # Errors
    /// As [`join`](Self::join), and [`Error::Unproven`] where another secret is used at the address.
    pub fn join_over(membership: &Membership<'_>, network: &Network) -> Result<Self, Error> {
        Self::meet(membership, Some(network), None)
    }

    /// Joins a group, on rank 0 with a `listener` that listens already or one of its own.
    fn meet(
        membership: &Membership<'_>,
        network: Option<&Network>,
        listener: Option<OwnedFd>,
    ) -> Result<Self, Error> {
        let &Membership { rank, world_size, config, deadline, .. } = membership;
        let most = network.map_or(MAX_WORLD_SIZE, |_| MAX_RANKS);
        if !(MIN_RANKS..=most).contains(&world_size) || rank >= world_size {
            return Err(Error::Membership { rank, world_size });
        }
        check_length("a configuration", config, join::MAX_CONFIG)?;
        let host = network.map_or("", |network| &network.host);
        check_length("the name of a host", host.as_bytes(), join::MAX_HOST)?;
        let until = saturating_add(Instant::now(), deadline);
        // Ahead of the meeting, so that a rank that cannot have them does not come.
        let decline = |error: &Error| drop(join::decline(membership, network, &error.to_string()));
        let shared = Shared::new().map_err(Error::system("make an event for the group's monitor"));
        let shared = Arc::new(shared.inspect_err(decline)?);
        let (monitor, ready) = start_monitor().inspect_err(decline)?;
        let Gathered { channels, hosts } = match listener {
            Some(listener) => join::gather_on(listener, membership, network, until, None)?,
            None if rank == 0 => join::gather(membership, network, until)?,
            None => join::call(membership, network, until)?,
        };
        let hosts: Arc<[String]> = hosts.into();
        let own_address = match (network, channels.first()) {
            (Some(_), Some(channel)) => Some(network::own_address(channel.as_fd())?.ip()),
            _ => None,
        };
        // Received, as the thread waits for it.
        let _ = ready.send(RankMonitor::new(Arc::clone(&shared), membership, channels, Arc::clone(&hosts)));
        let (monitor, operation) = (Some(monitor), Mutex::new(()));
        Ok(Group {
            rank,
            world_size,
            deadline,
            key: membership.key.to_owned(),
            network: network.cloned(),
            hosts,
            own_address,
            splits: AtomicU32::new(0),
            shared,
            monitor,
            operation,
            farewell: false,
        })
    }

    /// Tells the ranks of a group, as they come to join it, that this rank will not, and the `reason`. They fail with
    /// [`How::GaveUp`] at once, not at their deadline. Returns what they are told: this rank's loss, unless another rank was
    /// first. Waits for ranks that have not come yet, for a few seconds at most.
    ///
    /// Of `membership`, rank, size and key count. The size may be one that no group can have. Ranks of several hosts meet over
    /// a `network`.
    pub fn decline(membership: &Membership<'_>, network: Option<&Network>, reason: &str) -> Lost {
        join::decline(membership, network, &reason[..reason.floor_char_boundary(MAX_REASON)])
    }

    /// This rank.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// Ranks in the group.
    pub fn world_size(&self) -> u32 {
        self.world_size
    }

    /// The host of each rank, if they have met over a network; else none, and all are on this host.
    pub fn hosts(&self) -> &[String] {
        &self.hosts
    }

    /// The ranks of each host; all are on one if they have not met over a network.
    ///
    /// # Errors
    /// Hosts have different numbers of ranks.
    pub fn by_host(&self) -> Result<Hosts, BootstrapError> {
        if self.hosts.is_empty() {
            return Ok(Hosts::one(self.rank, self.world_size));
        }
        Hosts::of(&self.hosts, self.rank)
    }

    /// The longest wait of any rank for the others at each operation.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// Gives every rank what every rank contributes, by rank.
    ///
    /// # Errors
    /// A rank was lost, or the contribution is longer than [`MAX_MESSAGE`].
    pub fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        check_length("a contribution", bytes, MAX_MESSAGE)?;
        let parts = self.run(Operation::AllGather, Part { bytes: bytes.to_vec(), descriptor: None })?;
        Ok(parts.into_iter().map(|part| part.bytes).collect())
    }

    /// Gives every rank what rank 0 contributes; the others give `None`.
    ///
    /// # Errors
    /// A rank was lost, the contribution is longer than [`MAX_MESSAGE`], or the wrong rank makes one.
    pub fn broadcast(&self, bytes: Option<&[u8]>) -> Result<Vec<u8>, Error> {
        self.check_root("broadcast", bytes.is_some())?;
        let bytes = bytes.unwrap_or_default();
        check_length("a contribution", bytes, MAX_MESSAGE)?;
        Ok(self.run_for_one(Operation::Broadcast, Part { bytes: bytes.to_vec(), descriptor: None })?.bytes)
    }

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// A rank was lost.
    pub fn barrier(&self) -> Result<(), Error> {
        self.run(Operation::Barrier, Part { bytes: Vec::new(), descriptor: None }).map(drop)
    }

    /// Gives every rank a descriptor of rank 0's open file; the others give `None`. It is closed on `exec`.
    ///
    /// Ranks that have met over a network open it under `/proc`, which asks for one user and one PID namespace.
    ///
    /// # Errors
    /// A rank was lost or is on another host, the wrong rank has a file to share, or this process can open no more.
    pub fn share_fd(&self, descriptor: Option<BorrowedFd<'_>>) -> Result<OwnedFd, Error> {
        self.check_root("share_fd", descriptor.is_some())?;
        if let Some((rank, host)) = (0..).zip(&*self.hosts).find(|(_, host)| **host != self.hosts[0]) {
            return Err(Error::OtherHost { rank, host: host.clone() });
        }
        if self.network.is_some() {
            return share_by_path(self, descriptor).map_err(|error| match error.downcast() {
                Ok(error) => *error,
                Err(error) => Error::system("open the file of rank 0")(std::io::Error::other(error)),
            });
        }
        let duplicate =
            |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map_err(Error::system("duplicate a descriptor"));
        let (own, sent) = (descriptor.map(duplicate).transpose()?, descriptor.map(duplicate).transpose()?);
        let part = self.run_for_one(Operation::ShareFd, Part { bytes: Vec::new(), descriptor: sent })?;
        own.or(part.descriptor).ok_or(Error::NoDescriptor)
    }

    /// Makes groups of this one's ranks: those that give the same `color` are one, numbered in the order that they
    /// have here; a rank that gives `None` is in none. All ranks call this.
    ///
    /// The new groups know nothing of each other, nor of this group, which stays as it is: they run what they like,
    /// and a rank that is lost to this group is lost to the one of the new groups that had it. To leave a new group
    /// is no [farewell](Self::farewell) to this one.
    ///
    /// If this group has met over a network, so does a new one with ranks of several hosts, at a port that the kernel chooses.
    /// A new one with ranks of one host meets within the host, and its members can share files.
    ///
    /// # Errors
    /// On every rank: a rank was lost, or [`Error::Membership`] if a rank is the only one of its color.
    pub fn split(&self, color: Option<u32>) -> Result<Option<Group>, Error> {
        let split = self.splits.fetch_add(1, Ordering::Relaxed);
        let mut own = vec![u8::from(color.is_some())];
        own.extend(color.unwrap_or(0).to_le_bytes());
        let all = self.all_gather(&own)?;
        let of_color = |color: &Vec<u8>| all.iter().filter(|other| *other == color).count() as u32;
        for (rank, color) in (0..).zip(&all) {
            // A rank of this program says something; another may not.
            if color.first().is_some_and(|&has| has != 0) && of_color(color) < MIN_RANKS {
                return Err(Error::Membership { rank, world_size: of_color(color) });
            }
        }
        let rank = all[..self.rank as usize].iter().filter(|other| **other == own).count() as u32;
        let key = format!("{}/split {split}/{}", self.key, color.unwrap_or(0));
        let (world_size, deadline) = (of_color(&own), self.deadline);
        let membership = Membership { rank, world_size, key: &key, config: b"", deadline };
        let Some(network) = &self.network else {
            return color.map(|_| Group::join(&membership)).transpose();
        };
        // The first rank of each color listens, and says where.
        let first = all.iter().position(|other| *other == own).unwrap_or(0);
        let of_host = |host| {
            let of_color = |(other, _): &(&Vec<u8>, _)| **other == own;
            all.iter().zip(&*self.hosts).filter(of_color).all(|(_, other)| other == host)
        };
        let spans_hosts = color.is_some() && !of_host(&self.hosts[first]);
        let listener = match rank {
            0 if spans_hosts => Some(self.listen()?),
            _ => None,
        };
        let address = listener.as_ref().map_or_else(String::new, |(_, address)| address.to_string());
        let addresses = self.all_gather(address.as_bytes())?;
        if color.is_none() {
            return Ok(None);
        }
        if !spans_hosts {
            return Group::join(&membership).map(Some);
        }
        let address = str::from_utf8(&addresses[first]).ok().and_then(|text| text.parse().ok());
        let out_of_step = || {
            let detail = "it gave no address to meet at".to_owned();
            Error::Lost(Lost { rank: first as u32, how: How::OutOfStep, detail })
        };
        let network = Network { address: address.ok_or_else(out_of_step)?, ..network.clone() };
        Group::meet(&membership, Some(&network), listener.map(|(socket, _)| socket)).map(Some)
    }

    /// Listens at a free port. Returns the socket and the address where other hosts find it.
    fn listen(&self) -> Result<(OwnedFd, Address), Error> {
        let unknown = || Error::system("find a rank's own address")(std::io::Error::other("it has none"));
        let network = self.network.as_ref().ok_or_else(unknown)?;
        let listener = network::listen_at(&network.address, 0, join::BACKLOG, Instant::now())
            .map_err(Error::system("listen for ranks of other hosts"))?;
        let port = network::port(&listener)?;
        // A rank on the host of rank 0 is found where rank 0 was. It may know that host by another address.
        let is_rank_0_s = self.hosts[self.rank as usize] == self.hosts[0];
        let own = self.own_address.filter(|_| !is_rank_0_s).map(|own| own.to_canonical().to_string());
        let address = match own {
            Some(own) => Address::new(&own, port).map_err(|_| unknown())?,
            None => network.address.at(port),
        };
        Ok((listener, address))
    }

    /// The rank that was lost, if one was. One atomic load while none is.
    pub fn lost(&self) -> Option<Lost> {
        self.control().lost()
    }

    /// Makes an alarm for code that waits for peers by other means than this group's operations.
    pub fn alarm(&self) -> Alarm {
        self.shared.alarm.clone()
    }

    /// Ends the group for all: see [`Control::abort`].
    pub fn abort(&self, reason: &str) {
        self.control().abort(reason);
    }

    /// Makes a handle for other threads, and for what may live longer than the group.
    pub fn control(&self) -> Control {
        Control { rank: self.rank, shared: Arc::clone(&self.shared) }
    }

    /// Leaves the group together with all others, after which nobody's end is a loss.
    ///
    /// # Errors
    /// A rank was lost.
    pub fn farewell(mut self) -> Result<(), Error> {
        self.run(Operation::Farewell, Part { bytes: Vec::new(), descriptor: None })?;
        self.farewell = true;
        Ok(())
    }

    fn check_root(&self, operation: &'static str, gives: bool) -> Result<(), Error> {
        if gives == (self.rank == 0) { Ok(()) } else { Err(Error::Root { operation, rank: self.rank }) }
    }

    fn run_for_one(&self, operation: Operation, part: Part) -> Result<Part, Error> {
        let missing = || Error::Lost(self.late(operation));
        self.run(operation, part)?.pop().ok_or_else(missing)
    }

    /// Offers a contribution and waits for the parts that come of it.
    fn run(&self, operation: Operation, part: Part) -> Result<Vec<Part>, Error> {
        let _one_at_a_time = self.operation.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lost) = self.lost() {
            return Err(lost.into());
        }
        let expected = operation.parts(self.world_size) as usize;
        self.shared.lock().expected = expected;
        self.shared.command(Command::Offer(operation, part));
        let mut state = self.shared.lock();
        // The margin is waited for on its own: if this process was suspended past the deadline, its monitor
        // still has the time to read what happened meanwhile.
        for time in [self.deadline, MARGIN] {
            let waiting = |state: &mut monitor::State| state.lost.is_none() && state.parts.len() < expected;
            let result = self.shared.changed.wait_timeout_while(state, time, waiting);
            state = result.unwrap_or_else(PoisonError::into_inner).0;
        }
        if state.parts.len() >= expected {
            state.expected = 0;
            return Ok(std::mem::take(&mut state.parts));
        }
        if let Some(lost) = state.lost.clone() {
            return Err(lost.into());
        }
        drop(state);
        let late = self.late(operation);
        self.shared.command(Command::Fail(late.clone()));
        // What the monitor records is what later operations will say.
        let waiting = |state: &mut monitor::State| state.lost.is_none();
        let result = self.shared.changed.wait_timeout_while(self.shared.lock(), MARGIN, waiting);
        let state = result.unwrap_or_else(PoisonError::into_inner).0;
        Err(state.lost.clone().unwrap_or(late).into())
    }

    /// Rank 0 has not answered, and not said who else is missing.
    fn late(&self, operation: Operation) -> Lost {
        let detail = format!("{} within {:.1?}", operation.name(), self.deadline);
        Lost { rank: 0, how: How::Late, detail }
    }
}

impl Bootstrap for Group {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn world_size(&self) -> u32 {
        self.world_size
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, BootstrapError> {
        Ok(self.all_gather(bytes)?)
    }

    fn barrier(&self) -> Result<(), BootstrapError> {
        Ok(self.barrier()?)
    }

    fn host(&self) -> Result<Vec<u8>, BootstrapError> {
        match self.hosts.get(self.rank as usize) {
            Some(host) => Ok(host.clone().into_bytes()),
            None => this_host(),
        }
    }

    fn share_file(&self, file: Option<BorrowedFd<'_>>) -> Result<OwnedFd, BootstrapError> {
        Ok(self.share_fd(file)?)
    }

    fn monitor(&self) -> Option<Arc<dyn Monitor>> {
        Some(Arc::new(self.control()))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if !self.farewell {
            let detail = if thread::panicking() { "it panicked" } else { "it left without a farewell" };
            self.shared.command(Command::Fail(Lost {
                rank: self.rank,
                how: How::GaveUp,
                detail: detail.to_owned(),
            }));
        }
        self.shared.command(Command::Stop);
        if let Some(monitor) = self.monitor.take() {
            // A monitor that panicked has closed its connections, which is all that is wanted here.
            let _ = monitor.join();
        }
    }
}

/// Tells of a group's end, and brings it about, from any thread.
#[derive(Clone, Debug)]
pub struct Control {
    rank: u32,
    shared: Arc<Shared>,
}

impl Control {
    /// The rank that was lost, if one was. Fit for a spin loop: one atomic load.
    #[inline]
    pub fn lost_rank(&self) -> Option<u32> {
        self.shared.alarm.lost_rank()
    }

    /// The first loss.
    pub fn lost(&self) -> Option<Lost> {
        self.lost_rank().and_then(|_| self.shared.lock().lost.clone())
    }

    /// Ends the group for all: every rank's operations fail with [`How::GaveUp`] and this reason, of which the
    /// first 4 KiB are sent. Returns when the message is on its way, so the process may exit. Does nothing if
    /// a rank has been lost already.
    pub fn abort(&self, reason: &str) {
        if self.lost_rank().is_some() {
            return;
        }
        let detail = reason[..reason.floor_char_boundary(MAX_REASON)].to_owned();
        self.shared.command(Command::Fail(Lost { rank: self.rank, how: How::GaveUp, detail }));
        let waiting = |state: &mut monitor::State| !(state.flushed && state.lost.is_some());
        // Past the time limit the connection's end tells the others as much.
        drop(self.shared.changed.wait_timeout_while(self.shared.lock(), monitor::FLUSH, waiting));
    }
}

impl Monitor for Control {
    fn lost(&self) -> Option<Lost> {
        self.lost()
    }

    fn abort(&self, reason: &str) {
        self.abort(reason);
    }

    fn on_loss(&self, act: Box<dyn Fn() + Send>) -> Box<dyn Any + Send> {
        let number = self.shared.add_action(act);
        Box::new(OnLoss { number, shared: Arc::clone(&self.shared) })
    }
}

/// Something to be done at a loss, until it is dropped.
#[derive(Debug)]
struct OnLoss {
    number: u64,
    shared: Arc<Shared>,
}

impl Drop for OnLoss {
    fn drop(&mut self) {
        self.shared.remove_action(self.number);
    }
}

/// True if somebody waits for a group to come together under `key`, on this host and as this user.
pub fn is_taken(key: &str) -> bool {
    join::is_taken(key)
}

/// Starts the thread of a monitor, which waits for the monitor itself.
fn start_monitor() -> Result<(JoinHandle<()>, Sender<RankMonitor>), Error> {
    let (ready, monitor) = mpsc::channel::<RankMonitor>();
    let thread = thread::Builder::new()
        .name("rank-monitor".to_owned())
        .spawn(move || monitor.recv().into_iter().for_each(RankMonitor::run))
        .map_err(Error::system("start the group's monitor"))?;
    Ok((thread, ready))
}

fn check_length(what: &'static str, bytes: &[u8], limit: usize) -> Result<(), Error> {
    if bytes.len() <= limit { Ok(()) } else { Err(Error::TooLong { what, bytes: bytes.len(), limit }) }
}
