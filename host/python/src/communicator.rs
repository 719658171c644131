//! Communicators: one rank's end of a group, of which several threads may be in calls.

use std::{
    path::PathBuf,
    process, ptr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError,
        mpsc::{RecvTimeoutError, channel},
    },
    thread,
    time::Duration,
};

use fused_collective::{
    Error,
    core::{dtype::DType, plan::Algorithm},
    cuda::KernelSource,
    group::Aborter,
    raw::{self, Captured, Device, Meeting, Options, Tensor, TensorType, Tensors, Watch},
};
use pyo3::prelude::*;

use crate::{
    failure::{exception, invalid},
    operation::Operation,
};

/// The time between two looks at Python's signals, while a thread of its own joins or leaves.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// A tensor of Python's: address, length, and the type of its elements by its number in [`element`]'s table.
type Given = (u64, u64, u8);

fn element(py: Python<'_>, number: u8) -> PyResult<TensorType> {
    const ELEMENTS: [TensorType; 5] = [
        TensorType::Code,
        TensorType::Element(DType::F32),
        TensorType::Element(DType::F16),
        TensorType::Element(DType::Bf16),
        TensorType::Index,
    ];
    ELEMENTS.get(usize::from(number)).copied().ok_or_else(|| invalid(py, "a tensor's type is not known"))
}

fn tensor(py: Python<'_>, (address, length, number): Given) -> PyResult<Tensor> {
    Ok(Tensor { address, length, element: element(py, number)? })
}

fn options(
    py: Python<'_>,
    cuda: bool,
    device: Option<u32>,
    sizes: (u64, u64),
    deadline: f64,
    switches: (bool, bool),
    kernels: Option<PathBuf>,
) -> PyResult<Options> {
    let deadline = Duration::try_from_secs_f64(deadline)
        .ok()
        .filter(|deadline| !deadline.is_zero())
        .ok_or_else(|| invalid(py, &format!("deadline {deadline} is not valid: use seconds, more than 0")))?;
    Ok(Options {
        device: match (cuda, device) {
            (false, _) => Device::Cpu,
            (true, None) => Device::CudaByRank,
            (true, Some(ordinal)) => Device::Cuda(ordinal),
        },
        max_row_bytes: sizes.0,
        max_tokens: sizes.1,
        deadline,
        oversubscribe: switches.0,
        check_scales: switches.1,
        kernels: kernels.map_or(KernelSource::Embedded, KernelSource::Folder),
    })
}

/// Bytes of memory that the ranks of a group share: on CPUs all of them together, on GPUs each on its own GPU.
#[pyfunction]
pub(crate) fn workspace_bytes(
    py: Python<'_>,
    cuda: bool,
    world_size: u32,
    max_row_bytes: u64,
    max_tokens: u64,
) -> PyResult<u64> {
    let options = options(py, cuda, None, (max_row_bytes, max_tokens), 1.0, (false, false), None)?;
    options.workspace_bytes(world_size).map_err(|error| exception(py, &error.into()))
}

/// Operations that were captured into a CUDA graph.
#[pyclass(frozen, module = "fused_collective._native")]
pub(crate) struct Capture(Captured);

/// The exception of a signal's handler, which ended a wait.
type Interrupt = Arc<Mutex<Option<PyErr>>>;

/// One rank's end of a group.
#[pyclass(frozen, module = "fused_collective._native")]
pub(crate) struct Communicator {
    /// Shared with the thread that leaves. `None` in a child of a fork, which has none of its threads.
    communicator: Arc<Mutex<raw::Communicator>>,
    aborter: Aborter,
    interrupt: Interrupt,
    process: u32,
    rank: u32,
    world_size: u32,
    gpu: Option<u32>,
}

impl Communicator {
    /// The communicator, if no other thread is in a call of it.
    fn lock(&self, py: Python<'_>) -> PyResult<MutexGuard<'_, raw::Communicator>> {
        if process::id() != self.process {
            return Err(invalid(
                py,
                "this communicator is of another process, which forked this one: make one in each process",
            ));
        }
        match self.communicator.try_lock() {
            Ok(communicator) => Ok(communicator),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => Err(invalid(
                py,
                "another thread, or a handler of a signal, is in a call of this communicator: make its calls one after \
                 the other",
            )),
        }
    }

    /// The outcome of a call: that of a signal's handler first.
    fn outcome<T>(&self, py: Python<'_>, result: Result<T, Error>) -> PyResult<T> {
        result.map_err(|error| {
            let interrupt = self.interrupt.lock().unwrap_or_else(PoisonError::into_inner).take();
            interrupt.unwrap_or_else(|| exception(py, &error))
        })
    }
}

/// Runs `work` on a thread of its own, and serves Python's signals meanwhile. If a handler raises, the work is left to end by
/// itself.
fn beside<T: Send + 'static>(py: Python<'_>, work: impl FnOnce() -> T + Send + 'static) -> PyResult<T> {
    let (sender, mut receiver) = channel();
    thread::Builder::new().name("fused-collective".to_owned()).spawn(move || {
        // Nobody listens any more, if a handler has raised.
        let _ = sender.send(work());
    })?;
    loop {
        let received;
        (received, receiver) = py.detach(move || (receiver.recv_timeout(LOOK_EVERY), receiver));
        match received {
            Ok(done) => return Ok(done),
            Err(RecvTimeoutError::Timeout) => py.check_signals()?,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(invalid(
                    py,
                    "the library has a bug: it panicked, as it says on the standard error",
                ));
            }
        }
    }
}

/// Serves Python's signals inside of waits, and ends the group if a handler raises.
fn watch(interrupt: &Interrupt, aborter: &Arc<OnceLock<Aborter>>) -> Watch {
    let (interrupt, aborter) = (Arc::clone(interrupt), Arc::clone(aborter));
    Watch::new(move || {
        // An interpreter that ends serves none.
        let raised = Python::try_attach(|py| py.check_signals().err()).flatten();
        if let (Some(error), Some(aborter)) = (raised, aborter.get()) {
            *interrupt.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            aborter.abort();
        }
    })
}

#[pymethods]
impl Communicator {
    /// Joins a group of processes, by rank, size and key, and between hosts an address, or by a launcher's variables.
    #[staticmethod]
    #[pyo3(signature = (
        membership, *, cuda, device, max_row_bytes, max_tokens, deadline, oversubscribe, check_scales, kernels,
        address = None
    ))]
    #[expect(clippy::too_many_arguments, reason = "keywords of Python's, one for each option")]
    fn join(
        py: Python<'_>,
        membership: Option<(u32, u32, String)>,
        cuda: bool,
        device: Option<u32>,
        max_row_bytes: u64,
        max_tokens: u64,
        deadline: f64,
        oversubscribe: bool,
        check_scales: bool,
        kernels: Option<PathBuf>,
        address: Option<String>,
    ) -> PyResult<Communicator> {
        let (sizes, switches) = ((max_row_bytes, max_tokens), (oversubscribe, check_scales));
        let options = options(py, cuda, device, sizes, deadline, switches, kernels)?;
        let (interrupt, aborter) = (Interrupt::default(), Arc::new(OnceLock::new()));
        let watch = watch(&interrupt, &aborter);
        let joined = beside(py, move || {
            let meeting = match membership {
                Some((rank, world_size, key)) => match &address {
                    Some(address) => Meeting::at(rank, world_size, &key, address, &options)?,
                    None => Meeting::processes(rank, world_size, &key, &options)?,
                },
                None => Meeting::of_launcher(&options)?,
            };
            raw::Communicator::join(meeting, &options, Some(watch))
        })?;
        let communicator = joined.map_err(|error| exception(py, &error))?;
        let aborter = aborter.get_or_init(|| communicator.aborter()).clone();
        let (rank, world_size, gpu) = (communicator.rank(), communicator.world_size(), communicator.gpu());
        let communicator = Arc::new(Mutex::new(communicator));
        let process = process::id();
        Ok(Communicator { communicator, aborter, interrupt, process, rank, world_size, gpu })
    }

    #[getter]
    fn rank(&self) -> u32 {
        self.rank
    }

    #[getter]
    fn world_size(&self) -> u32 {
        self.world_size
    }

    /// Rows of the residual and of `residual_out` on this rank.
    fn residual_rows(&self, py: Python<'_>, operation: &Operation) -> PyResult<u64> {
        Ok(self.lock(py)?.residual_rows(&operation.operation))
    }

    /// The ordinal of this rank's GPU; None on CPUs.
    #[getter]
    fn device(&self) -> Option<u32> {
        self.gpu
    }

    /// Plans an operation, and on GPUs loads its kernels: its algorithm and its rounds.
    fn query(&self, py: Python<'_>, operation: &Operation) -> PyResult<(&'static str, u64)> {
        let mut guard = self.lock(py)?;
        let communicator = &mut *guard;
        let query = py.detach(move || communicator.query(&operation.operation));
        drop(guard);
        let query = self.outcome(py, query)?;
        let algorithm = match query.algorithm {
            Algorithm::OneShot => "one_shot",
            Algorithm::TwoShot => "two_shot",
            Algorithm::ShardedTwoShot => "sharded_two_shot",
            Algorithm::Hierarchical => "hierarchical",
            Algorithm::ShardedHierarchical => "sharded_hierarchical",
        };
        Ok((algorithm, query.rounds))
    }

    /// Enqueues an operation on tensors at addresses, which the caller vouches for. `experts` are rows, index and scales.
    #[pyo3(signature = (
        operation, input, residual, bias, gamma, scale, residual_out, norm_out, quant_out, scale_out, stream, /,
        post_gamma = None, experts = None
    ))]
    #[expect(clippy::too_many_arguments, reason = "one for each tensor")]
    fn enqueue(
        &self,
        py: Python<'_>,
        operation: &Operation,
        input: Option<Given>,
        residual: Option<Given>,
        bias: Option<Given>,
        gamma: Option<Given>,
        scale: Option<Given>,
        residual_out: Given,
        norm_out: Option<Given>,
        quant_out: Option<Given>,
        scale_out: Option<Given>,
        stream: u64,
        post_gamma: Option<Given>,
        experts: Option<[Given; 3]>,
    ) -> PyResult<()> {
        let optional = |given: Option<Given>| given.map(|given| tensor(py, given)).transpose();
        let [rows, index, scales] = experts.map_or([None; 3], |experts| experts.map(Some));
        let tensors = Tensors {
            input: optional(input)?,
            residual: optional(residual)?,
            bias: optional(bias)?,
            post_gamma: optional(post_gamma)?,
            expert_rows: optional(rows)?,
            expert_index: optional(index)?,
            expert_scales: optional(scales)?,
            gamma: optional(gamma)?,
            scale: optional(scale)?,
            residual_out: tensor(py, residual_out)?,
            norm_out: optional(norm_out)?,
            quant_out: optional(quant_out)?,
            scale_out: optional(scale_out)?,
        };
        let operation = &operation.operation;
        let mut guard = self.lock(py)?;
        let communicator = &mut *guard;
        // SAFETY: the package's modules, which alone call this, take addresses and stream from live tensors that the
        // call's arguments own.
        let mut enqueue = move || unsafe {
            communicator.enqueue(operation, &tensors, ptr::with_exposed_provenance_mut(stream as usize))
        };
        // On GPUs nothing is waited for, and other threads need not run meanwhile.
        let result = if self.gpu.is_some() { enqueue() } else { py.detach(enqueue) };
        drop(guard);
        self.outcome(py, result)
    }

    /// Waits until everything on a stream has ended, and checks it.
    fn synchronize(&self, py: Python<'_>, stream: u64) -> PyResult<()> {
        let mut guard = self.lock(py)?;
        let communicator = &mut *guard;
        // SAFETY: the package's modules take the stream from its owner.
        let result = py.detach(move || unsafe {
            communicator.synchronize(ptr::with_exposed_provenance_mut(stream as usize))
        });
        drop(guard);
        self.outcome(py, result)
    }

    /// Checks, without a wait, what has ended.
    fn check(&self, py: Python<'_>) -> PyResult<()> {
        let result = self.lock(py)?.check();
        self.outcome(py, result)
    }

    /// Takes the operations that were captured since this was last called.
    fn captured(&self, py: Python<'_>) -> PyResult<Capture> {
        Ok(Capture(self.lock(py)?.captured()))
    }

    /// Says that a graph with these operations is about to be launched.
    fn replay(&self, py: Python<'_>, capture: &Capture) -> PyResult<()> {
        let result = self.lock(py)?.replay(capture.0);
        self.outcome(py, result)
    }

    /// Ends the group's operations, on all ranks, from any thread.
    fn abort(&self) {
        if process::id() == self.process {
            self.aborter.abort();
        }
    }

    /// Leaves the group together with all others.
    fn leave(&self, py: Python<'_>) -> PyResult<()> {
        drop(self.lock(py)?);
        let communicator = Arc::clone(&self.communicator);
        let left = beside(py, move || communicator.lock().unwrap_or_else(PoisonError::into_inner).leave())?;
        self.outcome(py, left)
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        if process::id() != self.process {
            // A child of a fork has none of the threads that would be waited for, and what is shared is its parent's.
            std::mem::forget(Arc::clone(&self.communicator));
        }
    }
}
