//! The CPU backend: tensors in memory, and every [`Step`] as a vectorized pass.
//!
//! The separate operations use the row loops of the fused one, so a difference in time comes from passes over memory.

pub(crate) mod cache;
pub(crate) mod cores;
mod eager;
mod links;
mod tensors;

use std::{collections::HashMap, marker::PhantomData, mem::replace, time::Instant};

use fused_collective::{
    cpu::{
        Communicator, ExpertRows, Inputs, Operand, Outputs, Plain,
        experts::CombineRow,
        finish::{Finish, FinishRow, PostNormRow, QuantizeRow, RowOutputs},
        rows::elements_mut,
        sum::AddRow,
    },
    group::rendezvous::Group,
};
use fused_collective_bench::digest;
use fused_collective_core::{
    dtype::{DType, bf16, f16},
    fusion::{Experts, Mode, Norm, Rounding},
    norm::Weights,
    plan::Limits,
    quant::Quantization,
};

use crate::backend::{
    collective::{Collective, MAX_OPERATIONS, copies},
    error::Error,
    links::Links,
    problem::{Problem, Tensor},
    steps::{Fused, Rows, Step},
};

use cache::cache_bytes;
use cores::Cores;
use eager::EagerPass;
use links::CpuLinks;
use tensors::{Buffer, Tensors};

/// The experts of rows.
fn experts_of<'a, E: Plain>(
    [rows, index, scales]: [&'a Buffer; 3],
    of: Rows,
    experts: &Experts,
) -> ExpertRows<'a, E> {
    let top_k = u64::from(experts.top_k);
    let chosen = (of.first * top_k) as usize..((of.first + of.count) * top_k) as usize;
    ExpertRows {
        rows: rows.elements(),
        index: &bytemuck::cast_slice(index.bytes())[chosen.clone()],
        scales: Weights::F32(&scales.elements()[chosen]),
    }
}

/// One rank of the CPU backend.
#[derive(Debug)]
pub struct Engine {
    communicator: Communicator,
    problem: Option<Problem>,
    /// The tensors, and the copies on which the operations of a cold trial take turns.
    sets: Vec<Tensors>,
    /// The set in use.
    set: usize,
    cold: bool,
    /// Memory that is written before a cold trial, to replace everything in the cache.
    flush: Vec<u64>,
    /// The saved problems with their tensors, by slot.
    aside: HashMap<usize, (Option<Problem>, Vec<Tensors>)>,
    /// The slot of the current problem.
    slot: usize,
    scratch: Vec<u64>,
    /// The CPUs of the ranks, to which they are pinned while they are timed.
    cores: Cores,
}

impl Engine {
    /// An engine without a problem.
    pub fn new(communicator: Communicator) -> Self {
        Engine {
            communicator,
            problem: None,
            sets: vec![Tensors::default()],
            set: 0,
            cold: false,
            flush: Vec::new(),
            aside: HashMap::new(),
            slot: 0,
            scratch: Vec::new(),
            cores: Cores::default(),
        }
    }

    /// This engine with CPUs for its ranks. Without them nobody is pinned.
    pub(crate) fn on(self, cores: Cores) -> Self {
        Engine { cores, ..self }
    }

    fn step(&mut self, step: Step) -> Result<(), Error> {
        let Some(problem) = self.problem else {
            return Err(Error::Step { step, why: "no problem was prepared" });
        };
        match problem.dtype {
            DType::F32 => self.typed_step::<f32>(&problem, step),
            DType::F16 => self.typed_step::<f16>(&problem, step),
            DType::Bf16 => self.typed_step::<bf16>(&problem, step),
        }
    }

    fn typed_step<E: Plain>(&mut self, problem: &Problem, step: Step) -> Result<(), Error> {
        match step {
            Step::Fused(Fused { sharded: true, .. }) if !problem.sharded => {
                Err(Error::Step { step, why: "the problem has no sharded residual" })
            }
            Step::Fused(call) => self.fused::<E>(problem, call),
            Step::AllReduce(mode) => self.all_reduce::<E>(problem, mode),
            Step::NcclAllReduce | Step::NcclSymmetricAllReduce => {
                Err(Error::Step { step, why: "NCCL needs the cuda backend" })
            }
            Step::CombineExperts => self.combine_experts::<E>(problem, step),
            Step::PostNorm => self.post_norm::<E>(problem, step),
            Step::AfterAllReduce => {
                self.add_rms_norm::<E>(problem, problem.quantization, problem.pattern.post_norm())
            }
            Step::AddRmsNorm => self.add_rms_norm::<E>(problem, Quantization::None, None),
            Step::AddRmsNormQuantize => self.add_rms_norm::<E>(problem, problem.quantization, None),
            Step::Quantize => self.quantize::<E>(problem),
            Step::Eager(eager) => {
                let pass = EagerPass {
                    eager,
                    problem,
                    tensors: &mut self.sets[self.set],
                    element: PhantomData::<E>,
                };
                self.communicator.arch().dispatch(pass);
                Ok(())
            }
        }
    }

    fn fused<E: Plain>(&mut self, problem: &Problem, call: Fused) -> Result<(), Error> {
        let (rank, world_size) = (self.communicator.rank(), self.communicator.world_size());
        let operation = call.operation(problem);
        let Rows { first, count } = call.rows_of(problem);
        let part = |first: u64, rows: u64, row: u64| (first * row) as usize..((first + rows) * row) as usize;
        let rows = part(first, count, problem.hidden);
        // With a sharded residual these are this rank's own rows.
        let first_own = if call.sharded { first / u64::from(world_size) } else { first };
        let own_rows = part(first_own, operation.residual_rows(rank, world_size), problem.hidden);
        let codes = part(first, count, problem.quantization.value_bytes_per_row(problem.hidden));
        let scales = problem.quantization.scale_bytes(count, problem.hidden).unwrap_or(0) as usize;
        let tensors = &mut self.sets[self.set];
        let (residual, residual_out) = match call.sharded {
            true => (&mut tensors.residual_shard, &mut tensors.residual_shard_out),
            false => (&mut tensors.residual, &mut tensors.residual_out),
        };
        let (residual, residual_out) = match (problem.residual, call.in_place) {
            (false, _) => (None, residual_out),
            (true, true) => (Some(Operand::InPlace), residual),
            (true, false) => {
                (Some(Operand::Apart(&residual.elements::<E>()[own_rows.clone()])), residual_out)
            }
        };
        let (input, norm_out) = match call.in_place && operation.writes_norm() {
            true => (Operand::InPlace, &mut tensors.input),
            false => (Operand::Apart(&tensors.input.elements::<E>()[rows.clone()]), &mut tensors.norm_out),
        };
        let gamma = Weights::Element(tensors.gamma.elements::<E>());
        let post_gamma = operation.post_norm.map(|_| Weights::Element(tensors.post_gamma.elements()));
        let experts = [&tensors.expert_rows, &tensors.expert_index, &tensors.expert_scales];
        let experts = operation.experts.map(|of| experts_of(experts, call.rows_of(problem), &of));
        let inputs = Inputs { input, residual, bias: None, post_gamma, experts, gamma, scale: problem.scale };
        let outputs = Outputs {
            residual_out: &mut residual_out.elements_mut()[own_rows],
            norm_out: &mut norm_out.elements_mut()[rows],
            quant_out: &mut tensors.quant_out.bytes_mut()[codes],
            scale_out: &mut tensors.scale_out.bytes_mut()[..scales],
        };
        Ok(self.communicator.all_reduce(&operation, inputs, outputs)?)
    }

    fn all_reduce<E: Plain>(&mut self, problem: &Problem, mode: Mode) -> Result<(), Error> {
        let tensors = &mut self.sets[self.set];
        let sum = if problem.residual { &mut tensors.reduced } else { &mut tensors.residual_out };
        let inputs = Inputs {
            input: Operand::Apart(match problem.addend() {
                Tensor::Combined => tensors.combined.elements(),
                _ => tensors.input.elements(),
            }),
            residual: None,
            bias: None,
            post_gamma: None,
            experts: None,
            gamma: Weights::Element(tensors.gamma.elements::<E>()),
            scale: problem.scale,
        };
        let outputs = Outputs {
            residual_out: sum.elements_mut(),
            norm_out: &mut [],
            quant_out: &mut [],
            scale_out: &mut [],
        };
        Ok(self.communicator.all_reduce(&problem.all_reduce(mode), inputs, outputs)?)
    }

    /// The parameters of the steps after the sum, with this `quantization` in place of the problem's.
    fn finish<'a, E: Plain>(
        gamma: &'a Buffer,
        problem: &Problem,
        quantization: Quantization,
    ) -> Finish<'a, E> {
        Finish {
            norm: problem.norm,
            gamma: Weights::Element(gamma.elements()),
            quantization,
            scale: problem.scale,
            tokens: problem.tokens,
        }
    }

    fn combine_experts<E: Plain>(&mut self, problem: &Problem, step: Step) -> Result<(), Error> {
        let Some(experts) = problem.pattern.experts() else {
            return Err(Error::Step { step, why: "the problem has no experts" });
        };
        let (arch, hidden) = (self.communicator.arch(), problem.hidden as usize);
        let tensors = &mut self.sets[self.set];
        let all = Rows { first: 0, count: problem.tokens };
        let rows = [&tensors.expert_rows, &tensors.expert_index, &tensors.expert_scales];
        let rows = experts_of::<E>(rows, all, &experts);
        let shared = tensors.input.elements::<E>().chunks_exact(hidden);
        let addends = tensors.combined.elements_mut::<E>().chunks_exact_mut(hidden);
        for (token, (out, shared)) in addends.zip(shared).enumerate() {
            let shared = experts.shared.then_some(shared);
            arch.dispatch(CombineRow { experts: rows.of_token(token, &experts), shared, out });
        }
        Ok(())
    }

    fn post_norm<E: Plain>(&mut self, problem: &Problem, step: Step) -> Result<(), Error> {
        let Some(norm) = problem.pattern.post_norm() else {
            return Err(Error::Step { step, why: "the problem has no norm of the sum" });
        };
        let (arch, hidden) = (self.communicator.arch(), problem.hidden as usize);
        let tensors = &mut self.sets[self.set];
        self.scratch.resize(hidden, 0);
        let row: &mut [E] = &mut elements_mut(bytemuck::cast_slice_mut(&mut self.scratch))[..hidden];
        let gamma = Weights::Element(tensors.post_gamma.elements());
        let sum = if problem.residual { &mut tensors.reduced } else { &mut tensors.residual_out };
        for out in sum.elements_mut().chunks_exact_mut(hidden) {
            row.copy_from_slice(out);
            arch.dispatch(PostNormRow { norm, gamma, row, add: None, out });
        }
        Ok(())
    }

    /// With `post_norm` the pass begins with that norm of the sum.
    fn add_rms_norm<E: Plain>(
        &mut self,
        problem: &Problem,
        quantization: Quantization,
        post_norm: Option<Norm>,
    ) -> Result<(), Error> {
        let arch = self.communicator.arch();
        let hidden = problem.hidden as usize;
        let tensors = &mut self.sets[self.set];
        let finish = Self::finish::<E>(&tensors.gamma, problem, quantization);
        let row_bytes = quantization.value_bytes_per_row(problem.hidden) as usize;
        self.scratch.resize(problem.hidden as usize, 0);
        let scratch = &mut elements_mut(bytemuck::cast_slice_mut(&mut self.scratch))[..hidden];
        for token in 0..problem.tokens {
            let first = token as usize * hidden;
            let row = &mut tensors.residual_out.elements_mut::<E>()[first..first + hidden];
            if let Some(norm) = post_norm {
                if problem.residual {
                    scratch.copy_from_slice(&tensors.reduced.elements()[first..first + hidden]);
                    row.copy_from_slice(&tensors.residual.elements()[first..first + hidden]);
                } else {
                    scratch.copy_from_slice(row);
                }
                let gamma = Weights::Element(tensors.post_gamma.elements());
                let add = problem.residual.then_some(Rounding::AfterAllReduce);
                arch.dispatch(PostNormRow { norm, gamma, row: scratch, add, out: row });
            } else if problem.residual {
                let sum = &tensors.reduced.elements()[first..first + hidden];
                let residual = &tensors.residual.elements()[first..first + hidden];
                arch.dispatch(AddRow { row: sum, addend: residual, out: row });
            }
            let values = token as usize * row_bytes;
            let outputs = RowOutputs {
                norm: if quantization == Quantization::None {
                    &mut tensors.norm_out.elements_mut()[first..first + hidden]
                } else {
                    &mut []
                },
                values: &mut tensors.quant_out.bytes_mut()[values..values + row_bytes],
                scales: tensors.scale_out.bytes_mut(),
            };
            arch.dispatch(FinishRow { finish: &finish, row, token, outputs, scratch });
        }
        finish.pad(problem.hidden, tensors.scale_out.bytes_mut());
        Ok(())
    }

    fn quantize<E: Plain>(&mut self, problem: &Problem) -> Result<(), Error> {
        let arch = self.communicator.arch();
        let hidden = problem.hidden as usize;
        let tensors = &mut self.sets[self.set];
        let finish = Self::finish::<E>(&tensors.gamma, problem, problem.quantization);
        let row_bytes = problem.quantization.value_bytes_per_row(problem.hidden) as usize;
        for token in 0..problem.tokens {
            let normed = &tensors.norm_out.elements()[token as usize * hidden..][..hidden];
            let values = &mut tensors.quant_out.bytes_mut()[token as usize * row_bytes..][..row_bytes];
            let scales = tensors.scale_out.bytes_mut();
            arch.dispatch(QuantizeRow { finish: &finish, normed, token, values, scales });
        }
        finish.pad(problem.hidden, tensors.scale_out.bytes_mut());
        Ok(())
    }
}

impl Collective for Engine {
    fn prepare(&mut self, problem: &Problem) -> Result<(), Error> {
        // Memory lies near the CPU that touches it first.
        let _pinned = self.cores.pin();
        self.problem = None;
        self.sets.clear();
        self.flush = vec![0; if self.cold { 2 * self.cache_bytes() as usize / 8 } else { 0 }];
        for _ in 0..sets(problem, self.cold) {
            let mut tensors = Tensors::default();
            for tensor in Tensor::ALL {
                let bytes = problem.bytes(tensor).ok_or_else(|| {
                    Error::Memory(format!(
                        "{tensor:?} of {} tokens has more bytes than 64 bits count",
                        problem.tokens
                    ))
                })?;
                *tensors.get_mut(tensor) = Buffer::new(bytes)?;
            }
            self.sets.push(tensors);
        }
        self.set = 0;
        self.problem = Some(*problem);
        Ok(())
    }

    fn select(&mut self, slot: usize) -> Result<(), Error> {
        if slot != self.slot {
            let (problem, sets) =
                self.aside.remove(&slot).unwrap_or_else(|| (None, vec![Tensors::default()]));
            let aside = (replace(&mut self.problem, problem), replace(&mut self.sets, sets));
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
        for tensors in &mut self.sets {
            let buffer = tensors.get_mut(tensor).bytes_mut();
            let length = buffer.len();
            let range = usize::try_from(offset)
                .ok()
                .and_then(|start| buffer.get_mut(start..start.checked_add(bytes.len())?));
            let Some(range) = range else {
                let what =
                    format!("{} bytes at {offset} do not fit {tensor:?} of {length} bytes", bytes.len());
                return Err(Error::Memory(what));
            };
            range.copy_from_slice(bytes);
        }
        Ok(())
    }

    fn fill(&mut self, tensor: Tensor, byte: u8) -> Result<(), Error> {
        self.sets.iter_mut().for_each(|tensors| tensors.get_mut(tensor).bytes_mut().fill(byte));
        Ok(())
    }

    fn digest(&mut self, tensor: Tensor) -> Result<u64, Error> {
        Ok(self.sets.first_mut().map_or(0, |tensors| digest::of(0, tensors.get_mut(tensor).bytes())))
    }

    fn read(&mut self, tensor: Tensor) -> Result<Vec<u8>, Error> {
        Ok(self.sets.first_mut().map_or_else(Vec::new, |tensors| tensors.get_mut(tensor).bytes().to_vec()))
    }

    fn run(&mut self, steps: &[Step]) -> Result<(), Error> {
        steps.iter().try_for_each(|&step| self.step(step))
    }

    fn time(&mut self, steps: &[Step], operations: u32) -> Result<f64, Error> {
        let _pinned = self.cores.pin();
        if self.cold {
            // The compiler must not know the number, so that the memory is really written.
            let number = std::hint::black_box(operations).into();
            self.flush.fill(number);
            std::hint::black_box(&mut self.flush);
        }
        self.communicator.barrier()?;
        let began = Instant::now();
        for _ in 0..operations {
            self.run(steps)?;
            self.set = (self.set + 1) % self.sets.len();
        }
        let time = began.elapsed().as_secs_f64() * 1e6 / f64::from(operations);
        self.set = 0;
        Ok(time)
    }

    fn runs_on_each(&self, operations: u32) -> u32 {
        operations.div_ceil(self.sets.len() as u32)
    }

    fn set_cold(&mut self, cold: bool) {
        self.cold = cold;
    }

    fn limits(&self) -> &Limits {
        self.communicator.limits()
    }

    fn cache_bytes(&self) -> u64 {
        cache_bytes()
    }

    fn find_stray_write(&mut self, _thorough: bool) -> Result<Option<String>, Error> {
        for tensors in &mut self.sets {
            for tensor in Tensor::ALL {
                if let Some(at) = tensors.get_mut(tensor).stray_write() {
                    return Ok(Some(format!("{tensor:?}: {at}")));
                }
            }
        }
        // The workspace is small enough to be read whole each time.
        Ok(self.communicator.find_stray_write())
    }

    fn links<'b>(&'b mut self, group: &'b Group) -> Result<Box<dyn Links + 'b>, Error> {
        Ok(Box::new(CpuLinks::share(group, &mut self.communicator, self.cores.pin())?))
    }

    fn cpus(&self) -> Vec<String> {
        self.cores.of_ranks().to_vec()
    }

    fn notes(&self) -> &[String] {
        self.cores.notes()
    }

    fn copy_time(&mut self, bytes: u64) -> Result<f64, Error> {
        let _pinned = self.cores.pin();
        let (from, mut to) = (Buffer::new(bytes)?, Buffer::new(bytes)?);
        let mut times = Vec::new();
        for _ in 0..COPIES {
            self.communicator.barrier()?;
            let began = Instant::now();
            to.bytes_mut().copy_from_slice(std::hint::black_box(from.bytes()));
            std::hint::black_box(to.bytes());
            times.push(began.elapsed().as_secs_f64() * 1e6);
        }
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }
}

/// The number of sets of tensors on which operations take turns.
pub(crate) fn sets(problem: &Problem, cold: bool) -> u32 {
    if cold { copies(problem, cache_bytes(), MAX_OPERATIONS) } else { 1 }
}

/// Copies whose median time is [`Engine::copy_time`](Collective::copy_time).
const COPIES: usize = 9;
