//! One rank's end of a group of GPUs.

mod abort_flag;
mod across;
mod call_table;
pub(super) mod custom;
pub(super) mod external;
mod failures;
mod join;
pub(super) mod launches;
mod limits;
mod progress;
mod rounds;
mod stream;
mod unanimous;
mod wait;
mod watchdog;

use std::{
    any::Any,
    sync::{Arc, Mutex},
    time::Duration,
};

use fused_collective_core::{
    agreement::{Call, Chain},
    fusion::Operation,
    launch::{self, Address, Shape},
    plan::{Limits, Plan},
    workspace::{Header, Layout},
};

use super::{
    device::Gpu,
    driver::{Handle, check},
    epilogue::Epilogue,
    kernels::{KernelSource, Kernels, Launch},
    memory::{DeviceMemory, MappedStatus},
    tensors::{Tensors, supported},
    workspace::Workspace,
};
use crate::{
    error::Error,
    group::{Aborter, Bootstrap, Hosts, Monitor, calls::CallLog, failure::Failure},
    query::Query,
};
use abort_flag::AbortFlag;
use across::{Across, Gathered};
use call_table::CallTable;
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

/// One rank's end of a group of GPUs, of one host or several, for fused operations on a caller's stream.
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
    /// Between hosts, those of each round's first kernel.
    host_sums: Vec<Launch>,
    /// The exchange between hosts, in a group of several.
    across: Option<Across>,
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
    /// This rank.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// Ranks in the group.
    pub fn world_size(&self) -> u32 {
        self.limits.world_size
    }

    /// The hosts of the group, if there are several.
    pub fn hosts(&self) -> Option<&Hosts> {
        self.across.as_ref().map(Across::hosts)
    }

    /// This rank's number among the ranks of its host.
    pub fn place(&self) -> u32 {
        self.hosts().map_or(self.rank, Hosts::place)
    }

    /// The rank at a place of this rank's host.
    fn neighbor(&self, place: u32) -> u32 {
        self.hosts().map_or(place, |hosts| hosts.rank_at(hosts.host(), place))
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
        launches::kernel(operation, plan.algorithm, self.limits.ranks_per_host())?;
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
        tensors.check(operation, self.place(), self.limits.ranks_per_host())?;
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
        if let (Some(across), Some(last)) = (&mut self.across, captured.last) {
            across.enqueued(captured.rounds, last);
        }
        Ok(())
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
    /// ranks call this when their operations have ended; every later call fails. In a group of several hosts the graphs that
    /// operations were captured in are destroyed before.
    ///
    /// # Errors
    /// A rank was lost; such graphs are left.
    pub fn leave(&mut self, bootstrap: &dyn Bootstrap) -> Result<(), Error> {
        self.left = true;
        let failed = self.failed.is_some();
        let closed = self.across.as_mut().map_or(Ok(()), |across| across.close(failed));
        self.workspace.close_peers();
        bootstrap.barrier().map_err(Error::bootstrap)?;
        // Of a group that has failed, more is not expected.
        if failed { Ok(()) } else { closed }
    }

    /// Looks, while no operation runs, for what this rank's region holds all the same: for tests. All of it is read only if
    /// `thorough`.
    ///
    /// # Errors
    /// The driver's.
    pub fn find_stray_write(&self, thorough: bool) -> Result<Option<String>, Error> {
        let (world_size, slot_bytes) = (self.layout.world_size(), self.layout.slot_bytes());
        let header = Header { world_size, rank: self.place(), slot_bytes };
        self.workspace.find_stray_write(&self.layout, header, thorough)
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

    /// This rank's place in the group, or among the ranks of its host, for kernels of one's own that reach other `regions` than
    /// the workspace's.
    pub fn launch_group(&self, regions: [Address; launch::MAX_RANKS]) -> launch::Group {
        launch::Group {
            regions,
            state: self.workspace.state(),
            status: self.status.address(),
            slot_bytes: self.layout.slot_bytes(),
            timeout_ns: self.deadline.as_nanos().min(u128::from(u64::MAX)) as u64,
            world_size: self.limits.ranks_per_host(),
            rank: self.place(),
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
    /// Rounds with a gather between hosts, and the last of them.
    rounds: u32,
    last: Option<Gathered>,
}

const _: () = {
    const fn is_send<T: Send>() {}
    is_send::<Communicator>();
};
