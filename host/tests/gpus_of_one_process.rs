//! Ranks that are threads of one process, each with a GPU. Where there are not two GPUs, nothing is tested; a machine that
//! has them runs this file by itself.

use std::{ptr::null_mut, sync::Arc, thread, time::Duration};

use cudarc::driver::{CudaContext, CudaStream, DevicePtr as _, DevicePtrMut as _};
use fused_collective::{
    Error,
    core::{
        dtype::{DType, bf16},
        fusion::{Mode, Norm, Operation, PartialSums, Residual, Rounding},
        plan::Algorithm,
        quant::Quantization,
        wire::WireFormat,
    },
    cuda::{
        Communicator, DeviceTensor, KernelSource, Options, TensorType, Tensors, count, driver, slot_bytes,
    },
    group::{Bootstrap as _, Thread, threads},
};

const RANKS: u32 = 2;
const DEADLINE: Duration = Duration::from_secs(30);
const ELEMENT: TensorType = TensorType::Element(DType::Bf16);

/// Runs `rank` on a thread for each of two ranks; what they return. `None` without two GPUs.
fn on_gpus<T: Send>(rank: impl Fn(&Thread) -> T + Sync) -> Option<Vec<T>> {
    if count().is_ok_and(|gpus| gpus >= RANKS) {
        let rank = &rank;
        Some(thread::scope(|scope| {
            let start = |bootstrap: Thread| scope.spawn(move || rank(&bootstrap));
            let ranks: Vec<_> = threads(RANKS, DEADLINE).into_iter().map(start).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        }))
    } else {
        eprintln!("fewer than {RANKS} GPUs here: not tested");
        None
    }
}

fn operation(tokens: u64, hidden: u64) -> Operation {
    Operation {
        dtype: DType::Bf16,
        tokens,
        hidden,
        residual: Residual::None,
        norm: Some(Norm::default()),
        quantization: Quantization::None,
        keep_norm: false,
        rounding: Rounding::Once,
        bias: false,
        post_norm: None,
        experts: None,
        wire: None,
        partial_sums: PartialSums::F32,
        mode: Mode::Auto,
    }
}

fn options(operation: &Operation, deadline: Duration) -> Options {
    let slot_bytes = slot_bytes(RANKS, operation);
    Options {
        slot_bytes,
        deadline,
        oversubscribe: false,
        check_scales: false,
        kernels: KernelSource::Embedded,
    }
}

/// The context that is current in this thread.
fn current() -> usize {
    let mut context = null_mut();
    // SAFETY: there is room for the answer.
    let code = unsafe { (driver::load().unwrap().cuCtxGetCurrent)(&mut context) };
    driver::check("ask for the current context", code).unwrap();
    context.addr()
}

/// Sums inputs full of `value` on a stream, and holds the norm to ones and the sum to `expected`.
fn reduce(
    communicator: &mut Communicator,
    operation: &Operation,
    stream: &Arc<CudaStream>,
    value: f32,
    expected: f32,
) -> Result<(), Error> {
    let elements = (operation.tokens * operation.hidden) as usize;
    let filled = |value: f32, length| vec![bf16::from_f32(value).to_bits(); length];
    let input = stream.clone_htod(&filled(value, elements)).unwrap();
    let gamma = stream.clone_htod(&filled(1.0, operation.hidden as usize)).unwrap();
    let mut sum = stream.alloc_zeros::<u16>(elements).unwrap();
    let mut norm = stream.alloc_zeros::<u16>(elements).unwrap();
    stream.synchronize().unwrap();
    {
        let tensor =
            |address, length: usize| DeviceTensor { address, length: length as u64, element: ELEMENT };
        let (input, _input) = input.device_ptr(stream);
        let (gamma, _gamma) = gamma.device_ptr(stream);
        let (sum, _sum) = sum.device_ptr_mut(stream);
        let (norm, _norm) = norm.device_ptr_mut(stream);
        let tensors = Tensors {
            input: Some(tensor(input, elements)),
            residual: None,
            bias: None,
            post_gamma: None,
            expert_rows: None,
            expert_index: None,
            expert_scales: None,
            gamma: Some(tensor(gamma, operation.hidden as usize)),
            scale: None,
            residual_out: tensor(sum, elements),
            norm_out: Some(tensor(norm, elements)),
            quant_out: None,
            scale_out: None,
        };
        let handle = stream.cu_stream().cast();
        let before = current();
        // SAFETY: the tensors have these lengths and outlive the wait, those that are written overlap no other, and the
        // stream is of the GPU's primary context.
        unsafe {
            communicator.enqueue(operation, &tensors, handle)?;
            assert_eq!(current(), before, "after an operation was enqueued");
            communicator.synchronize(handle)?;
        }
        assert_eq!(current(), before, "after a wait");
    }
    let all = |memory: &_, value: f32| {
        stream
            .clone_dtoh(memory)
            .unwrap()
            .into_iter()
            .all(|bits: u16| bf16::from_bits(bits).to_f32() == value)
    };
    assert!(all(&sum, expected) && all(&norm, 1.0));
    Ok(())
}

#[test]
fn communicators_take_turns_change_threads_and_leave_the_current_context_as_it_was() {
    on_gpus(|bootstrap| {
        let rank = bootstrap.rank();
        // The other GPU's context is current all along.
        let own = CudaContext::new(rank as usize).unwrap();
        let other = CudaContext::new((1 - rank) as usize).unwrap();
        let (few, many) = (operation(3, 8192), operation(700, 4096));
        other.bind_to_thread().unwrap();
        let before = current();
        let mut first = Communicator::join(bootstrap, rank, &options(&few, DEADLINE)).unwrap();
        let mut second = Communicator::join(bootstrap, rank, &options(&many, DEADLINE)).unwrap();
        assert_eq!(current(), before, "after both were joined");
        let stream = own.default_stream();
        for _ in 0..3 {
            reduce(&mut first, &few, &stream, 1.0 + rank as f32, 3.0).unwrap();
            reduce(&mut second, &many, &stream, 2.0, 4.0).unwrap();
        }
        let moved = thread::scope(|scope| {
            let work = || reduce(&mut first, &few, &stream, 0.5, 1.0);
            scope.spawn(work).join().unwrap()
        });
        moved.unwrap();
        first.leave(bootstrap).unwrap();
        second.leave(bootstrap).unwrap();
        assert!(matches!(reduce(&mut first, &few, &stream, 1.0, 2.0), Err(Error::Left)));
        other.bind_to_thread().unwrap();
        let before = current();
        drop((first, second));
        assert_eq!(current(), before, "after both were dropped");
    });
}

#[test]
fn a_query_tells_what_an_operation_would_take_and_launches_nothing() {
    on_gpus(|bootstrap| {
        let small = operation(64, 4096);
        let mut communicator =
            Communicator::join(bootstrap, bootstrap.rank(), &options(&small, DEADLINE)).unwrap();
        let query = communicator.query(&small).unwrap();
        assert_eq!((query.algorithm, query.rounds), (Algorithm::OneShot, 1));
        assert_eq!(communicator.query(&operation(640, 4096)).unwrap().rounds, 10);
        assert!(matches!(communicator.query(&operation(1, 20)), Err(Error::Plan(_))));
        let fewer_bits = Operation { wire: Some(WireFormat::Int8), ..small };
        assert!(matches!(communicator.query(&fewer_bits), Err(Error::Unsupported(_))));
        bootstrap.barrier().unwrap();
    });
}

#[test]
fn without_a_monitor_a_rank_that_does_not_come_is_named_at_the_deadline() {
    on_gpus(|bootstrap| {
        let rank = bootstrap.rank();
        let context = CudaContext::new(rank as usize).unwrap();
        let few = operation(2, 1024);
        let deadline = Duration::from_millis(500);
        let mut communicator = Communicator::join(bootstrap, rank, &options(&few, deadline)).unwrap();
        if rank == 0 {
            let error = reduce(&mut communicator, &few, &context.default_stream(), 1.0, 2.0).unwrap_err();
            assert_eq!((error.rank(), error.peer()), (Some(0), Some(1)), "{error}");
            let again = reduce(&mut communicator, &few, &context.default_stream(), 1.0, 2.0).unwrap_err();
            assert!(again.is_poisoned(), "{again}");
        }
        bootstrap.barrier().unwrap();
        if rank == 1 {
            // It learns of it at its next call.
            let error = reduce(&mut communicator, &few, &context.default_stream(), 1.0, 2.0).unwrap_err();
            assert_eq!(error.peer(), Some(0), "{error}");
        }
        bootstrap.barrier().unwrap();
    });
}
