//! A grid: its threads take turns at random, until all have ended or one is at fault.

mod execute;
mod together;

use std::{
    error::Error,
    fmt,
    mem::MaybeUninit,
    thread,
    time::{Duration, Instant},
};

use crate::{
    instruction::{Entry, Register, Source},
    memory::Memory,
    races::Races,
    shared::{Access, Shared},
    stores::Stores,
};

/// Threads of a warp.
const WARP: usize = 32;
/// Instructions that a thread executes before another may, at most.
const LONGEST_TURN: usize = 96;
/// Turns after which the operating system may run another grid, on which this one may be waiting.
const TURNS_OF_A_GRID: u64 = 512;

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
    shuffle: Option<Shuffle>,
}

/// What a lane gives and gets.
#[derive(Clone, Copy)]
struct Shuffle {
    value: u64,
    /// The lane that it gets a value from, and where that goes.
    source: usize,
    to: Register,
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
    /// Threads at the barrier.
    at_barrier: u32,
    /// Whether the predicate of one of them is true.
    any: bool,
    /// Whether those there want to know that.
    is_asked: bool,
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
    /// Local memory of each thread, once it has accessed it.
    locals: Vec<Vec<u8>>,
    blocks: Vec<Block>,
    /// Threads of each cluster that have arrived at its barrier, in all.
    cluster_arrivals: Vec<u64>,
    messages: Vec<Message>,
    stores: Stores,
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
            is_asked: false,
            ended: 0,
        };
        Running {
            grid,
            threads: (0..all).map(|_| Thread::default()).collect(),
            registers: vec![0; all * grid.entry.registers],
            locals: vec![Vec::new(); all],
            blocks: (0..blocks).map(|_| block()).collect(),
            cluster_arrivals: vec![0; (blocks / cluster) as usize],
            messages: Vec::new(),
            stores: Stores::default(),
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
            if self.stores.len() > 0 && self.below(16) == 0 {
                let index = self.below(self.stores.len());
                self.stores.complete(index);
            }
            if self.runnable.is_empty() {
                self.stores.complete_of(|_| true);
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
            let length = 1 + self.below(LONGEST_TURN);
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
