//! Either backend behind one type, on raw addresses: the floor under bindings to other languages.
//!
//! [`Communicator`] is one rank's end of a group, on CPUs or GPUs. It takes the tensors of an operation as addresses, as
//! [`cuda::Communicator`] does, and holds the [`Meeting`] over which its ranks came together. A program in Rust has the
//! backends' own types, which check more when it is compiled.

mod host_memory;
mod watch;

use std::{fmt, time::Duration};

use fused_collective_core::{
    dtype::DType,
    fusion::{Mode, Operation, PartialSums, Residual, Rounding},
    plan::Plan,
    quant::Quantization,
    workspace::{Layout, LayoutError},
};

pub use crate::cuda::{Captured, DeviceTensor as Tensor, TensorType, Tensors, driver::Handle};
use crate::{
    cpu, cuda,
    error::Error,
    group::{
        Aborter, Bootstrap, meeting_place,
        rank_env::RankEnv,
        rendezvous::{Group, Membership, Network},
    },
    query::Query,
};
pub use watch::Watch;
use watch::Watching;

/// The processor that a rank computes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// The CPU. An operation runs in the call that enqueues it.
    Cpu,
    /// The GPU with this ordinal among those that the process sees.
    Cuda(u32),
    /// The GPU whose ordinal is the rank modulo the number of GPUs that the process sees.
    CudaByRank,
}

/// A group's settings. All ranks give the same, but for the device's ordinal and the kernels' place.
#[derive(Clone, Debug)]
pub struct Options {
    /// The processor.
    pub device: Device,
    /// Bytes of the longest row of any operation: hidden size times bytes of an element.
    pub max_row_bytes: u64,
    /// Tokens that an operation on GPUs may have to run in one round; a larger one takes several.
    pub max_tokens: u64,
    /// The longest wait for another rank.
    pub deadline: Duration,
    /// See [`cuda::Options::oversubscribe`].
    pub oversubscribe: bool,
    /// See [`cuda::Options::check_scales`].
    pub check_scales: bool,
    /// The place of the kernels.
    pub kernels: cuda::KernelSource,
}

impl Options {
    /// Bytes of memory that the ranks of a group share: on CPUs all of them together, on GPUs each on its own GPU.
    ///
    /// # Errors
    /// A group that is too small or too large, or sizes beyond 64 bits.
    pub fn workspace_bytes(&self, world_size: u32) -> Result<u64, LayoutError> {
        match self.device {
            Device::Cpu => cpu::layout(world_size, self.max_row_bytes).map(|layout| layout.total_bytes()),
            _ => Layout::new(world_size, self.slot_bytes(world_size)).map(|layout| layout.region_bytes()),
        }
    }

    /// The part of these that all ranks give alike.
    fn to_be_equal(&self) -> String {
        let device = if self.device == Device::Cpu { "cpu" } else { "cuda" };
        let Options { max_row_bytes, max_tokens, deadline, oversubscribe, .. } = self;
        format!(
            "{device}, rows of {max_row_bytes} bytes, {max_tokens} tokens, {deadline:?}, oversubscribe {oversubscribe}"
        )
    }

    /// Bytes of a slot on GPUs.
    fn slot_bytes(&self, world_size: u32) -> u64 {
        let dtype = DType::F16;
        let largest = Operation {
            dtype,
            tokens: self.max_tokens,
            hidden: self.max_row_bytes.div_ceil(dtype.bytes()),
            residual: Residual::Sharded,
            bias: false,
            post_norm: None,
            experts: None,
            wire: None,
            partial_sums: PartialSums::F32,
            norm: None,
            quantization: Quantization::None,
            keep_norm: false,
            rounding: Rounding::Once,
            mode: Mode::Auto,
        };
        cuda::slot_bytes(world_size, &largest)
    }
}

/// The means by which the ranks of a group came together; it lives as long as their communicators.
pub enum Meeting {
    /// The built-in one.
    Processes(Group),
    /// The caller's own.
    Own(Box<dyn Bootstrap + Send>),
}

impl fmt::Debug for Meeting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Meeting::Processes(group) => group.fmt(f),
            Meeting::Own(_) => f.write_str("Own"),
        }
    }
}

impl Meeting {
    /// Waits for the processes of a group that have the same `key` to come, all with the same `options`.
    ///
    /// # Errors
    /// [`Error::Bootstrap`], with [`rendezvous::Error`](crate::group::rendezvous::Error) as its source.
    pub fn processes(rank: u32, world_size: u32, key: &str, options: &Options) -> Result<Meeting, Error> {
        let config = options.to_be_equal();
        let membership =
            Membership { rank, world_size, key, config: config.as_bytes(), deadline: options.deadline };
        let joined = Group::join(&membership).map_err(|error| Error::bootstrap(error.into()))?;
        Ok(Meeting::Processes(joined))
    }

    /// As [`over`](Self::over), of processes that were told to meet at `address`, `HOST:PORT` on the host of rank 0. Their secret
    /// is the [environment's](meeting_place::at).
    ///
    /// # Errors
    /// As [`over`](Self::over); the address is none, or there is no secret.
    pub fn at(
        rank: u32,
        world_size: u32,
        key: &str,
        address: &str,
        options: &Options,
    ) -> Result<Meeting, Error> {
        let parsed = address.parse();
        let parsed = parsed.map_err(|error| Error::Options(format!("{address:?} is no address: {error}")))?;
        let network = meeting_place::at(parsed).map_err(|error| Error::Options(error.to_string()))?;
        Meeting::over(rank, world_size, key, &network, options)
    }

    /// As [`processes`](Self::processes), or between hosts as [`over`](Self::over), with rank, size and key of the [launcher's variables](crate::group::rank_env).
    ///
    /// # Errors
    /// As [`processes`](Self::processes); the variables are incomplete, or there are none.
    pub fn of_launcher(options: &Options) -> Result<Meeting, Error> {
        let found = RankEnv::from_env().map_err(|error| Error::Options(error.to_string()))?;
        let found = found.ok_or_else(|| {
            Error::Options(
                "no launcher started this process as one of several ranks: start it by torchrun, mpirun or srun, or give \
                 rank, size and key"
                    .to_owned(),
            )
        })?;
        let RankEnv { rank, world_size, ref key, .. } = found;
        let network = meeting_place::network(&found)
            .map_err(|error| Error::Options(format!("rank {rank}: {error}")))?;
        match network {
            Some(network) => Meeting::over(rank, world_size, key, &network, options),
            None => Meeting::processes(rank, world_size, key, options),
        }
    }

    /// As [`processes`](Self::processes), of processes on several hosts, which meet over a `network`.
    ///
    /// # Errors
    /// As [`Group::join_over`].
    pub fn over(
        rank: u32,
        world_size: u32,
        key: &str,
        network: &Network,
        options: &Options,
    ) -> Result<Meeting, Error> {
        let config = options.to_be_equal();
        let membership =
            Membership { rank, world_size, key, config: config.as_bytes(), deadline: options.deadline };
        let joined =
            Group::join_over(&membership, network).map_err(|error| Error::bootstrap(error.into()))?;
        Ok(Meeting::Processes(joined))
    }

    fn bootstrap(&self) -> &dyn Bootstrap {
        match self {
            Meeting::Processes(group) => group,
            Meeting::Own(bootstrap) => &**bootstrap,
        }
    }

    /// Parts with all others: nobody's end is a loss from here on.
    fn end(self) -> Result<(), Error> {
        match self {
            Meeting::Processes(group) => group.farewell().map_err(|error| Error::bootstrap(error.into())),
            Meeting::Own(bootstrap) => bootstrap.barrier().map_err(Error::bootstrap),
        }
    }
}

/// One rank's end of a group, on CPUs or GPUs.
///
/// All ranks make the same calls in the same order. A communicator is dropped when the operations of all ranks have ended:
/// [`leave`](Self::leave) makes sure of it.
#[derive(Debug)]
pub struct Communicator {
    // Dropped before the meeting, whose end the other ranks notice.
    backend: Backend,
    /// `None` once this rank has left.
    meeting: Option<Meeting>,
}

#[derive(Debug)]
enum Backend {
    Cpu(Box<cpu::Communicator>),
    Cuda(Box<cuda::Communicator>),
}

impl Communicator {
    /// Joins the ranks of `meeting`. All ranks call this with the same `options`. `watch` is called inside of waits.
    ///
    /// # Errors
    /// As [`cpu::Communicator::join`] and [`cuda::Communicator::join`].
    pub fn join(meeting: Meeting, options: &Options, watch: Option<Watch>) -> Result<Communicator, Error> {
        let bootstrap = Watching::new(meeting.bootstrap(), watch);
        let backend = match options.device {
            Device::Cpu => {
                let &Options { max_row_bytes, deadline, .. } = options;
                let options = cpu::Options { max_row_bytes, deadline };
                Backend::Cpu(Box::new(cpu::Communicator::join(&bootstrap, options)?))
            }
            Device::Cuda(ordinal) => Self::join_gpus(&bootstrap, ordinal, options)?,
            Device::CudaByRank => {
                let ordinal = bootstrap.rank() % cuda::count()?.max(1);
                Self::join_gpus(&bootstrap, ordinal, options)?
            }
        };
        Ok(Communicator { backend, meeting: Some(meeting) })
    }

    fn join_gpus(bootstrap: &dyn Bootstrap, ordinal: u32, options: &Options) -> Result<Backend, Error> {
        let options = cuda::Options {
            slot_bytes: options.slot_bytes(bootstrap.world_size()),
            deadline: options.deadline,
            oversubscribe: options.oversubscribe,
            check_scales: options.check_scales,
            kernels: options.kernels.clone(),
        };
        Ok(Backend::Cuda(Box::new(cuda::Communicator::join(bootstrap, ordinal, &options)?)))
    }

    /// This rank.
    pub fn rank(&self) -> u32 {
        match &self.backend {
            Backend::Cpu(communicator) => communicator.rank(),
            Backend::Cuda(communicator) => communicator.rank(),
        }
    }

    /// Ranks in the group.
    pub fn world_size(&self) -> u32 {
        match &self.backend {
            Backend::Cpu(communicator) => communicator.world_size(),
            Backend::Cuda(communicator) => communicator.world_size(),
        }
    }

    /// Rows of the residual and of `residual_out` on this rank: see [`Operation::residual_rows`].
    pub fn residual_rows(&self, operation: &Operation) -> u64 {
        match &self.backend {
            Backend::Cpu(communicator) => {
                operation.residual_rows(communicator.rank(), communicator.world_size())
            }
            Backend::Cuda(communicator) => {
                operation.residual_rows(communicator.place(), communicator.limits().ranks_per_host())
            }
        }
    }

    /// The ordinal of this rank's GPU; `None` on CPUs.
    pub fn gpu(&self) -> Option<u32> {
        match &self.backend {
            Backend::Cpu(_) => None,
            Backend::Cuda(communicator) => Some(communicator.gpu().ordinal),
        }
    }

    /// Plans `operation` without running it, and on GPUs loads its kernels, so that the first call need not.
    ///
    /// # Errors
    /// As [`enqueue`](Self::enqueue) has, but for tensors.
    pub fn query(&mut self, operation: &Operation) -> Result<Query, Error> {
        self.check_here()?;
        match &mut self.backend {
            Backend::Cpu(communicator) => communicator.query(operation),
            Backend::Cuda(communicator) => {
                let query = communicator.query(operation)?;
                communicator.prepare(operation)?;
                Ok(query)
            }
        }
    }

    /// Enqueues `operation` on `stream`, a `CUstream` of this rank's context. On CPUs, where `stream` is null, it runs the
    /// operation and returns when this rank's outputs are complete.
    ///
    /// # Errors
    /// As [`cpu::Communicator::all_reduce`] and [`cuda::Communicator::enqueue`]; a stream on CPUs.
    ///
    /// # Safety
    /// The tensors are where and what they are said to be until the operation has ended, and nobody else uses what it
    /// writes. `stream` is a stream of this rank's context.
    pub unsafe fn enqueue(
        &mut self,
        operation: &Operation,
        tensors: &Tensors,
        stream: Handle,
    ) -> Result<(), Error> {
        self.check_here()?;
        match &mut self.backend {
            Backend::Cpu(_) if !stream.is_null() => Err(no_streams()),
            Backend::Cpu(communicator) => {
                communicator.check_usable()?;
                // Sizes of tensors are those of a valid operation.
                Plan::new(operation, communicator.limits())?;
                tensors.fit(operation, communicator.rank(), communicator.world_size(), 1)?;
                // SAFETY: the tensors fit, and this function's caller vouches for their addresses.
                unsafe { host_memory::all_reduce(communicator, operation, tensors) }
            }
            // SAFETY: this function's caller vouches for tensors and stream.
            Backend::Cuda(communicator) => unsafe { communicator.enqueue(operation, tensors, stream) },
        }
    }

    /// Waits until everything on `stream` has ended, and [checks](Self::check) it.
    ///
    /// # Errors
    /// As [`cuda::Communicator::synchronize`]; a stream on CPUs.
    ///
    /// # Safety
    /// `stream` is a stream of this rank's context.
    pub unsafe fn synchronize(&mut self, stream: Handle) -> Result<(), Error> {
        self.check_here()?;
        match &mut self.backend {
            Backend::Cpu(_) if !stream.is_null() => Err(no_streams()),
            Backend::Cpu(communicator) => communicator.check_usable(),
            // SAFETY: this function's caller vouches for the stream.
            Backend::Cuda(communicator) => unsafe { communicator.synchronize(stream) },
        }
    }

    /// Checks, without a wait, that all operations that have ended did so well, and that the group is not over.
    ///
    /// # Errors
    /// As [`cuda::Communicator::check`] and [`cpu::Communicator::check_usable`].
    pub fn check(&mut self) -> Result<(), Error> {
        self.check_here()?;
        match &mut self.backend {
            Backend::Cpu(communicator) => communicator.check_usable(),
            Backend::Cuda(communicator) => communicator.check(),
        }
    }

    /// Takes the calls that were captured into a graph: see [`cuda::Communicator::captured`]. On CPUs there are none.
    pub fn captured(&mut self) -> Captured {
        match &mut self.backend {
            Backend::Cpu(_) => Captured::default(),
            Backend::Cuda(communicator) => communicator.captured(),
        }
    }

    /// Says that a graph with these calls is about to be launched: see [`cuda::Communicator::replay`].
    ///
    /// # Errors
    /// A group that has failed.
    pub fn replay(&mut self, captured: Captured) -> Result<(), Error> {
        self.check_here()?;
        match &mut self.backend {
            Backend::Cpu(communicator) => communicator.check_usable(),
            Backend::Cuda(communicator) => communicator.replay(captured),
        }
    }

    /// Makes a handle that ends the group's operations, on all ranks, from any thread. It may outlive the communicator.
    pub fn aborter(&self) -> Aborter {
        match &self.backend {
            Backend::Cpu(communicator) => communicator.aborter(),
            Backend::Cuda(communicator) => communicator.aborter(),
        }
    }

    /// Leaves the group together with all others, after which nobody's end is a loss: drop it. All ranks call this when
    /// their operations have ended; every later call fails. In a group of several hosts the graphs that operations were captured in
    /// are destroyed before.
    ///
    /// # Errors
    /// A rank was lost; such graphs are left; this rank has left already.
    pub fn leave(&mut self) -> Result<(), Error> {
        let meeting = self.meeting.take().ok_or(Error::Left)?;
        let left = match &mut self.backend {
            Backend::Cuda(communicator) => communicator.leave(meeting.bootstrap()),
            Backend::Cpu(_) => Ok(()),
        };
        // With graphs that are left, all ranks have met, and nobody is lost.
        if let Ok(()) | Err(Error::Nccl(_)) = left {
            meeting.end()?;
        }
        left
    }

    fn check_here(&self) -> Result<(), Error> {
        if self.meeting.is_some() { Ok(()) } else { Err(Error::Left) }
    }
}

fn no_streams() -> Error {
    Error::Options("a stream is given, and the CPU backend has none: use a null stream".to_owned())
}
