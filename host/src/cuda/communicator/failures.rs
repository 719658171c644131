//! Failures of a communicator: noticed, named by rank, and told to the others.

use std::{
    sync::atomic::Ordering::{Acquire, Relaxed},
    thread,
    time::{Duration, Instant},
};

use fused_collective_core::launch::{ABORTED, HOST_FAILED, Status};

use super::{Communicator, across::Across};
use crate::{
    error::Error,
    group::{
        Hosts, Lost,
        failure::{Awaited, Cause, Disagreement, Failure, GaveUp, What},
    },
};

/// The time that a monitor has to tell who was lost, once another host's sums or NCCL say that somebody was.
const NOTICE: Duration = Duration::from_secs(2);

impl Communicator {
    /// Checks that all operations that have ended did so well, and were the same on every rank. Call it after the stream was
    /// synchronized and before results are used.
    ///
    /// Ranks of other hosts are compared with this one by what came with the sums of the last operation, so only while no
    /// operation is under way. After graphs that were launched without [`replay`](Self::replay), the next operation is.
    ///
    /// # Errors
    /// [`Error::Failed`]: who waited for whom, in which operation, or who called something else. From then on the
    /// communicator is poisoned: every later call fails at once. The other ranks' operations end, too.
    pub fn check(&mut self) -> Result<(), Error> {
        self.check_usable()?;
        // Ahead of a wait that failed because of it.
        if let Some(disagreement) = self.disagreement() {
            return Err(self.poison(self.out_of_step(disagreement)));
        }
        if let Some(failure) = self.failed_wait() {
            return Err(self.poison(failure));
        }
        // What has ended here has begun on every rank, so each has announced it.
        if let Some(disagreement) = self.log.disagreement_at_end() {
            return Err(self.poison(self.out_of_step(self.of_group(disagreement))));
        }
        self.check_hosts()
    }

    /// Compares the calls of hosts, and asks how NCCL's part went.
    fn check_hosts(&mut self) -> Result<(), Error> {
        let Some(across) = &mut self.across else { return Ok(()) };
        match (across.check().and_then(|()| across.disagreement()), self.log.call()) {
            (Ok(Some(rank)), Some(ours)) => {
                let disagreement = Disagreement { rank, theirs: None, ours };
                Err(self.poison(self.out_of_step(disagreement)))
            }
            (Ok(_), _) => Ok(()),
            (Err(error), _) => Err(self.fail_launch(error)),
        }
    }

    /// [Fails](Self::fail), because a launch or NCCL did. An error of NCCL's may come of a gather that this rank's own thread has
    /// ended, or of the end of the group, or of a process's: that came first.
    pub(super) fn fail_launch(&mut self, error: Error) -> Error {
        let is_nccl = matches!(error, Error::Nccl(_));
        if is_nccl && self.late_gather().is_none() {
            // NCCL may see the end of a process before the monitor does, and does not say whose.
            self.lost_soon();
        }
        match self.end() {
            cause @ (Cause::Deadline(_) | Cause::GaveUp(_)) if is_nccl => {
                self.poison(Failure { rank: self.rank, wait: self.late_gather(), cause })
            }
            _ => self.fail(error),
        }
    }

    /// The wait that failed on the device, if one did.
    fn failed_wait(&self) -> Option<Failure> {
        // Acquire: the kernel wrote the rest before this.
        let reason = self.status.word(Status::FAILED).load(Acquire);
        if reason == 0 {
            return None;
        }
        let word = |offset| u64::from(self.status.word(offset).load(Relaxed));
        let long = |offset| word(offset) | word(offset + 4) << 32;
        let (token, missing) = (long(Status::TOKEN), word(Status::MISSING_RANK) as u32);
        let (hop, late) = (word(Status::HOP) as u32, self.across.as_ref().and_then(Across::late));
        let (from, what) = match hop {
            // The host has ended the gather: who was late in it is not known to the kernel.
            HOST_FAILED if reason == ABORTED => {
                let other = late.or_else(|| self.across.as_ref().map(Across::next_host));
                (other.unwrap_or(self.rank), What::HostSums)
            }
            HOST_FAILED => (rank_of_host(self.hosts(), missing), What::HostSum(token)),
            2 => (self.neighbor(missing), What::Sum(token)),
            4 => (self.neighbor(missing), What::Flag),
            _ => (self.neighbor(missing), What::Input(token)),
        };
        let call = self.calls.call(long(Status::CALL));
        let wait = Awaited { from, what, operation: long(Status::OPERATION), call };
        let cause = match reason {
            ABORTED => self.end(),
            HOST_FAILED => self.lost_soon().map_or(Cause::OtherHost(from), Cause::Lost),
            _ => Cause::Deadline(self.deadline),
        };
        Some(Failure { rank: self.rank, wait: Some(wait), cause })
    }

    /// The rank that the monitor tells of within [`NOTICE`].
    fn lost_soon(&self) -> Option<Lost> {
        let monitor = self.monitor.as_ref()?;
        let began = Instant::now();
        loop {
            match monitor.lost() {
                Some(lost) => return (lost.rank != self.rank).then_some(lost),
                None if began.elapsed() > NOTICE => return None,
                None => thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Why waits were ended.
    pub(super) fn end(&self) -> Cause {
        let lost = self.monitor.as_ref().and_then(|monitor| monitor.lost());
        let across = self.across.as_ref();
        match (lost, &self.monitor) {
            (Some(lost), _) if lost.rank != self.rank => Cause::Lost(lost),
            _ if across.is_some_and(|across| across.late().is_some()) => {
                Cause::Deadline(across.map_or(self.deadline, Across::gather_limit))
            }
            (_, None) => self.gave_up().map_or_else(|| self.aborted(), Cause::GaveUp),
            (_, Some(_)) => self.aborted(),
        }
    }

    /// This rank has ended its waits: it was told to, or NCCL has failed.
    fn aborted(&self) -> Cause {
        match self.across.as_ref().and_then(Across::failed) {
            // As in `fail_launch`.
            Some(failed) => self.lost_soon().map_or(Cause::Gpu(failed), Cause::Lost),
            None => Cause::Aborted,
        }
    }

    /// A rank of this host that has announced something else, if one is known to.
    pub(super) fn disagreement(&self) -> Option<Disagreement> {
        self.log.disagreement().map(|disagreement| self.of_group(disagreement))
    }

    /// A rank of this host that has given up, if there is one.
    pub(super) fn gave_up(&self) -> Option<GaveUp> {
        self.log.gave_up().map(|gave_up| GaveUp { rank: self.neighbor(gave_up.rank), ..gave_up })
    }

    /// A disagreement of places of this host, by the ranks of the group.
    fn of_group(&self, disagreement: Disagreement) -> Disagreement {
        Disagreement { rank: self.neighbor(disagreement.rank), ..disagreement }
    }

    fn out_of_step(&self, disagreement: Disagreement) -> Failure {
        Failure { rank: self.rank, wait: None, cause: Cause::OutOfStep(disagreement) }
    }

    /// Ends the group with this failure, unless it has one.
    pub(super) fn poison(&mut self, failure: Failure) -> Error {
        if let Some(first) = &self.failed {
            return Error::Poisoned(first.clone());
        }
        let failure = Box::new(failure);
        self.failed = Some(failure.clone());
        // The watchdog of gathers sees it, and has NCCL end what is running.
        self.abort.set();
        if let Some((fault, because_of)) = failure.fault() {
            self.log.give_up(fault, because_of);
        }
        if let Some(monitor) = &self.monitor {
            monitor.abort(&failure.to_string());
        }
        Error::Failed(failure)
    }

    pub(super) fn check_usable(&mut self) -> Result<(), Error> {
        if self.left {
            return Err(Error::Left);
        }
        if let Some(failure) = &self.failed {
            return Err(Error::Poisoned(failure.clone()));
        }
        // Without a monitor, nothing else tells that a peer has given up.
        if self.monitor.is_none() && self.log.gave_up().is_some() {
            self.abort.set();
        }
        if self.abort.is_set() && self.status.word(Status::FAILED).load(Acquire) == 0 {
            // No wait was under way, so none has told of it.
            let failure = match self.disagreement() {
                Some(disagreement) => self.out_of_step(disagreement),
                None => Failure { rank: self.rank, wait: self.late_gather(), cause: self.end() },
            };
            return Err(self.poison(failure));
        }
        Ok(())
    }

    /// The gather that was ended because it took too long, where no kernel has told of it.
    fn late_gather(&self) -> Option<Awaited> {
        let across = self.across.as_ref()?;
        let from = across.late()?;
        Some(Awaited { from, what: What::HostSums, operation: across.operation(), call: self.log.call() })
    }
}

/// The rank of this rank's place on host `host`. A kernel's word may be any number.
fn rank_of_host(hosts: Option<&Hosts>, host: u32) -> u32 {
    match hosts {
        Some(hosts) if host < hosts.count() => hosts.rank_at(host, hosts.place()),
        _ => host,
    }
}
