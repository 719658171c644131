//! The thread that reads a rank's control connections, so that a lost peer is seen whatever the rank itself
//! is doing. It sleeps in `poll` and costs no processor time.
//!
//! Every operation goes the same way: each rank offers its contribution to rank 0, and when the offers of all
//! ranks are there, rank 0 answers every rank with the parts it is to have. The first failure that rank 0
//! sees, its own included, is sent to all and ends the group; so all ranks name the same cause. Only where
//! rank 0 itself is lost do the others find out by themselves.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, eventfd},
    io::{read, write},
};

use super::{
    super::loss::{How, Lost},
    channel::{Channel, wait_for},
    error::Error,
    frame::{Frame, Operation},
    membership::{Membership, saturating_add},
    network::ended,
};

/// When a group ends: how long its last messages may take to leave.
pub(super) const FLUSH: Duration = Duration::from_secs(1);

/// A contribution to an operation, or a part of its result.
pub(super) struct Part {
    pub(super) bytes: Vec<u8>,
    pub(super) descriptor: Option<OwnedFd>,
}

/// Requests of the rank's own threads to the monitor.
pub(super) enum Command {
    Offer(Operation, Part),
    Fail(Lost),
    /// Send what is left and end.
    Stop,
}

/// Tells whether a rank has been lost, to code that cannot afford more than a load.
#[derive(Clone, Debug, Default)]
pub struct Alarm(
    /// 0, or 1 + the rank.
    Arc<AtomicU32>,
);

impl Alarm {
    /// The rank that was lost, if one was. Fit for a spin loop: one atomic load.
    #[inline]
    pub fn lost_rank(&self) -> Option<u32> {
        self.0.load(Ordering::Acquire).checked_sub(1)
    }

    fn raise(&self, rank: u32) {
        self.0.store(1 + rank, Ordering::Release);
    }
}

/// State that the monitor and the rank's own threads share.
pub(super) struct Shared {
    pub(super) state: Mutex<State>,
    /// Signalled at every change of `state`.
    pub(super) changed: Condvar,
    /// Raised after `State::lost` is set.
    pub(super) alarm: Alarm,
    /// Actions at a loss.
    actions: Mutex<Actions>,
    wake: OwnedFd,
}

#[derive(Default)]
struct Actions {
    /// Done already, or to be done at once.
    lost: bool,
    next: u64,
    all: Vec<(u64, Box<dyn Fn() + Send>)>,
}

#[derive(Default)]
pub(super) struct State {
    commands: Vec<Command>,
    /// Parts that are to come of the operation under way: rank 0 may send no more.
    pub(super) expected: usize,
    /// Parts that have come.
    pub(super) parts: Vec<Part>,
    /// The first loss.
    pub(super) lost: Option<Lost>,
    /// True once everything asked for was handed to the kernel.
    pub(super) flushed: bool,
}

impl Shared {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            alarm: Alarm::default(),
            actions: Mutex::default(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// No thread leaves the state half-changed, so one that panicked does no harm to the others.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the monitor for something.
    pub(super) fn command(&self, command: Command) {
        let mut state = self.lock();
        state.flushed = false;
        state.commands.push(command);
        drop(state);
        // Fails only where the counter is full: the monitor is being woken already.
        let _ = write(&self.wake, &1_u64.to_ne_bytes());
    }

    fn take_commands(&self) -> Vec<Command> {
        // Emptied before the commands are taken: one that comes in between wakes the monitor again.
        let _ = read(&self.wake, &mut [0; 8]);
        std::mem::take(&mut self.lock().commands)
    }

    /// True while a part is still to come.
    fn is_waiting(&self) -> bool {
        let state = self.lock();
        state.parts.len() < state.expected
    }

    fn add_part(&self, part: Part) {
        self.lock().parts.push(part);
        self.changed.notify_all();
    }

    /// Records a loss, if it is the first.
    fn lose(&self, lost: Lost) {
        let mut state = self.lock();
        if state.lost.is_none() {
            let rank = lost.rank;
            state.lost = Some(lost);
            self.alarm.raise(rank);
            self.changed.notify_all();
            drop(state);
            let mut actions = self.lock_actions();
            actions.lost = true;
            actions.all.iter().for_each(|(_, act)| act());
        }
    }

    fn lock_actions(&self) -> MutexGuard<'_, Actions> {
        self.actions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has `act` called at the first loss, or now if there was one. Returns its number.
    pub(super) fn add_action(&self, act: Box<dyn Fn() + Send>) -> u64 {
        let mut actions = self.lock_actions();
        if actions.lost {
            act();
        }
        actions.next += 1;
        let number = actions.next;
        actions.all.push((number, act));
        number
    }

    /// When this returns, the action does not run and will not.
    pub(super) fn remove_action(&self, number: u64) {
        self.lock_actions().all.retain(|(other, _)| *other != number);
    }
}

/// See the [module](self).
pub(super) struct RankMonitor {
    rank: u32,
    world_size: u32,
    shared: Arc<Shared>,
    peers: Vec<Peer>,
    /// Between hosts, the host of each rank.
    hosts: Arc<[String]>,
    deadline: Duration,
    /// On rank 0.
    hub: Option<Hub>,
    /// The farewell is done: connections may end.
    parted: bool,
    stop_by: Option<Instant>,
}

struct Peer {
    rank: u32,
    channel: Channel,
    connected: bool,
}

/// Rank 0's knowledge of the operation that its group has come to.
struct Hub {
    /// Of each rank: what it has come to.
    offers: Vec<Option<(Operation, Part)>>,
    /// When the group has waited long enough for the last of them.
    due: Option<Instant>,
    deadline: Duration,
}

impl RankMonitor {
    /// On rank 0 `channels` are those to ranks 1, 2, ...; on another rank the one to rank 0.
    pub(super) fn new(
        shared: Arc<Shared>,
        membership: &Membership<'_>,
        channels: Vec<Channel>,
        hosts: Arc<[String]>,
    ) -> Self {
        let &Membership { rank, world_size, deadline, .. } = membership;
        let hub =
            (rank == 0).then(|| Hub { offers: (0..world_size).map(|_| None).collect(), due: None, deadline });
        let first = u32::from(rank == 0);
        let peers =
            (first..).zip(channels).map(|(rank, channel)| Peer { rank, channel, connected: true }).collect();
        RankMonitor { rank, world_size, shared, peers, hosts, deadline, hub, parted: false, stop_by: None }
    }

    /// Runs until it is told to stop.
    pub(super) fn run(mut self) {
        loop {
            for command in self.shared.take_commands() {
                match command {
                    Command::Offer(operation, part) => self.offer(operation, part),
                    Command::Fail(lost) => self.fail(lost),
                    Command::Stop => self.stop_by = Some(Instant::now() + FLUSH),
                }
            }
            for index in 0..self.peers.len() {
                self.hear(index);
            }
            if let Some(mut late) = self.hub.as_mut().and_then(Hub::late) {
                if let Some(host) = self.host(late.rank) {
                    late.detail += &format!(" (host {host})");
                }
                self.fail(late);
            }
            let flushed = self.flush();
            if self.stop_by.is_some_and(|by| flushed || Instant::now() >= by) {
                return;
            }
            if let Err(error) = self.sleep() {
                // Without poll nothing can be known of the peers any more.
                self.shared.lose(Lost { rank: self.rank, how: How::GaveUp, detail: error.to_string() });
                return;
            }
        }
    }

    fn sleep(&self) -> Result<(), Error> {
        let due = self.hub.as_ref().and_then(|hub| hub.due);
        let end = [due, self.stop_by].into_iter().flatten().min();
        let mut fds = vec![PollFd::new(&self.shared.wake, PollFlags::IN)];
        fds.extend(self.peers.iter().filter(|peer| peer.connected).map(|peer| peer.channel.poll_fd()));
        wait_for(&mut fds, end)
    }

    /// Sends what can be sent; returns whether nothing is left.
    fn flush(&mut self) -> bool {
        for peer in &mut self.peers {
            peer.channel.flush();
        }
        let flushed = self.peers.iter().all(|peer| !peer.connected || peer.channel.is_flushed());
        let mut state = self.shared.lock();
        // A command that has come meanwhile may have more to send.
        if flushed && state.commands.is_empty() && !state.flushed {
            state.flushed = true;
            self.shared.changed.notify_all();
        }
        flushed
    }

    /// Ends the group, unless it has ended: tells the others, then this rank's own threads.
    fn fail(&mut self, lost: Lost) {
        if self.shared.alarm.lost_rank().is_some() {
            return;
        }
        let bytes: Arc<[u8]> = Frame::Failed(lost.clone()).encode().into();
        for peer in &mut self.peers {
            peer.channel.queue_encoded(Arc::clone(&bytes), None);
            peer.channel.flush();
        }
        if let Some(hub) = &mut self.hub {
            hub.due = None;
        }
        self.shared.lose(lost);
    }

    /// Reads what one peer has sent.
    fn hear(&mut self, index: usize) {
        let peer = &mut self.peers[index];
        if !peer.connected {
            return;
        }
        let rank = peer.rank;
        peer.connected = peer.channel.fill();
        loop {
            let peer = &mut self.peers[index];
            match peer.channel.next() {
                Ok(Some(frame)) => self.heed(index, frame),
                Ok(None) => break,
                Err(error) => {
                    peer.connected = false;
                    self.fail(Lost { rank, how: How::OutOfStep, detail: format!("it sent {error}") });
                    return;
                }
            }
        }
        let peer = &self.peers[index];
        if !peer.connected && !self.parted {
            let detail = ended(peer.channel.is_silent(), self.host(rank), self.deadline);
            self.fail(Lost { rank, how: How::Ended, detail });
        }
    }

    /// The host of a rank, between hosts.
    fn host(&self, rank: u32) -> Option<&str> {
        self.hosts.get(rank as usize).map(String::as_str)
    }

    fn heed(&mut self, index: usize, frame: Frame) {
        let peer = &mut self.peers[index];
        let rank = peer.rank;
        match (frame, &self.hub) {
            (Frame::Offer { operation, bytes }, Some(_)) => {
                self.collect(rank, operation, Part { bytes, descriptor: None });
            }
            (Frame::Part { operation, bytes, .. }, None) if self.shared.is_waiting() => {
                let descriptor = peer.channel.take_descriptor();
                self.parted |= operation == Operation::Farewell;
                self.shared.add_part(Part { bytes, descriptor });
            }
            // The hub passes it on; the others have it from the hub.
            (Frame::Failed(lost), Some(_)) if lost.rank < self.world_size => self.fail(lost),
            (Frame::Failed(lost), None) if lost.rank < self.world_size => self.shared.lose(lost),
            _ => self.fail(Lost {
                rank,
                how: How::OutOfStep,
                detail: "it sent an unexpected message".to_owned(),
            }),
        }
    }

    /// Brings this rank's own contribution to rank 0.
    fn offer(&mut self, operation: Operation, part: Part) {
        if self.hub.is_some() {
            self.collect(0, operation, part);
        } else {
            self.peers[0].channel.queue(&Frame::Offer { operation, bytes: part.bytes });
        }
    }

    /// On rank 0: takes a rank's contribution, and answers all once it is the last.
    fn collect(&mut self, rank: u32, operation: Operation, part: Part) {
        let Some(hub) = &mut self.hub else { return };
        if let Err(lost) = hub.collect(rank, operation, part) {
            return self.fail(lost);
        }
        let Some(offers) = hub.complete() else { return };
        self.parted |= operation == Operation::Farewell;
        let mut own = Vec::new();
        for (rank, part) in (0..operation.parts(self.world_size)).zip(offers) {
            // The descriptor lives until the last peer has been sent it; this rank keeps its own.
            let descriptor = part.descriptor.map(Arc::new);
            let frame = Frame::Part { rank, operation, bytes: part.bytes };
            let bytes: Arc<[u8]> = frame.encode().into();
            for peer in &mut self.peers {
                peer.channel.queue_encoded(Arc::clone(&bytes), descriptor.clone());
            }
            if let Frame::Part { bytes, .. } = frame {
                own.push(Part { bytes, descriptor: None });
            }
        }
        // The others first: this rank may do anything once it has its parts, even exit.
        for peer in &mut self.peers {
            peer.channel.flush();
        }
        own.into_iter().for_each(|part| self.shared.add_part(part));
    }
}

impl Hub {
    fn collect(&mut self, rank: u32, operation: Operation, part: Part) -> Result<(), Lost> {
        let out_of_step = |detail| Err(Lost { rank, how: How::OutOfStep, detail });
        let others =
            self.offers.iter().enumerate().find_map(|(other, offer)| Some((other, offer.as_ref()?.0)));
        if let Some((other, expected)) = others
            && expected != operation
        {
            return out_of_step(format!(
                "it is at {}, rank {other} at {}",
                operation.name(),
                expected.name()
            ));
        }
        match self.offers.get_mut(rank as usize) {
            Some(offer @ None) => *offer = Some((operation, part)),
            _ => return out_of_step(format!("it came to {} twice", operation.name())),
        }
        self.due.get_or_insert_with(|| saturating_add(Instant::now(), self.deadline));
        Ok(())
    }

    /// The offers of all ranks, once all are there.
    fn complete(&mut self) -> Option<Vec<Part>> {
        if self.offers.iter().any(Option::is_none) {
            return None;
        }
        self.due = None;
        Some(self.offers.iter_mut().filter_map(|offer| Some(offer.take()?.1)).collect())
    }

    /// The first rank that has not come to an operation that is due.
    fn late(&mut self) -> Option<Lost> {
        self.due.take_if(|due| Instant::now() >= *due)?;
        let rank = self.offers.iter().position(Option::is_none)? as u32;
        let operation = self.offers.iter().flatten().next()?.0;
        Some(Lost {
            rank,
            how: How::Late,
            detail: format!("{} within {:.1?}", operation.name(), self.deadline),
        })
    }
}
