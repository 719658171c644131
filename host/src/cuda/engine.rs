//! The CUDA backend's side of the benchmark: tensors on the GPU, and every [`Step`] as a kernel.
//!
//! A trial is timed as inference runs it: a CUDA graph of several operations, launched twice back to back, of which
//! the second is timed by events on the device. The first hides the launch, and by the data that its operations wait
//! for brings all ranks to the same point. In a cold trial the cache is flushed in between, and each operation has
//! tensors of its own.

use std::{collections::HashMap, mem::replace, time::Duration};

use cust::{
    event::{Event, EventFlags},
    stream::{Stream, StreamFlags},
};
use fused_collective_core::{
    dtype::DType,
    fusion::{Mode, Norm, Operation, Residual},
    launch::{Activations, Address, Audit, Conversions, Local, Step as EagerStep},
    pack::Pack,
    quant::Quantization,
};

use super::{
    Captured, Communicator, Error as CudaError,
    communicator::shape,
    driver::{Handle, check, failed, load},
    epilogue::{Part, WithEpilogue, with_epilogue},
    gather,
    graph::Graph,
    kernels::{Entry, Kernels, Set},
    links::Links,
    memory::{DeviceMemory, GuardedMemory, require},
    nccl::NcclGroup,
    tensors::{DeviceTensor, TensorType, Tensors},
};
use crate::{
    collective::{self, AUDITED, AllReduce, Collective, Conversion, Eager, Error, Problem, Step, Tensor},
    links,
    rendezvous::Group,
    settings::AllReduceChoice,
};

/// Operations of a trial: a graph of as many kernels as a model has layers, about.
const OPERATIONS_PER_TRIAL: u32 = 20;
/// Copies that [`Engine::copy_time`](Collective::copy_time) takes the median of.
const COPIES: usize = 9;
/// Graphs of an audit that are launched before it is waited for.
const GRAPHS_AT_ONCE: u64 = 64;
/// Threads of a block of an eager step.
const EAGER_THREADS: u32 = 512;
/// Elements that a thread of an eager step takes at a time.
const EAGER_GROUP: u64 = 4;

/// A problem that was put aside, with what belongs to it.
#[derive(Debug)]
struct Aside {
    problem: Option<Problem>,
    // Dropped before the tensors that they work on.
    graphs: Vec<(Vec<Step>, u32, Graph, Captured)>,
    sets: Vec<HashMap<Tensor, GuardedMemory>>,
    scale: Option<GuardedMemory>,
}

/// One rank of the CUDA backend.
#[derive(Debug)]
pub struct Engine<'a> {
    group: &'a Group,
    problem: Option<Problem>,
    /// The tensors, and the copies that operations of a cold trial take turns on.
    sets: Vec<HashMap<Tensor, GuardedMemory>>,
    /// The ones in use.
    set: usize,
    cold: bool,
    /// Written before a cold trial, to have the cache full of it.
    flush: Option<DeviceMemory>,
    scale: Option<GuardedMemory>,
    /// The graphs timed on the current problem, with what they run.
    graphs: Vec<(Vec<Step>, u32, Graph, Captured)>,
    /// The problems put aside, by slot, and the slot of the one at hand.
    aside: HashMap<usize, Aside>,
    slot: usize,
    events: [Event; 2],
    nccl: Option<NcclGroup>,
    all_reduces: Vec<AllReduceChoice>,
    notes: Vec<String>,
    gpus: Vec<String>,
    stream: Stream,
    // Dropped last: the context that everything above lives in.
    communicator: Communicator,
}

impl<'a> Engine<'a> {
    /// An engine without a problem yet, whose separate operations use the all-reduces in `all_reduces`. All ranks
    /// call this.
    ///
    /// Where NCCL is asked for and missing, the [notes](Collective::notes) say so.
    ///
    /// # Errors
    /// The driver's; NCCL is the only all-reduce that was asked for, and is missing.
    pub fn new(
        group: &'a Group,
        communicator: Communicator,
        all_reduces: &[AllReduceChoice],
        deadline: Duration,
    ) -> Result<Self, CudaError> {
        let mut notes = vec![format!("{} x {}", group.world_size(), communicator.describe())];
        let mut nccl = None;
        if communicator.shares_gpus() {
            notes.insert(
                0,
                "RANKS SHARE GPUS (--oversubscribe): they take turns, so all times mean nothing".to_owned(),
            );
        }
        if all_reduces.contains(&AllReduceChoice::Nccl) && communicator.shares_gpus() {
            let why = "NCCL is left out: it refuses ranks that share a GPU";
            if !all_reduces.contains(&AllReduceChoice::Custom) {
                return Err(CudaError::Nccl("refuses ranks that share a GPU: use custom".to_owned()));
            }
            notes.push(why.to_owned());
        } else if all_reduces.contains(&AllReduceChoice::Nccl) {
            match NcclGroup::join(group, communicator.gpu(), deadline) {
                Ok(joined) => {
                    notes.push(format!("standard_allreduce is NCCL {}", joined.version()));
                    nccl = Some(joined);
                }
                Err(error) if all_reduces.contains(&AllReduceChoice::Custom) => notes.push(error.to_string()),
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
            graphs: Vec::new(),
            aside: HashMap::new(),
            slot: 0,
            events: [event()?, event()?],
            nccl,
            all_reduces: all_reduces.to_vec(),
            notes,
            gpus: gather(group, &communicator.gpu().name)?,
            stream: Stream::new(StreamFlags::DEFAULT, None).map_err(failed("make a stream"))?,
            communicator,
        })
    }

    fn handle(&self) -> Handle {
        self.stream.as_inner().cast()
    }

    fn tensors(&self) -> &HashMap<Tensor, GuardedMemory> {
        &self.sets[self.set]
    }

    /// Where `tensor` is; null if the problem has no use for it.
    fn address(&self, tensor: Tensor) -> Address {
        self.tensors().get(&tensor).map_or(Address::NULL, GuardedMemory::address)
    }

    /// The tensor as an operation takes it.
    fn tensor(&self, tensor: Tensor, dtype: DType) -> DeviceTensor {
        let (element, size) = match tensor {
            Tensor::QuantOut | Tensor::ScaleOut => (TensorType::Code, 1),
            _ => (TensorType::Element(dtype), dtype.bytes()),
        };
        let bytes = self.tensors().get(&tensor).map_or(0, GuardedMemory::bytes);
        DeviceTensor { address: self.address(tensor).0, length: bytes / size, element }
    }

    /// What an operation with `norm` and `quantization` reads and writes, with its sum in `sum`.
    fn operands(&self, problem: &Problem, norm: bool, quantization: Quantization, sum: Tensor) -> Tensors {
        let tensor = |role| self.tensor(role, problem.dtype);
        let quantized = quantization != Quantization::None;
        let scale = self.scale.as_ref().map_or(Address::NULL, GuardedMemory::address);
        Tensors {
            input: tensor(Tensor::Input),
            residual: None,
            gamma: norm.then(|| tensor(Tensor::Gamma)),
            scale: quantized.then_some(DeviceTensor {
                address: scale.0,
                length: 1,
                element: TensorType::Element(DType::F32),
            }),
            residual_out: tensor(sum),
            norm_out: (norm && !quantized).then(|| tensor(Tensor::NormOut)),
            quant_out: quantized.then(|| tensor(Tensor::QuantOut)),
            scale_out: quantization.scale_layout().map(|_| tensor(Tensor::ScaleOut)),
        }
    }

    fn problem(&self, step: Step) -> Result<Problem, Error> {
        self.problem.ok_or(Error::Step { step, why: "no problem was prepared" })
    }

    /// Enqueues every step once.
    fn enqueue_all(&mut self, steps: &[Step]) -> Result<(), Error> {
        steps.iter().try_for_each(|&step| self.enqueue(step))
    }

    fn enqueue(&mut self, step: Step) -> Result<(), Error> {
        let problem = self.problem(step)?;
        match step {
            Step::Fused(mode) => self.fused(&problem, problem.operation(mode)),
            Step::FusedSharded if !problem.sharded => {
                Err(Error::Step { step, why: "the problem has no sharded residual" })
            }
            Step::FusedSharded => self.fused(&problem, problem.sharded_operation()),
            Step::AllReduce(mode) => self.all_reduce(&problem, mode),
            Step::NcclAllReduce => self.nccl_all_reduce(&problem, step),
            Step::AddRmsNorm => self.local(&problem, Some(problem.norm), Quantization::None),
            Step::AddRmsNormQuantize => self.local(&problem, Some(problem.norm), problem.quantization),
            Step::Quantize => self.local(&problem, None, problem.quantization),
            Step::Eager(eager) => self.eager(&problem, eager),
        }
    }

    fn fused(&mut self, problem: &Problem, operation: Operation) -> Result<(), Error> {
        let (residual, residual_out) = match operation.residual {
            Residual::Sharded => (Tensor::ResidualShard, Tensor::ResidualShardOut),
            Residual::None | Residual::Replicated => (Tensor::Residual, Tensor::ResidualOut),
        };
        let mut tensors = self.operands(problem, true, problem.quantization, residual_out);
        tensors.residual = operation.residual.is_some().then(|| self.tensor(residual, problem.dtype));
        // The tensors have room for every rank's rows.
        let (rank, world_size) = (self.communicator.rank(), self.communicator.world_size());
        let length = operation.residual_rows(rank, world_size) * operation.hidden;
        tensors.residual_out.length = length;
        tensors.residual = tensors.residual.map(|residual| DeviceTensor { length, ..residual });
        let stream = self.handle();
        // SAFETY: the tensors are this engine's and outlive what it enqueues: `settle` comes before they are freed.
        Ok(unsafe { self.communicator.enqueue(&operation, &tensors, stream) }?)
    }

    fn all_reduce(&mut self, problem: &Problem, mode: Mode) -> Result<(), Error> {
        let tensors = self.operands(problem, false, Quantization::None, sum(problem));
        let stream = self.handle();
        // SAFETY: as in `fused`.
        Ok(unsafe { self.communicator.enqueue(&problem.all_reduce(mode), &tensors, stream) }?)
    }

    fn nccl_all_reduce(&mut self, problem: &Problem, step: Step) -> Result<(), Error> {
        let nccl = self.nccl.as_ref().ok_or(Error::Step { step, why: "NCCL was not loaded" })?;
        let (from, to) = (self.address(Tensor::Input), self.address(sum(problem)));
        let count = problem.tokens * problem.hidden;
        // SAFETY: as in `fused`.
        Ok(unsafe { nccl.all_reduce(problem.dtype, from, to, count, self.handle()) }?)
    }

    /// One pass after the all-reduce. Without a norm, it quantizes `NormOut`.
    fn local(
        &mut self,
        problem: &Problem,
        norm: Option<Norm>,
        quantization: Quantization,
    ) -> Result<(), Error> {
        let tensors = self.operands(problem, norm.is_some(), quantization, Tensor::ResidualOut);
        let activations = match norm {
            None => Activations {
                input: self.address(Tensor::NormOut),
                residual: Address::NULL,
                residual_out: Address::NULL,
            },
            // Without a residual the sum is in `ResidualOut` already.
            Some(_) if !problem.residual => Activations {
                input: self.address(Tensor::ResidualOut),
                residual: Address::NULL,
                residual_out: Address::NULL,
            },
            Some(_) => Activations {
                input: self.address(Tensor::Reduced),
                residual: self.address(Tensor::Residual),
                residual_out: self.address(Tensor::ResidualOut),
            },
        };
        let stream = self.handle();
        let kernels = self.communicator.kernels();
        let pass = LocalPass { kernels, problem, activations, stream };
        Ok(with_epilogue(norm, quantization, problem.hidden, &tensors, pass)?)
    }

    fn eager(&mut self, problem: &Problem, eager: Eager) -> Result<(), Error> {
        let at = |tensor| self.address(tensor);
        let scale = self.scale.as_ref().map_or(Address::NULL, GuardedMemory::address);
        let (wide_a, wide_b, per_token) = (at(Tensor::WideA), at(Tensor::WideB), at(Tensor::PerToken));
        let none = Address::NULL;
        let norm = problem.norm;
        // Entry point, first and second operand, result, number.
        let launches: &[(&'static str, Address, Address, Address, f32)] = &match eager {
            Eager::AddResidual => vec![
                ("to_f32", at(Tensor::Reduced), none, wide_a, 0.0),
                ("to_f32", at(Tensor::Residual), none, wide_b, 0.0),
                ("add", wide_a, wide_b, wide_a, 0.0),
                ("round", wide_a, none, at(Tensor::ResidualOut), 0.0),
            ],
            Eager::WidenResidual => vec![("to_f32", at(Tensor::ResidualOut), none, wide_a, 0.0)],
            Eager::Square => vec![("square", wide_a, none, wide_b, 0.0)],
            // One kernel does both, to the advantage of the operation that it is part of.
            Eager::Mean => vec![("mean_rsqrt", wide_b, none, per_token, norm.epsilon)],
            Eager::Rsqrt => vec![],
            Eager::ScaleRows => vec![("scale_rows", wide_a, per_token, wide_a, 0.0)],
            Eager::Weight => vec![("mul_weight", wide_a, at(Tensor::Gamma), wide_a, norm.weight_bias)],
            Eager::RoundNorm => vec![("round", wide_a, none, at(Tensor::NormOut), 0.0)],
            Eager::WidenNorm => vec![("to_f32", at(Tensor::NormOut), none, wide_a, 0.0)],
            Eager::Rescale => vec![("mul_inverse", wide_a, scale, wide_a, 0.0)],
            Eager::Clamp => vec![("clamp", wide_a, none, wide_a, 0.0)],
            Eager::RoundFp8 => vec![("to_fp8", wide_a, none, at(Tensor::QuantOut), 0.0)],
        };
        let stream = self.handle();
        let groups = problem.hidden.div_ceil(EAGER_GROUP) as u32; // of at most 65,536 elements
        let threads = groups.next_multiple_of(32).min(EAGER_THREADS);
        let tokens = shape(0, problem.tokens, problem.tokens, problem.row_bytes())?.tokens;
        let kernels = self.communicator.kernels();
        for &(part, a, b, out, value) in launches {
            let entry = Entry { set: Set::Local, family: "eager", part, packs: None };
            let launch = kernels.for_elements(problem.dtype, entry, threads, problem.tokens)?;
            let parameters =
                EagerStep { a, b, out, tokens, hidden: problem.hidden as u32, value, reserved: 0 };
            // SAFETY: the entry point takes these parameters; the tensors have the shapes that it asks for, and live
            // as in `fused`.
            unsafe { kernels.launch(launch, &parameters, stream)? };
        }
        Ok(())
    }

    /// Waits for all that was enqueued, and checks it.
    fn settle(&mut self) -> Result<(), Error> {
        let stream = self.handle();
        // SAFETY: the engine's stream.
        let settled = unsafe { self.communicator.synchronize(stream) };
        if let Some(nccl) = &mut self.nccl {
            if settled.is_err() {
                nccl.abort();
            } else {
                nccl.check()?;
            }
        }
        Ok(settled?)
    }

    /// The index of the graph of `steps`, `operations` times, which is made when it is first timed.
    fn capture(&mut self, steps: &[Step], operations: u32) -> Result<usize, Error> {
        let is_same =
            |(of, times, ..): &(Vec<Step>, u32, Graph, Captured)| of == steps && *times == operations;
        if let Some(index) = self.graphs.iter().position(is_same) {
            return Ok(index);
        }
        // Whatever is set up at first use is so before the capture.
        self.run(steps)?;
        let stream = self.handle();
        let enqueue = || {
            let enqueued = (0..operations as usize).try_for_each(|operation| {
                self.set = operation % self.sets.len();
                self.enqueue_all(steps)
            });
            self.set = 0;
            enqueued.map_err(|error| match error {
                Error::Cuda(error) => error,
                error => CudaError::Group(error.to_string()),
            })
        };
        // SAFETY: the engine's stream; the graphs are dropped before the tensors.
        let graph = unsafe { Graph::capture(stream, enqueue) }?;
        let captured = self.communicator.captured();
        self.graphs.push((steps.to_vec(), operations, graph, captured));
        Ok(self.graphs.len() - 1)
    }

    /// Enqueues kernels that depend on what was enqueued before them, and hold outputs to what they should be.
    fn enqueue_audits(&mut self, dtype: DType, audits: &[Audit]) -> Result<(), CudaError> {
        let stream = self.handle();
        let kernels = self.communicator.kernels();
        let entry = Entry { set: Set::Local, family: "audit", part: "outputs", packs: None };
        for audit in audits {
            let blocks = audit.packs.div_ceil(u64::from(EAGER_THREADS));
            let launch = kernels.for_elements(dtype, entry, EAGER_THREADS, blocks)?;
            // SAFETY: the entry point takes these parameters, which are memory of whole packs; its owner settles before
            // it is freed.
            unsafe { kernels.launch(launch, audit, stream)? };
        }
        Ok(())
    }

    /// Runs `steps` and `audits`, `times` times, in graphs.
    fn run_audited(
        &mut self,
        steps: &[Step],
        dtype: DType,
        audits: &[Audit],
        times: u64,
    ) -> Result<(), Error> {
        // Whatever is set up at first use is so before the capture.
        self.run(steps)?;
        self.enqueue_audits(dtype, audits)?;
        self.settle()?;
        let stream = self.handle();
        let enqueue = || {
            (0..OPERATIONS_PER_TRIAL).try_for_each(|_| {
                self.enqueue_all(steps).map_err(|error| match error {
                    Error::Cuda(error) => error,
                    error => CudaError::Group(error.to_string()),
                })?;
                self.enqueue_audits(dtype, audits)
            })
        };
        // SAFETY: the engine's stream; the graph is dropped, after `settle`, before the tensors.
        let graph = unsafe { Graph::capture(stream, enqueue) }?;
        let captured = self.communicator.captured();
        for launch in 1..=times.div_ceil(u64::from(OPERATIONS_PER_TRIAL)) {
            self.communicator.replay(captured)?;
            // SAFETY: the engine's stream; the tensors that were captured are there.
            unsafe { graph.launch(stream)? };
            if launch.is_multiple_of(GRAPHS_AT_ONCE) {
                self.settle()?;
            }
        }
        self.settle()
    }

    /// Microseconds on the device between the two events.
    fn elapsed(&self) -> Result<f64, Error> {
        let [begin, end] = &self.events;
        let milliseconds = end.elapsed_time_f32(begin).map_err(failed("read the time"))?;
        Ok(f64::from(milliseconds) * 1e3)
    }

    fn record(&self, event: usize) -> Result<(), Error> {
        Ok(self.events[event].record(&self.stream).map_err(failed("record an event"))?)
    }

    fn barrier(&self) -> Result<(), Error> {
        Ok(self.group.barrier().map_err(CudaError::from)?)
    }
}

/// Where the all-reduce of the separate operations leaves its sum.
fn sum(problem: &Problem) -> Tensor {
    if problem.residual { Tensor::Reduced } else { Tensor::ResidualOut }
}

/// Launches an epilogue that needs no collective.
struct LocalPass<'a> {
    kernels: &'a mut Kernels,
    problem: &'a Problem,
    activations: Activations,
    stream: Handle,
}

impl WithEpilogue for LocalPass<'_> {
    fn call<X: Copy>(self, part: Part, epilogue: X) -> Result<(), CudaError> {
        let LocalPass { kernels, problem, activations, stream } = self;
        let shape = shape(0, problem.tokens, problem.tokens, problem.row_bytes())?;
        let entry = Entry { set: Set::Local, family: "local", part: part.local, packs: None };
        let launch = kernels.for_rows(problem.dtype, entry, 1, shape.row_packs, problem.tokens)?;
        let parameters = Local { shape, activations, epilogue };
        // SAFETY: the name and the parameters are of one epilogue; the tensors are the engine's and of the problem's
        // shapes, and live as in `fused`.
        unsafe { kernels.launch(launch, &parameters, stream) }
    }
}

impl Collective for Engine<'_> {
    fn prepare(&mut self, problem: &Problem) -> Result<(), Error> {
        self.problem = None;
        self.graphs.clear();
        self.sets.clear();
        self.set = 0;
        self.flush = None;
        let (tokens, hidden) = (problem.tokens, problem.hidden);
        let needed = problem.total_bytes().unwrap_or(u64::MAX);
        require(&format!("a problem of {tokens} tokens of hidden size {hidden}"), needed)?;
        let copies = if self.cold {
            self.flush = Some(DeviceMemory::new(2 * self.cache_bytes())?);
            collective::copies(problem, self.cache_bytes(), OPERATIONS_PER_TRIAL)
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
                tensors.insert(tensor, GuardedMemory::new(bytes)?);
            }
            self.sets.push(tensors);
        }
        let mut scale = GuardedMemory::new(size_of::<f32>() as u64)?;
        scale.write(0, &problem.scale.to_ne_bytes())?;
        self.scale = Some(scale);
        self.communicator.prepare(&problem.operation(Mode::Auto))?;
        self.communicator.kernels().load(problem.dtype, Set::Local)?;
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
        Ok(())
    }

    fn read(&mut self, tensor: Tensor) -> Result<Vec<u8>, Error> {
        let tensor = self.sets.first().and_then(|tensors| tensors.get(&tensor));
        Ok(tensor.map_or(Ok(Vec::new()), GuardedMemory::read)?)
    }

    fn run(&mut self, steps: &[Step]) -> Result<(), Error> {
        let enqueued = self.enqueue_all(steps);
        // What was enqueued before an error runs to its end all the same.
        let settled = self.settle();
        enqueued.and(settled)
    }

    fn time(&mut self, steps: &[Step], operations: u32) -> Result<f64, Error> {
        let index = self.capture(steps, operations)?;
        self.barrier()?;
        let stream = self.handle();
        let (_, _, graph, captured) = &self.graphs[index];
        // Both ahead of the first: nothing should come between the launches.
        self.communicator.replay(*captured)?;
        self.communicator.replay(*captured)?;
        // SAFETY: the engine's stream; the tensors that were captured are there.
        unsafe { graph.launch(stream)? };
        if let Some(flush) = &self.flush {
            // SAFETY: inside the allocation, which lives as long as this problem.
            let code =
                unsafe { (load()?.cuMemsetD8Async)(flush.address().0, 1, flush.bytes() as usize, stream) };
            check("flush the cache", code)?;
        }
        self.record(0)?;
        // SAFETY: as above.
        unsafe { graph.launch(stream)? };
        self.record(1)?;
        self.settle()?;
        Ok(self.elapsed()? / f64::from(operations))
    }

    fn links<'b>(&'b mut self, group: &'b Group) -> Result<Box<dyn links::Links + 'b>, Error> {
        Ok(Box::new(Links::share(group, &mut self.communicator)?))
    }

    fn copy_time(&mut self, bytes: u64) -> Result<f64, Error> {
        let (from, to) = (DeviceMemory::new(bytes)?, DeviceMemory::new(bytes)?);
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
        let Some(problem) = self.problem else { return Ok(None) };
        let mut expected = Vec::new();
        for &tensor in outputs {
            expected.push(DeviceMemory::holding(&self.read(tensor)?)?);
        }
        let mut words = vec![0; outputs.len() * size_of::<u32>()];
        let found = DeviceMemory::holding(&words)?;
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
        let ran = self.run_audited(steps, problem.dtype, &audits, times);
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
        let mut out = DeviceMemory::new(codes.len() as u64)?;
        // A code that is not written is wrong.
        out.fill_from(0, u32::MAX)?;
        let stream = self.handle();
        let kernels = self.communicator.kernels();
        let entry = Entry { set: Set::Local, family: "encode", part: to.name(), packs: None };
        // The kernels for every element type have these.
        let launch = kernels.for_elements(DType::F32, entry, EAGER_THREADS, u64::from(count / 4))?;
        let parameters = Conversions { out: out.address(), first, count };
        // SAFETY: the entry point takes these parameters; `out` has room for all codes, and lives until `settle`.
        unsafe { kernels.launch(launch, &parameters, stream)? };
        self.settle()?;
        out.read(0, &mut codes)?;
        Ok(Some(codes))
    }

    fn leave(&mut self) -> Result<(), Error> {
        Ok(self.communicator.leave(self.group)?)
    }

    fn all_reduces(&self) -> Vec<AllReduce> {
        let mut all = Vec::new();
        if self.nccl.is_some() {
            all.push(AllReduce { name: "allreduce", ways: vec![("NCCL", Step::NcclAllReduce)] });
        }
        if self.all_reduces.contains(&AllReduceChoice::Custom) {
            all.push(AllReduce::of_both_modes("custom_allreduce"));
        }
        all
    }

    fn set_cold(&mut self, cold: bool) {
        self.cold = cold;
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

    fn notes(&self) -> &[String] {
        &self.notes
    }
}
