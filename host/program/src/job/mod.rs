//! A job: the ranks that run one command. This module starts the ranks, or joins them as one, and ends them together.

pub mod launch;
mod meeting;
pub mod options;
mod placement;
pub mod ranks;
pub(crate) mod screen;

pub use fused_collective::group::rank_env;

use std::{
    cell::Cell,
    thread,
    time::{Duration, Instant},
};

use fused_collective::{
    cpu, cuda,
    group::{
        How, Lost,
        failure::Cause,
        rendezvous::{self, Group, MIN_RANKS, Membership, Network},
    },
};
use fused_collective_core::fusion::Mode;
use serde::Serialize;

use crate::backend::all_reduce_choice::AllReduceChoice;
use crate::{
    allocator,
    backend::{self, collective::Collective, cpu::cores::Cores, problem::Problem},
    exit::{self, Failure, complain},
    report::memory::{available_memory, killed_since, oom_kills},
};
use launch::{Launcher, SimulatedHosts};
use options::{BackendChoice, JobOptions};
use placement::Backend;
use rank_env::{ADDRESS, KEY, RankEnv};
use ranks::Error;

/// The time that a rank waits for another, which has given up, to say why.
const FIRST_HAND: Duration = Duration::from_secs(1);

/// The needs of a command: its ranks, and the resources that they compute with.
pub(crate) struct Request {
    pub(crate) options: JobOptions,
    /// The all-reduces to prepare.
    pub(crate) all_reduces: Vec<AllReduceChoice>,
    /// Every problem that the backend will prepare.
    pub(crate) problems: Vec<Problem>,
    /// True if the backend will hold copies of the tensors, so that no operation finds its own in a cache.
    pub(crate) cold: bool,
    /// True if operations are timed: then ranks without a GPU get a CPU each.
    pub(crate) timed: bool,
    /// Bytes that each rank holds of a problem besides its tensors; `None` past 64 bits.
    pub(crate) held: fn(&Problem) -> Option<u64>,
}

impl Request {
    /// A request for ranks with this project's all-reduce, and without problems yet.
    pub(crate) fn new(options: JobOptions) -> Self {
        Request {
            options,
            all_reduces: vec![AllReduceChoice::Custom],
            problems: Vec::new(),
            cold: false,
            timed: false,
            held: |_| Some(0),
        }
    }
}

/// A request that can be met.
pub(crate) struct Job {
    request: Request,
    environment: Option<RankEnv>,
    /// The place where the ranks meet, if the launcher says that they are on several hosts.
    network: Option<Network>,
    /// Under another launcher, the one that this rank has found by itself, until the ranks [settle](Self::settle) on one.
    backend: Cell<Backend>,
    world_size: u32,
    /// Processes of the control group that were killed for memory before the run, where that is known.
    oom_kills: Option<u64>,
    /// Contents for the ranks to read, by variable.
    handed_over: Vec<(&'static str, Vec<u8>)>,
}

impl Job {
    /// Settles on a backend and a number of ranks.
    pub(crate) fn new(request: Request) -> Result<Self, Failure> {
        let environment = RankEnv::from_env().map_err(|error| Failure::Usage(error.to_string()))?;
        if let Some(environment) = &environment {
            allocator::set_rank(environment.rank);
        }
        let network = environment.as_ref().map_or(Ok(None), meeting::network);
        // The hosts know nothing of each other: one line on each.
        let is_first = environment.as_ref().is_none_or(|environment| environment.local_rank == 0);
        let network = network.map_err(|line| Failure::Usage(if is_first { line } else { String::new() }))?;
        let options = &request.options;
        let asked = match &environment {
            Some(RankEnv { hosts: Some(hosts), size_variable, world_size, .. }) => {
                options.world_size_of_hosts(hosts, size_variable, *world_size)?
            }
            Some(RankEnv { size_variable, world_size, .. }) => {
                options.world_size(Some((size_variable, *world_size)))?
            }
            None => options.world_size(None)?,
        };
        let (backend, world_size) = placement::choose(
            options,
            &request.all_reduces,
            asked,
            is_foreign(&environment),
            network.is_some() || options.hosts > 1,
        )?;
        let groups = options.groups;
        if !world_size.is_multiple_of(groups) || world_size / groups < MIN_RANKS {
            return Err(Failure::Usage(format!(
                "--groups: {world_size} ranks cannot form {groups} groups of one size: use a number that leaves each {MIN_RANKS} ranks or more"
            )));
        }
        let (backend, oom_kills) = (Cell::new(backend), oom_kills());
        Ok(Job { request, environment, network, backend, world_size, oom_kills, handed_over: Vec::new() })
    }

    pub(crate) fn backend_name(&self) -> &'static str {
        self.backend.get().name()
    }

    /// Ranks of all groups together.
    pub(crate) fn world_size(&self) -> u32 {
        self.world_size
    }

    /// This rank's GPU, if the backend has one.
    pub(crate) fn cuda(&self) -> Option<u32> {
        let environment = self.environment.as_ref()?;
        if self.backend.get() == Backend::Cuda { ordinal(environment.local_rank).ok() } else { None }
    }

    /// This process's rank; `None` in the process that will start the ranks.
    pub(crate) fn rank(&self) -> Option<u32> {
        self.environment.as_ref().map(|environment| environment.rank)
    }

    /// Gives `content` to the ranks that this process will start: see [`launch::handed_over`].
    pub(crate) fn hand_over(&mut self, variable: &'static str, content: Vec<u8>) {
        self.handed_over.push((variable, content));
    }

    /// Longest wait for another rank.
    pub(crate) fn deadline(&self) -> Duration {
        self.request.options.deadline()
    }

    /// Ranks of the largest group.
    pub(crate) fn group_size(&self) -> u32 {
        self.world_size / self.request.options.groups
    }

    /// True if the ranks are on several hosts, as a launcher says, or one host simulates several.
    pub(crate) fn spans_hosts(&self) -> bool {
        self.network.is_some() || self.request.options.hosts > 1
    }

    /// True if the ranks are processes of this program's own, one for each GPU.
    pub(crate) fn starts_ranks_on_gpus(&self) -> bool {
        !self.spans_hosts()
            && self.backend.get() == Backend::Cuda
            && (self.environment.is_none() || launch::is_launched())
    }

    /// Meets the other ranks, which have the same settings, under a key made from the job's.
    pub(crate) fn meet(&self, key: impl FnOnce(&str) -> String) -> Result<Group, rendezvous::Error> {
        let (rank, job) = match &self.environment {
            Some(environment) => (environment.rank, environment.key.as_str()),
            None => (0, ""),
        };
        let (key, world_size, deadline) = (key(job), self.world_size, self.deadline());
        let membership = Membership { rank, world_size, key: &key, config: b"", deadline };
        meeting::join(&membership, self.network.as_ref())
    }

    /// Starts the ranks and waits for them, or does the `work` as one of them. `work` gets the group of all ranks and its
    /// backend. Rank 0 ends with `conclude`, which returns an exit status. The ranks must agree on the `config`.
    pub(crate) fn run<T>(
        &self,
        config: &impl Serialize,
        work: impl FnOnce(&Group, &mut dyn Collective) -> Result<T, Error>,
        conclude: impl FnOnce(T) -> Result<u8, Failure>,
    ) -> Result<u8, Failure> {
        let work = |group: &Group| {
            let mut backend = self.join(group, self.deadline())?;
            let result = work(group, &mut *backend)?;
            backend.leave()?;
            Ok(result)
        };
        self.run_ranks(config, work, conclude)
    }

    /// Like [`run`](Self::run), without a backend: the `work` forms its groups first, and then [joins](Self::join) one.
    pub(crate) fn run_ranks<T>(
        &self,
        config: &impl Serialize,
        work: impl FnOnce(&Group) -> Result<T, Error>,
        conclude: impl FnOnce(T) -> Result<u8, Failure>,
    ) -> Result<u8, Failure> {
        let Some(environment) = &self.environment else { return self.launch() };
        let rank = environment.rank;
        let config = serde_json::to_vec(config).map_err(|error| Failure::Failed(error.to_string()))?;
        let membership = Membership {
            rank,
            world_size: self.world_size,
            key: &environment.key,
            config: &config,
            deadline: self.deadline(),
        };
        let group =
            meeting::join(&membership, self.network.as_ref()).map_err(|error| self.not_met(&error, rank))?;
        let ready = meeting::check(group.hosts()).map_err(Error::OfAll).and_then(|()| self.settle(&group));
        match ready.and_then(|()| self.check_hosts(&group)).and_then(|()| work(&group)) {
            Ok(result) => {
                let status = if rank == 0 { conclude(result) } else { Ok(exit::SUCCESS) };
                // A rank that waits at the farewell waits for rank 0's files, too. Files that fail are rank 0's to report.
                let farewell = group.farewell().map_err(|error| self.rendezvous_failure(&error, rank));
                status.and_then(|status| farewell.map(|()| status))
            }
            Err(error) => Err(self.give_up(&group, &error)),
        }
    }

    /// Settles on one backend with the other ranks of a launcher, which may show each of them another GPU.
    fn settle(&self, group: &Group) -> Result<(), Error> {
        let options = &self.request.options;
        let found = self.backend.get();
        if !is_foreign(&self.environment) {
            return Ok(());
        }
        let local_rank = self.environment.as_ref().map_or(0, |environment| environment.local_rank);
        if options.backend != BackendChoice::Auto {
            // Each group checks its own ranks' GPUs when it joins, but not that another group has them.
            if found == Backend::Cuda && options.groups > 1 {
                let ordinal = ordinal(local_rank).unwrap_or(u32::MAX);
                cuda::check_group(group, ordinal, options.oversubscribe)?;
            }
            return Ok(());
        }
        let settled = placement::settle(group, found, || ordinal(local_rank), options.oversubscribe)?;
        self.backend.set(settled);
        if settled == found {
            return Ok(());
        }
        // Of another backend, all that was checked before.
        let checked = settled.check_all_reduces(&self.request.all_reduces).and_then(|()| self.check_memory());
        match checked {
            Err(Failure::Usage(line) | Failure::Failed(line)) => Err(Error::Failed(line)),
            _ => Ok(()),
        }
    }

    /// Refuses ranks on several hosts, if the backend is for those of one.
    fn check_hosts(&self, group: &Group) -> Result<(), Error> {
        let hosts = meeting::ranks_of_hosts(group.hosts());
        if hosts.len() < 2 || self.backend.get() == Backend::Cuda {
            return Ok(());
        }
        let names: Vec<_> = hosts.iter().map(|(host, _)| *host).collect();
        Err(Error::OfAll(format!(
            "the CPU backend is for ranks of one host, and these are on {}: {}",
            hosts.len(),
            names.join(", ")
        )))
    }

    /// Joins the backend of `group`. All ranks of the group call this. No operation waits past `deadline`.
    pub(crate) fn join<'a>(
        &self,
        group: &'a Group,
        deadline: Duration,
    ) -> Result<Box<dyn Collective + 'a>, Error> {
        Ok(match self.backend.get() {
            Backend::Cpu => Box::new(self.join_cpu(group, deadline)?),
            Backend::Cuda => {
                let local_rank = self.environment.as_ref().map_or(0, |environment| environment.local_rank);
                Box::new(self.join_cuda(group, local_rank, deadline)?)
            }
        })
    }

    fn launch(&self) -> Result<u8, Failure> {
        let failed = |error: launch::Error| Failure::Failed(error.to_string());
        let hosts = SimulatedHosts::new(self.request.options.hosts).map_err(failed)?;
        let launcher = Launcher::new(self.world_size).map_err(failed)?;
        let mut launcher = launcher.on_hosts(hosts).grace(self.deadline());
        for (variable, content) in &self.handed_over {
            launcher = launcher.hand_over(variable, content).map_err(failed)?;
        }
        let ended = launcher.run().map_err(failed)?;
        if let Some(message) = ended.message {
            complain(&message);
        }
        Ok(ended.status)
    }

    /// Refuses problems that do not fit in main memory. GPU memory is not checked: its allocator reports that itself.
    pub(crate) fn check_memory(&self) -> Result<(), Failure> {
        // Ranks of several hosts are told of their backend when they have met.
        if self.backend.get() == Backend::Cuda || self.spans_hosts() {
            return Ok(());
        }
        let needed = |problem: &Problem| self.memory_needed(problem).unwrap_or(u64::MAX);
        let Some(largest) = self.request.problems.iter().max_by_key(|problem| needed(problem)) else {
            return Ok(());
        };
        match (self.memory_needed(largest), available_memory()) {
            (Some(needed), Some(available)) if needed <= available => Ok(()),
            (Some(_), None) => Ok(()),
            (needed, available) => {
                let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64);
                Err(Failure::Usage(format!(
                    "--num-tokens: {} tokens of hidden size {} on {} ranks need {} of memory, and {} are free: use fewer tokens or ranks",
                    largest.tokens,
                    largest.hidden,
                    self.world_size,
                    needed.map_or_else(|| "more than 64 bits count".to_owned(), gib),
                    available.map_or_else(|| "fewer".to_owned(), gib),
                )))
            }
        }
    }

    /// Bytes that a problem takes on all ranks; `None` past 64 bits.
    fn memory_needed(&self, problem: &Problem) -> Option<u64> {
        let on_each = problem.total_bytes()?.checked_add((self.request.held)(problem)?)?;
        let shared = cpu::layout(self.group_size(), self.longest_row()).ok()?.total_bytes();
        let shared = shared.checked_mul(u64::from(self.request.options.groups))?;
        let (copies, flush) = match self.request.cold {
            true => (backend::cpu::sets(problem, true), 2 * backend::cpu::cache::cache_bytes()),
            false => (1, 0),
        };
        let on_each = on_each.checked_mul(copies.into())?.checked_add(flush)?;
        on_each.checked_mul(u64::from(self.world_size))?.checked_add(shared)
    }

    /// Bytes of the longest row of any problem.
    fn longest_row(&self) -> u64 {
        self.request.problems.iter().map(Problem::row_bytes).max().unwrap_or(0)
    }

    /// Sets up the group's shared memory.
    fn join_cpu(&self, group: &Group, deadline: Duration) -> Result<backend::cpu::Engine, Error> {
        let cores = if self.request.timed { Cores::agree(group)? } else { Cores::default() };
        // The memory that this rank touches first lies near its CPU.
        let pinned = cores.pin();
        let options = cpu::Options { max_row_bytes: self.longest_row(), deadline };
        let communicator = cpu::Communicator::join(group, options)?;
        drop(pinned);
        Ok(backend::cpu::Engine::new(communicator).on(cores))
    }

    /// Makes the group's workspace on the GPUs. If its ranks are on several hosts, [`Group::hosts`] has the host of each.
    fn join_cuda<'a>(
        &self,
        group: &'a Group,
        local_rank: u32,
        deadline: Duration,
    ) -> Result<backend::cuda::Engine<'a>, Error> {
        let slot_bytes =
            |problem: &Problem| cuda::slot_bytes(group.world_size(), &problem.operation(Mode::Auto));
        let options = cuda::Options {
            slot_bytes: self.request.problems.iter().map(slot_bytes).max().unwrap_or(0),
            deadline,
            oversubscribe: self.request.options.oversubscribe,
            check_scales: false,
            kernels: cuda::KernelSource::default(),
        };
        let communicator = cuda::Communicator::join(group, ordinal(local_rank)?, &options)?;
        Ok(backend::cuda::Engine::new(group, communicator, &self.request.all_reduces, deadline)?)
    }

    /// Ends this rank's part in a failed job: tells the other ranks, unless one of them was the cause, and the user.
    fn give_up(&self, group: &Group, error: &Error) -> Failure {
        if let Some(lost) = group.lost() {
            return self.loss(&lost, group.rank());
        }
        if let Error::Group(error) = error {
            return self.rendezvous_failure(error, group.rank());
        }
        if is_anothers(error, group.rank()) {
            // That rank is about to tell all ranks, and knows best.
            let until = Instant::now() + FIRST_HAND;
            while group.lost().is_none() && Instant::now() < until {
                thread::sleep(Duration::from_millis(1));
            }
            if let Some(lost) = group.lost() {
                return self.loss(&lost, group.rank());
            }
        }
        let line = format!("rank {}: {error}", group.rank());
        group.abort(&error.to_string());
        // Another rank may have been first.
        match group.lost() {
            Some(lost) if lost.rank != group.rank() => self.loss(&lost, group.rank()),
            _ => Failure::Failed(line),
        }
    }

    fn loss(&self, lost: &Lost, rank: u32) -> Failure {
        let is_launched = launch::is_launched();
        let reports = match self.network {
            // Without rank 0 the hosts do not hear of each other: one line on each.
            Some(_) if lost.rank == 0 && lost.how != How::GaveUp && !is_launched => {
                self.is_first_of_host() && rank > 0
            }
            _ => launch::reports(lost, rank, is_launched),
        };
        if !reports {
            return if is_launched { Failure::Elsewhere } else { Failure::Failed(String::new()) };
        }
        let out_of_memory = lost.how == How::Ended && killed_since(self.oom_kills);
        let cause = if out_of_memory { "; its control group ran out of memory" } else { "" };
        Failure::Failed(format!("{lost}{cause}"))
    }

    fn rendezvous_failure(&self, error: &rendezvous::Error, rank: u32) -> Failure {
        match error {
            rendezvous::Error::Lost(lost) => self.loss(lost, rank),
            error => Failure::Failed(format!("rank {rank}: {error}")),
        }
    }

    fn is_first_of_host(&self) -> bool {
        self.environment.as_ref().is_some_and(|environment| environment.local_rank == 0)
    }

    /// The failure of a rank that did not find the others.
    fn not_met(&self, error: &rendezvous::Error, rank: u32) -> Failure {
        let is_late = matches!(error, rendezvous::Error::Lost(lost) if lost.how == How::Late);
        // Ranks of one host find the same at the address.
        let is_of_host = matches!(error, rendezvous::Error::Unproven { .. } | rendezvous::Error::Protocol(_));
        let (variable, value) = if self.network.is_some() { (ADDRESS, "address") } else { (KEY, "key") };
        match self.rendezvous_failure(error, rank) {
            Failure::Failed(line) if is_late && !line.is_empty() && !launch::is_launched() => {
                Failure::Failed(format!("{line} (the variable {variable} sets the {value})"))
            }
            Failure::Failed(_) if is_of_host && self.network.is_some() && !self.is_first_of_host() => {
                Failure::Failed(String::new())
            }
            failure => failure,
        }
    }
}

/// True if another program than this one started the ranks.
fn is_foreign(environment: &Option<RankEnv>) -> bool {
    environment.is_some() && !launch::is_launched()
}

/// The GPU of a rank, of those that it sees: all of the host, its own alone, or its own and some others. Ranks that get the
/// same one find out by its UUID.
fn ordinal(local_rank: u32) -> Result<u32, fused_collective::Error> {
    Ok(local_rank % cuda::count()?.max(1))
}

/// Ends a rank that fails before it meets the others. All ranks may fail in the same way: then rank 0 alone prints it. If
/// others do not, they learn it from this rank. Returns what is left to print.
pub(crate) fn decline(failure: Failure) -> Failure {
    let (is_usage, line) = match failure {
        Failure::Usage(line) => (true, line),
        Failure::Failed(line) => (false, line),
        Failure::Elsewhere => return Failure::Elsewhere,
    };
    let mut left = line.clone();
    if let (Ok(Some(environment)), false) = (RankEnv::from_env(), line.is_empty()) {
        let RankEnv { rank, world_size, key, .. } = &environment;
        let (rank, world_size) = (*rank, *world_size);
        let named = format!("rank {rank}: {line}");
        if rank == 0 {
            // Ahead of the wait for the others, which may not come.
            complain(&named);
        }
        let membership = Membership { rank, world_size, key, config: b"", deadline: Duration::ZERO };
        let told = match meeting::network(&environment) {
            Ok(network) => Group::decline(&membership, network.as_ref(), &line).rank,
            // Without a network it cannot tell them.
            Err(_) => rank,
        };
        left = if rank > 0 && told == rank { named } else { String::new() };
    }
    if is_usage { Failure::Usage(left) } else { Failure::Failed(left) }
}

/// True if a call failed only because another rank has given up, or if another reports the failure of all.
fn is_anothers(error: &Error, rank: u32) -> bool {
    match error {
        Error::OfAll(_) => rank > 0,
        Error::Collective(error) => {
            error.failure().is_some_and(|failure| matches!(failure.cause, Cause::GaveUp(_)))
        }
        _ => false,
    }
}
