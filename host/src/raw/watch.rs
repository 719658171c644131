//! A function that is called inside of waits, so that a caller's signals are served.

use std::{
    any::Any,
    fmt,
    os::fd::{BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use crate::group::{Bootstrap, BootstrapError, Lost, Monitor};

/// A function that a rank calls inside of its waits, about every 20 ms, from the thread that waits. One that finds that the
/// wait should end calls the communicator's [`Aborter`](crate::group::Aborter).
#[derive(Clone)]
pub struct Watch(Arc<dyn Fn() + Send + Sync>);

impl Watch {
    /// Wraps a function. It is short, and makes no call of the communicator.
    pub fn new(watch: impl Fn() + Send + Sync + 'static) -> Watch {
        Watch(Arc::new(watch))
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watch")
    }
}

/// The time between two calls.
const EVERY: Duration = Duration::from_millis(20);

/// A bootstrap whose monitor, if it has one, is watched.
pub(super) struct Watching<'a> {
    bootstrap: &'a dyn Bootstrap,
    watch: Option<Watch>,
}

impl<'a> Watching<'a> {
    pub(super) fn new(bootstrap: &'a dyn Bootstrap, watch: Option<Watch>) -> Self {
        Watching { bootstrap, watch }
    }
}

impl Bootstrap for Watching<'_> {
    fn rank(&self) -> u32 {
        self.bootstrap.rank()
    }

    fn world_size(&self) -> u32 {
        self.bootstrap.world_size()
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, BootstrapError> {
        self.bootstrap.all_gather(bytes)
    }

    fn host(&self) -> Result<Vec<u8>, BootstrapError> {
        self.bootstrap.host()
    }

    fn barrier(&self) -> Result<(), BootstrapError> {
        self.bootstrap.barrier()
    }

    fn share_file(&self, file: Option<BorrowedFd<'_>>) -> Result<OwnedFd, BootstrapError> {
        self.bootstrap.share_file(file)
    }

    fn monitor(&self) -> Option<Arc<dyn Monitor>> {
        let monitor = self.bootstrap.monitor()?;
        let Some(watch) = self.watch.clone() else { return Some(monitor) };
        Some(Arc::new(Watched { monitor, watch, began: Instant::now(), next: AtomicU64::new(0) }))
    }
}

/// A monitor that calls a [`Watch`] when it is asked inside of waits.
#[derive(Debug)]
struct Watched {
    monitor: Arc<dyn Monitor>,
    watch: Watch,
    began: Instant,
    /// The time of the next call, in nanoseconds from `began`.
    next: AtomicU64,
}

impl Monitor for Watched {
    fn lost(&self) -> Option<Lost> {
        let now = self.began.elapsed().as_nanos() as u64;
        if now >= self.next.load(Relaxed) {
            self.next.store(now + EVERY.as_nanos() as u64, Relaxed);
            (self.watch.0)();
        }
        self.monitor.lost()
    }

    fn abort(&self, reason: &str) {
        self.monitor.abort(reason);
    }

    fn on_loss(&self, act: Box<dyn Fn() + Send>) -> Box<dyn Any + Send> {
        self.monitor.on_loss(act)
    }
}
