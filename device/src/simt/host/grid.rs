//! A grid of threads, and what its blocks and warps share.

use std::{
    array,
    boxed::Box,
    cell::RefCell,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread::{Builder, ScopedJoinHandle, scope},
    time::Duration,
    vec::Vec,
};

use super::flight::{Delays, InStream};
use crate::{
    launch::{MAX_BLOCK_THREADS, MAX_CLUSTER},
    simt::limits::{COUNTERS, SHARED_FLOATS, WARP},
};

/// Kernels keep rows in registers, here on the stack; nothing recurses.
const STACK_BYTES: usize = 256 * 1024;

/// The geometry of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// Blocks of the grid: a multiple of `cluster`.
    pub blocks: u32,
    /// Blocks of a cluster.
    pub cluster: u32,
    /// Threads of a block: a multiple of [`WARP`].
    pub threads: u32,
}

/// [`launch`](super::launch), at a place in a stream.
pub(super) fn launch_in(place: &InStream, geometry: Launch, kernel: impl Fn() + Sync) {
    let Launch { blocks, cluster, threads } = geometry;
    assert!(threads > 0 && threads.is_multiple_of(WARP) && threads <= MAX_BLOCK_THREADS, "{geometry:?}");
    assert!(
        cluster > 0 && cluster <= MAX_CLUSTER && blocks > 0 && blocks.is_multiple_of(cluster),
        "{geometry:?}"
    );
    let ended = Arc::new(AtomicBool::new(false));
    let clusters: Vec<Arc<ClusterState>> =
        (0..blocks / cluster).map(|_| Arc::new(ClusterState::new(cluster, threads, &ended))).collect();
    scope(|scope| {
        let spawn = |block: u32, thread: u32| -> ScopedJoinHandle<'_, ()> {
            let (cluster_state, ended, kernel) =
                (Arc::clone(&clusters[(block / cluster) as usize]), &ended, &kernel);
            let run = move || {
                let (place, delays) =
                    (place.clone(), place.delays(blocks * threads, block * threads + thread));
                let context = Context { thread, block, geometry, cluster: cluster_state, place, delays };
                CONTEXT.with_borrow_mut(|current| *current = Some(context));
                pass();
                if let Err(panic) = catch_unwind(AssertUnwindSafe(kernel)) {
                    // The others would wait at a barrier for this thread: end them too.
                    ended.store(true, Ordering::Relaxed);
                    resume_unwind(panic);
                }
            };
            Builder::new()
                .stack_size(STACK_BYTES)
                .spawn_scoped(scope, run)
                .expect("a thread for each CUDA thread")
        };
        for block in 0..blocks {
            for thread in 0..threads {
                spawn(block, thread);
            }
        }
    });
}

/// A thread's place in its grid.
pub(super) struct Context {
    pub(super) thread: u32,
    pub(super) block: u32,
    pub(super) geometry: Launch,
    pub(super) cluster: Arc<ClusterState>,
    pub(super) place: InStream,
    delays: Option<Delays>,
}

std::thread_local! {
    static CONTEXT: RefCell<Option<Context>> = const { RefCell::new(None) };
}

pub(super) fn with<R>(read: impl FnOnce(&Context) -> R) -> R {
    CONTEXT.with_borrow(|context| read(context.as_ref().expect("called inside a launched kernel")))
}

/// A place where the schedule may be disturbed: see [`Stream::with_delays`](super::Stream::with_delays).
pub(super) fn pass() {
    with(|context| {
        if let Some(delays) = &context.delays {
            delays.pass();
        }
    });
}

pub(super) struct ClusterState {
    pub(super) barrier: Barrier,
    pub(super) blocks: Box<[BlockState]>,
}

pub(super) struct BlockState {
    pub(super) barrier: Barrier,
    /// Disjunction that [`block_any`](super::block_any) collects; 0 outside.
    pub(super) any: AtomicU32,
    pub(super) warps: Box<[WarpState]>,
    pub(super) shared: Box<[AtomicU32]>,
    pub(super) counters: [Counter; COUNTERS as usize],
}

pub(super) struct WarpState {
    /// Values that lanes hand to each other.
    pub(super) mailbox: [AtomicU32; WARP as usize],
    /// One for each tile of 2, 4, ..., 32 lanes: `tiles[log2(lanes) - 1][tile]`.
    pub(super) tiles: Vec<Vec<Barrier>>,
}

impl ClusterState {
    fn new(blocks: u32, threads: u32, ended: &Arc<AtomicBool>) -> Self {
        ClusterState {
            barrier: Barrier::new(blocks * threads, ended),
            blocks: (0..blocks).map(|_| BlockState::new(threads, ended)).collect(),
        }
    }
}

impl BlockState {
    fn new(threads: u32, ended: &Arc<AtomicBool>) -> Self {
        // Shared memory starts with what is no number, so that a read before a write shows.
        let poison = || AtomicU32::new(f32::NAN.to_bits());
        BlockState {
            barrier: Barrier::new(threads, ended),
            any: AtomicU32::new(0),
            warps: (0..threads / WARP).map(|_| WarpState::new(ended)).collect(),
            shared: (0..SHARED_FLOATS).map(|_| poison()).collect(),
            counters: array::from_fn(|_| Counter::new(ended)),
        }
    }
}

impl WarpState {
    fn new(ended: &Arc<AtomicBool>) -> Self {
        let tiles = |lanes: u32| (0..WARP / lanes).map(|_| Barrier::new(lanes, ended)).collect();
        WarpState { mailbox: Default::default(), tiles: [2, 4, 8, 16, 32].map(tiles).into() }
    }
}

/// A reusable barrier that ends its waiters when the launch ends early.
pub(super) struct Barrier {
    parties: u32,
    state: Mutex<BarrierState>,
    complete: Condvar,
    ended: Arc<AtomicBool>,
}

#[derive(Default)]
struct BarrierState {
    arrived: u32,
    phase: u64,
}

impl Barrier {
    fn new(parties: u32, ended: &Arc<AtomicBool>) -> Self {
        Barrier { parties, state: Mutex::default(), complete: Condvar::new(), ended: Arc::clone(ended) }
    }

    pub(super) fn arrive_and_wait(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let phase = state.phase;
        state.arrived += 1;
        if state.arrived == self.parties {
            *state = BarrierState { arrived: 0, phase: phase + 1 };
            self.complete.notify_all();
        }
        while state.phase == phase {
            assert!(!self.ended.load(Ordering::Relaxed), "another thread of the launch panicked");
            let (next, _) = self
                .complete
                .wait_timeout(state, Duration::from_millis(100))
                .unwrap_or_else(PoisonError::into_inner);
            state = next;
        }
    }
}

pub(super) fn own_block(context: &Context) -> &BlockState {
    &context.cluster.blocks[(context.block % context.geometry.cluster) as usize]
}

/// Counts what arrives, in phases.
pub(super) struct Counter {
    state: Mutex<CounterState>,
    complete: Condvar,
    ended: Arc<AtomicBool>,
}

#[derive(Default)]
struct CounterState {
    phase: u32,
    /// True once the number of floats that arrive in this phase is known.
    armed: bool,
    /// Floats yet to arrive; less than zero while more have than are known of.
    missing: i64,
}

impl Counter {
    fn new(ended: &Arc<AtomicBool>) -> Self {
        Counter { state: Mutex::default(), complete: Condvar::new(), ended: Arc::clone(ended) }
    }

    pub(super) fn expect(&self, floats: u32) {
        self.change(|state| {
            assert!(!state.armed, "a phase was expected twice");
            state.armed = true;
            state.missing += i64::from(floats);
        });
    }

    pub(super) fn count(&self) {
        self.change(|state| state.missing -= 1);
    }

    fn change(&self, change: impl FnOnce(&mut CounterState)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut state);
        if state.armed && state.missing == 0 {
            *state = CounterState { phase: state.phase + 1, armed: false, missing: 0 };
            self.complete.notify_all();
        }
    }

    pub(super) fn wait(&self, phase: u32) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.phase % 2 == phase % 2 {
            assert!(!self.ended.load(Ordering::Relaxed), "another thread of the launch panicked");
            let (next, _) = self
                .complete
                .wait_timeout(state, Duration::from_millis(100))
                .unwrap_or_else(PoisonError::into_inner);
            state = next;
        }
    }
}
