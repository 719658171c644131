//! The functions of the ABI.

#![allow(non_camel_case_types, reason = "these are C's names")]

use std::{
    ffi::{c_char, c_void},
    ptr,
    sync::{Mutex, MutexGuard, PoisonError},
};

use fused_collective::{
    group::Aborter,
    raw::{Communicator, Meeting},
};

use crate::{
    arguments::{pointee, read, room, text, write},
    bootstrap::Callbacks,
    failure::{Failure, call},
    types::{
        fc_bootstrap, fc_capture, fc_membership, fc_operation, fc_options, fc_plan, fc_status, fc_tensors,
    },
    values,
};

/// One rank's end of a group. Threads may share it: its calls come one after the other, but for `fc_abort`.
#[derive(Debug)]
pub struct fc_communicator {
    communicator: Mutex<Communicator>,
    /// Beside the lock: a call that waits holds it.
    aborter: Aborter,
}

impl fc_communicator {
    fn lock(&self) -> MutexGuard<'_, Communicator> {
        self.communicator.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Joins a meeting that `meet` makes, and hands the communicator to C.
    fn join(
        options: &fc_options,
        out: &mut *mut fc_communicator,
        meet: impl FnOnce(&fused_collective::raw::Options) -> Result<Meeting, Failure>,
    ) -> Result<(), Failure> {
        *out = ptr::null_mut();
        // SAFETY: the ABI asks for a null or a text in `kernels`.
        let options = unsafe { values::options(options)? };
        let communicator = Communicator::join(meet(&options)?, &options, None)?;
        let aborter = communicator.aborter();
        let communicator = Mutex::new(communicator);
        *out = Box::into_raw(Box::new(fc_communicator { communicator, aborter }));
        Ok(())
    }
}

/// Returns the version of the library, as `0.2.0`.
#[unsafe(no_mangle)]
pub extern "C" fn fc_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// Joins a group of processes of one host, and returns this rank's end in `communicator`, to be freed by `fc_free`. Waits for
/// all ranks, at most `deadline_ms`. A null `membership` stands for the variables of `torchrun`, `mpirun` or `srun`.
///
/// # Safety
/// The pointers are null, or point to structs of the size that these state, and to room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fc_join(
    options: *const fc_options,
    membership: *const fc_membership,
    communicator: *mut *mut fc_communicator,
) -> fc_status {
    call(|| {
        // SAFETY: as this function's caller vouches for.
        let (options, out) = unsafe { (read(options)?, room(communicator, "the communicator")?) };
        fc_communicator::join(&options, out, |options| {
            if membership.is_null() {
                return Ok(Meeting::of_launcher(options)?);
            }
            // SAFETY: as above; the ABI asks for a null or a text in `key`.
            let (membership, key) = unsafe {
                let membership = read(membership)?;
                (membership, text(membership.key, "key")?)
            };
            let key = key.ok_or_else(|| Failure::Argument("key of fc_membership is null".to_owned()))?;
            Ok(Meeting::processes(membership.rank, membership.world_size, key, options)?)
        })
    })
}

/// Joins a group over the caller's own functions, and returns this rank's end in `communicator`, to be freed by `fc_free`.
/// `fc_leave` calls them again. A rank that is lost later is noticed at the deadline only.
///
/// # Safety
/// As `fc_join`; the functions do as `fc_bootstrap` says, with its `context`, until `fc_leave` or `fc_free` has returned.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fc_join_over(
    options: *const fc_options,
    bootstrap: *const fc_bootstrap,
    communicator: *mut *mut fc_communicator,
) -> fc_status {
    call(|| {
        // SAFETY: as this function's caller vouches for.
        let (options, bootstrap, out) =
            unsafe { (read(options)?, read(bootstrap)?, room(communicator, "the communicator")?) };
        fc_communicator::join(&options, out, |_| Ok(Meeting::Own(Box::new(Callbacks::new(&bootstrap)?))))
    })
}

/// Returns in `bytes` the memory that a group of `world_size` ranks with these options shares: on CPUs all ranks together, on
/// GPUs each on its own GPU.
///
/// # Safety
/// As `fc_join`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fc_workspace_bytes(
    options: *const fc_options,
    world_size: u32,
    bytes: *mut u64,
) -> fc_status {
    call(|| {
        // SAFETY: as this function's caller vouches for.
        let (options, bytes) = unsafe { (values::options(&read(options)?)?, room(bytes, "the bytes")?) };
        *bytes = options.workspace_bytes(world_size)?;
        Ok(())
    })
}

/// Plans `operation` without running it: `FC_STATUS_OK` if the group can run it, and in `plan`, whose size the caller has set,
/// the sizes of its outputs. On GPUs it loads the kernels, so that the first call need not.
///
/// # Safety
/// As `fc_join`; `communicator` is null, or was returned by `fc_join` or `fc_join_over` and not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fc_query(
    communicator: *const fc_communicator,
    operation: *const fc_operation,
    plan: *mut fc_plan,
) -> fc_status {
    call(|| {
        // SAFETY: as this function's caller vouches for.
        let (communicator, operation) =
            unsafe { (pointee(communicator, "the communicator")?, values::operation(&read(operation)?)?) };
        let mut communicator = communicator.lock();
        let query = communicator.query(&operation)?;
        let quantization = operation.quantization;
        let answer = fc_plan {
            size: 0,
            residual_rows: communicator.residual_rows(&operation),
            quant_bytes: operation.tokens * quantization.value_bytes_per_row(operation.hidden),
            scale_bytes: quantization.scale_bytes(operation.tokens, operation.hidden).unwrap_or(u64::MAX),
            rounds: query.rounds,
            algorithm: values::algorithm(query.algorithm),
            writes_norm: operation.writes_norm().into(),
        };
        // SAFETY: as this function's caller vouches for.
        unsafe { write(plan, &answer) }
    })
}

/// Enqueues `operation` on `stream`, a `CUstream` or `cudaStream_t` of the rank's device, which may be capturing a graph. On
/// CPUs `stream` is null, and the call returns when this rank's outputs are complete. All ranks make the same calls in the same
/// order.
///
/// # Safety
/// As `fc_query`; the tensors are where and what they are said to be until the operation has ended, nobody else uses what it
/// writes, and `stream` is a stream of the device's primary context.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fc_enqueue(
    communicator: *const fc_communicator,
    operation: *const fc_operation,
    tensors: *const fc_tensors,
    stream: *mut c_void,
) -> fc_status {
    call(|| {
        // SAFETY: as this function's caller vouches for.
        unsafe {
            let communicator = pointee(communicator, "the communicator")?;
            let (operation, tensors) =
                (values::operation(&read(operation)?)?, values::tensors(&read(tensors)?)?);
            Ok(communicator.lock().enqueue(&operation, &tensors, stream)?)
        }
    })
}

/// Waits until everything on `stream` has ended, and checks it as `fc_check` does. The wait ends when a rank is lost.
///
/// # Safety
/// As `fc_query`; `stream` as for `fc_enqueue`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fc_synchronize(
    communicator: *const fc_communicator,
    stream: *mut c_void,
) -> fc_status {
    // SAFETY: as this function's caller vouches for.
    call(|| unsafe { Ok(pointee(communicator, "the communicator")?.lock().synchronize(stream)?) })
}

/// Checks, without a wait, that all operations that have ended did so well and were the same on every rank. Call it when the
/// stream was synchronized, before results are used. After a failure every later call fails: make a new communicator.
///
/// # Safety
/// As `fc_query`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fc_check(communicator: *const fc_communicator) -> fc_status {
    // SAFETY: as this function's caller vouches for.
    call(|| unsafe { Ok(pointee(communicator, "the communicator")?.lock().check()?) })
}

/// Returns in `capture` the operations that were captured since this was last called, to be freed by `fc_capture_free`. Call it
/// when a capture has ended.
///
/// # Safety
/// As `fc_query`, and for room for a pointer as `fc_join`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fc_captured(
    communicator: *const fc_communicator,
    capture: *mut *mut fc_capture,
) -> fc_status {
    call(|| {
        // SAFETY: as this function's caller vouches for.
        let (communicator, out) =
            unsafe { (pointee(communicator, "the communicator")?, room(capture, "the capture")?) };
        *out = Box::into_raw(Box::new(fc_capture(communicator.lock().captured())));
        Ok(())
    })
}

/// Says that a graph with the operations of `capture` is about to be launched, so that the ranks' calls can be compared. Where no
/// rank ever says so, graphs are not compared. If the launch then fails, call `fc_abort`: the other ranks wait for it.
///
/// # Safety
/// As `fc_query`; `capture` is null, or was returned by `fc_captured` and not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fc_replay(
    communicator: *const fc_communicator,
    capture: *const fc_capture,
) -> fc_status {
    call(|| {
        // SAFETY: as this function's caller vouches for.
        let (communicator, capture) =
            unsafe { (pointee(communicator, "the communicator")?, pointee(capture, "the capture")?) };
        Ok(communicator.lock().replay(capture.0)?)
    })
}

/// Frees a capture. A null is none.
///
/// # Safety
/// `capture` is null, or was returned by `fc_captured`, and is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fc_capture_free(capture: *mut fc_capture) -> fc_status {
    call(|| {
        if !capture.is_null() {
            // SAFETY: it is a box's, which the caller gives back.
            drop(unsafe { Box::from_raw(capture) });
        }
        Ok(())
    })
}

/// Ends the group's operations, on all ranks. Any thread may call it, also while another is in a call of this communicator.
///
/// # Safety
/// As `fc_query`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fc_abort(communicator: *const fc_communicator) -> fc_status {
    call(|| {
        // SAFETY: as this function's caller vouches for.
        unsafe { pointee(communicator, "the communicator")? }.aborter.abort();
        Ok(())
    })
}

/// Leaves the group together with all others, when their operations have ended, after which nobody's end is a loss. Every later
/// call but `fc_free` fails. In a group of several hosts the graphs that operations were captured in are destroyed before.
///
/// # Safety
/// As `fc_query`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fc_leave(communicator: *const fc_communicator) -> fc_status {
    // SAFETY: as this function's caller vouches for.
    call(|| unsafe { Ok(pointee(communicator, "the communicator")?.lock().leave()?) })
}

/// Frees a communicator. A null is none. Without `fc_leave` before it, this rank is lost to the others.
///
/// # Safety
/// As `fc_query`, and the communicator is not used again, by any thread. No operation of any rank is under way.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fc_free(communicator: *mut fc_communicator) -> fc_status {
    call(|| {
        if !communicator.is_null() {
            // SAFETY: it is a box's, which the caller gives back.
            drop(unsafe { Box::from_raw(communicator) });
        }
        Ok(())
    })
}

const _: () = {
    const fn is_shared<T: Send + Sync>() {}
    is_shared::<fc_communicator>();
};
