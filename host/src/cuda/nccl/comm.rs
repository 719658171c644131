//! A communicator of NCCL's: made within a limit, asked how it goes, left or aborted by any thread.

use std::{
    ffi::c_void,
    ptr::null_mut,
    sync::{
        Arc, Mutex, PoisonError, TryLockError,
        mpsc::{self, Receiver},
    },
    thread,
    time::{Duration, Instant},
};

use fused_collective_core::launch::Address;
use nccl_sys::{Nccl, ncclComm_t, ncclConfig_t, ncclInProgress, ncclSuccess, ncclUint8};

use super::{
    super::{device::Context, driver::Handle},
    library::{Library, UniqueId},
};
use crate::error::Error;

/// Time between two questions whether a call has come to its end, once it has not at once.
const ASK_EVERY: Duration = Duration::from_micros(200);
/// Questions before the thread sleeps between them.
const SPINS: u32 = 1_000;

/// The time that NCCL may take to leave in good order.
pub const LEAVE_LIMIT: Duration = Duration::from_secs(10);
/// The time that it may take when it was aborted, which nobody should wait for.
pub const ABORT_LIMIT: Duration = Duration::from_secs(1);

/// A rank's place in a communicator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seat {
    /// Ranks of the communicator.
    pub ranks: u32,
    /// This one.
    pub rank: u32,
}

/// The end of a wait: at a time, or as soon as the group is over.
#[derive(Clone, Copy)]
pub struct Bounds<'a> {
    /// The longest that it takes.
    pub limit: Duration,
    /// True once the group is over.
    pub is_over: &'a dyn Fn() -> bool,
}

/// One rank's end of a communicator, until it is [left](Self::leave).
#[derive(Debug)]
pub struct Comm {
    nccl: Arc<Library>,
    seat: Seat,
    /// `None` in tests, which have no GPU.
    context: Option<Context>,
    /// The communicator, locked by the thread that is inside of NCCL; `None` before it is made and once it is left.
    handle: Mutex<Option<Owned>>,
    /// Held while NCCL leaves, so that who comes second waits as well.
    leaving: Mutex<()>,
}

/// The handle, which a thread may hand to another.
#[derive(Debug)]
struct Owned(ncclComm_t);

// SAFETY: NCCL allows any thread to use a communicator, one at a time.
unsafe impl Send for Owned {}

impl Comm {
    /// Joins the communicator `id` at `seat`, on the GPU of `context`, without blocking: in NCCL's own threads, which are
    /// asked how it goes within `bounds`.
    ///
    /// # Errors
    /// [`Error::Nccl`]: its own errors; it took longer than the limit, or the group is over. The communicator is aborted then.
    pub fn connect(
        library: &Arc<Library>,
        context: &Context,
        id: UniqueId,
        seat: Seat,
        bounds: Bounds<'_>,
    ) -> Result<Comm, Error> {
        Comm::connect_in(library, Some(context), id, seat, bounds)
    }

    /// As [`connect`](Self::connect), but returns when NCCL does, however long it takes, and so do calls of the communicator:
    /// for a thread that can be left behind.
    ///
    /// # Errors
    /// [`Error::Nccl`]: its own.
    pub fn connect_blocking(
        library: &Arc<Library>,
        context: &Context,
        id: UniqueId,
        seat: Seat,
    ) -> Result<Comm, Error> {
        let comm = Comm::unconnected(library, Some(context), seat);
        comm.init(id, true)?;
        Ok(comm)
    }

    pub(in crate::cuda) fn connect_in(
        library: &Arc<Library>,
        context: Option<&Context>,
        id: UniqueId,
        seat: Seat,
        bounds: Bounds<'_>,
    ) -> Result<Comm, Error> {
        let comm = Comm::unconnected(library, context, seat);
        let connected = comm.init(id, false).and_then(|()| comm.settle("connect the group", bounds));
        if let Err(error) = connected {
            // Nobody waits for it: NCCL ends what it has begun.
            drop(Arc::new(comm).leave_in_thread(true));
            return Err(error);
        }
        Ok(comm)
    }

    fn unconnected(library: &Arc<Library>, context: Option<&Context>, seat: Seat) -> Comm {
        let (nccl, context) = (Arc::clone(library), context.cloned());
        Comm { nccl, seat, context, handle: Mutex::new(None), leaving: Mutex::new(()) }
    }

    fn init(&self, id: UniqueId, blocking: bool) -> Result<(), Error> {
        let _entered = self.context.as_ref().map(Context::enter).transpose()?;
        let (mut comm, mut config) = (null_mut(), ncclConfig_t::new(blocking));
        let (ranks, rank) = (self.seat.ranks as i32, self.seat.rank as i32);
        let nccl = self.nccl.functions();
        // SAFETY: room for the communicator, and a config of the size and version that it says.
        let result = unsafe { (nccl.ncclCommInitRankConfig)(&mut comm, ranks, id.0, rank, &mut config) };
        if !comm.is_null() {
            *self.handle.lock().unwrap_or_else(PoisonError::into_inner) = Some(Owned(comm));
        }
        if result == ncclInProgress { Ok(()) } else { self.nccl.check("connect the group", result) }
    }

    /// The NCCL that was loaded.
    pub fn nccl(&self) -> &Arc<Library> {
        &self.nccl
    }

    /// Calls `inside` with the communicator, alone.
    ///
    /// # Errors
    /// It was left; those of `inside`.
    pub fn inside<T>(&self, inside: impl FnOnce(&Nccl, ncclComm_t) -> Result<T, Error>) -> Result<T, Error> {
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        match &*handle {
            Some(Owned(comm)) => inside(self.nccl.functions(), *comm),
            None => Err(Error::Nccl("was aborted".to_owned())),
        }
    }

    /// Asks how it goes: `false` while a call is under way.
    fn is_settled(&self, doing: &'static str) -> Result<bool, Error> {
        self.inside(|_, comm| self.ask(comm, doing))
    }

    /// As [`is_settled`](Self::is_settled), of the communicator that the caller has locked.
    fn ask(&self, comm: ncclComm_t, doing: &'static str) -> Result<bool, Error> {
        let mut result = ncclSuccess;
        // SAFETY: the communicator is alive, and there is room for the answer.
        let asked = unsafe { (self.nccl.functions().ncclCommGetAsyncError)(comm, &mut result) };
        self.nccl.check("tell how it went", asked)?;
        if result == ncclInProgress {
            return Ok(false);
        }
        self.nccl.check(doing, result).map(|()| true)
    }

    /// Waits until the last call has come to its end. `doing` completes "could not".
    fn settle(&self, doing: &'static str, bounds: Bounds<'_>) -> Result<(), Error> {
        let began = Instant::now();
        let mut asked = 0u32;
        while !self.is_settled(doing)? {
            if (bounds.is_over)() {
                return Err(Error::Nccl(format!(
                    "was told to stop, as the group is over: could not {doing}"
                )));
            }
            if began.elapsed() > bounds.limit {
                let Seat { ranks, rank } = self.seat;
                return Err(Error::Nccl(format!(
                    "did not {doing} within {:.1} s (rank {rank} of {ranks}): a host is missing or stuck, or the deadline \
                     is shorter than NCCL takes",
                    bounds.limit.as_secs_f64()
                )));
            }
            asked = asked.saturating_add(1);
            if asked < SPINS { thread::yield_now() } else { thread::sleep(ASK_EVERY) }
        }
        Ok(())
    }

    /// An error if anything went wrong in what was enqueued. While another thread is inside of NCCL there is nothing to ask, and
    /// nobody waits for that thread here.
    ///
    /// # Errors
    /// NCCL's; none once it was left.
    pub fn check(&self) -> Result<(), Error> {
        let handle = match self.handle.try_lock() {
            Ok(handle) => handle,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(()),
        };
        handle.as_ref().map_or(Ok(()), |&Owned(comm)| self.ask(comm, "run a collective").map(drop))
    }

    /// Enqueues an all-gather in place: every rank's `bytes` bytes, from `bytes * rank` on in `buffer`. Returns when NCCL has
    /// enqueued it, which the first time means to connect the ranks; if that takes longer than `bounds`, the error says so.
    ///
    /// # Errors
    /// [`Error::Nccl`].
    ///
    /// # Safety
    /// The buffer has `bytes` for each rank until the all-gather has ended, and `stream` is a stream of the communicator's
    /// context.
    pub unsafe fn all_gather(
        &self,
        buffer: Address,
        bytes: u64,
        stream: Handle,
        bounds: Bounds<'_>,
    ) -> Result<(), Error> {
        const DOING: &str = "gather partial sums";
        let own = buffer.0 + bytes * u64::from(self.seat.rank);
        let (from, to) = (own as *const c_void, buffer.0 as *mut c_void);
        self.inside(|nccl, comm| {
            // SAFETY: the caller vouches for buffer and stream; the communicator is alive.
            let result = unsafe { (nccl.ncclAllGather)(from, to, bytes as usize, ncclUint8, comm, stream) };
            if result == ncclInProgress { Ok(()) } else { self.nccl.check(DOING, result) }
        })?;
        self.settle(DOING, bounds)
    }

    /// Leaves the communicator: ends what is running, or waits for it. NCCL may take any time for either: see
    /// [`leave_in_thread`](Self::leave_in_thread).
    pub fn leave(&self, abort: bool) {
        let _leaving = self.leaving.lock().unwrap_or_else(PoisonError::into_inner);
        let left = self.handle.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Owned(comm)) = left {
            // Without a context NCCL makes do with its own.
            let _entered = self.context.as_ref().map(Context::enter);
            let nccl = self.nccl.functions();
            let leave = if abort { nccl.ncclCommAbort } else { nccl.ncclCommDestroy };
            // SAFETY: the communicator was alive, and nobody else has it any more.
            unsafe { leave(comm) };
        }
    }

    /// [Leaves](Self::leave) in a thread; the receiver is disconnected when that is done, also where another thread has begun it. It is
    /// at once if there is no thread to be had: the communicator then ends with the process.
    pub fn leave_in_thread(self: Arc<Self>, abort: bool) -> Receiver<()> {
        let (alive, over) = mpsc::channel();
        let leave = move || {
            let _alive = alive;
            self.leave(abort);
        };
        let _ = thread::Builder::new().name("nccl-leave".to_owned()).spawn(leave);
        over
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::SeqCst;

    use super::{
        super::fake::{Fake, until},
        *,
    };

    const SEAT: Seat = Seat { ranks: 2, rank: 1 };

    fn within(limit: Duration) -> Bounds<'static> {
        Bounds { limit, is_over: &|| false }
    }

    fn connect(fake: &Fake, bounds: Bounds<'_>) -> Result<Comm, Error> {
        Comm::connect_in(&fake.nccl(), None, fake.id(), SEAT, bounds)
    }

    #[test]
    fn ranks_connect_without_blocking_in_the_time_that_nccl_takes() {
        let fake = Fake::new();
        fake.in_progress.store(5, SeqCst);
        let comm = connect(&fake, within(Duration::from_secs(10))).unwrap();
        assert_eq!(fake.seats.lock().unwrap()[..], [(2, 1, false)]);
        comm.check().unwrap();
        comm.leave(false);
        assert_eq!((fake.destroyed.load(SeqCst), fake.aborted.load(SeqCst)), (1, 0));
    }

    #[test]
    fn a_host_that_does_not_come_is_an_error_at_the_deadline_and_the_rest_is_aborted() {
        let fake = Fake::new();
        fake.in_progress.store(u32::MAX, SeqCst);
        let began = Instant::now();
        let error = connect(&fake, within(Duration::from_millis(50))).unwrap_err().to_string();
        assert!(began.elapsed() < Duration::from_secs(5));
        assert!(
            error.starts_with("NCCL did not connect the group within 0.1 s (rank 1 of 2): a host"),
            "{error}"
        );
        until(|| fake.aborted.load(SeqCst) == 1);
    }

    #[test]
    fn a_rank_that_is_lost_meanwhile_ends_the_wait_at_once() {
        let fake = Fake::new();
        fake.in_progress.store(u32::MAX, SeqCst);
        let bounds = Bounds { limit: Duration::from_secs(60), is_over: &|| true };
        let error = connect(&fake, bounds).unwrap_err().to_string();
        assert_eq!(error, "NCCL was told to stop, as the group is over: could not connect the group");
        until(|| fake.aborted.load(SeqCst) == 1);
    }

    #[test]
    fn an_error_of_nccls_comes_with_its_words_at_once_or_while_it_runs() {
        let fake = Fake::new();
        fake.init_result.store(5, SeqCst);
        let error = connect(&fake, within(Duration::from_secs(10))).unwrap_err().to_string();
        assert_eq!(error, "NCCL could not connect the group: fake error 5");
        let fake = Fake::new();
        let comm = connect(&fake, within(Duration::from_secs(10))).unwrap();
        fake.async_error.store(6, SeqCst);
        let error = comm.check().unwrap_err().to_string();
        assert_eq!(error, "NCCL could not run a collective: fake error 6");
    }

    #[test]
    fn an_all_gather_is_in_place_and_waits_until_it_is_enqueued() {
        let fake = Fake::new();
        let comm = connect(&fake, within(Duration::from_secs(10))).unwrap();
        fake.in_progress.store(3, SeqCst);
        let bounds = within(Duration::from_secs(10));
        // SAFETY: the fake looks at no memory.
        unsafe { comm.all_gather(Address(0x1000), 0x100, null_mut(), bounds) }.unwrap();
        assert_eq!(fake.gathers.lock().unwrap()[..], [(0x1100, 0x1000, 0x100)]);
        fake.in_progress.store(u32::MAX, SeqCst);
        let bounds = within(Duration::from_millis(20));
        // SAFETY: as above.
        let error = unsafe { comm.all_gather(Address(0x1000), 0x100, null_mut(), bounds) }.unwrap_err();
        assert!(error.to_string().starts_with("NCCL did not gather partial sums within 0.0 s"), "{error}");
    }

    #[test]
    fn a_communicator_that_was_aborted_by_another_thread_says_so_and_is_left_once() {
        let fake = Fake::new();
        let comm = Arc::new(connect(&fake, within(Duration::from_secs(10))).unwrap());
        let over = Arc::clone(&comm).leave_in_thread(true);
        assert!(over.recv_timeout(Duration::from_secs(10)).is_err());
        until(|| fake.aborted.load(SeqCst) == 1);
        let bounds = within(Duration::from_secs(10));
        // SAFETY: as above.
        let error = unsafe { comm.all_gather(Address(0), 0, null_mut(), bounds) }.unwrap_err();
        assert_eq!(error.to_string(), "NCCL was aborted");
        comm.check().unwrap();
        comm.leave(true);
        assert_eq!(fake.aborted.load(SeqCst), 1);
    }

    #[test]
    fn a_check_does_not_wait_for_a_thread_that_is_inside_of_nccl() {
        let fake = Fake::new();
        let comm = connect(&fake, within(Duration::from_secs(10))).unwrap();
        fake.async_error.store(6, SeqCst);
        comm.inside(|_, _| thread::scope(|scope| scope.spawn(|| comm.check()).join().expect("no panic")))
            .unwrap();
        comm.check().unwrap_err();
    }
}
