//! A group of ranks that does one thing: how it is started, how ranks join it, and how it ends.

pub mod launch;
pub mod options;
pub mod rank_env;
pub mod ranks;
pub(crate) mod screen;

use std::{
    thread,
    time::{Duration, Instant},
};

use fused_collective_core::fusion::Mode;
use serde::Serialize;

use fused_collective::{
    cpu::{self, Communicator},
    cuda::{self, KernelSource},
    group::{
        Lost,
        failure::Cause,
        rendezvous::{self, Group, MIN_RANKS, Membership},
    },
};

use crate::{
    backend::{
        collective::Collective,
        cpu::{Engine, cache_bytes, sets},
        cuda::{Engine as CudaEngine, gpus::check_peers},
        error::Error as BackendError,
        problem::Problem,
    },
    commands::values::world_size,
    exit::{self, Failure, complain},
    job::{
        options::{AllReduceChoice, BackendChoice},
        ranks::Error,
    },
    report::machine,
};
use launch::Launcher;
use rank_env::RankEnv;

/// Ranks that are started where nobody says how many.
const DEFAULT_RANKS: u32 = 2;

/// How long a rank waits for another, which has given up, to say why.
const FIRST_HAND: Duration = Duration::from_secs(1);

/// The group that a command asks for, and what it will compute.
pub(crate) struct Request {
    pub(crate) backend: BackendChoice,
    /// Ranks of the job; `None` leaves it to the launcher or to the backend.
    pub(crate) nproc_per_node: Option<u32>,
    /// Groups that the ranks are dealt out to, of the same size.
    pub(crate) groups: u32,
    /// Whether ranks may share a GPU.
    pub(crate) oversubscribe: bool,
    pub(crate) all_reduces: Vec<AllReduceChoice>,
    /// Longest wait for a peer.
    pub(crate) deadline: Duration,
    /// Everything that the backend will be asked to prepare.
    pub(crate) problems: Vec<Problem>,
    /// Whether it will have copies of the tensors, so that none is found in a cache.
    pub(crate) cold: bool,
    /// Bytes that each rank holds of a problem besides its tensors; `None` past 64 bits.
    pub(crate) held: fn(&Problem) -> Option<u64>,
}

/// A request that can be met.
pub(crate) struct Job {
    request: Request,
    environment: Option<RankEnv>,
    backend: Backend,
    world_size: u32,
    /// What the ranks are given to read, by variable.
    handed_over: Vec<(&'static str, Vec<u8>)>,
}

/// The backend that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Backend {
    Cpu,
    Cuda,
}

impl Backend {
    fn name(self) -> &'static str {
        match self {
            Backend::Cpu => "cpu",
            Backend::Cuda => "cuda",
        }
    }
}

impl Job {
    /// Settles on a backend and a number of ranks.
    pub(crate) fn new(request: Request) -> Result<Self, Failure> {
        let environment = RankEnv::from_env().map_err(|error| Failure::Usage(error.to_string()))?;
        let launched = environment.as_ref().map(|environment| environment.world_size);
        let asked = world_size(request.nproc_per_node, launched)?;
        let (backend, world_size) = choose_backend(&request, asked, launched.is_some())?;
        let groups = request.groups;
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

    pub(crate) fn world_size(&self) -> u32 {
        self.world_size
    }

    /// This rank's GPU, if the backend has one.
    pub(crate) fn cuda(&self) -> Option<u32> {
        let environment = self.environment.as_ref()?;
        if self.backend == Backend::Cuda { self.ordinal(environment.local_rank).ok() } else { None }
    }

    /// This process's rank; `None` in one that will start the ranks.
    pub(crate) fn rank(&self) -> Option<u32> {
        self.environment.as_ref().map(|environment| environment.rank)
    }

    /// Gives the ranks that this process will start `content` to read: see [`launch::handed_over`].
    pub(crate) fn hand_over(&mut self, variable: &'static str, content: Vec<u8>) {
        self.handed_over.push((variable, content));
    }

    /// Longest wait for a peer.
    pub(crate) fn deadline(&self) -> Duration {
        self.request.deadline
    }

    /// Ranks of the largest group.
    pub(crate) fn group_size(&self) -> u32 {
        self.world_size / self.request.groups
    }

    /// Whether the ranks are processes that this program starts, one for each GPU.
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
            deadline: self.request.deadline,
        })
    }

    /// Starts the ranks and waits for them, or is one of them: then does the `work` with the group of all ranks and its
    /// backend, and on rank 0 ends with `conclude`, which makes an exit status of it. Ranks must agree on the `config`.
    pub(crate) fn run<T>(
        &self,
        config: &impl Serialize,
        work: impl FnOnce(&Group, &mut dyn Collective) -> Result<T, Error>,
        conclude: impl FnOnce(T) -> Result<u8, Failure>,
    ) -> Result<u8, Failure> {
        let work = |group: &Group| {
            let mut backend = self.join(group, self.request.deadline)?;
            let outcome = work(group, &mut *backend)?;
            backend.leave()?;
            Ok(outcome)
        };
        self.run_ranks(config, work, conclude)
    }

    /// As [`run`](Self::run), without a backend: the `work` [joins](Self::join) it when it has the groups it wants.
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
            deadline: self.request.deadline,
        };
        let group = Group::join(&membership).map_err(|error| rendezvous_failure(&error, rank))?;
        let outcome = work(&group);
        match outcome {
            Ok(outcome) => {
                let status = if rank == 0 { conclude(outcome)? } else { exit::SUCCESS };
                // A rank that waits at the farewell waits for rank 0's files, too.
                group.farewell().map_err(|error| rendezvous_failure(&error, rank))?;
                Ok(status)
            }
            Err(error) => Err(give_up(&group, &error)),
        }
    }

    /// This rank's end of the backend, for `group`, all of whose ranks call this. No operation waits past `deadline`.
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
        let mut launcher = Launcher::new(self.world_size).map_err(failed)?.grace(self.request.deadline);
        for (variable, content) in &self.handed_over {
            launcher = launcher.hand_over(variable, content).map_err(failed)?;
        }
        let outcome = launcher.run().map_err(failed)?;
        if let Some(message) = outcome.message {
            complain(&message);
        }
        Ok(outcome.status)
    }

    /// Refuses what would not fit in memory. A GPU's memory says so itself.
    pub(crate) fn check_memory(&self) -> Result<(), Failure> {
        if self.backend == Backend::Cuda {
            return Ok(());
        }
        let needed = |problem: &Problem| self.memory_needed(problem).unwrap_or(u64::MAX);
        let Some(largest) = self.request.problems.iter().max_by_key(|problem| needed(problem)) else {
            return Ok(());
        };
        match (self.memory_needed(largest), machine::available_memory()) {
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
                    available.map_or_else(|| "not so many".to_owned(), gib),
                )))
            }
        }
    }

    /// Bytes that a problem takes on all ranks; `None` past 64 bits.
    fn memory_needed(&self, problem: &Problem) -> Option<u64> {
        let on_each = problem.total_bytes()?.checked_add((self.request.held)(problem)?)?;
        let shared = cpu::layout(self.group_size(), self.longest_row()).ok()?.total_bytes();
        let shared = shared.checked_mul(u64::from(self.request.groups))?;
        let (copies, flush) = match self.request.cold {
            true => (sets(problem, true), 2 * cache_bytes()),
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
    fn join_cpu(&self, group: &Group, deadline: Duration) -> Result<Engine, Error> {
        let options = cpu::Options { max_row_bytes: self.longest_row(), deadline };
        let communicator = Communicator::join(group, options).map_err(BackendError::from)?;
        Ok(Engine::new(communicator))
    }

    /// The GPU of the rank with this number on the host. Ranks past the last GPU start over with the first, if they may.
    fn ordinal(&self, local_rank: u32) -> Result<u32, fused_collective::Error> {
        if self.request.oversubscribe { Ok(local_rank % cuda::count()?.max(1)) } else { Ok(local_rank) }
    }

    /// Makes the group's workspace on the GPUs.
    fn join_cuda<'a>(
        &self,
        group: &'a Group,
        local_rank: u32,
        deadline: Duration,
    ) -> Result<CudaEngine<'a>, Error> {
        let slot_bytes =
            |problem: &Problem| cuda::slot_bytes(group.world_size(), &problem.operation(Mode::Auto));
        let slot_bytes = self.request.problems.iter().map(slot_bytes).max().unwrap_or(0);
        let oversubscribe = self.request.oversubscribe;
        let options = cuda::Options { slot_bytes, deadline, oversubscribe, kernels: KernelSource::default() };
        let ordinal = self.ordinal(local_rank).map_err(BackendError::from)?;
        let communicator = cuda::Communicator::join(group, ordinal, &options).map_err(BackendError::from)?;
        Ok(CudaEngine::new(group, communicator, &self.request.all_reduces, deadline)?)
    }
}

/// Tells the others, unless it was one of them, and the user.
fn give_up(group: &Group, error: &Error) -> Failure {
    if let Some(lost) = group.lost() {
        return loss(&lost, group.rank());
    }
    if let Error::Group(error) = error {
        return rendezvous_failure(error, group.rank());
    }
    if is_anothers(error) {
        // That rank is about to tell all, and knows best.
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

/// Whether a call failed only because another rank has given up.
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

/// The backend and the number of ranks, from what was `asked` for. `launched`: something else has started the ranks.
fn choose_backend(request: &Request, asked: Option<u32>, launched: bool) -> Result<(Backend, u32), Failure> {
    let groups = request.groups;
    let on_cpu = (Backend::Cpu, asked.unwrap_or(DEFAULT_RANKS * groups));
    let oversubscribe = request.oversubscribe;
    let check = |ranks: u32| check_peers(ranks / groups, groups, oversubscribe).map(|()| ranks);
    let chosen = match request.backend {
        BackendChoice::Cpu => on_cpu,
        BackendChoice::Auto => match gpu_ranks(asked, groups, oversubscribe).and_then(check) {
            Ok(ranks) => (Backend::Cuda, ranks),
            Err(_) => on_cpu,
        },
        BackendChoice::Cuda => {
            // A launcher may show each rank its own GPU alone: then the ranks find out together.
            let check = |ranks| if launched { Ok(ranks) } else { check(ranks) };
            let ranks = gpu_ranks(asked, groups, oversubscribe).and_then(check).map_err(|error| {
                Failure::Usage(format!("--backend: cuda: {error}: use cpu, or leave the option out"))
            })?;
            (Backend::Cuda, ranks)
        }
    };
    if chosen.0 == Backend::Cpu && !request.all_reduces.contains(&AllReduceChoice::Custom) {
        return Err(Failure::Usage(
            "--allreduce: nccl needs the cuda backend: use custom, or leave the option out".to_owned(),
        ));
    }
    Ok(chosen)
}

/// The ranks of so many groups of GPUs: as many as `asked` for, or one for each GPU, or the fewest that can form the
/// groups if they may `oversubscribe` the GPUs.
fn gpu_ranks(asked: Option<u32>, groups: u32, oversubscribe: bool) -> Result<u32, fused_collective::Error> {
    let count = match cuda::count()? {
        count @ 1.. if oversubscribe => count.max(DEFAULT_RANKS * groups),
        count => count,
    };
    let ranks = asked.unwrap_or((count / groups).min(cuda::MAX_RANKS) * groups);
    if (DEFAULT_RANKS..=cuda::MAX_RANKS).contains(&(ranks / groups)) {
        return Ok(ranks);
    }
    let most = cuda::MAX_RANKS;
    let group = if groups == 1 { "a group".to_owned() } else { format!("{groups} groups") };
    Err(fused_collective::Error::Device(format!(
        "{ranks} GPUs cannot form {group}: {DEFAULT_RANKS} to {most} can form one"
    )))
}
