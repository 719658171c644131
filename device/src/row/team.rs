//! The blocks that share a row, and sums over it.
//!
//! Sums over a row have one order, that of [`norm`](fused_collective_core::norm#order-of-operations), whatever the team. The 32 packs of a
//! warp are a line, so a line's sum is the warp's. Of `n` blocks, block `b` has every `n`-th line from line `b` on: what it
//! sums by halves is the same part of the order as if the whole row were its, and `n`, a power of two, sums are left for the
//! cluster. A thread's packs are of different lines, and are summed apart.

use fused_collective_core::{
    MAX_HIDDEN,
    norm::{self, LINE_PACKS},
    pack::Pack,
};

use crate::{
    launch::{MAX_BLOCK_THREADS, MAX_CLUSTER},
    simt::{self, SHARED_FLOATS, Shared, WARP},
};

/// Lines of a row that a block may have: in registers, where a warp of the largest block has one; else of the longest row.
const fn max_lines(resident: bool) -> u32 {
    if resident { MAX_BLOCK_THREADS / WARP } else { (MAX_HIDDEN * 4 / Pack::BYTES) as u32 / WARP }
}

/// Floats of shared memory that one sum takes: one for each line and for each block.
const fn partials(resident: bool) -> u32 {
    max_lines(resident) + MAX_CLUSTER
}

const _: () = assert!(2 * partials(false) <= SHARED_FLOATS && LINE_PACKS == WARP as usize);

/// The blocks that share a row, as one of their threads sees them.
#[derive(Debug)]
pub struct Team {
    /// This team's index in the grid.
    pub index: u32,
    /// Teams of the grid.
    pub teams: u32,
    /// This thread's index in the team.
    pub thread: u32,
    /// Threads of the team.
    pub threads: u32,
    shared: Shared,
    /// Sums made so far.
    sums: u32,
}

impl Team {
    /// Joins the team. Every thread of the grid calls this once, at the start of its kernel; `sums` says whether it
    /// will call [`sum`](Self::sum).
    #[inline(always)]
    pub fn join(sums: bool) -> Team {
        let (cluster, cluster_rank) = (simt::cluster_size(), simt::cluster_rank());
        let shared = Shared::take();
        if sums && cluster > 1 {
            shared.connect();
        }
        let thread = (simt::thread() / WARP * cluster + cluster_rank) * WARP + simt::thread() % WARP;
        Team {
            index: simt::cluster(),
            teams: simt::clusters(),
            // `black_box`, or a compiler keeps lane and line apart, in two registers.
            thread: simt::black_box_u32(thread),
            threads: cluster * simt::threads(),
            shared,
            sums: 0,
        }
    }

    /// Zeroes the places of lines and blocks that this launch does not have. Every thread of the block calls this once,
    /// before its first sum over rows of which each of its warps has `lines` lines.
    #[inline(always)]
    pub fn clear<const RESIDENT: bool>(&self, lines: u32) {
        let (cluster, used) = (simt::cluster_size(), simt::threads() / WARP * lines);
        let (lanes, _) = Self::tiles(used);
        // Most rows fill their places, and the code need not be fetched.
        if RESIDENT && used == lanes * 4 && (cluster == 1 || cluster == MAX_CLUSTER) {
            return;
        }
        let mut index = simt::thread();
        while index < 2 * partials(RESIDENT) {
            let place = index % partials(RESIDENT);
            let is_used = if place >= max_lines(RESIDENT) {
                place - max_lines(RESIDENT) < cluster
            } else if RESIDENT {
                // The line that has the place, if one has.
                place / 4 + place % 4 * lanes < used && place < 4 * lanes
            } else {
                place < used
            };
            if !is_used {
                self.shared.store(index, 0.0);
            }
            index += simt::threads();
        }
    }

    /// The place of the sum of this block's line `line` of `lines`.
    ///
    /// Resident lines are summed four in a lane, by as many lanes side by side as it takes: [`tiles`](Self::tiles). A lane
    /// has every line that is as many after another, so that a tile's sum ends with neighbours.
    #[inline(always)]
    fn place<const RESIDENT: bool>(line: u32, lines: u32) -> u32 {
        if !RESIDENT {
            return line;
        }
        let (lanes, shift) = Self::tiles(lines);
        debug_assert!(line < 4 * lanes, "a block holds more lines than the largest of one pack a thread");
        (line & (lanes - 1)) * 4 + (line >> shift)
    }

    /// Lanes that sum `lines` resident lines, and its logarithm.
    #[inline(always)]
    fn tiles(lines: u32) -> (u32, u32) {
        const { assert!(max_lines(true) == 32) };
        match lines {
            17.. => (8, 3),
            9.. => (4, 2),
            5.. => (2, 1),
            _ => (1, 0),
        }
    }

    /// Leaves the sums of this warp's lines of chunk `chunk` of a row, of which this thread's packs have the sums `packs`,
    /// for [`sum`](Self::sum). Every thread of the team calls this for each chunk of the row.
    #[inline(always)]
    pub fn add<const P: usize, const RESIDENT: bool>(&self, chunk: u32, packs: [f32; P]) {
        const { assert!(P == 1 || P == 2) };
        let (thread, warps) = (simt::thread(), simt::threads() / WARP);
        let lanes = WARP / P as u32;
        let line = (chunk * P as u32 + thread % WARP / lanes) * warps + thread / WARP;
        // Ahead of the sum, which takes its time.
        let place = Self::place::<RESIDENT>(line, warps * P as u32);
        // Two sums take as many shuffles as one: in the first, each half of the lanes takes over one of them.
        let sum = match P {
            1 => simt::warp_sum(packs[0]),
            _ => simt::two_warp_sums(packs[0], packs[P - 1]),
        };
        // Past the longest row's end there is nothing to add.
        if thread % lanes == 0 && (RESIDENT || line < max_lines(false)) {
            self.shared.store(self.sums % 2 * partials(RESIDENT) + place, sum);
        }
    }

    /// The sum over a row whose lines' sums were [left](Self::add), with the same bits in every thread. Every thread of the
    /// team calls it.
    ///
    /// The blocks that share a row send their own sums to each other. Sums alternate between two buffers: one is
    /// written again two sums later, when the sum between has shown that everybody has read it. After the last sum nobody
    /// sends to a block any more, so blocks may end.
    #[inline(always)]
    pub fn sum<const P: usize, const RESIDENT: bool>(&mut self) -> f32 {
        let (buffer, phase) = (self.sums % 2, self.sums / 2);
        self.sums += 1;
        let partials = buffer * partials(RESIDENT);
        simt::block_barrier();
        let lane = simt::thread() % WARP;
        let sum = if RESIDENT {
            let (lanes, _) = Self::tiles(simt::threads() / WARP * P as u32);
            simt::tile_sum(self.quad(partials + (lane & (lanes - 1)) * 4), lanes)
        } else {
            let mut of_lane = [0.0; (max_lines(false) / WARP) as usize];
            for (index, sum) in of_lane.iter_mut().enumerate() {
                *sum = self.shared.load(partials + index as u32 * WARP + lane);
            }
            simt::warp_sum(norm::sum_by_halves(of_lane))
        };
        // To read it again costs less than to keep it.
        if simt::cluster_size() == 1 {
            return sum;
        }
        let [first, second] = self.exchange(sum, partials + max_lines(RESIDENT), buffer, phase);
        norm::sum_by_halves(core::array::from_fn::<_, 4, _>(|block| first[block] + second[block]))
    }

    /// The largest of all threads' numbers, none of which is negative or NaN. Every thread of the team calls it.
    ///
    /// It takes its turn with the [sums](Self::sum) over the rows, and leaves what they need in shared memory.
    #[inline(always)]
    pub fn max<const P: usize, const RESIDENT: bool>(&mut self, largest: f32) -> f32 {
        let (buffer, phase) = (self.sums % 2, self.sums / 2);
        self.sums += 1;
        let partials = buffer * partials(RESIDENT);
        let (lane, warps) = (simt::thread() % WARP, simt::threads() / WARP);
        let over_warp = |value: f32| f32::from_bits(simt::tile_max(value.to_bits(), WARP, WARP));
        // Where a line's sum lies. Other places stay as they are.
        let place = |warp: u32| partials + Self::place::<RESIDENT>(warp, warps * P as u32);
        let of_warp = over_warp(largest);
        if lane == 0 {
            self.shared.store(place(simt::thread() / WARP), of_warp);
        }
        simt::block_barrier();
        let largest = over_warp(if lane < warps { self.shared.load(place(lane)) } else { 0.0 });
        if simt::cluster_size() == 1 {
            return largest;
        }
        let [first, second] = self.exchange(largest, partials + max_lines(RESIDENT), buffer, phase);
        let of = |four: [f32; 4]| four.into_iter().fold(0.0, f32::max);
        of(first).max(of(second))
    }

    /// Sends this block's number to every block of the cluster. Returns those of all, in their places from `numbers` on.
    #[inline(always)]
    fn exchange(&self, number: f32, numbers: u32, buffer: u32, phase: u32) -> [[f32; 4]; 2] {
        const { assert!(MAX_CLUSTER == 8) };
        let cluster = simt::cluster_size();
        if simt::thread() < cluster {
            if simt::thread() == 0 {
                self.shared.expect(buffer, cluster);
            }
            self.shared.send(simt::thread(), numbers + simt::cluster_rank(), number, buffer);
        }
        self.shared.wait(buffer, phase);
        [0, 4].map(|block| self.shared.load_four(numbers + block))
    }

    /// The sum by halves of four floats of shared memory.
    #[inline(always)]
    fn quad(&self, first: u32) -> f32 {
        norm::sum_by_halves(self.shared.load_four(first))
    }
}
