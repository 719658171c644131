//! One rank of the CUDA backend: its tensors, stream, kernels and communicator.

use std::{collections::HashMap, mem::replace, time::Duration};

use cust::{
    event::{Event, EventFlags},
    stream::{Stream, StreamFlags},
};
use fused_collective_bench::{
    launch::{Audit, Conversions, LAYOUT, LAYOUT_SYMBOL},
    table::{PROBES, Probe, eager_module},
};
use fused_collective_core::{
    dtype::DType,
    fusion::Mode,
    kernels::{Module, Set},
    launch::Address,
    pack::Pack,
    plan::Limits,
    quant::Quantization,
};

use fused_collective::{
    cuda::{
        Communicator, DeviceTensor, ExternalWork, KernelSource, TensorType, Tensors,
        driver::{Handle, check, load},
        kernels::{Kernels, Parameters},
        memory::{DeviceMemory, require},
    },
    group::rendezvous::Group,
};

use super::{
    cust_driver::{bind_cust, failed},
    graph::TimedGraph,
    guarded_memory::GuardedMemory,
    links::CudaLinks,
    nccl::NcclGroup,
    window_tensors::WindowTensors,
};
use crate::backend::{
    all_reduce_choice::AllReduceChoice,
    collective::{AUDITED, Collective, copies},
    error::Error,
    gather::gather,
    links::Links,
    problem::{Problem, Tensor},
    steps::{AllReduce, Conversion, Step},
};

/// Operations of a trial: a graph of as many kernels as a model has layers, about.
pub(super) const OPERATIONS_PER_TRIAL: u32 = 20;
/// Copies that [`Engine::copy_time`](Collective::copy_time) takes the median of.
const COPIES: usize = 9;
/// Threads of a block of an eager step.
pub(super) const EAGER_THREADS: u32 = 512;

/// The archive of the benchmark's kernels; empty in a build without it.
#[cfg(embedded)]
static EMBEDDED: &[u8] = include_bytes!("../../../archive/kernels.archive");
#[cfg(not(embedded))]
static EMBEDDED: &[u8] = &[];

/// A problem that was put aside, with what belongs to it.
#[derive(Debug)]
struct Aside {
    problem: Option<Problem>,
    // Dropped before the tensors that they work on.
    graphs: Vec<TimedGraph>,
    sets: Vec<HashMap<Tensor, GuardedMemory>>,
    scale: Option<GuardedMemory>,
}

/// One rank of the CUDA backend.
#[derive(Debug)]
pub struct Engine<'a> {
    pub(super) group: &'a Group,
    pub(super) problem: Option<Problem>,
    /// The tensors, and the copies that operations of a cold trial take turns on.
    pub(super) sets: Vec<HashMap<Tensor, GuardedMemory>>,
    /// The ones in use.
    pub(super) set: usize,
    pub(super) cold: bool,
    /// Written before a cold trial, to have the cache full of it.
    pub(super) flush: Option<DeviceMemory>,
    pub(super) scale: Option<GuardedMemory>,
    /// Memory for the sums of a digest, a word for each thread.
    pub(super) sums: Option<DeviceMemory>,
    /// Addend and sum of the current problem in NCCL's symmetric window, if it has any.
    pub(super) window: Option<WindowTensors>,
    /// True if the steps that ran last had their addend and sum there.
    in_window: bool,
    /// The graphs timed on the current problem, with what they run.
    pub(super) graphs: Vec<TimedGraph>,
    /// The problems put aside, by slot, and the slot of the one at hand.
    aside: HashMap<usize, Aside>,
    pub(super) slot: usize,
    pub(super) events: [Event; 2],
    pub(super) nccl: Option<NcclGroup>,
    pub(super) all_reduces: Vec<AllReduceChoice>,
    pub(super) notes: Vec<String>,
    pub(super) gpus: Vec<String>,
    pub(super) stream: Stream,
    /// The kernels of the benchmark's own.
    pub(super) probes: Kernels,
    pub(super) communicator: Communicator,
    // Dropped last: the context that everything above lives in, current in this thread.
    pub(super) _context: cust::context::Context,
}

impl<'a> Engine<'a> {
    /// An engine without a problem yet, whose separate operations use the all-reduces in `all_reduces`. All ranks
    /// call this.
    ///
    /// No rank uses NCCL if it is missing, does not connect on some rank, or has no symmetric windows: the
    /// [notes](Collective::notes) say so and why.
    ///
    /// # Errors
    /// The driver's; NCCL is the only all-reduce that was asked for, and is not used; it hangs, and cannot be ended; a
    /// rank of the group was lost.
    pub fn new(
        group: &'a Group,
        communicator: Communicator,
        all_reduces: &[AllReduceChoice],
        deadline: Duration,
    ) -> Result<Self, Error> {
        bind_cust()?;
        let device =
            cust::device::Device::get_device(communicator.gpu().ordinal).map_err(failed("find the GPU"))?;
        let context = cust::context::Context::new(device).map_err(failed("make a context on the GPU"))?;
        let mut notes = vec![format!("{} x {}", group.world_size(), communicator.describe())];
        if let Some(hosts) = communicator.hosts() {
            let (count, ranks) = (hosts.count(), hosts.ranks_per_host());
            notes.push(format!("{count} hosts of {ranks} ranks each, with NCCL between them"));
        }
        let mut nccl = None;
        if communicator.shares_gpus() {
            notes.insert(
                0,
                "RANKS SHARE GPUS (--oversubscribe): they take turns, so all times mean nothing".to_owned(),
            );
        }
        let mut all_reduces = all_reduces.to_vec();
        let has_custom = all_reduces.contains(&AllReduceChoice::Custom);
        let wants_nccl = all_reduces.iter().any(|&choice| choice != AllReduceChoice::Custom);
        if wants_nccl && communicator.shares_gpus() {
            let why = "NCCL is left out: it refuses ranks that share a GPU";
            if !has_custom {
                return Err(Error::Nccl("refuses ranks that share a GPU: use custom".to_owned()));
            }
            notes.push(why.to_owned());
        } else if wants_nccl {
            match NcclGroup::join(group, communicator.gpu(), deadline)? {
                Ok(joined) => {
                    let version = joined.version();
                    if all_reduces.contains(&AllReduceChoice::Nccl) {
                        notes.push(format!("standard_allreduce is NCCL {version}"));
                    }
                    nccl = Some(joined);
                }
                Err(error) if has_custom => notes.push(error.to_string()),
                Err(error) => return Err(error),
            }
        }
        if let (Some(nccl), true) = (&mut nccl, all_reduces.contains(&AllReduceChoice::NcclSymmetric)) {
            // A small one shows whether there are any.
            match nccl.window(group, 1)? {
                Ok(_) => notes.push(format!(
                    "standard_symm_allreduce is NCCL {} over symmetric windows",
                    nccl.version()
                )),
                Err(error) if all_reduces.len() > 1 => {
                    all_reduces.retain(|&choice| choice != AllReduceChoice::NcclSymmetric);
                    notes.push(format!("standard_symm_allreduce was not measured: {error}"));
                }
                Err(error) => return Err(error),
            }
        }
        let event = || Event::new(EventFlags::DEFAULT).map_err(failed("make an event"));
        Ok(Engine {
            group,
            problem: None,
            sets: vec![HashMap::new()],
            set: 0,
            cold: false,
            flush: None,
            scale: None,
            sums: None,
            window: None,
            in_window: false,
            graphs: Vec::new(),
            aside: HashMap::new(),
            slot: 0,
            events: [event()?, event()?],
            nccl,
            all_reduces,
            notes,
            gpus: gather(group, &communicator.gpu().name)?,
            stream: Stream::new(StreamFlags::DEFAULT, None).map_err(failed("make a stream"))?,
            probes: Kernels::find(communicator.gpu(), &KernelSource::Archive(EMBEDDED), PROBES)?,
            communicator,
            _context: context,
        })
    }

    pub(super) fn context(&self) -> fused_collective::cuda::device::Context {
        self.communicator.gpu().context().clone()
    }

    pub(super) fn handle(&self) -> Handle {
        self.stream.as_inner().cast()
    }

    pub(super) fn tensors(&self) -> &HashMap<Tensor, GuardedMemory> {
        &self.sets[self.set]
    }

    /// Has `steps` find their addend and sum in the symmetric window, if they are to.
    pub(super) fn use_window(&mut self, steps: &[Step]) {
        self.in_window = steps.contains(&Step::NcclSymmetricAllReduce);
    }

    /// True if a kernel of the steps at hand must not let the next one in early: NCCL's over the window would not wait.
    pub(super) fn holds_dependents(&self) -> bool {
        self.in_window && self.nccl.as_ref().is_some_and(|nccl| !nccl.symmetric_kernels_wait())
    }

    /// The tensors in the symmetric window, if the steps at hand use them.
    fn window_in_use(&self) -> Option<&WindowTensors> {
        self.window.as_ref().filter(|_| self.in_window)
    }

    /// Where `tensor` is; null if the problem has no use for it.
    pub(super) fn address(&self, tensor: Tensor) -> Address {
        if let Some(address) = self.window_in_use().and_then(|window| window.address(self.set, tensor)) {
            return address;
        }
        self.tensors().get(&tensor).map_or(Address::NULL, GuardedMemory::address)
    }

    /// The tensor as an operation takes it.
    pub(super) fn tensor(&self, tensor: Tensor, dtype: DType) -> DeviceTensor {
        let (element, size) = match tensor {
            Tensor::QuantOut | Tensor::ScaleOut => (TensorType::Code, 1),
            Tensor::ExpertIndex => (TensorType::Index, 4),
            _ => (TensorType::Element(dtype), dtype.bytes()),
        };
        let bytes = self.tensors().get(&tensor).map_or(0, GuardedMemory::bytes);
        DeviceTensor { address: self.address(tensor).0, length: bytes / size, element }
    }

    /// What an operation with `norm` and `quantization` reads and writes, with its sum in `sum`.
    pub(super) fn operands(
        &self,
        problem: &Problem,
        norm: bool,
        quantization: Quantization,
        sum: Tensor,
    ) -> Tensors {
        let tensor = |role| self.tensor(role, problem.dtype);
        let quantized = quantization != Quantization::None;
        let scale = self.scale.as_ref().map_or(Address::NULL, GuardedMemory::address);
        Tensors {
            input: Some(tensor(Tensor::Input)),
            residual: None,
            bias: None,
            post_gamma: None,
            expert_rows: None,
            expert_index: None,
            expert_scales: None,
            gamma: norm.then(|| tensor(Tensor::Gamma)),
            scale: quantization.reads_scale().then_some(DeviceTensor {
                address: scale.0,
                length: 1,
                element: TensorType::Element(DType::F32),
            }),
            residual_out: tensor(sum),
            norm_out: (norm && !quantized).then(|| tensor(Tensor::NormOut)),
            quant_out: quantized.then(|| tensor(Tensor::QuantOut)),
            scale_out: quantization.scales(1, problem.hidden).map(|_| tensor(Tensor::ScaleOut)),
        }
    }

    pub(super) fn problem(&self, step: Step) -> Result<Problem, Error> {
        self.problem.ok_or(Error::Step { step, why: "no problem was prepared" })
    }

    /// Waits for all that was enqueued, and checks it.
    pub(super) fn settle(&mut self) -> Result<(), Error> {
        let stream = self.handle();
        let communicator = &mut self.communicator;
        let mut wait = |external: Option<ExternalWork<'_>>| {
            // SAFETY: the engine's stream.
            unsafe { communicator.synchronize_with(stream, external) }.map_err(Error::from)
        };
        let Some(nccl) = &mut self.nccl else { return wait(None) };
        nccl.while_waiting(&mut wait)?;
        nccl.check().map_err(|error| communicator.fail(error).into())
    }

    pub(super) fn barrier(&self) -> Result<(), Error> {
        Ok(self.group.barrier()?)
    }
}

impl Collective for Engine<'_> {
    fn prepare(&mut self, problem: &Problem) -> Result<(), Error> {
        self.problem = None;
        self.graphs.clear();
        self.sets.clear();
        self.set = 0;
        self.window = None;
        self.flush = None;
        let context = self.context();
        let (tokens, hidden) = (problem.tokens, problem.hidden);
        let needed = problem.total_bytes().unwrap_or(u64::MAX);
        require(&context, &format!("a problem of {tokens} tokens of hidden size {hidden}"), needed)?;
        let copies = if self.cold {
            self.flush = Some(DeviceMemory::new(&context, 2 * self.cache_bytes())?);
            copies(problem, self.cache_bytes(), OPERATIONS_PER_TRIAL)
        } else {
            1
        };
        for _ in 0..copies {
            let mut tensors = HashMap::new();
            for tensor in Tensor::ALL {
                let bytes = problem.bytes(tensor).ok_or_else(|| {
                    Error::Memory(format!(
                        "{tensor:?} of {} tokens is more bytes than 64 bits count",
                        problem.tokens
                    ))
                })?;
                tensors.insert(tensor, GuardedMemory::new(&context, bytes)?);
            }
            self.sets.push(tensors);
        }
        let mut scale = GuardedMemory::new(&context, size_of::<f32>() as u64)?;
        scale.write(0, &problem.scale.to_ne_bytes())?;
        self.scale = Some(scale);
        self.communicator.prepare(&problem.operation(Mode::Auto))?;
        let local = Module { dtype: problem.dtype, set: Set::Local };
        self.communicator.kernels().load(local.name())?;
        for name in [eager_module(problem.dtype), PROBES] {
            if self.probes.load(name)?.word(LAYOUT_SYMBOL)? != Some(LAYOUT) {
                return Err(Error::Other(format!(
                    "the kernels of {name} are of another version: build them again with this program"
                )));
            }
        }
        if let (Some(nccl), true) =
            (&mut self.nccl, self.all_reduces.contains(&AllReduceChoice::NcclSymmetric))
        {
            let count = self.sets.len();
            let bytes = WindowTensors::needed(problem, count).unwrap_or(u64::MAX);
            match nccl.window(self.group, bytes)? {
                Ok(base) => self.window = Some(WindowTensors::new(context, base, problem, count)),
                Err(error) => {
                    self.all_reduces.retain(|&choice| choice != AllReduceChoice::NcclSymmetric);
                    self.notes
                        .push(format!("standard_symm_allreduce was not measured from here on: {error}"));
                }
            }
        }
        self.problem = Some(*problem);
        Ok(())
    }

    fn select(&mut self, slot: usize) -> Result<(), Error> {
        if slot != self.slot {
            let none = Aside { problem: None, graphs: Vec::new(), sets: vec![HashMap::new()], scale: None };
            let Aside { problem, graphs, sets, scale } = self.aside.remove(&slot).unwrap_or(none);
            let aside = Aside {
                problem: replace(&mut self.problem, problem),
                graphs: replace(&mut self.graphs, graphs),
                sets: replace(&mut self.sets, sets),
                scale: replace(&mut self.scale, scale),
            };
            self.aside.insert(replace(&mut self.slot, slot), aside);
            self.set = 0;
            // There is one window, and it is the last prepared problem's.
            self.window = None;
        }
        Ok(())
    }

    fn aborter(&self) -> Box<dyn Fn() + Send> {
        let aborter = self.communicator.aborter();
        Box::new(move || aborter.abort())
    }

    fn write(&mut self, tensor: Tensor, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let too_long = || Error::Memory(format!("{tensor:?} has no bytes to write"));
        for tensors in &mut self.sets {
            tensors.get_mut(&tensor).ok_or_else(too_long)?.write(offset, bytes)?;
        }
        if let Some(window) = &mut self.window {
            window.write(tensor, offset, bytes)?;
        }
        Ok(())
    }

    fn fill(&mut self, tensor: Tensor, byte: u8) -> Result<(), Error> {
        self.fill_tensor(tensor, byte)
    }

    fn digest(&mut self, tensor: Tensor) -> Result<u64, Error> {
        self.digest_tensor(tensor)
    }

    fn read(&mut self, tensor: Tensor) -> Result<Vec<u8>, Error> {
        if let Some(window) = self.window_in_use()
            && let Some(bytes) = window.read(tensor)?
        {
            return Ok(bytes);
        }
        let tensor = self.sets.first().and_then(|tensors| tensors.get(&tensor));
        Ok(tensor.map_or(Ok(Vec::new()), |memory| memory.read_from(0))?)
    }

    fn run(&mut self, steps: &[Step]) -> Result<(), Error> {
        let enqueued = self.enqueue_all(steps);
        // What was enqueued before an error runs to its end all the same.
        let settled = self.settle();
        enqueued.and(settled)
    }

    fn time(&mut self, steps: &[Step], operations: u32) -> Result<f64, Error> {
        self.time_graph(steps, operations)
    }

    fn links<'b>(&'b mut self, group: &'b Group) -> Result<Box<dyn Links + 'b>, Error> {
        if let Some(hosts) = self.communicator.hosts() {
            let count = hosts.count();
            return Err(Error::Other(format!(
                "links are measured between GPUs of one host, and these are on {count}: start the ranks of one"
            )));
        }
        Ok(Box::new(CudaLinks::share(group, &mut self.communicator, &mut self.probes)?))
    }

    fn copy_time(&mut self, bytes: u64) -> Result<f64, Error> {
        let context = self.context();
        let (from, to) = (DeviceMemory::new(&context, bytes)?, DeviceMemory::new(&context, bytes)?);
        let driver = load()?;
        let mut times = Vec::new();
        for _ in 0..COPIES {
            self.barrier()?;
            let copy = || {
                // SAFETY: both have as many bytes, and `settle` comes before they are freed.
                let code = unsafe {
                    (driver.cuMemcpyDtoDAsync_v2)(
                        to.address().0,
                        from.address().0,
                        bytes as usize,
                        self.handle(),
                    )
                };
                check("copy on the GPU", code)
            };
            // The first hides the launch.
            copy()?;
            self.record(0)?;
            copy()?;
            self.record(1)?;
            self.settle()?;
            times.push(self.elapsed()?);
        }
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }

    fn find_stray_write(&mut self, thorough: bool) -> Result<Option<String>, Error> {
        for (tensor, memory) in self.sets.iter().flatten() {
            if let Some(at) = memory.stray_write()? {
                return Ok(Some(format!("{tensor:?}: {at}")));
            }
        }
        if let Some(at) = self.scale.as_ref().map_or(Ok(None), GuardedMemory::stray_write)? {
            return Ok(Some(format!("the scale: {at}")));
        }
        Ok(self.communicator.find_stray_write(thorough)?)
    }

    fn audit(&mut self, steps: &[Step], outputs: &[Tensor], times: u64) -> Result<Option<String>, Error> {
        if self.problem.is_none() {
            return Ok(None);
        }
        let context = self.context();
        let mut expected = Vec::new();
        for &tensor in outputs {
            expected.push(DeviceMemory::holding(&context, &self.read(tensor)?)?);
        }
        let mut words = vec![0; outputs.len() * size_of::<u32>()];
        let found = DeviceMemory::holding(&context, &words)?;
        let audits: Vec<Audit> = (0..)
            .zip(outputs.iter().zip(&expected))
            .map(|(index, (&tensor, expected))| Audit {
                actual: self.address(tensor),
                expected: expected.address(),
                found: found.address().offset(index * size_of::<u32>() as u64),
                packs: expected.bytes() / Pack::BYTES,
                poison: u32::from_ne_bytes([AUDITED; 4]),
                reserved: 0,
            })
            .collect();
        let ran = self.run_audited(steps, &audits, times);
        // What was enqueued reads `expected`, so it has ended before that is freed, whatever became of it.
        ran.and(self.settle())?;
        found.read(0, &mut words)?;
        self.run(steps)?;
        let places = words.as_chunks().0.iter().map(|word| u32::from_ne_bytes(*word));
        let wrong = outputs.iter().zip(places).find(|(_, place)| *place != 0);
        Ok(wrong.map(|(tensor, place)| {
            let byte = u64::from(place - 1) * Pack::BYTES;
            format!("a kernel that depends on the operation read something else at byte {byte} of {tensor:?}")
        }))
    }

    fn convert(&mut self, to: Conversion, first: u32, count: u32) -> Result<Option<Vec<u8>>, Error> {
        let mut codes = vec![0; (count / to.codes_per_byte()) as usize];
        let context = self.context();
        let mut out = DeviceMemory::new(&context, codes.len() as u64)?;
        // A code that is not written is wrong.
        out.fill_from(0, u32::MAX)?;
        let stream = self.handle();
        let kernels = &mut self.probes;
        let limits = kernels.limits();
        let probe = match to {
            Conversion::E4M3 => Probe::EncodeE4m3,
            Conversion::E2M1 => Probe::EncodeE2m1,
        };
        let function = kernels.function(probe.entry())?;
        let launch = limits.for_elements(function, EAGER_THREADS, u64::from(count / 4))?;
        // SAFETY: the struct has no padding, which its crate asserts.
        let parameters = unsafe { Parameters::of(&Conversions { out: out.address(), first, count }) };
        // SAFETY: the entry point takes these parameters; `out` has room for all codes, and lives until `settle`.
        unsafe { kernels.launch(launch, &parameters, stream)? };
        self.settle()?;
        out.read(0, &mut codes)?;
        Ok(Some(codes))
    }

    fn leave(&mut self) -> Result<(), Error> {
        // NCCL, between hosts, leaves when the graphs that it was captured in are gone.
        self.graphs.clear();
        self.aside.clear();
        Ok(self.communicator.leave(self.group)?)
    }

    fn all_reduces(&self) -> Vec<AllReduce> {
        let mut all = Vec::new();
        for choice in &self.all_reduces {
            match choice {
                AllReduceChoice::Nccl if self.nccl.is_some() => {
                    all.push(AllReduce { name: "allreduce", ways: vec![("NCCL", Step::NcclAllReduce)] });
                }
                AllReduceChoice::NcclSymmetric if self.nccl.is_some() => {
                    let ways = vec![("NCCL", Step::NcclSymmetricAllReduce)];
                    all.push(AllReduce { name: "symm_allreduce", ways });
                }
                AllReduceChoice::Nccl | AllReduceChoice::NcclSymmetric => {}
                AllReduceChoice::Custom if self.communicator.hosts().is_some() => {
                    let ways = vec![("two-shot", Step::AllReduce(Mode::TwoShot))];
                    all.push(AllReduce { name: "custom_allreduce", ways });
                }
                AllReduceChoice::Custom => all.push(AllReduce::of_both_modes("custom_allreduce")),
            }
        }
        all
    }

    fn set_cold(&mut self, cold: bool) {
        self.cold = cold;
    }

    fn limits(&self) -> &Limits {
        self.communicator.limits()
    }

    fn cache_bytes(&self) -> u64 {
        self.communicator.gpu().cache_bytes
    }

    fn gpus(&self) -> Vec<String> {
        self.gpus.clone()
    }

    fn operations_per_trial(&self, _microseconds: f64) -> u32 {
        OPERATIONS_PER_TRIAL
    }

    fn runs_on_each(&self, operations: u32) -> u32 {
        // The graph is launched twice.
        2 * operations.div_ceil(self.sets.len() as u32)
    }

    fn notes(&self) -> &[String] {
        &self.notes
    }
}
