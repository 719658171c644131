//! One rank's end of a group of GPUs.

use std::{
    collections::HashMap,
    hint,
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::Ordering::{Acquire, Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use fused_collective_core::{
    agreement::{CALL_WORDS, Call, Chain},
    fusion::Operation,
    launch::{self, ABORTED, Address, Fused, Shape, Status},
    plan::{self, Algorithm, Limits, Plan, Round},
    workspace::{Header, Layout},
};

use super::{
    Aborter, Error,
    abort::Switch,
    device::{self, Gpu},
    driver::{Handle, check, is_ready, load},
    epilogue::{Part, WithEpilogue, with_epilogue},
    gather,
    kernels::{Entry, Kernels, MAX_RANKS, Set},
    memory::MappedStatus,
    tensors::Tensors,
    workspace::Workspace,
};
use crate::{
    board::{Board, Disagreement, Place},
    failure::{Awaited, Cause, Failure, What},
    rendezvous::{Control, Group, OnLoss},
    shared_memory::SharedMemory,
};

/// The longest wait that kernels count, a little under their clock's turn.
const MAX_DEADLINE: Duration = Duration::from_secs(3600);
/// Beyond the deadline, how long a host waits for its GPU: several kernels may each wait for almost as long.
const PATIENCE: Duration = Duration::from_secs(10);
/// Announced calls that are kept: more than a GPU's queue holds, and so than a host can be ahead of its results.
const CALLS_KEPT: u64 = 4096;
/// Looks at the stream before the host's processor is offered to others.
const SPINS: u32 = 10_000;

/// How a group works.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Bytes of a slot of the workspace, at least: see [`slot_bytes`](super::slot_bytes).
    pub slot_bytes: u64,
    /// No wait of an operation is longer, nor than an hour.
    pub deadline: Duration,
    /// Whether ranks (processes) may share a GPU. They take turns on it, at the driver's pace: operations are right,
    /// and take milliseconds. Not under MPS, where their kernels would compete for the places that each counts on.
    pub oversubscribe: bool,
}

/// One rank's end of a group of GPUs of one host, for fused operations on a caller's stream.
///
/// All ranks enqueue the same operations in the same order, each on one stream, or on several that are ordered by
/// events. A communicator is dropped when the operations of all ranks have ended: until then peers write into its
/// memory.
#[derive(Debug)]
pub struct Communicator {
    rank: u32,
    limits: Limits,
    deadline: Duration,
    control: Control,
    failed: Option<Box<Failure>>,
    /// Other ranks' memory is closed: see [`leave`](Self::leave).
    left: bool,
    shares_gpus: bool,
    board: Board,
    names: Names,
    /// Captured since the last [`captured`](Self::captured).
    captured: Captured,
    switch: Arc<Switch>,
    // A loss throws the switch, whatever this process does meanwhile.
    _on_loss: OnLoss,
    status: Arc<MappedStatus>,
    workspace: Workspace,
    kernels: Kernels,
    set: Set,
    layout: Layout,
    // Dropped last: the context that everything above lives in.
    gpu: Gpu,
}

impl Communicator {
    /// Joins the ranks of `group`, this one with GPU `ordinal` of those that the process sees (its local rank, as a
    /// rule), and makes a workspace. All ranks call this, with the same `options`. The GPU's primary context becomes
    /// current in the calling thread.
    ///
    /// # Errors
    /// No driver, no kernels, not enough memory; two ranks that cannot share memory, by name.
    pub fn join(group: &Group, ordinal: u32, options: Options) -> Result<Communicator, Error> {
        let Options { slot_bytes, deadline, oversubscribe } = options;
        let (rank, world_size) = (group.rank(), group.world_size());
        let set = Set::for_group(world_size).ok_or_else(|| {
            Error::Devices(format!(
                "{world_size} ranks are more than GPU kernels serve: use 2 to {MAX_RANKS}"
            ))
        })?;
        let gpu = Gpu::open(ordinal)?;
        let mut kernels = Kernels::find(&gpu)?;
        let shares_gpus = device::check_group(group, &gpu, oversubscribe)?;
        let layout =
            Layout::new(world_size, slot_bytes).map_err(|error| Error::Devices(error.to_string()))?;
        let limits = agree(
            group,
            Limits {
                world_size,
                slot_bytes: layout.slot_bytes(),
                compute_units: gpu.units,
                max_cluster: kernels.max_cluster(),
                one_shot_bytes: plan::one_shot_bytes(world_size, HOP_BYTES),
            },
        )?;
        kernels.agree(limits.compute_units, limits.max_cluster);
        let layout =
            Layout::new(world_size, limits.slot_bytes).map_err(|error| Error::Devices(error.to_string()))?;
        let board = share_board(group)?;
        let workspace = Workspace::share(group, &layout)?;
        let status = Arc::new(MappedStatus::new()?);
        let switch = Switch::new(&status);
        let on_loss = Arc::clone(&switch);
        Ok(Communicator {
            rank,
            limits,
            deadline: deadline.min(MAX_DEADLINE),
            control: group.control(),
            failed: None,
            left: false,
            shares_gpus,
            board,
            names: Names::default(),
            captured: Captured::default(),
            switch,
            _on_loss: group.on_loss(move || on_loss.throw()),
            status,
            workspace,
            kernels,
            set,
            layout,
            gpu,
        })
    }

    /// This rank.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// Ranks in the group.
    pub fn world_size(&self) -> u32 {
        self.limits.world_size
    }

    /// Whether ranks of the group share GPUs.
    pub fn shares_gpus(&self) -> bool {
        self.shares_gpus
    }

    /// What operations are planned with; the same on every rank.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The GPU and the kernels, for reports.
    pub fn describe(&self) -> String {
        format!("{}, {}", self.gpu.name, self.kernels.describe())
    }

    pub(crate) fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    pub(crate) fn kernels(&mut self) -> &mut Kernels {
        &mut self.kernels
    }

    /// Loads the kernels that `operation` needs, so that the first one enqueued does not take the time.
    ///
    /// # Errors
    /// They are missing or unusable.
    pub fn prepare(&mut self, operation: &Operation) -> Result<(), Error> {
        self.kernels.load(operation.dtype, self.set)
    }

    /// Enqueues `operation` on `stream`, a `CUstream` of this rank's context. It may be captured into a graph, and
    /// the graph replayed for ever, between other operations.
    ///
    /// The kernels may start before the kernel ahead of them in the stream is complete (programmatic dependent
    /// launch), and wait for it before they read anything but gamma and the scale.
    ///
    /// # Errors
    /// Before anything is launched: what [`Plan::new`] refuses, tensors that do not fit the operation, a group that
    /// has failed.
    ///
    /// # Safety
    /// The tensors are where and what they are said to be until the operation has ended, those that are written
    /// overlap no other, and `stream` is a stream of this rank's context.
    pub unsafe fn enqueue(
        &mut self,
        operation: &Operation,
        tensors: &Tensors,
        stream: Handle,
    ) -> Result<(), Error> {
        self.check_usable()?;
        let plan = Plan::new(operation, &self.limits)?;
        tensors.check(operation, self.rank, self.limits.world_size)?;
        let call = Call::operation(operation, plan.algorithm, None);
        self.announce(call, stream)?;
        let call = self.names.name(call);
        for round in plan.rounds() {
            let launcher =
                RoundLauncher { communicator: self, plan, round, call, operation, tensors, stream };
            with_epilogue(operation.norm, operation.quantization, operation.hidden, tensors, launcher)?;
        }
        Ok(())
    }

    /// What was captured since this was last called, for [`replay`](Self::replay). Call it when a capture has ended.
    pub fn captured(&mut self) -> Captured {
        std::mem::take(&mut self.captured)
    }

    /// Says that a graph with these operations is about to be launched, so that the ranks' calls can be compared:
    /// nothing else sees a graph's launches. Where no rank ever says so, they are not compared.
    ///
    /// # Errors
    /// A group that has failed.
    pub fn replay(&mut self, captured: Captured) -> Result<(), Error> {
        self.check_usable()?;
        if captured.calls > 0 {
            self.board.announce(Call::Replay { captured: captured.chain.digest(), calls: captured.calls });
        }
        Ok(())
    }

    /// Whether all operations that have ended did so well, and were the same on every rank. Call it after the stream was
    /// synchronized and before results are used.
    ///
    /// # Errors
    /// [`Error::Failed`]: who waited for whom, in which operation, or who called something else. From then on the
    /// communicator is poisoned: every later call fails at once. The other ranks' operations end, too.
    pub fn check(&mut self) -> Result<(), Error> {
        self.check_usable()?;
        // Ahead of a wait that failed because of it.
        if let Some(disagreement) = self.board.disagreement() {
            return Err(self.poison(self.out_of_step(disagreement)));
        }
        if let Some(failure) = self.failed_wait() {
            return Err(self.poison(failure));
        }
        // What has ended here has begun on every rank, so each has announced it.
        if let Some(disagreement) = self.board.disagreement_at_end() {
            return Err(self.poison(self.out_of_step(disagreement)));
        }
        Ok(())
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
        let token = long(Status::TOKEN);
        let wait = Awaited {
            from: word(Status::MISSING_RANK) as u32,
            what: match word(Status::HOP) {
                2 => What::Sum(token),
                3 => What::Flag,
                _ => What::Input(token),
            },
            operation: long(Status::OPERATION),
            call: self.names.call(long(Status::CALL)),
        };
        let cause = if reason == ABORTED { self.end() } else { Cause::Deadline(self.deadline) };
        Some(Failure { rank: self.rank, wait: Some(wait), cause })
    }

    /// Why waits were ended.
    fn end(&self) -> Cause {
        match self.control.lost() {
            Some(lost) if lost.rank != self.rank => Cause::Lost(lost.to_string()),
            _ => Cause::Aborted,
        }
    }

    fn out_of_step(&self, disagreement: Disagreement) -> Failure {
        Failure { rank: self.rank, wait: None, cause: Cause::OutOfStep(disagreement) }
    }

    fn poison(&mut self, failure: Failure) -> Error {
        let failure = Box::new(failure);
        self.failed = Some(failure.clone());
        self.switch.throw();
        self.control.abort(&failure.to_string());
        Error::Failed(failure)
    }

    /// For other threads: ends the group's operations, on all ranks. It may outlive the communicator.
    pub fn aborter(&self) -> Aborter {
        Aborter { switch: Arc::clone(&self.switch), control: self.control.clone() }
    }

    /// Waits until everything on `stream` has ended, and [checks](Self::check) it. If a rank of the group is lost
    /// meanwhile, has made another call, or the GPU takes longer than its deadlines allow, all waits are ended.
    ///
    /// # Errors
    /// As [`check`](Self::check); [`Error::Stuck`] if the GPU does not end.
    ///
    /// # Safety
    /// `stream` is a stream of this rank's context.
    pub unsafe fn synchronize(&mut self, stream: Handle) -> Result<(), Error> {
        let driver = load()?;
        let began = Instant::now();
        let limit = 2 * self.deadline + PATIENCE;
        let mut ended: Option<Instant> = None;
        let mut looks = 0u32;
        // SAFETY: as this function's.
        while !is_ready("wait for the GPU", unsafe { (driver.cuStreamQuery)(stream) })? {
            looks = looks.saturating_add(1);
            if looks < SPINS {
                hint::spin_loop();
                continue;
            }
            let over = || {
                self.control.lost_rank().is_some()
                    || self.switch.is_thrown()
                    || self.board.disagreement().is_some()
                    || began.elapsed() > limit
            };
            match ended {
                None if over() => {
                    self.switch.throw();
                    ended = Some(Instant::now());
                }
                Some(since) if since.elapsed() > PATIENCE => {
                    return Err(Error::Stuck { rank: self.rank, waited: began.elapsed() });
                }
                _ => thread::yield_now(),
            }
        }
        self.check()
    }

    /// Closes other ranks' memory, and returns when all have done so, after which each may free its own: drop it. All
    /// ranks call this when their operations have ended; every later call fails.
    ///
    /// # Errors
    /// A rank was lost.
    pub fn leave(&mut self, group: &Group) -> Result<(), Error> {
        self.left = true;
        self.workspace.close_peers();
        Ok(group.barrier()?)
    }

    /// Between operations: what this rank's region holds, if anything. All of it is read only if `thorough`.
    pub(crate) fn find_stray_write(&self, thorough: bool) -> Result<Option<String>, Error> {
        let (world_size, slot_bytes) = (self.layout.world_size(), self.layout.slot_bytes());
        let header = Header { world_size, rank: self.rank, slot_bytes };
        self.workspace.find_stray_write(&self.layout, header, thorough)
    }

    fn check_usable(&mut self) -> Result<(), Error> {
        if self.left {
            return Err(Error::Group("this rank has left the group".to_owned()));
        }
        if let Some(failure) = &self.failed {
            return Err(Error::Poisoned(failure.clone()));
        }
        if self.switch.is_thrown() && self.status.word(Status::FAILED).load(Acquire) == 0 {
            // No wait was under way, so none has told of it.
            let failure = match self.board.disagreement() {
                Some(disagreement) => self.out_of_step(disagreement),
                None => Failure { rank: self.rank, wait: None, cause: self.end() },
            };
            return Err(self.poison(failure));
        }
        Ok(())
    }

    /// Tells the others what is called, before it is launched. What is captured is told of when it is replayed.
    fn announce(&mut self, call: Call, stream: Handle) -> Result<(), Error> {
        let mut capturing = 0;
        // SAFETY: a stream of this rank's context, as `enqueue`'s caller says, and room for the answer.
        let code = unsafe { (load()?.cuStreamIsCapturing)(stream, &mut capturing) };
        check("ask whether the stream is being captured", code)?;
        if matches!(call, Call::Operation { operation: Operation { tokens: 0, .. }, .. }) {
            // No rank takes part in it, so it is compared with the next call.
            if capturing == 0 {
                self.board.pass(&call);
            }
        } else if capturing == 0 {
            self.board.announce(call);
        } else {
            self.captured.chain = self.captured.chain.then(&call);
            self.captured.calls += 1;
        }
        Ok(())
    }

    fn group(&self) -> launch::Group {
        self.launch_group(self.workspace.regions())
    }

    /// This rank's place in the group, for kernels that reach other memory than the workspace.
    pub(crate) fn launch_group(&self, regions: [Address; launch::MAX_RANKS]) -> launch::Group {
        launch::Group {
            regions,
            state: self.workspace.state(),
            status: self.status.address(),
            slot_bytes: self.layout.slot_bytes(),
            timeout_ns: self.deadline.as_nanos().min(u128::from(u64::MAX)) as u64,
            world_size: self.limits.world_size,
            rank: self.rank,
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.switch.part();
    }
}

/// Operations that were captured into a graph: see [`Communicator::replay`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Captured {
    chain: Chain,
    calls: u64,
}

/// The memory in which the ranks' hosts tell each other what they call.
fn share_board(group: &Group) -> Result<Board, Error> {
    let failed = |error: std::io::Error| Error::Group(format!("the group's shared host memory: {error}"));
    let place = Place::alone(CALLS_KEPT);
    let bytes = place.bytes(group.world_size());
    let own = match group.rank() {
        0 => Some(SharedMemory::create(bytes).map_err(failed)?),
        _ => None,
    };
    let file = group.share_fd(own.as_ref().map(AsFd::as_fd))?;
    let memory = Arc::new(SharedMemory::map(file.as_fd(), bytes).map_err(failed)?);
    Ok(Board::new(memory, place, group.rank(), group.world_size()))
}

/// The calls that kernels were launched for, by the numbers that kernels know them by. They are kept for good, since a
/// graph may be launched at any time: as many as there are different calls.
#[derive(Debug, Default)]
struct Names {
    calls: Vec<Call>,
    numbers: HashMap<[u64; CALL_WORDS], u64>,
}

impl Names {
    /// The number of `call`.
    fn name(&mut self, call: Call) -> u64 {
        *self.numbers.entry(call.to_words()).or_insert_with(|| {
            self.calls.push(call);
            self.calls.len() as u64 - 1
        })
    }

    /// The call with this number.
    fn call(&self, number: u64) -> Option<Call> {
        usize::try_from(number).ok().and_then(|index| self.calls.get(index)).copied()
    }
}

/// Launches one round of an operation.
struct RoundLauncher<'a> {
    communicator: &'a mut Communicator,
    plan: Plan,
    round: Round,
    /// What kernels call the operation.
    call: u64,
    operation: &'a Operation,
    tensors: &'a Tensors,
    stream: Handle,
}

impl WithEpilogue for RoundLauncher<'_> {
    fn call<X: Copy>(self, part: Part, epilogue: X) -> Result<(), Error> {
        let RoundLauncher { communicator, plan, round, call, operation, tensors, stream } = self;
        let family = match plan.algorithm {
            Algorithm::OneShot => "one_shot",
            Algorithm::TwoShot => "two_shot",
            Algorithm::ShardedTwoShot => "sharded",
        };
        let shape = Shape::of_round(&plan, &round, call).ok_or(TOO_MANY_TOKENS)?;
        let activations = tensors.activations().of_round(&plan, &round);
        let parameters = Fused { group: communicator.group(), shape, activations, epilogue };
        let entry = Entry { set: communicator.set, family, part: part.fused, packs: None };
        let launch = communicator.kernels.for_rows(
            operation.dtype,
            entry,
            plan.cluster,
            shape.row_packs,
            round.rows.tokens,
        )?;
        // SAFETY: the name and the parameters are of one epilogue, and `enqueue` has checked the tensors, whose
        // addresses its caller vouches for.
        unsafe { communicator.kernels.launch(launch, &parameters, stream) }
    }
}

/// Why rows have no [`Shape`].
pub(crate) const TOO_MANY_TOKENS: Error = Error::Unsupported("rounds of 2^31 tokens or more");

/// The bytes that a GPU pushes while two-shot waits for its second hop. Between two H200 GPUs, which push the same in both
/// modes, two-shot takes 1.0 to 1.3 µs longer at 1 to 16 tokens, and 364 bytes are pushed in a nanosecond: `bench` and
/// `links` show both.
const HOP_BYTES: u64 = 364_000;

/// The least of all ranks' limits.
fn agree(group: &Group, own: Limits) -> Result<Limits, Error> {
    let Limits { world_size, slot_bytes, compute_units, max_cluster, one_shot_bytes } = own;
    let numbers =
        [u64::from(world_size), slot_bytes, u64::from(compute_units), u64::from(max_cluster), one_shot_bytes];
    let all: Vec<[u64; 5]> = gather(group, &numbers)?;
    let limits: Vec<Limits> = all
        .into_iter()
        .map(|[world_size, slot_bytes, units, cluster, one_shot_bytes]| Limits {
            world_size: world_size as u32,
            slot_bytes,
            compute_units: units as u32,
            max_cluster: cluster as u32,
            one_shot_bytes,
        })
        .collect();
    Limits::agree(&limits).ok_or_else(|| Error::Group("ranks disagree on the size of the group".to_owned()))
}

#[cfg(test)]
mod tests {
    use fused_collective_core::{
        dtype::DType,
        fusion::{Mode, Norm, Residual},
        quant::Quantization,
    };

    use super::*;

    #[test]
    fn a_number_that_a_kernel_hands_back_names_the_call_it_was_launched_for() {
        let operation = |tokens| Operation {
            dtype: DType::Bf16,
            tokens,
            hidden: 64,
            residual: Residual::Replicated,
            norm: Some(Norm::default()),
            quantization: Quantization::None,
            keep_norm: false,
            mode: Mode::OneShot,
        };
        let calls = [1, 2, 1].map(|tokens| Call::operation(&operation(tokens), Algorithm::TwoShot, None));
        let mut names = Names::default();
        let numbers = calls.map(|call| names.name(call));
        assert_eq!(numbers[0], numbers[2]);
        assert_ne!(numbers[0], numbers[1]);
        assert_eq!(numbers.map(|number| names.call(number)), calls.map(Some));
        assert_eq!([2, u64::MAX].map(|number| names.call(number)), [None, None]);
    }
}
