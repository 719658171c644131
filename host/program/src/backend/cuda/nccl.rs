//! NCCL's all-reduce, which the fused operations are measured against. It is called in the same way on any memory. On memory
//! that NCCL has registered on all ranks, a symmetric [window](NcclGroup::window), it runs kernels for that.
//!
//! NCCL waits for other ranks without a bound, on the device and on the host. What is bounded here:
//! - to connect, and whatever else happens inside of NCCL on the host, by [`CONNECT_LIMIT`]: it happens in threads that can
//!   be left behind, and ranks agree on what came of it ([`together`](super::together));
//! - an all-reduce on the device, by the group's deadline: [`NcclGroup::while_waiting`]. The host that waits for it aborts it.
//!
//! Within a rank one thread at a time is inside of NCCL, whichever it is: [`Comm`] has a lock.

use std::{
    ffi::c_void,
    ptr::null_mut,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{self, Receiver},
    },
    thread,
    time::{Duration, Instant},
};

use fused_collective_core::{dtype::DType, launch::Address};
use nccl_sys::{NCCL_WIN_COLL_SYMMETRIC, ncclBfloat16, ncclFloat16, ncclFloat32, ncclSum, ncclWindow_t};

use fused_collective::{
    cuda::{
        ExternalWork,
        device::{Context, Gpu},
        driver::{Handle, check as check_driver},
        nccl::{ABORT_LIMIT, Comm, LEAVE_LIMIT, Library, Seat, UniqueId},
    },
    group::rendezvous::{Control, Group},
};

use crate::backend::error::Error;

use super::together::{Limits, Outcome, together};

/// How long NCCL may take to be loaded, to connect the ranks, and to connect what an all-reduce uses for the first time:
/// tens of seconds on large machines, whatever the group's deadline.
pub(super) const CONNECT_LIMIT: Duration = Duration::from_secs(60);
/// How long it may take to give up what did not connect.
const UNDO_LIMIT: Duration = Duration::from_secs(15);
/// How long a call into NCCL may take to notice that the group is over.
const NOTICE: Duration = Duration::from_secs(2);
/// Between looks at whether it is.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// The granularity of a window, in bytes: a large page.
const WINDOW_BYTES: u64 = 2 << 20;
/// Predicates of "NCCL" in notes, for a communicator and for a window that there is not.
const NOT_USED: &str = "is not used";
const NO_WINDOW: &str = "has no symmetric window";
/// Bytes per second that every link between GPUs is faster than: what all-reduces enqueued ahead may take at most.
const SLOWEST: u64 = 1 << 30;

/// One rank's end of an NCCL communicator.
#[derive(Debug)]
pub(crate) struct NcclGroup {
    shared: Arc<Shared>,
    context: Context,
    control: Control,
    deadline: Duration,
    /// Bytes of the all-reduces that were enqueued and not waited for, and what the last of them was.
    pending: Option<(u64, String)>,
    /// An all-reduce has come to its end.
    proven: bool,
    /// Set when the communicator was given up; disconnected when that is done.
    aborted: Option<Receiver<()>>,
}

/// What the threads of a rank use of NCCL.
#[derive(Debug)]
struct Shared {
    comm: Comm,
    /// Locked before the communicator is.
    window: Mutex<Option<Window>>,
}

/// Memory of `ncclMemAlloc`, registered or about to be.
#[derive(Debug)]
struct Window {
    memory: *mut c_void,
    bytes: u64,
    /// Null before it is registered.
    window: ncclWindow_t,
}

// SAFETY: NCCL allows any thread to use a communicator and its windows, one at a time.
unsafe impl Send for Window {}

/// What one all-reduce is called with.
#[derive(Clone, Copy)]
struct Request {
    dtype: DType,
    from: Address,
    to: Address,
    count: u64,
    stream: Handle,
}

// SAFETY: a stream belongs to the process, not to a thread.
unsafe impl Send for Request {}

impl Shared {
    fn nccl(&self) -> &Library {
        self.comm.nccl()
    }

    fn lock_window(&self) -> MutexGuard<'_, Option<Window>> {
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the window, if there is one, and frees its memory. Nothing that was enqueued uses it any more.
    fn end_window(&self, own: &mut Option<Window>) -> Result<(), Error> {
        let library = self.nccl();
        let (Some(windows), Some(ended)) = (&library.functions().windows, own.take()) else { return Ok(()) };
        if !ended.window.is_null() {
            self.comm.inside(|_, comm| {
                // SAFETY: the communicator is alive, and the window its own.
                let result = unsafe { (windows.ncclCommWindowDeregister)(comm, ended.window) };
                library.check("end a symmetric window", result)
            })?;
        }
        // SAFETY: `ncclMemAlloc`'s, no longer registered, and unused, as the caller vouches for.
        Ok(library.check("free a symmetric window", unsafe { (windows.ncclMemFree)(ended.memory) })?)
    }

    /// Frees the window and, if `bytes` is not 0, allocates another, which is not registered yet.
    fn allocate_window(&self, bytes: u64) -> Result<(), Error> {
        let (library, mut own) = (self.nccl(), self.lock_window());
        let windows = library.functions().windows.as_ref();
        let windows =
            windows.ok_or_else(|| Error::Nccl("has none in this release: use 2.27 or later".to_owned()))?;
        self.end_window(&mut own)?;
        if bytes > 0 {
            let allocate = || {
                let mut memory = null_mut();
                // SAFETY: room for the address.
                let allocated = unsafe { (windows.ncclMemAlloc)(&mut memory, bytes as usize) };
                library.check("allocate a symmetric window", allocated).map(|()| memory)
            };
            let memory = self.comm.inside(|_, _| allocate())?;
            *own = Some(Window { memory, bytes, window: null_mut() });
        }
        Ok(())
    }

    /// Registers the window that was allocated.
    fn register_window(&self) -> Result<(), Error> {
        let (library, mut own) = (self.nccl(), self.lock_window());
        let (Some(windows), Some(Window { memory, bytes, window })) =
            (&library.functions().windows, &mut *own)
        else {
            return Err(Error::Nccl("has no window to register".to_owned()));
        };
        let registered = self.comm.inside(|_, comm| {
            // SAFETY: the communicator is alive, the memory has so many bytes, and there is room for the window.
            let registered = unsafe {
                let register = windows.ncclCommWindowRegister;
                register(comm, *memory, *bytes as usize, window, NCCL_WIN_COLL_SYMMETRIC)
            };
            library.check("register a symmetric window", registered)
        });
        let is_missing = window.is_null();
        let registered = registered.map_err(Error::from).and_then(|()| {
            let why = "has no use for symmetric windows between these GPUs";
            if is_missing { Err(Error::Nccl(why.to_owned())) } else { Ok(()) }
        });
        if registered.is_err() {
            // The memory is of no other use.
            let _ = self.end_window(&mut own);
        }
        registered
    }

    /// Leaves the communicator: ends what is running, or waits for it.
    fn leave(&self, abort: bool) {
        if !abort {
            // The communicator ends all the same.
            let _ = self.end_window(&mut self.lock_window());
        }
        self.comm.leave(abort);
    }

    /// Enqueues an all-reduce.
    ///
    /// # Safety
    /// As [`NcclGroup::all_reduce`].
    unsafe fn all_reduce(&self, request: Request) -> Result<(), Error> {
        let Request { dtype, from, to, count, stream } = request;
        let data_type = match dtype {
            DType::F32 => ncclFloat32,
            DType::F16 => ncclFloat16,
            DType::Bf16 => ncclBfloat16,
        };
        let (from, to) = (from.0 as *const c_void, to.0 as *mut c_void);
        self.comm.inside(|nccl, comm| {
            // SAFETY: the caller vouches for tensors and stream; the communicator is alive.
            let result =
                unsafe { (nccl.ncclAllReduce)(from, to, count as usize, data_type, ncclSum, comm, stream) };
            self.nccl().check("enqueue an all-reduce", result)
        })?;
        Ok(())
    }
}

impl NcclGroup {
    /// Joins the ranks of `group`, whose operations wait for each other no longer than `deadline`. All ranks call this,
    /// and all have NCCL then or none: why not, with the rank, is the inner error, the same on all.
    ///
    /// # Errors
    /// A rank of the group was lost, or NCCL hangs on one and cannot be ended.
    pub(crate) fn join(
        group: &Group,
        gpu: &Gpu,
        deadline: Duration,
    ) -> Result<Result<NcclGroup, Error>, Error> {
        let limits = Limits { work: CONNECT_LIMIT, undo: UNDO_LIMIT };
        let makes_id = group.rank() == 0;
        let loading = move || {
            let library = Library::load().map_err(|error| reason(error.into()))?;
            let id = if makes_id {
                Some(library.unique_id().map_err(|error| reason(error.into()))?)
            } else {
                None
            };
            Ok((library, id))
        };
        let (library, id) = match agreed(together(group, "loading it", limits, loading, drop)?, NOT_USED)? {
            Ok(loaded) => loaded,
            Err(why) => return Ok(Err(why)),
        };
        let told = id.map(UniqueId::to_bytes);
        let id = UniqueId::from_bytes(&group.broadcast(told.as_ref().map(|bytes| &bytes[..]))?)?;

        let seat = Seat { ranks: group.world_size(), rank: group.rank() };
        let context = gpu.context().clone();
        let connecting = move || {
            let comm = Comm::connect_blocking(&library, &context, id, seat);
            let comm = comm.map_err(|error| reason(error.into()))?;
            Ok(Arc::new(Shared { comm, window: Mutex::new(None) }))
        };
        let undo = |connected: Arc<Shared>| connected.leave(true);
        let outcome = together(group, "connecting it to the others", limits, connecting, undo)?;
        Ok(agreed(outcome, NOT_USED)?.map(|shared| NcclGroup {
            shared,
            context: gpu.context().clone(),
            control: group.control(),
            deadline,
            pending: None,
            proven: false,
            aborted: None,
        }))
    }

    /// The version: `2.28.9`.
    pub(crate) fn version(&self) -> String {
        self.shared.nccl().version()
    }

    /// True if its kernels over symmetric windows wait for the kernel ahead of them.
    pub(crate) fn symmetric_kernels_wait(&self) -> bool {
        self.shared.nccl().symmetric_kernels_wait()
    }

    /// Makes a symmetric window of at least `bytes` bytes, which takes the place of an earlier one, and returns its address.
    /// All ranks of `group`, which is the communicator's, call this with the same number, when all that was enqueued has
    /// ended. The inner error says why there is none, the same on all.
    ///
    /// # Errors
    /// A rank of the group was lost, or NCCL hangs on one and cannot be ended.
    pub(crate) fn window(&mut self, group: &Group, bytes: u64) -> Result<Result<Address, Error>, Error> {
        let bytes = bytes.checked_next_multiple_of(WINDOW_BYTES).unwrap_or(u64::MAX);
        let address =
            |shared: &Shared| shared.lock_window().as_ref().map(|it| (Address(it.memory as u64), it.bytes));
        if let Some((address, room)) = address(&self.shared)
            && room >= bytes
        {
            return Ok(Ok(address));
        }
        let limits = Limits { work: CONNECT_LIMIT, undo: UNDO_LIMIT };
        let in_context = |act: fn(&Shared, u64) -> Result<(), Error>| {
            let (shared, context) = (Arc::clone(&self.shared), self.context.clone());
            move || {
                let _entered = context.enter().map_err(|error| reason(error.into()))?;
                act(&shared, bytes).map_err(reason).map(|()| shared)
            }
        };
        let undo = || {
            let context = self.context.clone();
            move |shared: Arc<Shared>| {
                let _entered = context.enter();
                drop(shared.allocate_window(0));
            }
        };
        // Apart, as ranks wait for each other to register, and one may have no memory.
        let allocate = in_context(Shared::allocate_window);
        let allocated = together(group, "allocating a symmetric window", limits, allocate, undo())?;
        if let Err(why) = agreed(allocated, NO_WINDOW)? {
            return Ok(Err(why));
        }
        let register = in_context(|shared, _| shared.register_window());
        let registered = together(group, "registering a symmetric window", limits, register, undo())?;
        let registered = agreed(registered, NO_WINDOW)?;
        Ok(registered.and_then(|shared| {
            let why = || Error::Nccl("has no window any more".to_owned());
            address(&shared).map(|(address, _)| address).ok_or_else(why)
        }))
    }

    /// Enqueues the sum of all ranks' `count` elements at `from` into `to`, on the calling thread if `stream` is being
    /// captured: what it needs is connected then, since the same was run before.
    ///
    /// # Errors
    /// NCCL's; it did not return within [`CONNECT_LIMIT`], or within [`NOTICE`] of the group's end.
    ///
    /// # Safety
    /// Both tensors have `count` elements of type `dtype` until the operation has ended, and `stream` is a stream of
    /// the context that the communicator was made in.
    pub(crate) unsafe fn all_reduce(
        &mut self,
        dtype: DType,
        from: Address,
        to: Address,
        count: u64,
        stream: Handle,
    ) -> Result<(), Error> {
        let request = Request { dtype, from, to, count, stream };
        // SAFETY: the caller vouches for the stream.
        if unsafe { is_capturing(&self.context, stream)? } {
            // SAFETY: the caller vouches for tensors and stream.
            return unsafe { self.shared.all_reduce(request) };
        }
        self.expect(dtype, count, 1);
        let (sender, receiver) = mpsc::channel();
        let (shared, context) = (Arc::clone(&self.shared), self.context.clone());
        let call = move || {
            // SAFETY: as the surrounding function's.
            let made = context
                .enter()
                .map_err(Error::from)
                .and_then(|_entered| unsafe { shared.all_reduce(request) });
            if sender.send(made).is_err() {
                // Nobody waits any more, so nobody waits for what was enqueued.
                shared.leave(true);
            }
        };
        in_thread("nccl-call", call)?;
        let began = Instant::now();
        let mut over: Option<Instant> = None;
        loop {
            match receiver.recv_timeout(LOOK_EVERY) {
                Ok(made) => return made,
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    return Err(Error::Nccl("panicked in a call".to_owned()));
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
            if self.control.lost_rank().is_some() {
                over.get_or_insert_with(Instant::now);
            }
            if began.elapsed() > CONNECT_LIMIT || over.is_some_and(|over| over.elapsed() > NOTICE) {
                let what = describe(dtype, count);
                let waited = began.elapsed().as_secs_f64();
                return Err(Error::Nccl(format!(
                    "did not return within {waited:.1} s from the call for {what}: a rank is stuck"
                )));
            }
        }
    }

    /// Notes that all-reduces of `count` elements are enqueued so many `times`, by a graph.
    pub(crate) fn expect(&mut self, dtype: DType, count: u64, times: u64) {
        let bytes = count.saturating_mul(dtype.bytes()).saturating_mul(times);
        let (before, _) = self.pending.take().unwrap_or_default();
        self.pending = Some((before.saturating_add(bytes), describe(dtype, count)));
    }

    /// Calls `wait` with what is under way, if anything is, and how to end it; what `wait` says of it comes back.
    pub(crate) fn while_waiting(
        &mut self,
        wait: impl FnOnce(Option<ExternalWork<'_>>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Some((bytes, what)) = self.pending.take() else { return wait(None) };
        // The first one sets up what it uses, on each rank at its own pace.
        let set_up = if self.proven { Duration::ZERO } else { CONNECT_LIMIT };
        let limit = self.deadline.saturating_add(longest(bytes)).saturating_add(set_up);
        let mut end = || self.abort();
        let waited = wait(Some(ExternalWork { what, limit, end: &mut end }));
        match &waited {
            Ok(()) => self.proven = true,
            Err(_) => self.abort(),
        }
        waited
    }

    /// An error if anything went wrong in what was enqueued.
    ///
    /// # Errors
    /// NCCL's.
    pub(crate) fn check(&self) -> Result<(), Error> {
        Ok(self.shared.comm.check()?)
    }

    /// Ends what is running, and the communicator, in a thread: NCCL waits for its kernels, for the graphs that they are
    /// in, and for other ranks.
    pub(crate) fn abort(&mut self) {
        if self.aborted.is_none() {
            self.aborted = Some(self.leave(true));
        }
    }

    /// Leaves the communicator in a thread; the receiver is disconnected when that is done.
    fn leave(&self, abort: bool) -> Receiver<()> {
        let (alive, over) = mpsc::channel();
        let (shared, context) = (Arc::clone(&self.shared), self.context.clone());
        let leave = move || {
            let _alive = alive;
            // The window's memory is of the GPU that is current.
            let _entered = context.enter();
            shared.leave(abort);
        };
        // Without a thread the communicator ends with the process, which has none to spare.
        let _ = in_thread("nccl-leave", leave);
        over
    }
}

impl Drop for NcclGroup {
    fn drop(&mut self) {
        if self.control.lost_rank().is_some() {
            self.abort();
        }
        // Past the limit it ends with the process.
        let _ = match self.aborted.take() {
            Some(over) => over.recv_timeout(ABORT_LIMIT),
            None => self.leave(false).recv_timeout(LEAVE_LIMIT),
        };
    }
}

/// Asks whether what is enqueued on `stream` is captured.
///
/// # Errors
/// The driver's.
///
/// # Safety
/// `stream` is a stream of the current context.
unsafe fn is_capturing(context: &Context, stream: Handle) -> Result<bool, Error> {
    let mut capturing = 0;
    // SAFETY: a stream of the current context, and room for the answer.
    let code = unsafe { (context.driver().cuStreamIsCapturing)(stream, &mut capturing) };
    check_driver("ask whether the stream is being captured", code)?;
    Ok(capturing != 0)
}

/// The longest that all-reduces of so many bytes, which no rank keeps waiting, may take.
fn longest(bytes: u64) -> Duration {
    Duration::from_secs_f64(bytes as f64 / SLOWEST as f64)
}

/// An all-reduce, for a reader.
fn describe(dtype: DType, count: u64) -> String {
    format!("NCCL's all-reduce of {count} {dtype}")
}

/// Agrees on the result, or on why there is none. `lacks` is the predicate of NCCL in the note that then follows.
///
/// # Errors
/// A thread is still inside of NCCL: it would run beside all that is timed.
fn agreed<T>(outcome: Outcome<T>, lacks: &str) -> Result<Result<T, Error>, Error> {
    match outcome {
        Outcome::Done(done) => Ok(Ok(done)),
        Outcome::Failed { rank, why } => Ok(Err(Error::Nccl(format!("{lacks}: on rank {rank} {why}")))),
        Outcome::Running { rank, why, running } => Err(Error::Nccl(format!(
            "cannot be used, nor be ended on rank {running}: on rank {rank} {why}; leave it out (--allreduce custom)"
        ))),
    }
}

/// An error of this module, as what completes "NCCL".
fn reason(error: Error) -> String {
    match error {
        Error::Nccl(what) => format!("it {what}"),
        error => error.to_string(),
    }
}

fn in_thread(name: &str, act: impl FnOnce() + Send + 'static) -> Result<(), Error> {
    let spawned = thread::Builder::new().name(name.to_owned()).spawn(act);
    spawned.map(drop).map_err(|error| Error::Nccl(format!("has no thread to run in: {error}")))
}

/// Whether NCCL is there.
///
/// # Errors
/// It is missing or too old.
pub fn check() -> Result<(), Error> {
    Library::load()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_that_was_enqueued_ahead_adds_to_the_deadline_what_it_takes_at_most() {
        // Forty all-reduces of 2048 tokens of 8192 bfloat16, as a trial has.
        assert_eq!(longest(40 * (2048 * 8192 * 2)), Duration::from_millis(1250));
        assert_eq!(longest(0), Duration::ZERO);
        assert!(longest(u64::MAX) > Duration::from_secs(1 << 30));
    }

    #[test]
    fn ranks_that_cannot_use_it_say_on_which_one_and_why() {
        let failed = Outcome::<()>::Failed { rank: 1, why: "it cannot be loaded".to_owned() };
        let error = agreed(failed, NOT_USED).unwrap().unwrap_err().to_string();
        assert_eq!(error, "NCCL is not used: on rank 1 it cannot be loaded");
        let running = Outcome::<()>::Running { rank: 1, why: "it is late".to_owned(), running: 2 };
        let error = agreed(running, NO_WINDOW).unwrap_err().to_string();
        assert!(error.contains("ended on rank 2: on rank 1 it is late"), "{error}");
    }
}
