//! A grid: its threads take turns at random, until all have ended or one is at fault.

use std::{
    error::Error,
    fmt,
    mem::MaybeUninit,
    thread,
    time::{Duration, Instant},
};

use crate::{
    decode::{Entry, Operation, Place, Register, Source, Special},
    memory::{Cell, Memory},
    races::Races,
    shared::{Access, Shared},
};

/// Threads of a warp.
const WARP: usize = 32;
/// Instructions that a thread executes before another may, at most.
const LONGEST_TURN: u64 = 96;
/// Turns after which the operating system may run another grid, on which this one may be waiting.
const TURNS_OF_A_GRID: u64 = 512;
/// Stores to global memory that are on their way at the same time, at most.
const MOST_STORES: usize = 48;
/// Bits of an address in shared memory that are an offset; the block's rank in its cluster is above them.
const WINDOW_BITS: u32 = 24;

/// Blocks, blocks of a cluster, and threads of a block: a multiple of 32.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Blocks of the grid: a multiple of `cluster`.
    pub blocks: u32,
    /// Blocks of a cluster.
    pub cluster: u32,
    /// Threads of a block: a multiple of 32.
    pub threads: u32,
}

/// What a grid did that a kernel must not do, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The entry point.
    pub entry: String,
    /// The line of the PTX.
    pub line: usize,
    /// The block of the grid.
    pub block: u32,
    /// The thread of the block.
    pub thread: u32,
    /// What happened.
    pub what: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Fault { entry, line, block, thread, what } = self;
        write!(f, "{entry}, line {line}, block {block}, thread {thread}: {what}")
    }
}

impl Error for Fault {}

/// A grid to run: [`run`](Grid::run).
#[derive(Debug)]
pub struct Grid<'a> {
    /// The entry point.
    pub entry: &'a Entry,
    /// How many threads there are.
    pub geometry: Geometry,
    /// The parameter's bytes. Those that the kernel loads must have been written: padding need not.
    pub parameter: &'a [MaybeUninit<u8>],
    /// What it may access.
    pub memory: &'a Memory,
    /// Of the order in which threads take turns.
    pub seed: u64,
    /// The longest that it may take.
    pub timeout: Duration,
}

impl Grid<'_> {
    /// Runs the grid to its end; returns how many instructions it took.
    ///
    /// # Safety
    /// Every byte of the parameter that the entry point loads is initialized.
    ///
    /// # Panics
    /// If the geometry is none that a GPU takes, or the parameter has another size than the entry point's.
    pub unsafe fn run(&self) -> Result<u64, Fault> {
        let Geometry { blocks, cluster, threads } = self.geometry;
        assert!(
            cluster > 0 && blocks > 0 && blocks.is_multiple_of(cluster) && threads > 0 && threads % 32 == 0,
            "{:?}",
            self.geometry
        );
        assert_eq!(self.parameter.len() as u64, self.entry.param_bytes, "{}'s parameter", self.entry.name);
        Running::new(self).run()
    }
}

/// A lane that waits for others.
#[derive(Clone, Copy)]
struct Lane {
    mask: u32,
    at: usize,
    /// Of a shuffle: where the value goes, and the lane that it comes from.
    shuffle: Option<(Register, u64, usize)>,
}

#[derive(Default)]
struct Thread {
    at: usize,
    ended: bool,
    waited_for_grid: bool,
    barriers: u64,
    meetings: u64,
    lane: Option<Lane>,
    /// Where the result of the barrier goes that it waits at.
    barrier: Option<Option<Register>>,
    cluster_arrivals: u64,
    waits_for_cluster: bool,
    /// Counters, and how many of their phases it knows to have ended.
    observed: Vec<(u32, u64)>,
}

struct Block {
    shared: Shared,
    /// Threads at the barrier, and whether one of them said so.
    at_barrier: u32,
    any: bool,
    /// The instruction that the first came to.
    barrier_at: usize,
    ended: u32,
}

/// A word on its way to a block of the same cluster.
struct Message {
    sender: usize,
    block: usize,
    address: u64,
    value: u32,
    counter: u64,
}

/// A store to global memory that others do not see yet.
struct Store {
    thread: usize,
    cell: Cell,
    bytes: u64,
    value: u64,
}

/// How many phases of a counter a thread knows to have ended, by what it has `observed`.
fn phases_in(observed: &[(u32, u64)]) -> impl Fn(u32) -> u64 {
    |counter| observed.iter().find(|(known, _)| *known == counter).map_or(0, |(_, phases)| *phases)
}

/// How a thread's turn goes on.
enum Step {
    Next,
    Jump(usize),
    /// Another thread should go on: this one polls.
    Pause,
    Wait,
    End,
}

struct Running<'a> {
    grid: &'a Grid<'a>,
    threads: Vec<Thread>,
    registers: Vec<u64>,
    blocks: Vec<Block>,
    /// Threads of each cluster that have arrived at its barrier, in all.
    cluster_arrivals: Vec<u64>,
    messages: Vec<Message>,
    /// The oldest first. Those of one address arrive in this order, others in any.
    stores: Vec<Store>,
    races: Races,
    runnable: Vec<usize>,
    random: u64,
    began: Instant,
    executed: u64,
}

impl<'a> Running<'a> {
    fn new(grid: &'a Grid<'a>) -> Self {
        let Geometry { blocks, cluster, threads } = grid.geometry;
        let all = (blocks * threads) as usize;
        let block = || Block {
            shared: Shared::new(grid.entry.shared_bytes),
            at_barrier: 0,
            any: false,
            barrier_at: 0,
            ended: 0,
        };
        Running {
            grid,
            threads: (0..all).map(|_| Thread::default()).collect(),
            registers: vec![0; all * grid.entry.registers],
            blocks: (0..blocks).map(|_| block()).collect(),
            cluster_arrivals: vec![0; (blocks / cluster) as usize],
            messages: Vec::new(),
            stores: Vec::new(),
            races: Races::default(),
            runnable: (0..all).collect(),
            // Of xorshift, whose state is never 0.
            random: grid.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            began: Instant::now(),
            executed: 0,
        }
    }

    fn below(&mut self, end: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        ((self.random >> 33) % end as u64) as usize
    }

    fn run(mut self) -> Result<u64, Fault> {
        let mut turns = 0;
        loop {
            if !self.messages.is_empty() && (self.runnable.is_empty() || self.below(4) == 0) {
                let index = self.below(self.messages.len());
                self.deliver(index)?;
                continue;
            }
            if !self.stores.is_empty() && self.below(16) == 0 {
                let index = self.below(self.stores.len());
                self.complete_store(index);
            }
            if self.runnable.is_empty() {
                self.complete_stores(|_| true);
                return match self.threads.iter().position(|thread| !thread.ended) {
                    None => Ok(self.executed),
                    Some(thread) => Err(self.fault(thread, "waits for threads that do not come")),
                };
            }
            turns += 1;
            if turns % TURNS_OF_A_GRID == 0 {
                if self.began.elapsed() > self.grid.timeout {
                    let thread = self.runnable[0];
                    return Err(self.fault(thread, format!("still running after {:?}", self.grid.timeout)));
                }
                thread::yield_now();
            }
            let place = self.below(self.runnable.len());
            let thread = self.runnable[place];
            let length = 1 + self.below(LONGEST_TURN as usize);
            if !self.turn(thread, length)? {
                // Those that it set free are behind it: its place is still its own.
                self.runnable.swap_remove(place);
            }
        }
    }

    /// Executes some instructions of a thread; whether it can go on.
    fn turn(&mut self, thread: usize, length: usize) -> Result<bool, Fault> {
        for _ in 0..length {
            self.executed += 1;
            let Some(instruction) = self.grid.entry.code.get(self.threads[thread].at) else {
                return Err(self.fault(thread, "went past the last instruction"));
            };
            let is_skipped = instruction.guard.is_some_and(|(predicate, value)| {
                (self.registers[thread * self.grid.entry.registers + predicate] != 0) != value
            });
            let step = if is_skipped {
                Step::Next
            } else {
                self.execute(thread, &instruction.operation).map_err(|what| self.fault(thread, what))?
            };
            match step {
                Step::Next => self.threads[thread].at += 1,
                Step::Jump(target) => self.threads[thread].at = target,
                Step::Pause => {
                    self.threads[thread].at += 1;
                    return Ok(true);
                }
                // Whoever sets it free moves it on: perhaps itself, just now.
                Step::Wait => return Ok(self.is_free(thread)),
                Step::End => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Whether a thread that has just come to a wait need not wait. It is then still among the runnable.
    fn is_free(&self, thread: usize) -> bool {
        let thread = &self.threads[thread];
        thread.lane.is_none() && thread.barrier.is_none() && !thread.waits_for_cluster
    }

    fn fault(&self, thread: usize, what: impl Into<String>) -> Fault {
        let Grid { entry, geometry, .. } = self.grid;
        Fault {
            entry: entry.name.clone(),
            line: entry.code.get(self.threads[thread].at).map_or(0, |instruction| instruction.line),
            block: thread as u32 / geometry.threads,
            thread: thread as u32 % geometry.threads,
            what: what.into(),
        }
    }

    fn get(&self, thread: usize, source: Source) -> u64 {
        match source {
            Source::Register(register) => self.registers[thread * self.grid.entry.registers + register],
            Source::Constant(value) => value,
        }
    }

    fn set(&mut self, thread: usize, register: Register, value: u64) {
        self.registers[thread * self.grid.entry.registers + register] = value;
    }

    /// The global memory at a place, which a thread accesses.
    fn touch(
        &mut self,
        thread: usize,
        place: Place,
        bytes: u64,
        stores: bool,
        is_weak: bool,
    ) -> Result<Cell, String> {
        let address = self.get(thread, place.address).wrapping_add(place.offset);
        let cell = self.grid.memory.at(address, bytes)?;
        let by = (self.block_of(thread) as u32, self.access(thread));
        self.races.touch(address, bytes, by, stores, is_weak)?;
        Ok(cell)
    }

    /// Where in shared memory a place is; an address there has 32 bits.
    fn shared_address(&self, thread: usize, place: Place) -> u64 {
        u64::from((self.get(thread, place.address) as u32).wrapping_add(place.offset as u32))
    }

    fn block_of(&self, thread: usize) -> usize {
        thread / self.grid.geometry.threads as usize
    }

    fn cluster_of(&self, thread: usize) -> usize {
        self.block_of(thread) / self.grid.geometry.cluster as usize
    }

    fn access(&self, thread: usize) -> Access {
        let Thread { barriers, meetings, .. } = self.threads[thread];
        Access { thread: thread as u32 % self.grid.geometry.threads, barriers, meetings }
    }

    fn execute(&mut self, thread: usize, operation: &Operation) -> Result<Step, String> {
        match *operation {
            Operation::Compute { compute, to, from: [a, b, c] } => {
                let value = compute(self.get(thread, a), self.get(thread, b), self.get(thread, c));
                self.set(thread, to, value);
            }
            Operation::Special { to, of } => {
                let value = self.special(thread, of);
                self.set(thread, to, value);
            }
            Operation::Unpack { to: [low, high], from, bits } => {
                let value = self.get(thread, from);
                let part = |value: u64| value & ((1 << bits) - 1);
                if let Some(low) = low {
                    self.set(thread, low, part(value));
                }
                if let Some(high) = high {
                    self.set(thread, high, part(value >> bits));
                }
            }
            Operation::Pack { to, from: [low, high], bits } => {
                let part = |value: u64| value & ((1 << bits) - 1);
                let value = part(self.get(thread, low)) | part(self.get(thread, high)) << bits;
                self.set(thread, to, value);
            }
            Operation::LoadParameter { to, offset, bytes } => {
                let value = self.parameter(offset, bytes)?;
                self.set(thread, to, value);
            }
            Operation::LoadGlobal { ref to, bytes, from, constant, is_weak } => {
                self.check_grid(thread, constant)?;
                let all = bytes * to.len() as u64;
                let cell = self.touch(thread, from, all, false, is_weak)?;
                self.see_own_stores(thread, cell, all);
                for (index, register) in to.iter().enumerate() {
                    self.set(thread, *register, cell.at(index as u64 * bytes).load(bytes));
                }
                // It may be polling.
                return Ok(Step::Pause);
            }
            Operation::StoreGlobal { to, bytes, ref from, release, is_weak } => {
                self.check_grid(thread, false)?;
                let cell = self.touch(thread, to, bytes * from.len() as u64, true, is_weak)?;
                if release {
                    // What others stored before was made visible where it was ordered before this.
                    self.complete_stores(|other| other == thread);
                }
                for (index, source) in from.iter().enumerate() {
                    let (cell, value) = (cell.at(index as u64 * bytes), self.get(thread, *source));
                    self.stores.push(Store { thread, cell, bytes, value });
                }
                while self.stores.len() > MOST_STORES {
                    self.complete_store(0);
                }
            }
            Operation::CompareAndSwap { old, at, expected, new } => {
                self.check_grid(thread, false)?;
                let cell = self.touch(thread, at, 4, true, false)?;
                self.see_own_stores(thread, cell, 4);
                let (expected, new) = (self.get(thread, expected) as u32, self.get(thread, new) as u32);
                let was = cell.compare_and_swap(expected, new);
                self.set(thread, old, u64::from(was));
            }
            Operation::LoadShared { ref to, from } => {
                let (address, access, block) =
                    (self.shared_address(thread, from), self.access(thread), self.block_of(thread));
                if !address.is_multiple_of(4 * to.len() as u64) {
                    return Err(format!("address {address} of shared memory is not aligned"));
                }
                for (index, register) in to.iter().enumerate() {
                    let observed = phases_in(&self.threads[thread].observed);
                    let shared = &mut self.blocks[block].shared;
                    let value = shared.load(address + index as u64 * 4, access, observed)?;
                    self.set(thread, *register, u64::from(value));
                }
            }
            Operation::StoreShared { to, from } => {
                let (address, value, access, block) = (
                    self.shared_address(thread, to),
                    self.get(thread, from) as u32,
                    self.access(thread),
                    self.block_of(thread),
                );
                let observed = phases_in(&self.threads[thread].observed);
                self.blocks[block].shared.store(address, value, access, observed)?;
            }
            Operation::Branch { target } => return Ok(Step::Jump(target)),
            Operation::BranchIndexed { index, ref targets } => {
                let index = self.get(thread, index) as u32;
                let target = targets.get(index as usize);
                return target
                    .map(|target| Step::Jump(*target))
                    .ok_or_else(|| format!("branch {index} of {}", targets.len()));
            }
            Operation::Return => {
                self.end(thread)?;
                return Ok(Step::End);
            }
            Operation::Shuffle { to, value, distance, clamp, mask } => {
                let (value, distance, clamp, mask) = (
                    self.get(thread, value) & 0xffff_ffff,
                    self.get(thread, distance) as usize & 31,
                    self.get(thread, clamp) as usize,
                    self.get(thread, mask) as u32,
                );
                let lane = thread % WARP;
                let (segment, last) = (clamp >> 8 & 31, clamp & 31);
                let last = lane & segment | last & !segment;
                let source = if lane ^ distance <= last { lane ^ distance } else { lane };
                self.meet(thread, mask, Some((to, value, source)))?;
                return Ok(Step::Wait);
            }
            Operation::SynchronizeWarp { mask } => {
                let mask = self.get(thread, mask) as u32;
                self.meet(thread, mask, None)?;
                return Ok(Step::Wait);
            }
            Operation::Barrier => {
                self.arrive(thread, None, false)?;
                return Ok(Step::Wait);
            }
            Operation::BarrierAny { to, value } => {
                let value = self.get(thread, value) != 0;
                self.arrive(thread, Some(to), value)?;
                return Ok(Step::Wait);
            }
            Operation::ArriveAtCluster => {
                let cluster = self.cluster_of(thread);
                self.threads[thread].cluster_arrivals += 1;
                self.cluster_arrivals[cluster] += 1;
                self.release_cluster(cluster);
            }
            Operation::WaitForCluster => {
                let cluster = self.cluster_of(thread);
                if self.cluster_has_passed(thread, cluster) {
                    return Ok(Step::Next);
                }
                self.threads[thread].waits_for_cluster = true;
                return Ok(Step::Wait);
            }
            Operation::InitializeCounter { at, count } => {
                let (address, count, block) =
                    (self.shared_address(thread, at), self.get(thread, count) as u32, self.block_of(thread));
                self.blocks[block].shared.initialize_counter(address, count)?;
            }
            Operation::Expect { at, bytes } => {
                let (address, bytes, block) =
                    (self.shared_address(thread, at), self.get(thread, bytes) as u32, self.block_of(thread));
                self.blocks[block].shared.expect(address, bytes)?;
            }
            Operation::Map { to, address, rank } => {
                let (address, rank) = (self.get(thread, address) as u32, self.get(thread, rank) as u32);
                if rank >= self.grid.geometry.cluster {
                    return Err(format!(
                        "there is no block {rank} in a cluster of {}",
                        self.grid.geometry.cluster
                    ));
                }
                self.set(thread, to, u64::from(address | (rank + 1) << WINDOW_BITS));
            }
            Operation::Send { to, value, counter } => {
                let (to, counter) = (self.shared_address(thread, to), self.shared_address(thread, counter));
                let rank = to >> WINDOW_BITS;
                if !(1..=u64::from(self.grid.geometry.cluster)).contains(&rank) {
                    return Err(format!("a word for address {to:#x}, which is in no block's memory"));
                }
                if rank != counter >> WINDOW_BITS {
                    return Err("a word for one block's memory and another's counter".to_owned());
                }
                let first = self.cluster_of(thread) * self.grid.geometry.cluster as usize;
                let offset = |address: u64| address & ((1 << WINDOW_BITS) - 1);
                let (address, counter) = (offset(to), offset(counter));
                let value = self.get(thread, value) as u32;
                let block = first + rank as usize - 1;
                self.messages.push(Message { sender: thread, block, address, value, counter });
            }
            Operation::TryWait { to, at, parity } => {
                let (address, parity, block) =
                    (self.shared_address(thread, at), self.get(thread, parity) & 1, self.block_of(thread));
                let phase = self.blocks[block].shared.counter(address)?.phase;
                let has_ended = phase & 1 != parity;
                if has_ended {
                    let observed = &mut self.threads[thread].observed;
                    observed.retain(|(counter, _)| u64::from(*counter) != address);
                    observed.push((address as u32, phase));
                }
                self.set(thread, to, u64::from(has_ended));
                return Ok(Step::Pause);
            }
            Operation::WaitForGrid => self.threads[thread].waited_for_grid = true,
            Operation::Nothing => {}
        }
        Ok(Step::Next)
    }

    fn special(&self, thread: usize, of: Special) -> u64 {
        let Geometry { blocks, cluster, threads } = self.grid.geometry;
        let block = thread as u32 / threads;
        u64::from(match of {
            Special::Thread => thread as u32 % threads,
            Special::Threads => threads,
            Special::Block => block,
            Special::Blocks => blocks,
            Special::ClusterRank => block % cluster,
            Special::ClusterSize => cluster,
            Special::Cluster => block / cluster,
            Special::Clusters => blocks / cluster,
            Special::Nanoseconds => return self.began.elapsed().as_nanos() as u64,
        })
    }

    fn parameter(&self, offset: u64, bytes: u64) -> Result<u64, String> {
        let field = usize::try_from(offset).ok().and_then(|start| {
            let rest = self.grid.parameter.get(start..)?;
            rest.get(..bytes as usize)
        });
        let Some(field) = field else {
            return Err(format!(
                "{bytes} bytes at {offset} of {} bytes of parameter",
                self.grid.parameter.len()
            ));
        };
        let mut value = 0;
        for (index, byte) in field.iter().enumerate() {
            // SAFETY: loaded by the entry point, and so initialized, by the contract of `Grid::run`.
            value |= u64::from(unsafe { byte.assume_init() }) << (index * 8);
        }
        Ok(value)
    }

    /// What an earlier kernel may still write, or read, must not be accessed before the wait for it.
    fn check_grid(&self, thread: usize, constant: bool) -> Result<(), String> {
        if self.grid.entry.waits_for_grid && !constant && !self.threads[thread].waited_for_grid {
            return Err("global memory is accessed before griddepcontrol.wait".to_owned());
        }
        Ok(())
    }

    /// Makes a store visible, and before it those before it that overlap it.
    fn complete_store(&mut self, mut index: usize) {
        let Store { cell, bytes, value, .. } = self.stores[index];
        while let Some(older) =
            self.stores[..index].iter().position(|store| store.cell.overlaps(store.bytes, cell, bytes))
        {
            let before = self.stores.len();
            self.complete_store(older);
            index -= before - self.stores.len();
        }
        self.stores.remove(index);
        cell.store(bytes, value);
    }

    /// Makes the stores of some threads visible, and those before them to the same places.
    fn complete_stores(&mut self, of: impl Fn(usize) -> bool) {
        while let Some(index) = self.stores.iter().position(|store| of(store.thread)) {
            self.complete_store(index);
        }
    }

    fn complete_stores_of_block(&mut self, block: usize) {
        let threads = self.grid.geometry.threads as usize;
        self.complete_stores(|thread| thread / threads == block);
    }

    /// What a thread loads it sees as it has stored it.
    fn see_own_stores(&mut self, thread: usize, cell: Cell, bytes: u64) {
        while let Some(index) = self
            .stores
            .iter()
            .position(|store| store.thread == thread && store.cell.overlaps(store.bytes, cell, bytes))
        {
            self.complete_store(index);
        }
    }

    /// A lane comes to an instruction that those of `mask` execute together.
    fn meet(
        &mut self,
        thread: usize,
        mask: u32,
        shuffle: Option<(Register, u64, usize)>,
    ) -> Result<(), String> {
        if mask & 1 << (thread % WARP) == 0 {
            return Err(format!("a lane that is not in its own mask {mask:#x}"));
        }
        let at = self.threads[thread].at;
        self.threads[thread].lane = Some(Lane { mask, at, shuffle });
        self.release_lanes(thread)
    }

    /// Lets the lanes go on that wait for each other in the warp of `thread`.
    fn release_lanes(&mut self, thread: usize) -> Result<(), String> {
        let first = thread / WARP * WARP;
        let waiting = (first..first + WARP).filter_map(|lane| self.threads[lane].lane);
        let masks: Vec<u32> = waiting.map(|lane| lane.mask).collect();
        for mask in masks {
            let lanes: Vec<usize> =
                (0..WARP).filter(|lane| mask & 1 << lane != 0).map(|lane| first + lane).collect();
            let is_here = |thread: &usize| self.threads[*thread].lane.is_some_and(|lane| lane.mask == mask);
            let is_gone = |thread: &usize| self.threads[*thread].ended;
            if !lanes.iter().all(|thread| is_here(thread) || is_gone(thread)) {
                continue;
            }
            let here: Vec<(usize, Lane)> = lanes
                .iter()
                .filter_map(|thread| self.threads[*thread].lane.map(|lane| (*thread, lane)))
                .collect();
            if here.iter().any(|(_, lane)| lane.at != here[0].1.at) {
                return Err(format!("lanes of mask {mask:#x} come together at different instructions"));
            }
            if here.is_empty() {
                continue;
            }
            for &(lane_thread, lane) in &here {
                let Some((to, _, source)) = lane.shuffle else { continue };
                let from = here.iter().find(|(other, _)| *other == first + source);
                let Some((_, Lane { shuffle: Some((_, value, _)), .. })) = from else {
                    return Err(format!(
                        "a value of lane {source}, which does not shuffle with mask {mask:#x}"
                    ));
                };
                self.set(lane_thread, to, *value);
            }
            if here[0].1.shuffle.is_none() {
                self.complete_stores(|thread| lanes.contains(&thread));
            }
            for (lane_thread, lane) in here {
                let state = &mut self.threads[lane_thread];
                state.lane = None;
                state.at += 1;
                // A shuffle orders no memory.
                state.meetings += u64::from(lane.shuffle.is_none() && mask == u32::MAX);
                if lane_thread != thread {
                    self.runnable.push(lane_thread);
                }
            }
        }
        Ok(())
    }

    /// A thread comes to a barrier of its block.
    fn arrive(&mut self, thread: usize, to: Option<Register>, value: bool) -> Result<(), String> {
        let (index, at) = (self.block_of(thread), self.threads[thread].at);
        self.threads[thread].barrier = Some(to);
        let block = &mut self.blocks[index];
        if block.at_barrier == 0 {
            (block.any, block.barrier_at) = (false, at);
        } else if to.is_some()
            != matches!(self.grid.entry.code[block.barrier_at].operation, Operation::BarrierAny { .. })
        {
            return Err("threads of a block meet at barriers of two kinds".to_owned());
        }
        block.at_barrier += 1;
        block.any |= value;
        if block.ended > 0 {
            return Err("a barrier that threads of the block have ended without".to_owned());
        }
        if block.at_barrier < self.grid.geometry.threads {
            return Ok(());
        }
        let any = block.any;
        block.at_barrier = 0;
        self.complete_stores_of_block(index);
        let threads = self.grid.geometry.threads as usize;
        for member in index * threads..(index + 1) * threads {
            if let Some(Some(to)) = self.threads[member].barrier {
                self.set(member, to, u64::from(any));
            }
            let state = &mut self.threads[member];
            state.barrier = None;
            state.barriers += 1;
            state.at += 1;
            if member != thread {
                self.runnable.push(member);
            }
        }
        Ok(())
    }

    fn cluster_has_passed(&self, thread: usize, cluster: usize) -> bool {
        let Geometry { cluster: blocks, threads, .. } = self.grid.geometry;
        self.cluster_arrivals[cluster] >= self.threads[thread].cluster_arrivals * u64::from(blocks * threads)
    }

    /// Lets threads go on whose cluster has arrived at its barrier.
    fn release_cluster(&mut self, cluster: usize) {
        let members = (self.grid.geometry.cluster * self.grid.geometry.threads) as usize;
        for member in cluster * members..(cluster + 1) * members {
            if self.threads[member].waits_for_cluster && self.cluster_has_passed(member, cluster) {
                self.threads[member].waits_for_cluster = false;
                self.threads[member].at += 1;
                self.runnable.push(member);
            }
        }
    }

    /// A thread ends.
    fn end(&mut self, thread: usize) -> Result<(), String> {
        self.threads[thread].ended = true;
        let block = self.block_of(thread);
        self.blocks[block].ended += 1;
        if self.blocks[block].at_barrier > 0 {
            return Err("ends while threads of its block wait at a barrier".to_owned());
        }
        self.release_lanes(thread)
    }

    /// Brings a word to the block that it was sent to.
    fn deliver(&mut self, index: usize) -> Result<(), Fault> {
        let Message { sender, block, address, value, counter } = self.messages.swap_remove(index);
        let threads = self.grid.geometry.threads;
        let state = &mut self.blocks[block];
        let received = if state.ended == threads {
            Err(format!("sent a word to block {block}, which ended before it arrived"))
        } else {
            state.shared.receive(address, value, counter)
        };
        received.map_err(|what| self.fault(sender, what))
    }
}
