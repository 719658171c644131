//! A job: the ranks that run one command. This module starts the ranks, or joins them as one, and ends them together.

pub mod launch;
pub mod options;
mod placement;
pub mod rank_env;
pub mod ranks;
pub(crate) mod screen;

use std::{
    thread,
    time::{Duration, Instant},
};

use fused_collective::{
    cpu, cuda,
    group::{
        Lost,
        failure::Cause,
        rendezvous::{self, Group, MIN_RANKS, Membership},
    },
};
use fused_collective_core::fusion::Mode;
use serde::Serialize;

use crate::backend::all_reduce_choice::AllReduceChoice;
use crate::{
    backend::{self, collective::Collective, problem::Problem},
    exit::{self, Failure, complain},
    report::machine::available_memory,
};
use launch::Launcher;
use options::JobOptions;
use placement::Backend;
use rank_env::RankEnv;
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
            held: |_| Some(0),
        }
    }
}

/// A request that can be met.
pub(crate) struct Job {
    request: Request,
    environment: Option<RankEnv>,
    backend: Backend,
    world_size: u32,
    /// Contents for the ranks to read, by variable.
    handed_over: Vec<(&'static str, Vec<u8>)>,
}

impl Job {
    /// Settles on a backend and a number of ranks.
    pub(crate) fn new(request: Request) -> Result<Self, Failure> {
        let environment = RankEnv::from_env().map_err(|error| Failure::Usage(error.to_string()))?;
        let launched = environment.as_ref().map(|environment| environment.world_size);
        let options = &request.options;
        let asked = options.world_size(launched)?;
        let (backend, world_size) =
            placement::choose(options, &request.all_reduces, asked, launched.is_some())?;
        let groups = options.groups;
        if !world_size.is_multiple_of(groups) || world_size / groups < MIN_RANKS {
            return Err(Failure::Usage(format!(
                "--groups: {world_size} ranks cannot form {groups} groups of one size: use a number that leaves each {MIN_RANKS} ranks or more"
            )));
        }
        Ok(Job { request, environment, backend, world_size, handed_over: Vec::new() })
    }

    pub(crate) fn backend_name(&self) -> &'static str {
        self.backend.name()
    }

    /// Ranks of all groups together.
    pub(crate) fn world_size(&self) -> u32 {
        self.world_size
    }

    /// This rank's GPU, if the backend has one.
    pub(crate) fn cuda(&self) -> Option<u32> {
        let environment = self.environment.as_ref()?;
        if self.backend == Backend::Cuda { self.ordinal(environment.local_rank).ok() } else { None }
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

    /// True if the ranks are processes of this program's own, one for each GPU.
    pub(crate) fn starts_ranks_on_gpus(&self) -> bool {
        self.backend == Backend::Cuda && (self.environment.is_none() || launch::is_launched())
    }

    /// Meets the other ranks, which have the same settings, under a key made from the job's.
    pub(crate) fn meet(&self, key: impl FnOnce(&str) -> String) -> Result<Group, rendezvous::Error> {
        let (rank, job) = match &self.environment {
            Some(environment) => (environment.rank, environment.key.as_str()),
            None => (0, ""),
        };
        Group::join(&Membership {
            rank,
            world_size: self.world_size,
            key: &key(job),
            config: b"",
            deadline: self.deadline(),
        })
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
        let group = Group::join(&membership).map_err(|error| rendezvous_failure(&error, rank))?;
        match work(&group) {
            Ok(result) => {
                let status = if rank == 0 { conclude(result) } else { Ok(exit::SUCCESS) };
                // A rank that waits at the farewell waits for rank 0's files, too. Files that fail are rank 0's to report.
                let farewell = group.farewell().map_err(|error| rendezvous_failure(&error, rank));
                status.and_then(|status| farewell.map(|()| status))
            }
            Err(error) => Err(give_up(&group, &error)),
        }
    }

    /// Joins the backend of `group`. All ranks of the group call this. No operation waits past `deadline`.
    pub(crate) fn join<'a>(
        &self,
        group: &'a Group,
        deadline: Duration,
    ) -> Result<Box<dyn Collective + 'a>, Error> {
        Ok(match self.backend {
            Backend::Cpu => Box::new(self.join_cpu(group, deadline)?),
            Backend::Cuda => {
                let local_rank = self.environment.as_ref().map_or(0, |environment| environment.local_rank);
                Box::new(self.join_cuda(group, local_rank, deadline)?)
            }
        })
    }

    fn launch(&self) -> Result<u8, Failure> {
        let failed = |error: launch::Error| Failure::Failed(error.to_string());
        let mut launcher = Launcher::new(self.world_size).map_err(failed)?.grace(self.deadline());
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
        if self.backend == Backend::Cuda {
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
        let options = cpu::Options { max_row_bytes: self.longest_row(), deadline };
        Ok(backend::cpu::Engine::new(cpu::Communicator::join(group, options)?))
    }

    /// The GPU of a rank on this host. If ranks may share a GPU, ranks past the last GPU start over with the first.
    fn ordinal(&self, local_rank: u32) -> Result<u32, fused_collective::Error> {
        let oversubscribe = self.request.options.oversubscribe;
        if oversubscribe { Ok(local_rank % cuda::count()?.max(1)) } else { Ok(local_rank) }
    }

    /// Makes the group's workspace on the GPUs.
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
            kernels: cuda::KernelSource::default(),
        };
        let communicator = cuda::Communicator::join(group, self.ordinal(local_rank)?, &options)?;
        Ok(backend::cuda::Engine::new(group, communicator, &self.request.all_reduces, deadline)?)
    }
}

/// Ends this rank's part in a failed job: tells the other ranks, unless one of them was the cause, and the user.
fn give_up(group: &Group, error: &Error) -> Failure {
    if let Some(lost) = group.lost() {
        return loss(&lost, group.rank());
    }
    if let Error::Group(error) = error {
        return rendezvous_failure(error, group.rank());
    }
    if is_anothers(error) {
        // That rank is about to tell all ranks, and knows best.
        let until = Instant::now() + FIRST_HAND;
        while group.lost().is_none() && Instant::now() < until {
            thread::sleep(Duration::from_millis(1));
        }
        if let Some(lost) = group.lost() {
            return loss(&lost, group.rank());
        }
    }
    let line = format!("rank {}: {error}", group.rank());
    group.abort(&error.to_string());
    // Another rank may have been first.
    match group.lost() {
        Some(lost) if lost.rank != group.rank() => loss(&lost, group.rank()),
        _ => Failure::Failed(line),
    }
}

/// True if a call failed only because another rank has given up.
fn is_anothers(error: &Error) -> bool {
    match error {
        Error::Collective(error) => {
            error.failure().is_some_and(|failure| matches!(failure.cause, Cause::GaveUp(_)))
        }
        _ => false,
    }
}

fn loss(lost: &Lost, rank: u32) -> Failure {
    if launch::reports(lost, rank, launch::is_launched()) {
        Failure::Failed(lost.to_string())
    } else {
        Failure::Elsewhere
    }
}

fn rendezvous_failure(error: &rendezvous::Error, rank: u32) -> Failure {
    match error {
        rendezvous::Error::Lost(lost) => loss(lost, rank),
        error => Failure::Failed(format!("rank {rank}: {error}")),
    }
}
