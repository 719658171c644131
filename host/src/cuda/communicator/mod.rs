//! One rank's end of a group of GPUs.

mod limits;
mod names;
mod rounds;
mod wait;

use std::{
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::Ordering::{Acquire, Relaxed},
    },
    time::Duration,
};

use fused_collective_core::{
    agreement::{Call, Chain},
    fusion::Operation,
    kernels::{Module, Set},
    launch::{self, ABORTED, Address, Status},
    plan::{self, Limits, Plan},
    workspace::{Header, Layout},
};

use super::{
    Aborter, Error,
    abort::Switch,
    device::{self, Gpu},
    driver::{Handle, check, load},
    kernels::{Kernels, Launch, MAX_RANKS},
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
use limits::{HOP_BYTES, agree};
use names::Names;
use wait::Progress;

pub(crate) use rounds::TOO_MANY_TOKENS;
pub(crate) use wait::Foreign;

/// The longest deadline: kernels count a wait in 32 bits, which turn after 73 minutes.
pub const MAX_DEADLINE: Duration = Duration::from_secs(3600);
/// Announced calls that are kept: more than a GPU's queue holds, and so than a host can be ahead of its results.
const CALLS_KEPT: u64 = 4096;

/// How a group works.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Bytes of a slot of the workspace, at least: see [`slot_bytes`](super::slot_bytes).
    pub slot_bytes: u64,
    /// No wait of an operation is longer. At most [`MAX_DEADLINE`].
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
    /// How the rounds of the operation at hand are launched.
    launches: Vec<Launch>,
    /// Captured since the last [`captured`](Self::captured).
    captured: Captured,
    switch: Arc<Switch>,
    // A loss throws the switch, whatever this process does meanwhile.
    _on_loss: OnLoss,
    status: Arc<MappedStatus>,
    // Dropped before the memory that it looks at.
    progress: Progress,
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
    /// No driver, no kernels, not enough memory; two ranks that cannot share memory, by name; a deadline past
    /// [`MAX_DEADLINE`].
    pub fn join(group: &Group, ordinal: u32, options: Options) -> Result<Communicator, Error> {
        let Options { slot_bytes, deadline, oversubscribe } = options;
        check_deadline(deadline)?;
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
            deadline,
            control: group.control(),
            failed: None,
            left: false,
            shares_gpus,
            board,
            names: Names::default(),
            launches: Vec::new(),
            captured: Captured::default(),
            switch,
            _on_loss: group.on_loss(move || on_loss.throw()),
            status,
            progress: Progress::new(workspace.state())?,
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
        self.kernels.load(Module { dtype: operation.dtype, set: self.set }.name())
    }

    /// Enqueues `operation` on `stream`, a `CUstream` of this rank's context. It may be captured into a graph, and
    /// the graph replayed for ever, between other operations.
    ///
    /// The kernels may start before the kernel ahead of them in the stream is complete (programmatic dependent
    /// launch), and wait for it before they read anything but gamma and the scale.
    ///
    /// # Errors
    /// Before the other ranks are told: what [`Plan::new`] refuses, tensors that do not fit the operation, kernels that
    /// are missing, a group that has failed. After that, [`Error::Failed`]: the driver did not launch it, and the group is
    /// over, since the others wait. In a capture, whose operations nobody was told of, the driver's error; the graph must
    /// not be launched.
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
        self.choose_launches(operation, &plan, tensors)?;
        // SAFETY: a stream of this rank's context, as this function's caller says.
        let capturing = unsafe { is_capturing(stream)? };
        let captured = self.captured;
        let call = Call::operation(operation, plan.algorithm, None);
        self.announce(call, capturing);
        // SAFETY: as this function's.
        let launched = unsafe { self.launch_rounds(operation, &plan, call, tensors, stream) };
        launched.map_err(|error| {
            if !capturing {
                return self.fail(error);
            }
            self.captured = captured;
            error
        })
    }

    /// What was captured since this was last called, for [`replay`](Self::replay). Call it when a capture has ended.
    pub fn captured(&mut self) -> Captured {
        std::mem::take(&mut self.captured)
    }

    /// Says that a graph with these operations is about to be launched, so that the ranks' calls can be compared:
    /// nothing else sees a graph's launches. Where no rank ever says so, they are not compared. If the launch then fails,
    /// [abort](Self::aborter): the others wait for it.
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
            Some(lost) if lost.rank != self.rank => Cause::Lost(lost),
            _ => Cause::Aborted,
        }
    }

    fn out_of_step(&self, disagreement: Disagreement) -> Failure {
        Failure { rank: self.rank, wait: None, cause: Cause::OutOfStep(disagreement) }
    }

    /// Ends the group with this failure, unless it has one.
    fn poison(&mut self, failure: Failure) -> Error {
        if let Some(first) = &self.failed {
            return Error::Poisoned(first.clone());
        }
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
    fn announce(&mut self, call: Call, capturing: bool) {
        if matches!(call, Call::Operation { operation: Operation { tokens: 0, .. }, .. }) {
            // No rank takes part in it, so it is compared with the next call.
            if !capturing {
                self.board.pass(&call);
            }
        } else if capturing {
            self.captured.chain = self.captured.chain.then(&call);
            self.captured.calls += 1;
        } else {
            self.board.announce(call);
        }
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

/// Whether what is enqueued on `stream` is captured.
///
/// # Errors
/// The driver's.
///
/// # Safety
/// `stream` is a stream of the current context.
pub(crate) unsafe fn is_capturing(stream: Handle) -> Result<bool, Error> {
    let mut capturing = 0;
    // SAFETY: as this function's, and room for the answer.
    let code = unsafe { (load()?.cuStreamIsCapturing)(stream, &mut capturing) };
    check("ask whether the stream is being captured", code)?;
    Ok(capturing != 0)
}

/// Refuses a deadline that kernels would not keep.
fn check_deadline(deadline: Duration) -> Result<(), Error> {
    if deadline <= MAX_DEADLINE {
        return Ok(());
    }
    Err(Error::Devices(format!(
        "a deadline of {} s is longer than GPU kernels can wait: use up to {} s",
        deadline.as_secs_f64(),
        MAX_DEADLINE.as_secs()
    )))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_that_kernels_would_not_keep_is_refused_and_not_cut_short() {
        assert!(check_deadline(MAX_DEADLINE).is_ok());
        let error = check_deadline(MAX_DEADLINE + Duration::from_millis(1)).unwrap_err().to_string();
        assert_eq!(error, "a deadline of 3600.001 s is longer than GPU kernels can wait: use up to 3600 s");
        assert!(check_deadline(Duration::MAX).is_err());
    }
}
