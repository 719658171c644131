//! One rank's end of a group of GPUs.

mod abort_flag;
mod call_table;
pub(super) mod custom;
pub(super) mod external;
pub(super) mod launches;
mod limits;
mod progress;
mod rounds;
mod wait;

use std::{
    any::Any,
    os::fd::AsFd,
    sync::{
        Arc, Mutex,
        atomic::Ordering::{Acquire, Relaxed},
    },
    time::Duration,
};

use fused_collective_core::{
    agreement::{Call, Chain},
    dtype::DType,
    fusion::Operation,
    kernels::{Module, Set},
    launch::{self, ABORTED, Address, Shape, Status},
    plan::{self, Limits, Plan},
    workspace::{Header, Layout},
};

use super::{
    device::{self, Gpu},
    driver::{Handle, check},
    epilogue::Epilogue,
    kernels::{KernelSource, Kernels, Launch, MAX_RANKS},
    memory::{DeviceMemory, MappedStatus},
    tensors::{Tensors, supported},
    workspace::Workspace,
};
use crate::{
    error::Error,
    group::{
        Aborter, Bootstrap, Monitor,
        calls::{CallLog, Disagreement, Place},
        failure::{Awaited, Cause, Failure, What},
        shared_memory::SharedMemory,
    },
    query::Query,
};
use abort_flag::AbortFlag;
use call_table::CallTable;
use limits::{HOP_BYTES, agree};
use progress::Progress;

/// The longest deadline: kernels count a wait in 32 bits, which turn after 73 minutes.
pub const MAX_DEADLINE: Duration = Duration::from_secs(3600);
/// Announced calls that are kept: more than a GPU's queue holds, and so than a host can be ahead of its results.
const CALLS_KEPT: u64 = 4096;

/// A group's settings. All ranks give the same, but for the kernels' place.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of a slot of the workspace, at least: see [`slot_bytes`](super::slot_bytes).
    pub slot_bytes: u64,
    /// No wait of an operation is longer. At most [`MAX_DEADLINE`].
    pub deadline: Duration,
    /// Lets ranks (processes) share a GPU. They take turns on it, at the driver's pace: operations are right,
    /// and take milliseconds. Not under MPS, where their kernels would compete for the places that each counts on.
    pub oversubscribe: bool,
    /// Reads the scale of each operation from the GPU before it is enqueued, and refuses one that is
    /// [not valid](fused_collective_core::quant::Quantization::check_scale): for debugging, since the host waits for the
    /// stream. An operation that is captured is not checked.
    pub check_scales: bool,
    /// The place of the kernels.
    pub kernels: KernelSource,
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
    monitor: Option<Arc<dyn Monitor>>,
    failed: Option<Box<Failure>>,
    /// Other ranks' memory is closed: see [`leave`](Self::leave).
    left: bool,
    shares_gpus: bool,
    check_scales: bool,
    log: CallLog,
    calls: CallTable,
    /// The launches of the rounds of the operation at hand.
    launches: Vec<Launch>,
    /// Captured since the last [`captured`](Self::captured).
    captured: Captured,
    abort: Arc<AbortFlag>,
    /// Sets the flag at a loss, whatever this process does meanwhile. The lock makes the communicator `Sync`.
    _on_loss: Option<Mutex<Box<dyn Any + Send>>>,
    status: Arc<MappedStatus>,
    // Dropped before the memory that it looks at.
    progress: Progress,
    workspace: Workspace,
    kernels: Kernels,
    /// Room for the addends of a round of an operation with experts, once there was one.
    addends: Option<DeviceMemory>,
    layout: Layout,
    gpu: Gpu,
}

impl Communicator {
    /// Joins the ranks of `bootstrap`, this one with GPU `ordinal` of those that the process sees, and makes a workspace.
    /// Processes may see different GPUs, each its own alone for instance, which is then GPU 0 in all of them.
    /// All ranks call this, with the same `options`. The thread's current context stays what it is.
    ///
    /// Waits end early when the bootstrap's monitor tells of a lost rank; without one, at the deadline.
    ///
    /// # Errors
    /// No driver, no kernels, not enough memory; two ranks that cannot share memory, by number; a deadline past
    /// [`MAX_DEADLINE`]; the bootstrap's.
    pub fn join(bootstrap: &dyn Bootstrap, ordinal: u32, options: &Options) -> Result<Communicator, Error> {
        let &Options { slot_bytes, deadline, oversubscribe, check_scales, ref kernels } = options;
        check_deadline(deadline)?;
        let (rank, world_size) = (bootstrap.rank(), bootstrap.world_size());
        if world_size > MAX_RANKS {
            return Err(Error::Options(format!(
                "{world_size} ranks are more than GPU kernels serve: use 2 to {MAX_RANKS}"
            )));
        }
        let gpu = Gpu::open(ordinal)?;
        let context = gpu.context();
        let module = Module { dtype: DType::Bf16, set: Set::Any8 };
        let mut kernels = Kernels::find(&gpu, kernels, module.name())?;
        let shares_gpus = device::check_group(bootstrap, ordinal, oversubscribe)?;
        let layout = Layout::new(world_size, slot_bytes)?;
        let limits = agree(
            bootstrap,
            Limits {
                world_size,
                hosts: 1,
                slot_bytes: layout.slot_bytes(),
                compute_units: gpu.units,
                max_cluster: kernels.max_cluster(),
                one_shot_bytes: plan::one_shot_bytes(world_size, HOP_BYTES),
            },
        )?;
        kernels.agree(limits.compute_units, limits.max_cluster);
        let layout = Layout::new(world_size, limits.slot_bytes)?;
        let log = share_log(bootstrap)?;
        let workspace = Workspace::share(bootstrap, context, &layout)?;
        let status = Arc::new(MappedStatus::new(context)?);
        let abort = AbortFlag::new(&status);
        let monitor = bootstrap.monitor();
        let on_loss = monitor.as_ref().map(|monitor| {
            let abort = Arc::clone(&abort);
            Mutex::new(monitor.on_loss(Box::new(move || abort.set())))
        });
        Ok(Communicator {
            rank,
            limits,
            deadline,
            monitor,
            failed: None,
            left: false,
            shares_gpus,
            check_scales,
            log,
            calls: CallTable::default(),
            launches: Vec::new(),
            captured: Captured::default(),
            abort,
            _on_loss: on_loss,
            status,
            progress: Progress::new(context, workspace.state())?,
            workspace,
            kernels,
            addends: None,
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

    /// True where ranks of the group share GPUs.
    pub fn shares_gpus(&self) -> bool {
        self.shares_gpus
    }

    /// The limits that operations are planned with; the same on every rank.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Describes the GPU and the kernels, for reports.
    pub fn describe(&self) -> String {
        format!("{}, {}", self.gpu.name, self.kernels.describe())
    }

    /// This rank's GPU.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The kernels, for launches of one's own beside the communicator's.
    pub fn kernels(&mut self) -> &mut Kernels {
        &mut self.kernels
    }

    /// Plans `operation` without launching it: the collective that it would use, and its rounds.
    ///
    /// # Errors
    /// As [`enqueue`](Self::enqueue) has, but for tensors: the operation is invalid or too large, there are no kernels for
    /// it, or the group is over.
    pub fn query(&mut self, operation: &Operation) -> Result<Query, Error> {
        self.check_usable()?;
        let plan = Plan::new(operation, &self.limits)?;
        supported(operation)?;
        launches::kernel(operation, plan.algorithm, self.limits.world_size)?;
        if operation.post_norm.is_some() {
            // Rows that are streamed have none, and their kernels say which those are.
            self.choose_launches(operation, &plan)?;
        }
        let mut rounds = plan.rounds();
        if let Some(first) = rounds.next() {
            Shape::of_round(&plan, &first, 0).ok_or(launches::TOO_MANY_TOKENS)?;
        }
        Ok(Query { algorithm: plan.algorithm, rounds: plan.rounds().count() as u64 })
    }

    /// Loads the kernels that `operation` needs, so that the first one enqueued does not take the time.
    ///
    /// # Errors
    /// They are missing or unusable.
    pub fn prepare(&mut self, operation: &Operation) -> Result<(), Error> {
        let plan = Plan::new(operation, &self.limits)?;
        self.make_room(operation)?;
        self.choose_launches(operation, &plan)
    }

    /// Enqueues `operation` on `stream`, a `CUstream` of this rank's context. It may be captured into a graph, and
    /// the graph replayed for ever, between other operations.
    ///
    /// The kernels may start before the kernel ahead of them in the stream is complete (programmatic dependent
    /// launch), and wait for it before they read anything but gamma and the scale. So neither may be written by that kernel.
    ///
    /// # Errors
    /// Before the other ranks are told: what [`Plan::new`] refuses, tensors that do not fit the operation, kernels that
    /// are missing, a group that has failed. After that, [`Error::Failed`]: the driver did not launch it, and the group is
    /// over, since the others wait. In a capture, whose operations nobody was told of, the driver's error; the graph must
    /// not be launched.
    ///
    /// # Safety
    /// The tensors are where and what they are said to be until the operation has ended, and `stream` is a stream of this
    /// rank's context.
    pub unsafe fn enqueue(
        &mut self,
        operation: &Operation,
        tensors: &Tensors,
        stream: Handle,
    ) -> Result<(), Error> {
        self.check_usable()?;
        let plan = Plan::new(operation, &self.limits)?;
        tensors.check(operation, self.rank, self.limits.world_size)?;
        let _entered = self.gpu.context().clone().enter()?;
        if self.check_scales {
            // SAFETY: the context is current, and the caller vouches for the scale and the stream.
            unsafe { self.check_scale(operation, tensors, stream)? };
        }
        // SAFETY: a stream of the current context, as this function's caller says.
        if operation.experts.is_some() && self.addends.is_none() && unsafe { self.is_capturing(stream)? } {
            return Err(Error::Unsupported(
                "memory for the first operation with experts in a capture: prepare the operation before",
            ));
        }
        self.make_room(operation)?;
        self.choose_launches(operation, &plan)?;
        let epilogue = Epilogue::of(operation, tensors);
        let call = Call::operation(operation, plan.algorithm, None);
        let addend = self.addends.as_ref().map_or(Address::NULL, DeviceMemory::address);
        let read = (tensors.activations(operation, addend), tensors.extras(operation));
        // SAFETY: the kernels were chosen for the operation, whose epilogue this is, and the tensors were checked, whose
        // addresses this function's caller vouches for, as for the stream.
        unsafe { self.launch_rounds(&plan, call, read, &epilogue, stream) }
    }

    /// Allocates the memory of addends, if `operation` makes its addend and there is none yet.
    ///
    /// # Errors
    /// The GPU has not so much memory.
    fn make_room(&mut self, operation: &Operation) -> Result<(), Error> {
        if operation.experts.is_some() && self.addends.is_none() {
            // Every algorithm has at least two rows in a slot for each token of a round.
            self.addends = Some(DeviceMemory::new(self.gpu.context(), self.layout.slot_bytes() / 2)?);
        }
        Ok(())
    }

    /// Reads the scale of `operation`, and checks it. A scale that is written in a capture is not there yet.
    ///
    /// # Errors
    /// [`Error::Scale`]; the driver's.
    ///
    /// # Safety
    /// This rank's context is current, of which `stream` is one, and the scale is where the tensors say.
    unsafe fn check_scale(
        &self,
        operation: &Operation,
        tensors: &Tensors,
        stream: Handle,
    ) -> Result<(), Error> {
        let Some(scale) = tensors.scale else { return Ok(()) };
        // SAFETY: a stream of the current context.
        if unsafe { self.is_capturing(stream)? } {
            return Ok(());
        }
        let driver = self.gpu.context().driver();
        let mut value = 0.0f32;
        // SAFETY: as above; one `f32` of the device, and room for it.
        let codes = unsafe {
            let waited = (driver.cuStreamSynchronize)(stream);
            let to = (&raw mut value).cast();
            [waited, (driver.cuMemcpyDtoH_v2)(to, scale.address, size_of::<f32>())]
        };
        codes.into_iter().try_for_each(|code| check("read a scale", code))?;
        operation.quantization.check_scale(value).map_err(Error::Scale)
    }

    /// Takes the calls that were captured since this was last called, for [`replay`](Self::replay). Call it when a capture
    /// has ended.
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
            self.log.announce(Call::Replay { captured: captured.chain.digest(), calls: captured.calls });
        }
        Ok(())
    }

    /// Checks that all operations that have ended did so well, and were the same on every rank. Call it after the stream was
    /// synchronized and before results are used.
    ///
    /// # Errors
    /// [`Error::Failed`]: who waited for whom, in which operation, or who called something else. From then on the
    /// communicator is poisoned: every later call fails at once. The other ranks' operations end, too.
    pub fn check(&mut self) -> Result<(), Error> {
        self.check_usable()?;
        // Ahead of a wait that failed because of it.
        if let Some(disagreement) = self.log.disagreement() {
            return Err(self.poison(self.out_of_step(disagreement)));
        }
        if let Some(failure) = self.failed_wait() {
            return Err(self.poison(failure));
        }
        // What has ended here has begun on every rank, so each has announced it.
        if let Some(disagreement) = self.log.disagreement_at_end() {
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
                4 => What::Flag,
                _ => What::Input(token),
            },
            operation: long(Status::OPERATION),
            call: self.calls.call(long(Status::CALL)),
        };
        let cause = if reason == ABORTED { self.end() } else { Cause::Deadline(self.deadline) };
        Some(Failure { rank: self.rank, wait: Some(wait), cause })
    }

    /// Why waits were ended.
    fn end(&self) -> Cause {
        match &self.monitor {
            Some(monitor) => match monitor.lost() {
                Some(lost) if lost.rank != self.rank => Cause::Lost(lost),
                _ => Cause::Aborted,
            },
            None => self.log.gave_up().map_or(Cause::Aborted, Cause::GaveUp),
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
        self.abort.set();
        if let Some((fault, because_of)) = failure.fault() {
            self.log.give_up(fault, because_of);
        }
        if let Some(monitor) = &self.monitor {
            monitor.abort(&failure.to_string());
        }
        Error::Failed(failure)
    }

    /// Makes a handle that ends the group's operations, on all ranks, from any thread. It may outlive the communicator.
    pub fn aborter(&self) -> Aborter {
        let (abort, monitor, log) = (Arc::clone(&self.abort), self.monitor.clone(), self.log.aborter());
        Aborter::new(move || {
            abort.set();
            log.abort();
            if let Some(monitor) = &monitor {
                monitor.abort("the group was aborted on this rank");
            }
        })
    }

    /// Closes other ranks' memory, and returns when all have done so, after which each may free its own: drop it. All
    /// ranks call this when their operations have ended; every later call fails.
    ///
    /// # Errors
    /// A rank was lost.
    pub fn leave(&mut self, bootstrap: &dyn Bootstrap) -> Result<(), Error> {
        self.left = true;
        self.workspace.close_peers();
        bootstrap.barrier().map_err(Error::bootstrap)
    }

    /// Looks, while no operation runs, for what this rank's region holds all the same: for tests. All of it is read only if
    /// `thorough`.
    ///
    /// # Errors
    /// The driver's.
    pub fn find_stray_write(&self, thorough: bool) -> Result<Option<String>, Error> {
        let (world_size, slot_bytes) = (self.layout.world_size(), self.layout.slot_bytes());
        let header = Header { world_size, rank: self.rank, slot_bytes };
        self.workspace.find_stray_write(&self.layout, header, thorough)
    }

    fn check_usable(&mut self) -> Result<(), Error> {
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
            let failure = match self.log.disagreement() {
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
                self.log.pass(&call);
            }
        } else if capturing {
            self.captured.chain = self.captured.chain.then(&call);
            self.captured.calls += 1;
        } else {
            self.log.announce(call);
        }
    }

    fn group(&self) -> launch::Group {
        self.launch_group(self.workspace.regions())
    }

    /// This rank's place in the group, for kernels of one's own that reach other `regions` than the workspace's.
    pub fn launch_group(&self, regions: [Address; launch::MAX_RANKS]) -> launch::Group {
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
        self.abort.detach();
    }
}

/// Operations that were captured into a graph: see [`Communicator::replay`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Captured {
    chain: Chain,
    calls: u64,
}

const _: () = {
    const fn is_send<T: Send>() {}
    is_send::<Communicator>();
};

/// Refuses a deadline that kernels would not keep.
fn check_deadline(deadline: Duration) -> Result<(), Error> {
    if deadline <= MAX_DEADLINE {
        return Ok(());
    }
    Err(Error::Options(format!(
        "a deadline of {} s is longer than GPU kernels can wait: use up to {} s",
        deadline.as_secs_f64(),
        MAX_DEADLINE.as_secs()
    )))
}

/// The memory in which the ranks' hosts tell each other what they call.
fn share_log(bootstrap: &dyn Bootstrap) -> Result<CallLog, Error> {
    let doing = "share memory between the ranks' hosts";
    let (rank, world_size) = (bootstrap.rank(), bootstrap.world_size());
    let place = Place::alone(CALLS_KEPT);
    let bytes = place.bytes(world_size);
    let own = match rank {
        0 => Some(SharedMemory::create(bytes).map_err(Error::system(doing))?),
        _ => None,
    };
    let file = bootstrap.share_file(own.as_ref().map(AsFd::as_fd)).map_err(Error::bootstrap)?;
    let memory = Arc::new(SharedMemory::map(file.as_fd(), bytes).map_err(Error::system(doing))?);
    Ok(CallLog::new(memory, place, rank, world_size))
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
