//! The functions, called as C calls them.

use std::{
    ffi::{CStr, CString, c_int, c_void},
    ptr,
    sync::{Arc, Barrier, Mutex},
    thread,
    time::{Duration, Instant},
};

use fused_collective_capi::{communicator::*, fc_error_peer, fc_error_rank, fc_error_text, types::*};

const HIDDEN: usize = 64;
const TENSOR: fc_tensor = fc_tensor { data: ptr::null_mut(), length: 0, r#type: 0, reserved: 0 };
const OPERATION: fc_operation = fc_operation {
    size: size_of::<fc_operation>() as u64,
    tokens: 1,
    hidden: HIDDEN as u64,
    dtype: fc_type::F32 as u32,
    residual: 0,
    norm: 0,
    gamma: 0,
    epsilon: 0.0,
    weight_bias: 0.0,
    quantization: 0,
    scale_layout: 0,
    group: 0,
    group_scale: 0,
    keep_norm: 0,
    rounding: 0,
    mode: 0,
    bias: 0,
    post_norm: 0,
    post_gamma: 0,
    post_epsilon: 0.0,
    post_weight_bias: 0.0,
    top_k: 0,
    expert_scales: 0,
    shared_expert: 0,
    wire: 0,
    partial_sums: 0,
    reserved: 0,
};

fn options(deadline: Duration) -> fc_options {
    fc_options {
        size: size_of::<fc_options>() as u64,
        backend: fc_backend::Cpu as u32,
        device: 0,
        max_row_bytes: 4096,
        max_tokens: 16,
        deadline_ms: deadline.as_millis() as u64,
        oversubscribe: 0,
        check_scales: 0,
        kernels: ptr::null(),
    }
}

fn text() -> String {
    // SAFETY: the text is this thread's, and is copied before the next call.
    unsafe { CStr::from_ptr(fc_error_text()) }.to_str().expect("UTF-8").to_owned()
}

/// A communicator that threads of a test share.
#[derive(Clone, Copy)]
struct Handle(*mut fc_communicator);
// SAFETY: the ABI lets threads share a communicator.
unsafe impl Send for Handle {}

impl Handle {
    /// Joins rank `rank` of two, under `key`.
    fn join(rank: u32, key: &str, deadline: Duration) -> Handle {
        let key = CString::new(format!("capi {key} {}", std::process::id())).expect("a text");
        let membership =
            fc_membership { size: size_of::<fc_membership>() as u64, rank, world_size: 2, key: key.as_ptr() };
        let mut communicator = ptr::null_mut();
        // SAFETY: structs and room are there.
        let status = unsafe { fc_join(&options(deadline), &membership, &mut communicator) };
        assert_eq!(status, fc_status::Ok, "{}", text());
        Handle(communicator)
    }

    /// Adds up ones of this rank and of the others. The sum, if it succeeded.
    fn all_reduce(self, operation: &fc_operation) -> Result<f32, fc_status> {
        let elements = operation.tokens as usize * HIDDEN;
        let (mut input, mut sum) = (vec![1.0f32; elements], vec![0.0f32; elements]);
        let tensor = |data: &mut Vec<f32>| fc_tensor {
            data: data.as_mut_ptr().cast(),
            length: data.len() as u64,
            r#type: fc_type::F32 as u32,
            reserved: 0,
        };
        let tensors = tensors(tensor(&mut input), tensor(&mut sum));
        // SAFETY: the tensors are there.
        match unsafe { fc_enqueue(self.0, operation, &tensors, ptr::null_mut()) } {
            fc_status::Ok => Ok(sum[elements - 1]),
            status => Err(status),
        }
    }

    fn leave(self) {
        // SAFETY: the communicator is not used after.
        let statuses = unsafe { [fc_leave(self.0), fc_free(self.0)] };
        assert_eq!(statuses, [fc_status::Ok; 2], "{}", text());
    }
}

fn tensors(input: fc_tensor, residual_out: fc_tensor) -> fc_tensors {
    fc_tensors {
        size: size_of::<fc_tensors>() as u64,
        input,
        residual: TENSOR,
        bias: TENSOR,
        gamma: TENSOR,
        scale: TENSOR,
        residual_out,
        norm_out: TENSOR,
        quant_out: TENSOR,
        scale_out: TENSOR,
        post_gamma: TENSOR,
        expert_rows: TENSOR,
        expert_index: TENSOR,
        expert_scales: TENSOR,
    }
}

/// Runs both ranks of a group, each in a thread.
fn ranks<T: Send>(rank: impl Fn(u32) -> T + Sync) -> [T; 2] {
    thread::scope(|scope| {
        [0, 1]
            .map(|number| {
                scope.spawn({
                    let rank = &rank;
                    move || rank(number)
                })
            })
            .map(|it| it.join().expect("no panic"))
    })
}

#[test]
fn bad_arguments_are_errors_that_name_the_value_and_what_is_valid() {
    let mut out = ptr::null_mut();
    let deadline = Duration::from_secs(5);
    let mut invalid = |options: *const fc_options, membership: *const fc_membership| {
        // SAFETY: pointers are null or to structs of the size that they state.
        let status = unsafe { fc_join(options, membership, &mut out) };
        assert_eq!((status, out.is_null()), (fc_status::Invalid, true));
        text()
    };
    let none = ptr::null();
    assert_eq!(invalid(ptr::null(), none), "the pointer to fc_options is null");
    let no_backend = fc_options { backend: 9, ..options(deadline) };
    assert_eq!(invalid(&no_backend, none), "backend is 9, which is not valid: use 1 (Cpu), 2 (Cuda)");
    let no_size = fc_options { size: 0, ..options(deadline) };
    assert!(invalid(&no_size, none).contains("states a size of 0 bytes"), "{}", text());
    let device = fc_options { backend: 2, device: -2, ..options(deadline) };
    assert!(invalid(&device, none).contains("device -2 is not valid"), "{}", text());
    let no_key = fc_membership { size: 24, rank: 0, world_size: 2, key: ptr::null() };
    assert_eq!(invalid(&options(deadline), &no_key), "key of fc_membership is null");
    let no_time = fc_options { deadline_ms: 0, ..options(deadline) };
    assert!(invalid(&no_time, none).contains("deadline_ms is 0"), "{}", text());
    // SAFETY: as above; a null is no communicator.
    unsafe {
        assert_eq!(fc_join(&options(deadline), none, ptr::null_mut()), fc_status::Invalid);
        assert_eq!(fc_check(ptr::null()), fc_status::Invalid);
        assert_eq!(text(), "the pointer to the communicator is null");
        assert_eq!(
            (fc_free(ptr::null_mut()), fc_capture_free(ptr::null_mut())),
            (fc_status::Ok, fc_status::Ok)
        );
    }
}

#[test]
fn an_operation_that_cannot_be_is_refused_on_one_rank_and_the_group_goes_on() {
    let results = ranks(|rank| {
        let communicator = Handle::join(rank, "operations", Duration::from_secs(20));
        if rank == 0 {
            for (operation, expected) in [
                (
                    fc_operation { quantization: 7, ..OPERATION },
                    "quantization is 7, which is not valid: use 0 (None), 1",
                ),
                (fc_operation { hidden: 60, ..OPERATION }, "hidden size 60"),
                (fc_operation { quantization: 1, ..OPERATION }, "a quantization needs a norm"),
                (fc_operation { bias: 2, ..OPERATION }, "bias is 2, which is not valid: use 0 (no), 1 (yes)"),
                (fc_operation { post_norm: 1, ..OPERATION }, "a post-norm needs a norm after it"),
                (
                    fc_operation { top_k: 65, ..OPERATION },
                    "65 experts for each token are not supported: use 1",
                ),
                (
                    fc_operation { top_k: 1, expert_scales: fc_type::F16 as u32, ..OPERATION },
                    "expert_scales is float16, which is not valid: use float32",
                ),
                (
                    fc_operation { partial_sums: 2, ..OPERATION },
                    "partial_sums is 2, which is not valid: use 0 (F32), 1 (Element)",
                ),
                (
                    fc_operation { wire: 3, ..OPERATION },
                    "wire is 3, which is not valid: use 0 (Exact), 1 (Int8), 2 (Int4)",
                ),
                (fc_operation { tokens: 2, hidden: 32, ..OPERATION }, ""),
            ] {
                let expected_status = if expected.is_empty() { Ok(()) } else { Err(fc_status::Invalid) };
                let mut plan = fc_plan {
                    size: size_of::<fc_plan>() as u64,
                    residual_rows: 0,
                    quant_bytes: 0,
                    scale_bytes: 0,
                    rounds: 0,
                    algorithm: 0,
                    writes_norm: 0,
                };
                // SAFETY: communicator, struct and room are there.
                let status = match unsafe { fc_query(communicator.0, &operation, &mut plan) } {
                    fc_status::Ok => Ok(()),
                    status => Err(status),
                };
                assert_eq!(status, expected_status, "{expected}");
                assert!(text().contains(expected), "{}", text());
                if status.is_ok() {
                    assert_eq!((plan.residual_rows, plan.rounds, plan.algorithm), (2, 1, 1));
                }
            }
            // SAFETY: as above; the tensors are none.
            let status =
                unsafe { fc_enqueue(communicator.0, &OPERATION, &tensors(TENSOR, TENSOR), ptr::null_mut()) };
            assert_eq!(
                (status, text().as_str()),
                (fc_status::Invalid, "residual_out is missing: every operation has one")
            );
        }
        let sum = communicator.all_reduce(&OPERATION);
        communicator.leave();
        sum
    });
    assert_eq!(results, [Ok(2.0); 2]);
}

#[test]
fn structs_of_other_versions_are_read_as_far_as_they_go() {
    #[repr(C)]
    struct Later {
        now: fc_operation,
        added: u64,
    }
    let results = ranks(|rank| {
        let communicator = Handle::join(rank, "versions", Duration::from_secs(20));
        let now = fc_operation { size: size_of::<Later>() as u64, ..OPERATION };
        let mut later = Later { now, added: 0 };
        let accepted = communicator.all_reduce(&later.now);
        later.added = 1;
        // On one rank: it is refused before anything is sent.
        if rank == 1 {
            // SAFETY: the struct has the size that it states.
            let status = unsafe {
                fc_enqueue(
                    communicator.0,
                    ptr::from_ref(&later).cast(),
                    &tensors(TENSOR, TENSOR),
                    ptr::null_mut(),
                )
            };
            assert_eq!(status, fc_status::Invalid);
            assert!(text().contains("fc_operation has something at byte 120 of its 128"), "{}", text());
        }
        communicator.leave();
        accepted
    });
    assert_eq!(results, [Ok(2.0); 2]);
}

#[test]
fn experts_and_a_post_norm_are_what_their_fields_say() {
    let results = ranks(|rank| {
        let communicator = Handle::join(rank, "experts", Duration::from_secs(20));
        let of = |data: *mut c_void, length: usize, r#type: fc_type| fc_tensor {
            data,
            length: length as u64,
            r#type: r#type as u32,
            reserved: 0,
        };
        let floats = |data: &mut [f32]| of(data.as_mut_ptr().cast(), data.len(), fc_type::F32);
        let (mut rows, mut shared) = ([2.0f32; 2 * HIDDEN], [1.0f32; HIDDEN]);
        rows[HIDDEN..].fill(5.0);
        let (mut index, mut scales) = ([1i32, -1], [3.0f32, 100.0]);
        let (mut residual, mut sum, mut norm) = ([10.0f32; HIDDEN], [0.0f32; HIDDEN], [0.0f32; HIDDEN]);
        let (mut gamma, mut post_gamma) = ([1.0f32; HIDDEN], [2.0f32; HIDDEN]);
        let tensors = fc_tensors {
            residual: floats(&mut residual),
            gamma: floats(&mut gamma),
            norm_out: floats(&mut norm),
            post_gamma: floats(&mut post_gamma),
            expert_rows: floats(&mut rows),
            expert_index: of(index.as_mut_ptr().cast(), 2, fc_type::I32),
            expert_scales: floats(&mut scales),
            ..tensors(floats(&mut shared), floats(&mut sum))
        };
        let experts = fc_operation {
            residual: fc_residual::Replicated as u32,
            norm: fc_norm::Rms as u32,
            top_k: 2,
            shared_expert: 1,
            ..OPERATION
        };
        let post_norm = fc_operation { post_norm: fc_norm::Rms as u32, post_weight_bias: 1.0, ..experts };
        let mut sums = [0.0; 2];
        for (operation, result) in [experts, post_norm].into_iter().zip(&mut sums) {
            let tensors = match operation.post_norm {
                0 => fc_tensors { post_gamma: TENSOR, ..tensors },
                _ => tensors,
            };
            // SAFETY: the tensors are there.
            let status = unsafe { fc_enqueue(communicator.0, &operation, &tensors, ptr::null_mut()) };
            assert_eq!(status, fc_status::Ok, "{}", text());
            // SAFETY: the operation has ended, and nothing else uses the sum.
            *result = unsafe { tensors.residual_out.data.cast::<f32>().read() };
        }
        communicator.leave();
        sums
    });
    // Each rank adds 3 * 5 + 1; a row of 32 is normalized to ones, and weighs 1 + 2.
    assert_eq!(results[0], results[1]);
    assert_eq!(results[0][0], 42.0);
    assert!((results[0][1] - 13.0).abs() < 1e-5, "{}", results[0][1]);
}

#[test]
fn a_wire_format_is_what_its_field_says() {
    let results = ranks(|rank| {
        let communicator = Handle::join(rank, "wire", Duration::from_secs(20));
        let (mut input, mut sum) = ([0.3f32; HIDDEN], [0.0f32; HIDDEN]);
        // The step of 4 bits is 1 then, and that of 8 bits 1/16.
        input[0] = 8.0;
        let of = |data: &mut [f32]| fc_tensor {
            data: data.as_mut_ptr().cast(),
            length: HIDDEN as u64,
            r#type: fc_type::F32 as u32,
            reserved: 0,
        };
        let tensors = tensors(of(&mut input), of(&mut sum));
        let sums = [fc_wire::Exact, fc_wire::Int8, fc_wire::Int4].map(|wire| {
            let operation = fc_operation { wire: wire as u32, mode: fc_mode::OneShot as u32, ..OPERATION };
            // SAFETY: the tensors are there.
            let status = unsafe { fc_enqueue(communicator.0, &operation, &tensors, ptr::null_mut()) };
            assert_eq!(status, fc_status::Ok, "{}", text());
            // SAFETY: the operation has ended, and nothing else uses the sum.
            unsafe { tensors.residual_out.data.cast::<[f32; 2]>().read() }
        });
        communicator.leave();
        sums
    });
    assert_eq!(results, [[[16.0, 0.6], [16.0, 0.625], [16.0, 0.0]]; 2]);
}

/// An all-gather between two threads.
struct Exchange {
    together: Barrier,
    bytes: Mutex<[Vec<u8>; 2]>,
}

struct Context {
    rank: usize,
    exchange: Arc<Exchange>,
    calls: usize,
}

/// # Safety
/// As `fc_bootstrap` says, with a `Context`.
unsafe extern "C" fn all_gather(
    context: *mut c_void,
    bytes: *const c_void,
    length: u64,
    gathered: *mut c_void,
) -> c_int {
    // SAFETY: the context is this thread's, and as many bytes are there.
    let (context, bytes) = unsafe {
        (&mut *context.cast::<Context>(), std::slice::from_raw_parts(bytes.cast::<u8>(), length as usize))
    };
    context.calls += 1;
    context.exchange.bytes.lock().expect("no panic")[context.rank] = bytes.to_vec();
    context.exchange.together.wait();
    let all = context.exchange.bytes.lock().expect("no panic").concat();
    context.exchange.together.wait();
    // SAFETY: there is room for the bytes of both.
    unsafe { ptr::copy_nonoverlapping(all.as_ptr(), gathered.cast(), all.len()) };
    0
}

/// # Safety
/// None is needed.
unsafe extern "C" fn fails(_: *mut c_void, _: *const c_void, _: u64, _: *mut c_void) -> c_int {
    17
}

#[test]
fn ranks_meet_over_the_caller_s_own_functions() {
    let exchange = Arc::new(Exchange { together: Barrier::new(2), bytes: Mutex::default() });
    let results = ranks(|rank| {
        let mut context = Context { rank: rank as usize, exchange: Arc::clone(&exchange), calls: 0 };
        let bootstrap = fc_bootstrap {
            size: size_of::<fc_bootstrap>() as u64,
            rank,
            world_size: 2,
            context: (&raw mut context).cast(),
            all_gather: Some(all_gather),
            barrier: None,
        };
        let mut communicator = ptr::null_mut();
        // SAFETY: structs and room are there, and the context outlives the communicator.
        let status =
            unsafe { fc_join_over(&options(Duration::from_secs(20)), &bootstrap, &mut communicator) };
        assert_eq!(status, fc_status::Ok, "{}", text());
        let sum = Handle(communicator).all_reduce(&OPERATION);
        Handle(communicator).leave();
        (sum, context.calls > 2)
    });
    assert_eq!(results, [(Ok(2.0), true); 2]);
}

#[test]
fn a_function_of_the_caller_s_that_fails_is_named_with_its_number() {
    let bootstrap = fc_bootstrap {
        size: size_of::<fc_bootstrap>() as u64,
        rank: 0,
        world_size: 2,
        context: ptr::null_mut(),
        all_gather: Some(fails),
        barrier: None,
    };
    let mut communicator = ptr::null_mut();
    let missing = fc_bootstrap { all_gather: None, ..bootstrap };
    // SAFETY: structs and room are there.
    unsafe {
        let status = fc_join_over(&options(Duration::from_secs(20)), &bootstrap, &mut communicator);
        assert_eq!(
            (status, text().as_str()),
            (fc_status::Bootstrap, "the bootstrap's all_gather returned 17")
        );
        let status = fc_join_over(&options(Duration::from_secs(20)), &missing, &mut communicator);
        assert_eq!((status, text().as_str()), (fc_status::Invalid, "all_gather of fc_bootstrap is null"));
    }
}

#[test]
fn a_rank_that_does_not_call_is_named_at_the_deadline_and_every_later_call_fails() {
    let deadline = Duration::from_millis(400);
    ranks(|rank| {
        let communicator = Handle::join(rank, "late", deadline);
        if rank == 0 {
            assert_eq!(communicator.all_reduce(&OPERATION), Err(fc_status::TimedOut));
            assert_eq!((fc_error_rank(), fc_error_peer()), (0, 1));
            // SAFETY: the communicator is there.
            assert_eq!(unsafe { fc_check(communicator.0) }, fc_status::TimedOut);
            assert!(text().starts_with("an earlier operation failed: "), "{}", text());
        } else {
            thread::sleep(deadline * 2);
        }
        // SAFETY: the communicator is not used after.
        assert_eq!(unsafe { fc_free(communicator.0) }, fc_status::Ok);
    });
}

#[test]
fn another_thread_ends_a_wait_on_all_ranks() {
    let (began, ended) = (Instant::now(), Barrier::new(2));
    let results = ranks(|rank| {
        let communicator = Handle::join(rank, "abort", Duration::from_secs(60));
        let result = if rank == 0 {
            let waiting = thread::spawn(move || {
                let communicator = communicator;
                communicator.all_reduce(&OPERATION)
            });
            thread::sleep(Duration::from_millis(100));
            // SAFETY: the communicator is there, and may be aborted during a call.
            assert_eq!(unsafe { fc_abort(communicator.0) }, fc_status::Ok);
            let result = waiting.join().expect("no panic");
            ended.wait();
            result
        } else {
            // Of what rank 0 has given up, this rank completes no more than it was sent.
            ended.wait();
            communicator.all_reduce(&OPERATION).and(communicator.all_reduce(&OPERATION))
        };
        // SAFETY: the communicator is not used after.
        unsafe { fc_free(communicator.0) };
        result
    });
    assert_eq!(results, [Err(fc_status::Aborted), Err(fc_status::Lost)]);
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
}

#[test]
fn ranks_that_call_different_things_both_fail() {
    let results = ranks(|rank| {
        let communicator = Handle::join(rank, "mismatch", Duration::from_secs(20));
        let result = communicator.all_reduce(&fc_operation { tokens: u64::from(rank) + 1, ..OPERATION });
        // SAFETY: the communicator is not used after.
        unsafe { fc_free(communicator.0) };
        result
    });
    assert_eq!(results, [Err(fc_status::Mismatch); 2]);
}
