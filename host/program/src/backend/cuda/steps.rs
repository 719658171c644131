//! Every [`Step`] as the kernels that it enqueues.

use fused_collective_bench::{launch::EagerStep, table::EagerKernel};
use fused_collective_core::{
    dtype::DType,
    fusion::{Mode, Norm, Operation, Rounding},
    kernels::{Kernel, Module, Set},
    launch::{Activations, Address, Shape},
    quant::Quantization,
};

use fused_collective::cuda::{
    DeviceTensor, TOO_MANY_TOKENS, Tensors, epilogue::Epilogue, kernels::Parameters,
};

use crate::backend::{
    error::Error,
    problem::{Problem, Tensor},
    steps::{Eager, Fused, Rows, Step},
};

use super::{
    engine::{EAGER_THREADS, Engine},
    guarded_memory::GuardedMemory,
};

/// Elements that a thread of an eager step takes at a time.
const EAGER_GROUP: u64 = 4;

impl Engine<'_> {
    /// Enqueues every step once.
    pub(super) fn enqueue_all(&mut self, steps: &[Step]) -> Result<(), Error> {
        self.use_window(steps);
        steps.iter().try_for_each(|&step| self.enqueue(step))
    }

    fn enqueue(&mut self, step: Step) -> Result<(), Error> {
        let problem = self.problem(step)?;
        match step {
            Step::Fused(Fused { sharded: true, .. }) if !problem.sharded => {
                Err(Error::Step { step, why: "the problem has no sharded residual" })
            }
            Step::Fused(call) => self.fused(&problem, call),
            Step::AllReduce(mode) => self.all_reduce(&problem, mode),
            Step::NcclSymmetricAllReduce if self.window.is_none() => {
                Err(Error::Step { step, why: "the problem has no symmetric window" })
            }
            Step::NcclAllReduce | Step::NcclSymmetricAllReduce => self.nccl_all_reduce(&problem, step),
            Step::CombineExperts => self.combine_experts(&problem, step),
            Step::PostNorm => self.post_norm(&problem, step),
            Step::AfterAllReduce => {
                self.after_sum(&problem, problem.pattern.post_norm(), problem.quantization)
            }
            Step::AddRmsNorm => self.after_sum(&problem, None, Quantization::None),
            Step::AddRmsNormQuantize => self.after_sum(&problem, None, problem.quantization),
            Step::Quantize => self.quantize(&problem),
            Step::Eager(eager) => self.eager(&problem, eager),
        }
    }

    fn fused(&mut self, problem: &Problem, call: Fused) -> Result<(), Error> {
        let operation = call.operation(problem);
        let Rows { first, count } = call.rows_of(problem);
        let (place, ranks) = (self.communicator.place(), self.communicator.limits().ranks_per_host());
        // With a sharded residual these are this rank's own rows. The tensors have room for every rank's.
        let first_own = if call.sharded { first / u64::from(ranks) } else { first };
        let own = operation.residual_rows(place, ranks);
        let row_bytes = problem.row_bytes();
        let part = |tensor: DeviceTensor, first: u64, rows: u64, row_bytes: u64, row: u64| DeviceTensor {
            address: tensor.address + first * row_bytes,
            length: rows * row,
            ..tensor
        };
        let rows = |tensor| part(tensor, first, count, row_bytes, problem.hidden);
        let own_rows = |tensor| part(tensor, first_own, own, row_bytes, problem.hidden);
        let row_codes = problem.quantization.value_bytes_per_row(problem.hidden);
        let mut tensors = self.operands(problem, true, problem.quantization, call.sum(problem));
        tensors.post_gamma = operation.post_norm.map(|_| self.tensor(Tensor::PostGamma, problem.dtype));
        if let Some(experts) = operation.experts {
            let of = u64::from(experts.top_k);
            let chosen = |tensor| part(tensor, first, count, of * 4, of);
            self.add_experts(problem, &mut tensors);
            tensors.expert_index = tensors.expert_index.map(chosen);
            tensors.expert_scales = tensors.expert_scales.map(chosen);
        }
        tensors.input = tensors.input.map(rows);
        tensors.residual = problem.residual.then(|| own_rows(self.tensor(call.residual(), problem.dtype)));
        tensors.residual_out = own_rows(tensors.residual_out);
        tensors.norm_out = tensors.norm_out.map(|_| rows(self.tensor(call.norm(), problem.dtype)));
        tensors.quant_out = tensors.quant_out.map(|codes| part(codes, first, count, row_codes, row_codes));
        let scale_bytes = problem.quantization.scale_bytes(count, problem.hidden).unwrap_or(0);
        tensors.scale_out = tensors.scale_out.map(|scales| DeviceTensor { length: scale_bytes, ..scales });
        let stream = self.handle();
        // SAFETY: the tensors are this engine's and outlive what it enqueues: `settle` comes before they are freed.
        Ok(unsafe { self.communicator.enqueue(&operation, &tensors, stream) }?)
    }

    fn all_reduce(&mut self, problem: &Problem, mode: Mode) -> Result<(), Error> {
        let mut tensors = self.operands(problem, false, Quantization::None, problem.sum());
        tensors.input = Some(self.tensor(problem.addend(), problem.dtype));
        let stream = self.handle();
        // SAFETY: as in `fused`.
        Ok(unsafe { self.communicator.enqueue(&problem.all_reduce(mode), &tensors, stream) }?)
    }

    fn nccl_all_reduce(&mut self, problem: &Problem, step: Step) -> Result<(), Error> {
        let (from, to) = (self.address(problem.addend()), self.address(problem.sum()));
        let (count, stream) = (nccl_elements(problem), self.handle());
        let nccl = self.nccl.as_mut().ok_or(Error::Step { step, why: "NCCL was not loaded" })?;
        // SAFETY: as in `fused`.
        let enqueued = unsafe { nccl.all_reduce(problem.dtype, from, to, count, stream) };
        // The others may have enqueued theirs, and wait in it.
        enqueued.map_err(|error| self.communicator.fail(error).into())
    }

    /// Adds all rows' experts to the operands of an operation.
    fn add_experts(&self, problem: &Problem, tensors: &mut Tensors) {
        tensors.expert_rows = Some(self.tensor(Tensor::ExpertRows, problem.dtype));
        tensors.expert_index = Some(self.tensor(Tensor::ExpertIndex, problem.dtype));
        tensors.expert_scales = Some(self.tensor(Tensor::ExpertScales, DType::F32));
    }

    /// One pass ahead of the all-reduce: makes its addend.
    fn combine_experts(&mut self, problem: &Problem, step: Step) -> Result<(), Error> {
        let why = "the problem has no experts";
        let experts = Some(problem.pattern.experts().ok_or(Error::Step { step, why })?);
        let operation = Operation { experts, ..problem.all_reduce(Mode::Auto) };
        let mut tensors = self.operands(problem, false, Quantization::None, problem.sum());
        self.add_experts(problem, &mut tensors);
        self.local(problem, &operation, &tensors, self.alone(Tensor::Combined))
    }

    /// One pass over the sum: its norm, in place. A thread reads the packs of a row that it will write and no others, and
    /// writes one when it was read for the last time.
    fn post_norm(&mut self, problem: &Problem, step: Step) -> Result<(), Error> {
        let why = "the problem has no norm of the sum";
        let norm = Some(problem.pattern.post_norm().ok_or(Error::Step { step, why })?);
        let operation = Operation { norm, ..problem.all_reduce(Mode::Auto) };
        let mut tensors = self.operands(problem, true, Quantization::None, problem.sum());
        tensors.gamma = Some(self.tensor(Tensor::PostGamma, problem.dtype));
        tensors.norm_out = Some(self.tensor(problem.sum(), problem.dtype));
        self.local(problem, &operation, &tensors, self.alone(problem.sum()))
    }

    /// One pass after the all-reduce, with a norm of the sum or without.
    fn after_sum(
        &mut self,
        problem: &Problem,
        post_norm: Option<Norm>,
        quantization: Quantization,
    ) -> Result<(), Error> {
        let norm = Some(problem.norm);
        let operation = Operation { norm, post_norm, quantization, ..problem.all_reduce(Mode::Auto) };
        let mut tensors = self.operands(problem, true, quantization, Tensor::ResidualOut);
        tensors.post_gamma = post_norm.map(|_| self.tensor(Tensor::PostGamma, problem.dtype));
        let residual = if problem.residual { self.address(Tensor::Residual) } else { Address::NULL };
        // Without a residual the sum is in `ResidualOut` already, and its norm is in place.
        let is_written = problem.residual || post_norm.is_some();
        let residual_out = if is_written { self.address(Tensor::ResidualOut) } else { Address::NULL };
        self.local(problem, &operation, &tensors, [self.address(problem.sum()), residual, residual_out])
    }

    /// One pass over `NormOut`.
    fn quantize(&mut self, problem: &Problem) -> Result<(), Error> {
        let quantization = problem.quantization;
        let operation = Operation { quantization, ..problem.all_reduce(Mode::Auto) };
        let tensors = self.operands(problem, false, quantization, Tensor::ResidualOut);
        self.local(problem, &operation, &tensors, self.alone(Tensor::NormOut))
    }

    /// Where a [pass](Self::local) finds its input, if it has neither a residual nor `residual_out`.
    fn alone(&self, input: Tensor) -> [Address; 3] {
        [self.address(input), Address::NULL, Address::NULL]
    }

    /// One pass without a collective: `operation` on an input, a residual and `residual_out`, of which the last two may be
    /// null. With experts it makes the input, and nothing else.
    fn local(
        &mut self,
        problem: &Problem,
        operation: &Operation,
        tensors: &Tensors,
        [input, residual, residual_out]: [Address; 3],
    ) -> Result<(), Error> {
        // The sum in memory is rounded; the norm of the sum must be rounded too.
        let mut activations = Activations::new(input, residual, residual_out, Rounding::AfterAllReduce);
        activations.flags |= if operation.post_norm.is_some() { Activations::POST_NORM } else { 0 };
        activations.flags |= if operation.experts.is_some() { Activations::EXPERTS } else { 0 };
        activations.flags |= if self.holds_dependents() { Activations::HOLDS_DEPENDENTS } else { 0 };
        let stream = self.handle();
        let kernels = self.communicator.kernels();
        let limits = kernels.limits();
        let shape = shape(problem)?;
        let kernel =
            Kernel::local(operation).ok_or(fused_collective::Error::Unsupported("this quantization"))?;
        let module = Module { dtype: problem.dtype, set: Set::Local };
        let versions = kernels.versions(module, kernel, shape.row_packs)?;
        limits.check_post_norm(operation, versions, shape.row_packs)?;
        let launch = limits.for_rows(versions, 1, shape.row_packs, problem.tokens)?;
        let mut parameters = Parameters::default();
        // SAFETY: the launch structs have no padding, which `core` asserts.
        unsafe {
            parameters.push(&shape);
            parameters.push(&activations);
        }
        let takes_any = launch.takes_any_epilogue();
        parameters.append(Epilogue::of(operation, tensors).parameters(takes_any));
        if takes_any {
            // SAFETY: see above.
            unsafe { parameters.push(&tensors.extras(operation)) };
        }
        // SAFETY: the kernel and the parameters are of one operation; the tensors are the engine's and of the problem's
        // shapes, and live as in `fused`.
        Ok(unsafe { kernels.launch(launch, &parameters, stream) }?)
    }

    fn eager(&mut self, problem: &Problem, eager: Eager) -> Result<(), Error> {
        let at = |tensor| self.address(tensor);
        let scale = self.scale.as_ref().map_or(Address::NULL, GuardedMemory::address);
        let (wide_a, wide_b, per_token) = (at(Tensor::WideA), at(Tensor::WideB), at(Tensor::PerToken));
        let none = Address::NULL;
        let norm = problem.norm;
        // Kernel, first and second operand, result, number.
        let launches: &[(EagerKernel, Address, Address, Address, f32)] = &match eager {
            Eager::AddResidual => vec![
                (EagerKernel::ToF32, at(Tensor::Reduced), none, wide_a, 0.0),
                (EagerKernel::ToF32, at(Tensor::Residual), none, wide_b, 0.0),
                (EagerKernel::Add, wide_a, wide_b, wide_a, 0.0),
                (EagerKernel::Round, wide_a, none, at(Tensor::ResidualOut), 0.0),
            ],
            Eager::WidenResidual => vec![(EagerKernel::ToF32, at(Tensor::ResidualOut), none, wide_a, 0.0)],
            Eager::Square => vec![(EagerKernel::Square, wide_a, none, wide_b, 0.0)],
            Eager::MeanRsqrt => vec![(EagerKernel::MeanRsqrt, wide_b, none, per_token, norm.epsilon)],
            Eager::ScaleRows => vec![(EagerKernel::ScaleRows, wide_a, per_token, wide_a, 0.0)],
            Eager::Weight => {
                vec![(EagerKernel::MulWeight, wide_a, at(Tensor::Gamma), wide_a, norm.weight_bias)]
            }
            Eager::RoundNorm => vec![(EagerKernel::Round, wide_a, none, at(Tensor::NormOut), 0.0)],
            Eager::WidenNorm => vec![(EagerKernel::ToF32, at(Tensor::NormOut), none, wide_a, 0.0)],
            Eager::Rescale => vec![(EagerKernel::MulInverse, wide_a, scale, wide_a, 0.0)],
            Eager::Clamp => vec![(EagerKernel::Clamp, wide_a, none, wide_a, 0.0)],
            Eager::RoundFp8 => vec![(EagerKernel::ToFp8, wide_a, none, at(Tensor::QuantOut), 0.0)],
        };
        let stream = self.handle();
        let groups = problem.hidden.div_ceil(EAGER_GROUP) as u32; // of at most 65,536 elements
        let threads = groups.next_multiple_of(32).min(EAGER_THREADS);
        let Shape { tokens, .. } = shape(problem)?;
        let kernels = &mut self.probes;
        let limits = kernels.limits();
        for &(kernel, a, b, out, value) in launches {
            let function = kernels.function(kernel.entry(problem.dtype))?;
            let launch = limits.for_elements(function, threads, problem.tokens)?;
            let step = EagerStep { a, b, out, tokens, hidden: problem.hidden as u32, value, reserved: 0 };
            // SAFETY: the struct has no padding, which its crate asserts.
            let parameters = unsafe { Parameters::of(&step) };
            // SAFETY: the entry point takes these parameters; the tensors have the shapes that it asks for, and live
            // as in `fused`.
            unsafe { kernels.launch(launch, &parameters, stream)? };
        }
        Ok(())
    }
}

/// Elements of NCCL's all-reduce.
pub(super) fn nccl_elements(problem: &Problem) -> u64 {
    problem.tokens * problem.hidden
}

/// All rows of the problem.
fn shape(problem: &Problem) -> Result<Shape, Error> {
    Ok(Shape::of_rows(problem.tokens, problem.row_bytes()).ok_or(TOO_MANY_TOKENS)?)
}
