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
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::Instant,
};

use fused_collective_core::{norm, pack::Pack};

use super::limits::WARP;

mod flight;
mod grid;
mod memory;
mod stream;

use flight::InStream;
pub use grid::Launch;
use grid::{launch_in, own_block, pass, with};
pub(super) use memory::*;
pub use stream::Stream;

pub(super) const POLLS_PER_CHECK: u32 = 4;
pub(super) const CHECKS_PER_ABORT_LOOK: u32 = 4;

/// Runs `kernel` once in each thread of the grid and returns when all have ended.
///
/// # Panics
/// If the geometry is none that a GPU takes, or if the kernel panics in any thread.
pub fn launch(geometry: Launch, kernel: impl Fn() + Sync) {
    launch_in(&InStream::default(), geometry, kernel);
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

pub(super) fn warp_barrier() {
    exchange(WARP, 0, |_| ());
}

pub(super) fn warp_sum(value: f32) -> f32 {
    exchange(WARP, value.to_bits(), |mailbox| {
        let value = |lane: usize| f32::from_bits(mailbox[lane].load(Ordering::Relaxed));
        norm::sum_by_halves::<{ WARP as usize }>(array::from_fn(value))
    })
}

pub(super) fn two_warp_sums(first: f32, second: f32) -> f32 {
    let (first, second) = (warp_sum(first), warp_sum(second));
    if thread() & (WARP / 2) == 0 { first } else { second }
}

pub(super) fn tile_sum(value: f32, lanes: u32) -> f32 {
    if lanes == 1 {
        return value;
    }
    exchange(lanes, value.to_bits(), |mailbox| {
        // A tile of fewer lanes is one of eight whose others hold zeros.
        let value =
            |lane: usize| mailbox.get(lane).map_or(0.0, |bits| f32::from_bits(bits.load(Ordering::Relaxed)));
        norm::sum_by_halves::<8>(array::from_fn(value))
    })
}

/// Panics unless this lane is one of the first `lanes`, which are whole tiles: on a GPU no other may call what follows.
fn is_one_of_first(tile: u32, lanes: u32) {
    assert!(
        tile.is_power_of_two() && lanes <= WARP && lanes.is_multiple_of(tile),
        "{lanes} lanes are not whole tiles of {tile}"
    );
    assert!(thread() % WARP < lanes, "lane {} calls with the first {lanes}", thread() % WARP);
}

pub(super) fn tile_max(value: u32, tile: u32, lanes: u32) -> u32 {
    is_one_of_first(tile, lanes);
    if tile == 1 {
        return value;
    }
    exchange(tile, value, |mailbox| {
        mailbox.iter().fold(0, |max, value| max.max(value.load(Ordering::Relaxed)))
    })
}

pub(super) fn tile_or(value: u32, tile: u32, lanes: u32) -> u32 {
    is_one_of_first(tile, lanes);
    if tile == 1 {
        return value;
    }
    exchange(tile, value, |mailbox| {
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

pub(super) fn black_box(pack: Pack) -> Pack {
    pack
}

pub(super) fn black_box_u32(value: u32) -> u32 {
    value
}

pub(super) fn black_box_u64(value: u64) -> u64 {
    value
}
