//! Bounded waiting: spin, then yield, and never past a deadline.

use std::{
    fmt, hint,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

/// A wait that ended without what it waited for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Late {
    /// The rank that waited.
    pub rank: u32,
    /// The rank whose data did not come.
    pub waited_for: u32,
    /// The operation of the group, counted from 0; a round of a large operation counts as one.
    pub operation: u64,
    /// Why it ended.
    pub cause: LateCause,
}

/// Why a wait ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LateCause {
    /// The deadline passed.
    Deadline(Duration),
    /// A rank of the group is known to be gone.
    Lost(String),
}

/// Without the rank that waited: whoever shows it knows which one that is.
impl fmt::Display for Late {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Late { waited_for, operation, cause, .. } = self;
        match cause {
            LateCause::Deadline(deadline) => write!(
                f,
                "waited {:.1} s for rank {waited_for} in operation {operation}: it is stuck, or slower than the deadline",
                deadline.as_secs_f64()
            ),
            LateCause::Lost(how) => {
                write!(f, "{how}; this rank waited for rank {waited_for} in operation {operation}")
            }
        }
    }
}

impl std::error::Error for Late {}

/// Tells whether a rank of the group is known to be gone, and how that reads: `rank 2 was lost: ...`.
#[derive(Clone)]
pub struct Watch(Arc<dyn Fn() -> Option<String> + Send + Sync>);

impl Watch {
    /// A watch that asks `lost`. It is called from inside waits, so it should cost no more than an atomic load.
    pub fn new(lost: impl Fn() -> Option<String> + Send + Sync + 'static) -> Self {
        Watch(Arc::new(lost))
    }

    /// A watch that never tells of a loss: only deadlines end waits.
    pub fn nobody() -> Self {
        Watch::new(|| None)
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watch")
    }
}

/// Pauses before the processor is offered to another process: a peer on a core of its own answers in less.
const SPINS: u32 = 2_000;
/// Pauses between looks at the clock and the watch.
const LOOK_EVERY: u32 = 64;

/// One wait of one rank for another.
pub(crate) struct Wait<'a> {
    rank: u32,
    waited_for: u32,
    operation: u64,
    pauses: u32,
    deadline: Duration,
    began: Option<Instant>,
    watch: &'a Watch,
}

impl<'a> Wait<'a> {
    pub(crate) fn new(
        rank: u32,
        waited_for: u32,
        operation: u64,
        deadline: Duration,
        watch: &'a Watch,
    ) -> Self {
        Wait { rank, waited_for, operation, pauses: 0, deadline, began: None, watch }
    }

    /// Lets some time pass; an error once the deadline has passed or a rank is lost.
    #[cold]
    pub(crate) fn pause(&mut self) -> Result<(), Late> {
        self.pauses = self.pauses.wrapping_add(1);
        if self.pauses < SPINS {
            hint::spin_loop();
            return Ok(());
        }
        if self.pauses.is_multiple_of(LOOK_EVERY) {
            let began = *self.began.get_or_insert_with(Instant::now);
            if let Some(how) = (self.watch.0)() {
                return Err(self.late(LateCause::Lost(how)));
            }
            if began.elapsed() >= self.deadline {
                return Err(self.late(LateCause::Deadline(self.deadline)));
            }
        }
        thread::yield_now();
        Ok(())
    }

    fn late(&self, cause: LateCause) -> Late {
        Late { rank: self.rank, waited_for: self.waited_for, operation: self.operation, cause }
    }
}
