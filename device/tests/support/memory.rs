//! Memory that kernels reach by address: buffers with guards round them, and the workspaces of a group of ranks.

use std::{
    array,
    ops::Range,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use fused_collective_core::{
    lamport,
    pack::Pack,
    plan::Limits,
    workspace::{Layout, SLOTS_OFFSET},
};
use fused_collective_device::{
    launch::{Address, Group, RankState, Status},
    simt::host::Launch,
};

use super::launched::Launched;

/// Packs before and after each buffer that nobody may touch.
const GUARD: usize = 4;
const GUARD_WORD: u32 = 0xdead_beef;

/// Memory that kernels reach by address, filled with one word, with guards on both sides.
pub struct Buffer {
    memory: *mut [Pack],
    /// Those in between.
    pub bytes: usize,
}

// SAFETY: plain memory; kernels and tests take turns with it.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// The addresses inside.
    pub fn range(&self) -> Range<u64> {
        let start = self.address().0;
        start..start + self.bytes as u64
    }

    pub fn new(bytes: usize, fill: u32) -> Buffer {
        let mut packs = vec![Pack([GUARD_WORD; 4]); bytes.div_ceil(16) + 2 * GUARD];
        let inside = GUARD..packs.len() - GUARD;
        packs[inside].fill(Pack([fill; 4]));
        Buffer { memory: Box::into_raw(packs.into_boxed_slice()), bytes }
    }

    pub fn of<T: Copy>(values: &[T]) -> Buffer {
        let buffer = Buffer::new(size_of_val(values), GUARD_WORD);
        let start = buffer.start().cast::<T>();
        for (index, value) in values.iter().enumerate() {
            // SAFETY: inside the buffer, and aligned, as the buffer starts at a multiple of 16.
            unsafe { start.add(index).write(*value) };
        }
        buffer
    }

    fn start(&self) -> *mut u8 {
        // SAFETY: inside the allocation.
        unsafe { self.memory.cast::<Pack>().add(GUARD).cast() }
    }

    pub fn address(&self) -> Address {
        Address(self.start().expose_provenance() as u64)
    }

    /// The contents. No kernel may be running.
    pub fn get<T: Copy>(&self) -> Vec<T> {
        // SAFETY: inside the buffer; every bit pattern is a value of the types that tests read.
        (0..self.bytes / size_of::<T>())
            .map(|index| unsafe { self.start().cast::<T>().add(index).read() })
            .collect()
    }

    /// Makes `range` of the contents the same as another buffer's. Nobody accesses either.
    pub fn copy(&self, other: &Buffer, range: Range<usize>) {
        assert!(range.end <= self.bytes.min(other.bytes));
        // SAFETY: inside both buffers, which are different memory.
        unsafe { self.start().add(range.start).copy_from(other.start().add(range.start), range.len()) };
    }

    pub fn assert_guards(&self) {
        // SAFETY: the whole allocation, which nobody accesses now.
        let packs = unsafe { &*self.memory };
        let tail = self.bytes.div_ceil(16) + GUARD;
        let guards = packs[..GUARD].iter().chain(&packs[tail..]);
        assert!(guards.flat_map(|pack| pack.0).all(|word| word == GUARD_WORD), "a guard was overwritten");
    }

    /// A word that kernels access atomically.
    pub fn atomic(&self, offset: u64) -> &AtomicU32 {
        // SAFETY: inside the buffer and aligned.
        unsafe { &*self.start().add(offset as usize).cast() }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: made by `Box::into_raw`.
        drop(unsafe { Box::from_raw(self.memory) });
    }
}

/// Runs a rank's kernel in place of `simt`. It may access the memory at the addresses, which lives until it has ended.
pub type Runner = Box<dyn Fn(u32, Launch, &Launched, Vec<Range<u64>>) + Send + Sync>;

/// A group of ranks with their workspaces.
pub struct World {
    /// What runs the group's kernels, if it is not `simt`.
    pub runner: Option<Runner>,
    pub size: u32,
    layout: Layout,
    regions: Vec<Buffer>,
    pub states: Vec<Buffer>,
    pub statuses: Vec<Buffer>,
    pub timeout: Duration,
}

impl World {
    pub fn new(size: u32, slot_bytes: u64) -> World {
        let layout = Layout::new(size, slot_bytes).unwrap();
        let regions: Vec<Buffer> =
            (0..size).map(|_| Buffer::new(layout.region_bytes() as usize, lamport::SENTINEL)).collect();
        World {
            runner: None,
            size,
            layout,
            regions,
            states: (0..size).map(|_| Buffer::new(size_of::<RankState>(), 0)).collect(),
            statuses: (0..size).map(|_| Buffer::new(size_of::<Status>(), 0)).collect(),
            timeout: Duration::from_secs(60),
        }
    }

    pub fn group(&self, rank: u32) -> Group {
        Group {
            regions: array::from_fn(|rank| self.regions.get(rank).map_or(Address::NULL, Buffer::address)),
            state: self.states[rank as usize].address(),
            status: self.statuses[rank as usize].address(),
            slot_bytes: self.layout.slot_bytes(),
            timeout_ns: self.timeout.as_nanos() as u64,
            world_size: self.size,
            rank,
        }
    }

    /// The addresses that rank `rank`'s kernels may access, besides its tensors.
    pub fn ranges(&self, rank: u32) -> impl Iterator<Item = Range<u64>> {
        let own = [&self.states[rank as usize], &self.statuses[rank as usize]];
        self.regions.iter().chain(own).map(Buffer::range)
    }

    /// What operations are planned with.
    pub fn limits(&self) -> Limits {
        Limits {
            world_size: self.size,
            hosts: 1,
            slot_bytes: self.layout.slot_bytes(),
            compute_units: 1,
            max_cluster: 1,
            one_shot_bytes: u64::MAX,
        }
    }

    /// Runs `rank` for every rank at the same time.
    pub fn run(&self, rank: impl Fn(u32) + Sync) {
        thread::scope(|scope| {
            for index in 0..self.size {
                let rank = &rank;
                scope.spawn(move || rank(index));
            }
        });
    }

    /// Every word of every slot is the sentinel, and nothing was written outside.
    pub fn assert_clean(&self) {
        for region in &self.regions {
            region.assert_guards();
            let words = region.get::<u32>();
            let slots = &words[SLOTS_OFFSET as usize / 4..];
            assert!(slots.iter().all(|word| *word == lamport::SENTINEL), "a slot was not refilled");
        }
        for buffer in self.states.iter().chain(&self.statuses) {
            buffer.assert_guards();
        }
    }

    pub fn failed(&self, rank: u32) -> u32 {
        self.statuses[rank as usize].atomic(Status::FAILED).load(Ordering::Acquire)
    }
}
