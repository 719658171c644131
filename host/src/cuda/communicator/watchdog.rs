//! The thread that ends a gather between hosts which does not come to its end.
//!
//! NCCL waits on the device without a bound. Kernels tell of the operation whose gather is under way: the first kernel of a
//! round writes its number to `Status::gathers_begun`, the second to `Status::gathers_ended`. While the two differ, the thread counts the time.
//! Once that is more than deadlines allow, NCCL tells of an error, or the group is over, it sets the abort flag and has NCCL
//! end what is running. The second kernel then begins, sees the flag, and fails.

use std::{
    fmt,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{
            AtomicBool,
            Ordering::{Acquire, Release},
        },
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::super::nccl::Comm;
use crate::error::Error;

/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The progress that the thread looks at, and the end of the waits of this rank's kernels.
pub(super) trait Watched: Send + 'static {
    /// The operations whose gathers have begun and ended last.
    fn gathers(&self) -> [u32; 2];

    /// True once the group is over.
    fn is_over(&self) -> bool;

    /// Ends all waits of this rank's kernels.
    fn end(&self);
}

/// The thread, until it is dropped.
pub(super) struct Watchdog {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Watchdog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watchdog").field("late", &self.is_late()).finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct Shared {
    stop: Mutex<bool>,
    stopped: Condvar,
    late: AtomicBool,
    /// NCCL's error.
    failed: Mutex<Option<String>>,
}

impl Watchdog {
    /// Watches the gathers of `comm`, each of which may take `limit`.
    ///
    /// # Errors
    /// The system has no thread for it.
    pub(super) fn start(comm: Arc<Comm>, watched: impl Watched, limit: Duration) -> Result<Watchdog, Error> {
        let shared = Arc::<Shared>::default();
        let own = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("gather-watchdog".to_owned())
            .spawn(move || own.watch(&comm, &watched, limit))
            .map_err(Error::system("start the watchdog of gathers between hosts"))?;
        Ok(Watchdog { shared, thread: Some(thread) })
    }

    /// True if a gather was ended because it took too long.
    pub(super) fn is_late(&self) -> bool {
        self.shared.late.load(Acquire)
    }

    /// NCCL's error, if a gather was ended because of one.
    pub(super) fn failed(&self) -> Option<String> {
        self.shared.failed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        *self.shared.stop.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.shared.stopped.notify_all();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked watches nothing any more, which is all that is asked of it here.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn watch(&self, comm: &Arc<Comm>, watched: &impl Watched, limit: Duration) {
        let mut gauge = Gauge::new(limit);
        let mut stop = self.stop.lock().unwrap_or_else(PoisonError::into_inner);
        while !*stop {
            let gathers = watched.gathers();
            let is_late = gauge.look(Instant::now(), gathers);
            // An error of a peer that has left in good order is none: no gather is under way then.
            let error = if gathers[0] == gathers[1] { None } else { comm.check().err() };
            if is_late || error.is_some() || watched.is_over() {
                self.late.store(is_late, Release);
                *self.failed.lock().unwrap_or_else(PoisonError::into_inner) =
                    error.map(|error| error.to_string());
                // Ahead of NCCL's end, after which the second kernel looks.
                watched.end();
                // Nobody waits for it: it ends what is on the stream, and the communicator with it.
                drop(Arc::clone(comm).leave_in_thread(true));
                return;
            }
            stop = self.stopped.wait_timeout(stop, LOOK_EVERY).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The time that the gather at hand has taken.
#[derive(Debug)]
struct Gauge {
    limit: Duration,
    /// The operation, and when it was first seen.
    since: Option<(u32, Instant)>,
}

impl Gauge {
    fn new(limit: Duration) -> Gauge {
        Gauge { limit, since: None }
    }

    /// True if the gather at hand has taken longer than the limit, at the time `now`.
    fn look(&mut self, now: Instant, [begun, ended]: [u32; 2]) -> bool {
        if begun == ended {
            self.since = None;
            return false;
        }
        match self.since {
            Some((operation, since)) if operation == begun => {
                now.saturating_duration_since(since) > self.limit
            }
            _ => {
                self.since = Some((begun, now));
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

    use super::{
        super::super::nccl::{
            Bounds, Seat,
            fake::{Fake, until},
        },
        *,
    };

    const LIMIT: Duration = Duration::from_secs(3);

    #[test]
    fn a_gather_is_late_if_the_same_one_lasts_longer_than_the_limit() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut gauge = Gauge::new(LIMIT);
        assert!(!gauge.look(at(0), [0, 0]));
        // One after the other, for longer than the limit in all.
        for second in 0..20u32 {
            assert!(!gauge.look(at(second.into()), [second / 2 + 1, second / 2]), "{second}");
        }
        assert!(!gauge.look(at(20), [11, 10]) && !gauge.look(at(23), [11, 10]));
        assert!(gauge.look(at(24), [11, 10]));
        // Its end is no failure, and idle time is none of the next.
        assert!(!gauge.look(at(25), [11, 11]));
        assert!(!gauge.look(at(99), [12, 11]));
        // Numbers turn.
        assert!(!gauge.look(at(100), [0, u32::MAX]) && gauge.look(at(104), [0, u32::MAX]));
    }

    #[derive(Clone, Default)]
    struct Kernels {
        begun: Arc<AtomicU32>,
        over: Arc<AtomicBool>,
        ended: Arc<AtomicU32>,
    }

    impl Watched for Kernels {
        fn gathers(&self) -> [u32; 2] {
            [self.begun.load(SeqCst), 0]
        }

        fn is_over(&self) -> bool {
            self.over.load(SeqCst)
        }

        fn end(&self) {
            self.ended.fetch_add(1, SeqCst);
        }
    }

    fn started(fake: Fake, limit: Duration) -> (Kernels, Watchdog) {
        let kernels = Kernels::default();
        let bounds = Bounds { limit: Duration::from_secs(10), is_over: &|| false };
        let seat = Seat { ranks: 2, rank: 0 };
        let comm = Comm::connect_in(&fake.nccl(), None, fake.id(), seat, bounds).unwrap();
        let watchdog = Watchdog::start(Arc::new(comm), kernels.clone(), limit).unwrap();
        (kernels, watchdog)
    }

    #[test]
    fn a_gather_that_hangs_is_ended_with_the_kernels_waits() {
        let fake = Fake::new();
        let (kernels, watchdog) = started(fake, Duration::from_millis(50));
        thread::sleep(Duration::from_millis(100));
        assert_eq!((fake.aborted.load(SeqCst), watchdog.is_late()), (0, false));
        kernels.begun.store(1, SeqCst);
        until(|| fake.aborted.load(SeqCst) == 1);
        assert!(watchdog.is_late());
        assert_eq!(kernels.ended.load(SeqCst), 1);
    }

    #[test]
    fn an_error_of_nccls_ends_a_gather_at_once_and_is_kept() {
        let fake = Fake::new();
        let (kernels, watchdog) = started(fake, Duration::from_secs(3600));
        fake.async_error.store(6, SeqCst);
        thread::sleep(3 * LOOK_EVERY);
        assert_eq!(fake.aborted.load(SeqCst), 0, "no gather is under way");
        kernels.begun.store(1, SeqCst);
        until(|| fake.aborted.load(SeqCst) == 1);
        let failed = watchdog.failed();
        assert_eq!(failed.as_deref(), Some("NCCL could not run a collective: fake error 6"));
        assert!(!watchdog.is_late());
    }

    #[test]
    fn the_end_of_the_group_ends_gathers_at_once_and_is_not_their_lateness() {
        let fake = Fake::new();
        let (kernels, watchdog) = started(fake, Duration::from_secs(3600));
        kernels.begun.store(1, SeqCst);
        kernels.over.store(true, SeqCst);
        until(|| fake.aborted.load(SeqCst) == 1);
        assert!(!watchdog.is_late());
    }

    #[test]
    fn a_watchdog_that_is_dropped_leaves_the_communicator_as_it_is() {
        let fake = Fake::new();
        let (_, watchdog) = started(fake, Duration::from_secs(3600));
        drop(watchdog);
        assert_eq!(fake.aborted.load(SeqCst), 0);
    }
}
