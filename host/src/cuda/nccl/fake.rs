//! NCCL as functions of this process, for tests: what it answers is set by the test, and what it was asked is kept.
//!
//! A [`Fake`] is named by its communicator's id, so tests do not share one.

use std::{
    ffi::{c_char, c_int, c_void},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use nccl_sys::{
    Functions, Nccl, cudaStream_t, ncclComm_t, ncclConfig_t, ncclDataType_t, ncclInProgress, ncclRedOp_t,
    ncclResult_t, ncclSuccess, ncclUniqueId,
};

use super::library::{Library, UniqueId};

/// A communicator's answers, and what was asked of it.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// The next answers to the question how it goes are "in progress".
    pub(crate) in_progress: AtomicU32,
    /// The answer after these.
    pub(crate) async_error: AtomicU32,
    /// The answer to who joins.
    pub(crate) init_result: AtomicU32,
    /// Ranks, rank, and whether it blocks, of each who joined.
    pub(crate) seats: Mutex<Vec<(c_int, c_int, bool)>>,
    /// From, to, and bytes of each all-gather.
    pub(crate) gathers: Mutex<Vec<(usize, usize, usize)>>,
    pub(crate) aborted: AtomicU32,
    pub(crate) destroyed: AtomicU32,
}

/// A communicator that is not there. It is never freed: threads may be left behind with it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fake(&'static State);

impl std::ops::Deref for Fake {
    type Target = State;

    fn deref(&self) -> &State {
        self.0
    }
}

impl Fake {
    pub(crate) fn new() -> Fake {
        Fake(Box::leak(Box::default()))
    }

    pub(crate) fn nccl(self) -> Arc<Library> {
        Library::of(nccl::<21_900>()).expect("a release that can be used")
    }

    /// The id by which functions find the state.
    pub(crate) fn id(self) -> UniqueId {
        let mut bytes = [0; UniqueId::BYTES];
        bytes[..8].copy_from_slice(&(&raw const *self.0).expose_provenance().to_le_bytes());
        UniqueId::from_bytes(&bytes).expect("as many bytes")
    }
}

/// NCCL of this version.
pub(crate) fn nccl<const VERSION: i32>() -> Nccl {
    Nccl::of(
        Functions {
            ncclGetVersion: version::<VERSION>,
            ncclGetErrorString: describe,
            ncclGetUniqueId: unique_id,
            ncclCommInitRankConfig: init,
            ncclCommGetAsyncError: async_error,
            ncclCommDestroy: destroy,
            ncclCommAbort: abort,
            ncclAllGather: all_gather,
            ncclAllReduce: all_reduce,
        },
        None,
    )
}

/// The state of a communicator.
///
/// # Safety
/// `init` gave the address.
unsafe fn state(comm: ncclComm_t) -> &'static State {
    // SAFETY: a state that is never freed, as the caller vouches for.
    unsafe { &*comm.cast_const().cast() }
}

unsafe extern "C" fn version<const VERSION: i32>(version: *mut c_int) -> ncclResult_t {
    // SAFETY: the caller gives room for the answer.
    unsafe { *version = VERSION };
    ncclSuccess
}

unsafe extern "C" fn describe(result: ncclResult_t) -> *const c_char {
    match result {
        3 => c"fake error 3",
        5 => c"fake error 5",
        6 => c"fake error 6",
        _ => c"another fake error",
    }
    .as_ptr()
}

unsafe extern "C" fn unique_id(id: *mut ncclUniqueId) -> ncclResult_t {
    // SAFETY: the caller gives room for the answer.
    unsafe { (*id).internal = std::array::from_fn(|at| at as c_char) };
    ncclSuccess
}

unsafe extern "C" fn init(
    comm: *mut ncclComm_t,
    ranks: c_int,
    id: ncclUniqueId,
    rank: c_int,
    config: *mut ncclConfig_t,
) -> ncclResult_t {
    let bytes: [u8; 8] = std::array::from_fn(|at| id.internal[at] as u8);
    let address: *mut c_void = std::ptr::with_exposed_provenance_mut(usize::from_le_bytes(bytes));
    // SAFETY: `Fake::id` made the id of a state that is never freed.
    let state = unsafe { state(address) };
    // SAFETY: the caller gives a config, and room for the communicator.
    let blocking = unsafe {
        *comm = address;
        (*config).blocking != 0
    };
    state.seats.lock().expect("no test panicked with it").push((ranks, rank, blocking));
    match state.init_result.load(SeqCst) {
        0 => ncclInProgress,
        error => error as ncclResult_t,
    }
}

unsafe extern "C" fn async_error(comm: ncclComm_t, error: *mut ncclResult_t) -> ncclResult_t {
    // SAFETY: `init` made it.
    let state = unsafe { state(comm) };
    let counted = state.in_progress.fetch_update(SeqCst, SeqCst, |left| match left {
        0 => None,
        u32::MAX => Some(u32::MAX),
        left => Some(left - 1),
    });
    let answer =
        if counted.is_ok() { ncclInProgress } else { state.async_error.load(SeqCst) as ncclResult_t };
    // SAFETY: the caller gives room for the answer.
    unsafe { *error = answer };
    ncclSuccess
}

unsafe extern "C" fn destroy(comm: ncclComm_t) -> ncclResult_t {
    // SAFETY: `init` made it.
    unsafe { state(comm) }.destroyed.fetch_add(1, SeqCst);
    ncclSuccess
}

unsafe extern "C" fn abort(comm: ncclComm_t) -> ncclResult_t {
    // SAFETY: `init` made it.
    unsafe { state(comm) }.aborted.fetch_add(1, SeqCst);
    ncclSuccess
}

unsafe extern "C" fn all_gather(
    from: *const c_void,
    to: *mut c_void,
    count: usize,
    _data_type: ncclDataType_t,
    comm: ncclComm_t,
    _stream: cudaStream_t,
) -> ncclResult_t {
    // SAFETY: `init` made it.
    let state = unsafe { state(comm) };
    state.gathers.lock().expect("no test panicked with it").push((from.addr(), to.addr(), count));
    ncclInProgress
}

unsafe extern "C" fn all_reduce(
    _from: *const c_void,
    _to: *mut c_void,
    _count: usize,
    _data_type: ncclDataType_t,
    _operation: ncclRedOp_t,
    _comm: ncclComm_t,
    _stream: cudaStream_t,
) -> ncclResult_t {
    ncclSuccess
}

/// Waits for a thread of another's to do its part.
pub(crate) fn until(done: impl Fn() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(10), "nothing came of it");
        thread::yield_now();
    }
}
