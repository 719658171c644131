//! How threads share a row: a team of the blocks of one cluster works on one token at a time.
//!
//! Pack `i` of a row is thread `i % T`'s of the team's `T` threads. A thread holds `P` of its packs at a time; where
//! those are all it has (`RESIDENT`), the row stays in registers from the sum to the last store. A longer row is
//! taken in chunks and read again, by the same thread, once its sum is known.
//!
//! # Sums over a row
//! have one order, that of [`norm`](fused_collective_core::norm#order-of-operations), whatever the team. The 32 packs of a
//! warp are a line, so a line's sum is the warp's. Of `n` blocks, block `b` has every `n`-th line from line `b` on: what it
//! sums by halves is the same part of the order as if the whole row were its, and `n`, a power of two, sums are left for the
//! cluster. A thread's packs are of different lines, and are summed apart.

use fused_collective_core::{
    MAX_HIDDEN,
    dtype::Element,
    norm::{self, LINE_PACKS},
    pack::Pack,
};

use crate::{
    convert,
    epilogue::{Epilogue, PackIndex, RowValues, weights},
    launch::{Activations, Address, Extras, MAX_BLOCK_THREADS, MAX_CLUSTER, PostNorm, Shape},
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

/// This thread's packs of every row.
#[derive(Clone, Copy, Debug)]
pub struct ThreadSlice<const P: usize, const RESIDENT: bool> {
    thread: u32,
    threads: u32,
    row_packs: u32,
}

impl<const P: usize, const RESIDENT: bool> ThreadSlice<P, RESIDENT> {
    /// The share of this thread.
    #[inline(always)]
    pub fn new(team: &Team, shape: &Shape) -> Self {
        ThreadSlice { thread: team.thread, threads: team.threads, row_packs: shape.row_packs }
    }

    /// Lines of a row that each warp has.
    #[inline(always)]
    fn lines(&self) -> u32 {
        if RESIDENT { P as u32 } else { self.row_packs.div_ceil((P as u32 * self.threads).max(1)) * P as u32 }
    }

    /// Calls `each` for the chunks of `P` packs that a thread takes a row in. As many for
    /// every thread; one where the row is resident.
    #[inline(always)]
    pub fn for_chunks(&self, mut each: impl FnMut(u32)) {
        if RESIDENT {
            return each(0);
        }
        let mut chunk = 0;
        while chunk * P as u32 * self.threads < self.row_packs {
            each(chunk);
            chunk += 1;
        }
    }

    /// The `p`-th pack of chunk `chunk`, unless the row has ended before it.
    #[inline(always)]
    pub fn pack(&self, chunk: u32, p: usize) -> Option<u32> {
        let pack = self.thread + (chunk * P as u32 + p as u32) * self.threads;
        (pack < self.row_packs).then_some(pack)
    }

    /// Calls `each` for all packs of a row that are this thread's.
    #[inline(always)]
    pub fn for_packs(&self, mut each: impl FnMut(u32)) {
        let mut pack = self.thread;
        while pack < self.row_packs {
            each(pack);
            pack += self.threads;
        }
    }

    /// The indices of this thread's packs of chunk `chunk` of token `token`; those past the row's end are not to be used.
    #[inline(always)]
    pub fn indices(&self, token: u64, chunk: u32) -> [PackIndex; P] {
        let pack = |p: usize| self.thread + (chunk * P as u32 + p as u32) * self.threads;
        core::array::from_fn(|p| PackIndex::new(token, pack(p), self.row_packs))
    }

    /// Calls `each` for this thread's packs of chunk `chunk`: `p` and the pack.
    #[inline(always)]
    pub fn for_each(&self, chunk: u32, mut each: impl FnMut(usize, u32)) {
        const { assert!(P == 1 || P == 2) };
        let mut each = |p| {
            if let Some(pack) = self.pack(chunk, p) {
                each(p, pack);
            }
        };
        // Written out: an array of registers needs constant indices, and a compiler may leave a loop a loop.
        each(0);
        if P > 1 {
            each(1);
        }
    }

    /// Calls `each` for this thread's packs of chunk `chunk` as [`for_each`](Self::for_each), and for what is past the
    /// row's end: all lanes of a warp call it together.
    #[inline(always)]
    pub fn for_lanes(&self, chunk: u32, mut each: impl FnMut(usize, u32)) {
        const { assert!(P == 1 || P == 2) };
        let mut each = |p| each(p, self.thread + (chunk * P as u32 + p as u32) * self.threads);
        each(0);
        if P > 1 {
            each(1);
        }
    }
}

/// An epilogue with what it keeps in registers.
#[derive(Clone, Copy, Debug)]
pub struct Prepared<'a, E: Element, X: Epilogue<E>, const N: usize, const P: usize, const RESIDENT: bool> {
    epilogue: &'a X,
    constants: X::Constants,
    /// The weights of this thread's only pack. More would cost registers that the row itself needs: those are
    /// read for each row, from a cache.
    weights: X::Weights,
    /// The same, ready, where there are registers for it.
    ready: X::Ready,
    slice: ThreadSlice<P, RESIDENT>,
}

impl<'a, E: Element, X: Epilogue<E>, const N: usize, const P: usize, const RESIDENT: bool>
    Prepared<'a, E, X, N, P, RESIDENT>
{
    const HOLDS_WEIGHTS: bool = RESIDENT && P == 1;
    /// True if there are registers for more than what a row itself needs: kernels for two ranks hold fewer packs. A maximum
    /// over the row takes them.
    const SPARE: bool = RESIDENT && P == 1 && N == 2 && !X::ROW_MAX;

    /// Reads what is constant. Every thread of the team's blocks calls this once, before the first row; `N` is for how
    /// many ranks the kernel is.
    ///
    /// # Safety
    /// The addresses in `epilogue` are as its documentation says.
    #[inline(always)]
    pub unsafe fn new(epilogue: &'a X, slice: ThreadSlice<P, RESIDENT>, team: &Team) -> Self {
        if X::ROW_SUM || X::ROW_MAX {
            team.clear::<RESIDENT>(slice.lines());
        }
        let (mut weights, mut ready) = (X::Weights::default(), X::Ready::default());
        if Self::HOLDS_WEIGHTS {
            slice.for_each(0, |_, pack| {
                // SAFETY: as this function's.
                weights = unsafe { epilogue.weights(pack) };
                if Self::SPARE {
                    // SAFETY: as this function's.
                    ready = unsafe { epilogue.ready(pack, weights) };
                }
            });
        }
        // SAFETY: as this function's.
        let constants = unsafe { epilogue.constants() };
        Prepared { epilogue, constants, weights, ready, slice }
    }

    /// Completes token `token` of the round: `sum` puts this thread's packs of one chunk of `residual_out` into the
    /// array it is given, or with `POST_NORM` of the sum that there may be a norm of; `residual_out` is stored, and the epilogue
    /// gets the row. Every thread of the team calls this.
    ///
    /// # Safety
    /// The addresses are as their documentation says, `token` is one of the round, and no other team completes it.
    #[inline(always)]
    pub unsafe fn complete<const POST_NORM: bool>(
        &self,
        team: &mut Team,
        shape: &Shape,
        activations: &Activations,
        extras: &Extras,
        token: u32,
        mut sum: impl FnMut(u32, &[PackIndex; P], &mut [Pack; P]),
    ) {
        let token = shape.operation_token(token);
        let mut indices = self.slice.indices(token, 0);
        if Self::SPARE {
            indices = indices.map(PackIndex::kept);
        }
        let mut row = [Pack::default(); P];
        let mut row_sum = 0.0;
        if POST_NORM && RESIDENT && X::ROW_SUM {
            sum(0, &indices, &mut row);
            // SAFETY: as this function's.
            row_sum = unsafe { self.settle(team, (activations, extras), &mut row, |p, _| indices[p]) };
        } else {
            self.slice.for_chunks(|chunk| {
                let mut addends = [0.0; P];
                if !RESIDENT {
                    indices = self.slice.indices(token, chunk);
                }
                sum(chunk, &indices, &mut row);
                self.slice.for_each(chunk, |p, _| {
                    if !activations.residual_out.is_null() {
                        // SAFETY: inside the tensor; the pack is this thread's alone.
                        unsafe { simt::store(indices[p].of(activations.residual_out), row[p]) };
                    }
                    if X::ROW_SUM {
                        addends[p] = self.epilogue.addend(row[p]);
                    } else if !X::ROW_MAX {
                        // SAFETY: as this function's.
                        unsafe { self.finish(indices[p], row[p], RowValues::default()) };
                    }
                });
                if X::ROW_SUM {
                    team.add::<P, RESIDENT>(chunk, addends);
                }
            });
            if X::ROW_SUM {
                row_sum = team.sum::<P, RESIDENT>();
            }
        }
        if !X::ROW_SUM && !X::ROW_MAX {
            return;
        }
        let read = |index: PackIndex| {
            // SAFETY: this thread wrote the pack above, or nobody writes the input.
            unsafe { simt::load(index.of(row_in_memory(activations))) }
        };
        // SAFETY: as this function's.
        let of_row = unsafe { self.row_values(team, row_sum, token, &row, read) };
        self.slice.for_chunks(|chunk| {
            if !Self::SPARE {
                // `black_box`, or they would be kept.
                indices = self.slice.indices(simt::black_box_u64(token), chunk);
            }
            self.slice.for_each(chunk, |p, _| {
                if !RESIDENT {
                    row[p] = read(indices[p]);
                }
                // SAFETY: as this function's.
                unsafe { self.finish(indices[p], row[p], of_row) };
            });
        });
    }

    /// Makes `residual_out` of the sum of all ranks in `row`, which it is already unless there is a norm of the sum. Stores it,
    /// and returns the sum over it. `index` gives a pack's index in the residual.
    ///
    /// The norm of the sum and the sum over `residual_out` are turns of one loop: so the code of a sum over a row is in a
    /// kernel once.
    ///
    /// # Safety
    /// As [`complete`](Self::complete).
    #[inline(always)]
    unsafe fn settle(
        &self,
        team: &mut Team,
        (activations, extras): (&Activations, &Extras),
        row: &mut [Pack; P],
        index: impl Fn(usize, u32) -> PackIndex,
    ) -> f32 {
        let post_norm = &extras.post_norm;
        let mut left = simt::black_box_u32(activations.flags) & Activations::POST_NORM;
        loop {
            let mut addends = [0.0; P];
            self.slice.for_each(0, |p, pack| {
                if left == 0 {
                    // SAFETY: inside the tensor; the pack is this thread's alone.
                    unsafe { simt::store(index(p, pack).of(activations.residual_out), row[p]) };
                }
                addends[p] = self.epilogue.addend(row[p]);
            });
            team.add::<P, RESIDENT>(0, addends);
            let sum = team.sum::<P, RESIDENT>();
            if left == 0 {
                return sum;
            }
            // `black_box`, or a compiler knows that the next turn is the last, and has the loop twice.
            left = simt::black_box_u32(0);
            let inverse_rms = norm::inverse_rms(sum, post_norm.inverse_hidden, post_norm.epsilon, simt::fma);
            self.slice.for_each(0, |p, pack| {
                // SAFETY: as this function's.
                row[p] = unsafe {
                    post_norm_out::<E>((activations, post_norm), index(p, pack), row[p], inverse_rms)
                };
            });
        }
    }

    /// The values of a row that the epilogue needs, of which `row_sum` is the sum. `row` are this thread's packs, or where they
    /// are not resident `read` has them, of row `token` of its tensor.
    ///
    /// # Safety
    /// As [`complete`](Self::complete).
    #[inline(always)]
    unsafe fn row_values(
        &self,
        team: &mut Team,
        row_sum: f32,
        token: u64,
        row: &[Pack; P],
        read: impl Fn(PackIndex) -> Pack,
    ) -> RowValues {
        let value = if X::ROW_SUM { self.epilogue.row_value(row_sum) } else { 0.0 };
        let mut max = 0.0;
        if X::ROW_MAX {
            self.slice.for_chunks(|chunk| {
                self.slice.for_each(chunk, |p, pack| {
                    let index = || PackIndex::new(simt::black_box_u64(token), pack, self.slice.row_packs);
                    let row = if RESIDENT { row[p] } else { read(index()) };
                    // SAFETY: as this function's.
                    let weights = unsafe { self.ready(pack) };
                    max = f32::max(max, self.epilogue.magnitude(row, value, weights));
                });
            });
            max = team.max::<P, RESIDENT>(max);
        }
        RowValues { value, max }
    }

    /// Completes a token of this rank's as [`complete`](Self::complete), but gives what the epilogue makes of each pack
    /// to `send`, with the pack: what it became and, for the first of those that share a word of scales, this word.
    /// The row of `residual_out` is `owned`, the token's row among this rank's. `context` is what both closures work on.
    ///
    /// # Safety
    /// As [`complete`](Self::complete).
    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "a struct of them would have to be taken apart again")]
    pub unsafe fn make<C>(
        &self,
        team: &mut Team,
        shape: &Shape,
        (activations, extras): (&Activations, &Extras),
        owned: u32,
        context: &mut C,
        sum: impl Fn(&mut C, u32, &mut [Pack; P]),
        send: impl Fn(&mut C, u32, Pack, u32),
    ) {
        let index = |pack| PackIndex::new(owned as u64, pack, shape.row_packs);
        let mut row = [Pack::default(); P];
        let mut row_sum = 0.0;
        if RESIDENT && X::ROW_SUM {
            sum(context, 0, &mut row);
            // SAFETY: as this function's.
            row_sum = unsafe { self.settle(team, (activations, extras), &mut row, |_, pack| index(pack)) };
        } else {
            self.slice.for_chunks(|chunk| {
                let mut addends = [0.0; P];
                sum(context, chunk, &mut row);
                self.slice.for_each(chunk, |p, pack| {
                    // SAFETY: inside the tensor; the pack is this thread's alone.
                    unsafe { simt::store(index(pack).of(activations.residual_out), row[p]) };
                    if X::ROW_SUM {
                        addends[p] = self.epilogue.addend(row[p]);
                    }
                });
                if X::ROW_SUM {
                    team.add::<P, RESIDENT>(chunk, addends);
                }
            });
            if X::ROW_SUM {
                row_sum = team.sum::<P, RESIDENT>();
            }
        }
        // SAFETY: this thread wrote the packs above.
        let read = |index: PackIndex| unsafe { simt::load(index.of(activations.residual_out)) };
        // SAFETY: as this function's.
        let of_row = unsafe { self.row_values(team, row_sum, owned as u64, &row, read) };
        self.slice.for_chunks(|chunk| {
            self.slice.for_lanes(chunk, |p, pack| {
                let inside = pack < shape.row_packs;
                if !RESIDENT {
                    row[p] = if inside { read(index(pack)) } else { Pack::default() };
                }
                // SAFETY: as this function's.
                let weights = if inside { unsafe { self.ready(pack) } } else { X::Ready::default() };
                // `black_box`, so that the second pack's registers are not taken while the first's are in use.
                let (words, scales) = self.epilogue.make(
                    index(pack),
                    if P > 1 || X::ROW_MAX { simt::black_box(row[p]) } else { row[p] },
                    of_row,
                    weights,
                    self.constants,
                );
                if inside {
                    send(context, pack, words, scales);
                }
            });
        });
    }

    /// The weights of a pack of the row.
    ///
    /// # Safety
    /// As [`complete`](Self::complete).
    #[inline(always)]
    unsafe fn ready(&self, pack: u32) -> X::Ready {
        if Self::SPARE {
            self.ready
        } else if Self::HOLDS_WEIGHTS {
            // SAFETY: as this function's; so below.
            unsafe { self.epilogue.ready(pack, self.weights) }
        } else {
            // SAFETY: see above.
            unsafe { self.epilogue.ready(pack, self.epilogue.weights(pack)) }
        }
    }

    /// # Safety
    /// As [`complete`](Self::complete).
    #[inline(always)]
    unsafe fn finish(&self, index: PackIndex, row: Pack, of_row: RowValues) {
        // SAFETY: as this function's.
        unsafe {
            let weights = self.ready(index.pack);
            // As in `make`; and so that what `magnitude` made of the row is made again, not kept.
            let row = if P > 1 || X::ROW_MAX { simt::black_box(row) } else { row };
            self.epilogue.finish(index, row, of_row, weights, self.constants);
        }
    }
}

/// A pack of `residual_out`, of a pack of the sum of all ranks: the norm of the sum, plus the residual's pack `index`.
///
/// # Safety
/// The addresses are as their documentation says, and `index` is inside the residual.
#[inline(always)]
unsafe fn post_norm_out<E: Element>(
    (activations, post_norm): (&Activations, &PostNorm),
    index: PackIndex,
    sum: Pack,
    inverse_rms: f32,
) -> Pack {
    let PostNorm { gamma, weight_bias, gamma_f32, .. } = *post_norm;
    // SAFETY: gamma has a row's packs and is constant.
    let weights = unsafe { weights::<E>(gamma, gamma_f32 != 0, index.pack) };
    let mut norm = convert::widen::<E>(sum);
    for (value, weight) in norm.as_mut().iter_mut().zip(weights.as_ref()) {
        *value = *value * inverse_rms * (weight_bias + weight);
    }
    if activations.has(Activations::ROUNDS_SUM) {
        norm = convert::widen::<E>(convert::narrow::<E>(norm));
    }
    if !activations.residual.is_null() {
        // SAFETY: as this function's.
        let residual = convert::widen::<E>(unsafe { simt::load(index.of(activations.residual)) });
        for (value, residual) in norm.as_mut().iter_mut().zip(residual.as_ref()) {
            *value += residual;
        }
    }
    convert::narrow::<E>(norm)
}

/// Where a finished row can be read again. Without `residual_out` there is no residual, and the row is the input.
#[inline(always)]
fn row_in_memory(activations: &Activations) -> Address {
    if activations.residual_out.is_null() { activations.input } else { activations.residual_out }
}
