//! `simt` on the host: each CUDA thread is an operating-system thread, and a block shares real barriers.
//!
//! For tests: it is exact, not fast. [`launch`] runs a kernel to its end; ranks are threads of the test that
//! launch their kernels at the same time.
//!
//! On a GPU the boundary between two kernels orders what the first wrote before what the second sends, and what
//! the first read before what the second overwrites, for all devices that learn of it. Host memory has no such
//! boundary, so [`push`](super::push) releases and [`poll`](super::poll) acquires here.

use std::{
    array,
    boxed::Box,
    cell::RefCell,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Condvar, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread::{Builder, ScopedJoinHandle, scope},
    time::{Duration, Instant},
    vec::Vec,
};

use fused_collective_core::pack::Pack;

use super::{COUNTERS, SHARED_FLOATS, WARP};
use crate::launch::{MAX_BLOCK_THREADS, MAX_CLUSTER};

mod memory;
mod stream;

pub(super) use memory::*;
pub use stream::Stream;
use stream::{Delays, InStream};

pub(super) const POLLS_PER_CHECK: u32 = 4;
pub(super) const CHECKS_PER_ABORT_LOOK: u32 = 4;

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

/// Runs `kernel` once in each thread of the grid and returns when all have ended.
///
/// # Panics
/// If the geometry is none that a GPU takes, or if the kernel panics in any thread.
pub fn launch(geometry: Launch, kernel: impl Fn() + Sync) {
    launch_in(&InStream::default(), geometry, kernel);
}

/// [`launch`], at a place in a stream.
fn launch_in(place: &InStream, geometry: Launch, kernel: impl Fn() + Sync) {
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
                let (place, delays) = (place.clone(), place.delays(geometry, block, thread));
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

/// What a thread knows of itself.
struct Context {
    thread: u32,
    block: u32,
    geometry: Launch,
    cluster: Arc<ClusterState>,
    place: InStream,
    delays: Option<Delays>,
}

std::thread_local! {
    static CONTEXT: RefCell<Option<Context>> = const { RefCell::new(None) };
}

fn with<R>(read: impl FnOnce(&Context) -> R) -> R {
    CONTEXT.with_borrow(|context| read(context.as_ref().expect("called inside a launched kernel")))
}

/// A place where the schedule may be disturbed: see [`Stream::with_delays`].
fn pass() {
    with(|context| {
        if let Some(delays) = &context.delays {
            delays.pass();
        }
    });
}

struct ClusterState {
    barrier: Barrier,
    blocks: Box<[BlockState]>,
}

struct BlockState {
    barrier: Barrier,
    /// What [`block_any`] collects; 0 outside.
    any: AtomicU32,
    warps: Box<[WarpState]>,
    shared: Box<[AtomicU32]>,
    counters: [Counter; COUNTERS as usize],
}

struct WarpState {
    /// What each lane hands to the others.
    mailbox: [AtomicU32; WARP as usize],
    /// One for each tile of 2, 4, ..., 32 lanes: `tiles[log2(lanes) - 1][tile]`.
    tiles: Vec<Vec<Barrier>>,
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
struct Barrier {
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

    fn arrive_and_wait(&self) {
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

pub(super) fn thread() -> u32 {
    with(|context| context.thread)
}

pub(super) fn threads() -> u32 {
    with(|context| context.geometry.threads)
}

pub(super) fn block() -> u32 {
    with(|context| context.block)
}

pub(super) fn blocks() -> u32 {
    with(|context| context.geometry.blocks)
}

pub(super) fn cluster_rank() -> u32 {
    with(|context| context.block % context.geometry.cluster)
}

pub(super) fn cluster_size() -> u32 {
    with(|context| context.geometry.cluster)
}

pub(super) fn cluster() -> u32 {
    with(|context| context.block / context.geometry.cluster)
}

pub(super) fn clusters() -> u32 {
    with(|context| context.geometry.blocks / context.geometry.cluster)
}

fn own_block(context: &Context) -> &BlockState {
    &context.cluster.blocks[(context.block % context.geometry.cluster) as usize]
}

pub(super) fn block_barrier() {
    pass();
    with(|context| own_block(context).barrier.arrive_and_wait());
}

pub(super) fn block_any(value: bool) -> bool {
    with(|context| {
        let block = own_block(context);
        // Relaxed: the barriers order the accesses.
        block.any.fetch_or(u32::from(value), Ordering::Relaxed);
        block.barrier.arrive_and_wait();
        let any = block.any.load(Ordering::Relaxed) != 0;
        block.barrier.arrive_and_wait();
        block.any.store(0, Ordering::Relaxed);
        block.barrier.arrive_and_wait();
        any
    })
}

/// Every lane's value of this lane's tile of `lanes`.
fn exchange<R>(lanes: u32, value: u32, read: impl FnOnce(&[AtomicU32]) -> R) -> R {
    with(|context| {
        let (warp, lane) = (context.thread / WARP, context.thread % WARP);
        let state = &own_block(context).warps[warp as usize];
        let tile = lane / lanes;
        let barrier = &state.tiles[lanes.ilog2() as usize - 1][tile as usize];
        // Relaxed: the barriers order the accesses.
        state.mailbox[lane as usize].store(value, Ordering::Relaxed);
        barrier.arrive_and_wait();
        let first = (tile * lanes) as usize;
        let result = read(&state.mailbox[first..first + lanes as usize]);
        barrier.arrive_and_wait();
        result
    })
}

pub(super) fn warp_barrier() {}

pub(super) fn warp_sum(value: f32) -> f32 {
    exchange(WARP, value.to_bits(), |mailbox| {
        let mut values = [0.0; WARP as usize];
        for (value, bits) in values.iter_mut().zip(mailbox) {
            *value = f32::from_bits(bits.load(Ordering::Relaxed));
        }
        // The pairs that the GPU's butterfly adds, in its order.
        let mut distance = WARP as usize / 2;
        while distance > 0 {
            for lane in 0..distance {
                values[lane] += values[lane + distance];
            }
            distance /= 2;
        }
        values[0]
    })
}

pub(super) fn tile_sum(value: f32, lanes: u32) -> f32 {
    if lanes == 1 {
        return value;
    }
    exchange(lanes, value.to_bits(), |mailbox| {
        let mut values: Vec<f32> =
            mailbox.iter().map(|bits| f32::from_bits(bits.load(Ordering::Relaxed))).collect();
        // The pairs that the GPU's butterfly adds, in its order.
        while values.len() > 1 {
            values = values.chunks(2).map(|pair| pair[0] + pair[1]).collect();
        }
        values[0]
    })
}

/// Panics unless this lane is one of the first `lanes`, which are whole tiles: on a GPU no other may call what follows.
fn is_one_of_first(tile: u32, lanes: u32) {
    assert!(lanes <= WARP && lanes.is_multiple_of(tile), "{lanes} lanes are not whole tiles of {tile}");
    assert!(thread() % WARP < lanes, "lane {} calls with the first {lanes}", thread() % WARP);
}

pub(super) fn tile_max<const LANES: u32>(value: u32, lanes: u32) -> u32 {
    is_one_of_first(LANES, lanes);
    if LANES == 1 {
        return value;
    }
    exchange(LANES, value, |mailbox| {
        mailbox.iter().fold(0, |max, value| max.max(value.load(Ordering::Relaxed)))
    })
}

pub(super) fn tile_or<const LANES: u32>(value: u32, lanes: u32) -> u32 {
    is_one_of_first(LANES, lanes);
    if LANES == 1 {
        return value;
    }
    exchange(LANES, value, |mailbox| {
        mailbox.iter().fold(0, |bits, value| bits | value.load(Ordering::Relaxed))
    })
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Shared;

impl Shared {
    pub(super) fn take() -> Shared {
        Shared
    }

    pub(super) fn load(self, index: u32) -> f32 {
        // Relaxed, as in PTX: barriers order the accesses.
        with(|context| f32::from_bits(own_block(context).shared[index as usize].load(Ordering::Relaxed)))
    }

    pub(super) fn load_four(self, index: u32) -> [f32; 4] {
        assert!(index.is_multiple_of(4), "four floats are aligned to 16 bytes");
        array::from_fn(|float| self.load(index + float as u32))
    }

    pub(super) fn store(self, index: u32, value: f32) {
        with(|context| own_block(context).shared[index as usize].store(value.to_bits(), Ordering::Relaxed));
    }

    pub(super) fn connect(self) {
        with(|context| context.cluster.barrier.arrive_and_wait());
    }

    pub(super) fn expect(self, counter: u32, floats: u32) {
        with(|context| own_block(context).counters[counter as usize].expect(floats));
    }

    pub(super) fn send(self, rank: u32, index: u32, value: f32, counter: u32) {
        with(|context| {
            let block = &context.cluster.blocks[rank as usize];
            block.shared[index as usize].store(value.to_bits(), Ordering::Relaxed);
            block.counters[counter as usize].count();
        });
    }

    pub(super) fn wait(self, counter: u32, phase: u32) {
        with(|context| own_block(context).counters[counter as usize].wait(phase));
    }
}

/// Counts what arrives, in phases.
struct Counter {
    state: Mutex<CounterState>,
    complete: Condvar,
    ended: Arc<AtomicBool>,
}

#[derive(Default)]
struct CounterState {
    phase: u32,
    /// Whether it is known how many floats arrive in this phase.
    armed: bool,
    /// Floats yet to arrive; less than zero while more have than are known of.
    missing: i64,
}

impl Counter {
    fn new(ended: &Arc<AtomicBool>) -> Self {
        Counter { state: Mutex::default(), complete: Condvar::new(), ended: Arc::clone(ended) }
    }

    fn expect(&self, floats: u32) {
        self.change(|state| {
            assert!(!state.armed, "a phase was expected twice");
            state.armed = true;
            state.missing += i64::from(floats);
        });
    }

    fn count(&self) {
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

    fn wait(&self, phase: u32) {
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

/// At once outside a [`Stream`], where a launch starts when the one before has ended.
pub(super) fn wait_for_prerequisites() {
    with(|context| context.place.wait());
    pass();
}

pub(super) fn launch_dependents() {
    pass();
    with(|context| context.place.trigger(context.block));
}

pub(super) fn nanoseconds() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

pub(super) fn fma(a: f32, b: f32, c: f32) -> f32 {
    a.mul_add(b, c)
}

pub(super) fn rsqrt(value: f32) -> f32 {
    1.0 / value.sqrt()
}

pub(super) fn black_box(pack: Pack) -> Pack {
    pack
}

pub(super) fn black_box_u64(value: u64) -> u64 {
    value
}
