//! GPU words for GPU things: indices, barriers, shuffles, memory by order and scope, dependent launch, clock.
//!
//! Everything has two implementations behind one signature: PTX instructions on `nvptx64`, and
//! [operating-system threads](host) elsewhere, one for each CUDA thread. Kernels are written over this module
//! alone, so the source that becomes PTX also runs in ordinary tests.
//!
//! What must hold of every kernel over it: grids, clusters and blocks have one dimension, and blocks are a
//! multiple of [`WARP`] threads.

use fused_collective_core::pack::Pack;

use crate::launch::Address;

#[cfg(not(target_arch = "nvptx64"))]
pub mod host;
#[cfg(not(target_arch = "nvptx64"))]
use host as imp;
mod limits;
#[cfg(target_arch = "nvptx64")]
mod nvptx;
#[cfg(target_arch = "nvptx64")]
use nvptx as imp;

pub use limits::{COUNTERS, SHARED_FLOATS, WARP};

/// A wait looks at the clock and at the rank's state once in so many polls. On a GPU a poll takes about 0.7 us.
pub(crate) const POLLS_PER_CHECK: u32 = imp::POLLS_PER_CHECK;

/// A wait looks at the host's memory once in so many checks: across the bus, so seldom.
pub(crate) const CHECKS_PER_ABORT_LOOK: u32 = imp::CHECKS_PER_ABORT_LOOK;

/// This thread's index in its block.
#[inline(always)]
pub fn thread() -> u32 {
    imp::thread()
}

/// Threads of a block.
#[inline(always)]
pub fn threads() -> u32 {
    imp::threads()
}

/// This block's index in the grid.
#[inline(always)]
pub fn block() -> u32 {
    imp::block()
}

/// Blocks of the grid.
#[inline(always)]
pub fn blocks() -> u32 {
    imp::blocks()
}

/// This block's index in its cluster; 0 where there are no clusters.
#[inline(always)]
pub fn cluster_rank() -> u32 {
    imp::cluster_rank()
}

/// Blocks of a cluster; 1 where there are no clusters.
#[inline(always)]
pub fn cluster_size() -> u32 {
    imp::cluster_size()
}

/// This block's cluster's index in the grid; the block's where there are no clusters.
#[inline(always)]
pub fn cluster() -> u32 {
    imp::cluster()
}

/// Clusters of the grid; blocks where there are no clusters.
#[inline(always)]
pub fn clusters() -> u32 {
    imp::clusters()
}

/// Waits until every thread of the block has called it. What they did to memory before is visible after.
#[inline(always)]
pub fn block_barrier() {
    imp::block_barrier();
}

/// Waits like [`block_barrier`], and says whether `value` holds in any thread of the block. What `value` was computed
/// from has been read before any thread gets past this.
#[inline(always)]
pub fn block_any(value: bool) -> bool {
    imp::block_any(value)
}

/// Reconverges the warp after a loop whose trip count differs between lanes. All 32 lanes call it.
///
/// A compiler that does not see lanes together again has what follows executed for each group of them by itself, and
/// shuffles one lane at a time. What lanes did to memory before is visible to all of them after.
#[inline(always)]
pub fn warp_barrier() {
    imp::warp_barrier();
}

/// The sum over the warp, with the same bits in every lane. All 32 lanes call it.
#[inline(always)]
pub fn warp_sum(value: f32) -> f32 {
    imp::warp_sum(value)
}

/// Two sums over the warp: of `first` in its first 16 lanes, of `second` in the others, with the same bits in each of them.
/// All 32 lanes call it.
#[inline(always)]
pub fn two_warp_sums(first: f32, second: f32) -> f32 {
    imp::two_warp_sums(first, second)
}

/// The sum over this lane's tile of `lanes` lanes, 1, 2, 4 or 8, aligned to that many, by halves,
/// with the same bits in each of them. All 32 lanes call it with the same `lanes`.
#[inline(always)]
pub fn tile_sum(value: f32, lanes: u32) -> f32 {
    imp::tile_sum(value, lanes)
}

/// The maximum over this lane's tile of `tile` (a power of two, at most 32) lanes, aligned to that many. The first
/// `lanes` lanes of the warp call it, whole tiles of them, with the same `tile` and `lanes`, at least 1.
#[inline(always)]
pub fn tile_max(value: u32, tile: u32, lanes: u32) -> u32 {
    imp::tile_max(value, tile, lanes)
}

/// The bits of all lanes of this lane's tile, as [`tile_max`].
#[inline(always)]
pub fn tile_or(value: u32, tile: u32, lanes: u32) -> u32 {
    imp::tile_or(value, tile, lanes)
}

/// [`SHARED_FLOATS`] floats that the threads of a block share, and that other blocks of its cluster can send to.
///
/// A kernel takes it once, at its start: it is one allocation for each place in the source that does.
///
/// # Sending
/// What blocks of a cluster send each other is counted where it arrives, by one of [`COUNTERS`] counters. A counter
/// goes through phases: one ends when all floats that were [expected](Self::expect) in it have arrived. Nobody has to
/// flush other memory, as a barrier over the cluster would have everybody do.
#[derive(Clone, Copy, Debug)]
pub struct Shared(imp::Shared);

impl Shared {
    /// The block's shared memory, uninitialized.
    #[inline(always)]
    pub fn take() -> Shared {
        Shared(imp::Shared::take())
    }

    /// Reads float `index` of this block. Order it after the write by a barrier or a [`wait`](Self::wait).
    #[inline(always)]
    pub fn load(self, index: u32) -> f32 {
        self.0.load(index)
    }

    /// Reads four floats of this block, from `index` on, a multiple of 4. Order as [`load`](Self::load).
    #[inline(always)]
    pub fn load_four(self, index: u32) -> [f32; 4] {
        self.0.load_four(index)
    }

    /// Writes float `index` of this block.
    #[inline(always)]
    pub fn store(self, index: u32, value: f32) {
        self.0.store(index, value);
    }

    /// Makes the cluster ready for sending: starts the counters, and waits until all its blocks have done so. Every
    /// thread of the cluster calls this once.
    #[inline(always)]
    pub fn connect(self) {
        self.0.connect();
    }

    /// Says how many floats arrive in the present phase of counter `counter` of this block. One thread of the block
    /// calls this, once in each phase; floats may arrive before.
    #[inline(always)]
    pub fn expect(self, counter: u32, floats: u32) {
        self.0.expect(counter, floats);
    }

    /// Sends a float to place `index` of block `rank` of this cluster, where counter `counter` counts it. Call
    /// [`connect`](Self::connect) first. That block must not end before it has waited for the float.
    #[inline(always)]
    pub fn send(self, rank: u32, index: u32, value: f32, counter: u32) {
        self.0.send(rank, index, value, counter);
    }

    /// Waits until phase `phase` of counter `counter` of this block, the present one or the one before it, has ended.
    /// What arrived in it can be read afterwards.
    #[inline(always)]
    pub fn wait(self, counter: u32, phase: u32) {
        self.0.wait(counter, phase);
    }
}

/// Waits until the kernels that this one depends on have completed and what they wrote is visible. At once where
/// the launch was not a programmatic dependent one.
#[inline(always)]
pub fn wait_for_prerequisites() {
    imp::wait_for_prerequisites();
}

/// Lets the next kernel of the stream start, once every block has called this. It promises that kernel nothing
/// about memory: its own [`wait_for_prerequisites`] does.
#[inline(always)]
pub fn launch_dependents() {
    imp::launch_dependents();
}

/// Nanoseconds of a clock that goes forward; on a GPU its step is up to about a microsecond.
#[inline(always)]
pub fn nanoseconds() -> u64 {
    imp::nanoseconds()
}

/// `a * b + c`, rounded once.
#[inline(always)]
pub fn fma(a: f32, b: f32, c: f32) -> f32 {
    imp::fma(a, b, c)
}

/// The same pack, of which a compiler knows nothing. Where it would widen a pack ahead of a loop, this keeps it
/// packed, in half the registers or a quarter.
#[inline(always)]
pub fn black_box(pack: Pack) -> Pack {
    imp::black_box(pack)
}

/// As [`black_box_u64`], of a number of 32 bits.
#[inline(always)]
pub fn black_box_u32(value: u32) -> u32 {
    imp::black_box_u32(value)
}

/// The same number, of which a compiler knows nothing: what is computed from it is computed here, not ahead of a
/// loop, where it would take up registers.
#[inline(always)]
pub fn black_box_u64(value: u64) -> u64 {
    imp::black_box_u64(value)
}

/// Prefetches 16 bytes into L2. The value is not observed, so it may still change.
///
/// # Safety
/// `address` is valid for a read.
#[inline(always)]
pub unsafe fn prefetch(address: Address) {
    // SAFETY: as this function's.
    unsafe { imp::prefetch(address) }
}

/// Reads memory that nobody writes while the kernel runs, so that caches may keep it.
///
/// # Safety
/// `address` is valid for a read of 16 bytes, aligned to 16, and constant for as long as the kernel runs.
#[inline(always)]
pub unsafe fn load_constant(address: Address) -> Pack {
    // SAFETY: as this function's.
    unsafe { imp::load_constant(address) }
}

/// Reads a word that nobody writes while the kernel runs.
///
/// # Safety
/// As [`load_constant`], for four bytes.
#[inline(always)]
pub unsafe fn load_constant_u32(address: Address) -> u32 {
    // SAFETY: as this function's.
    unsafe { imp::load_constant_u32(address) }
}

/// Weak load: for memory that no other thread writes at the same time.
///
/// # Safety
/// `address` is valid for a read of 16 bytes and aligned to 16, and the read races with no write.
#[inline(always)]
pub unsafe fn load(address: Address) -> Pack {
    // SAFETY: as this function's.
    unsafe { imp::load(address) }
}

/// [`load`] on a condition, without a branch; zeros otherwise.
///
/// # Safety
/// As [`load`], where the condition holds.
#[inline(always)]
pub unsafe fn load_if(condition: bool, address: Address) -> Pack {
    // SAFETY: as this function's.
    unsafe { imp::load_if(condition, address) }
}

/// As [`load_if`], of four bytes, and `otherwise` in place of zero.
///
/// # Safety
/// As [`load_if`].
#[inline(always)]
pub unsafe fn load_u32_if(condition: bool, address: Address, otherwise: u32) -> u32 {
    // SAFETY: as this function's.
    unsafe { imp::load_u32_if(condition, address, otherwise) }
}

/// As [`load_if`], of two bytes.
///
/// # Safety
/// As [`load_if`].
#[inline(always)]
pub unsafe fn load_u16_if(condition: bool, address: Address, otherwise: u32) -> u32 {
    // SAFETY: as this function's.
    unsafe { imp::load_u16_if(condition, address, otherwise) }
}

/// Weak store: for memory that no other thread touches at the same time.
///
/// # Safety
/// `address` is valid for a write of 16 bytes and aligned to 16, and the write races with no other access.
#[inline(always)]
pub unsafe fn store(address: Address, pack: Pack) {
    // SAFETY: as this function's.
    unsafe { imp::store(address, pack) }
}

/// Weak store of any plain value.
///
/// # Safety
/// As [`store`], for the value's size and alignment.
#[inline(always)]
pub unsafe fn store_value<T: Copy>(address: Address, value: T) {
    // SAFETY: as this function's.
    unsafe { core::ptr::with_exposed_provenance_mut::<T>(address.0 as usize).write(value) }
}

/// Weak load of any plain value.
///
/// # Safety
/// As [`load`], for the value's size and alignment; the memory holds a valid `T`.
#[inline(always)]
pub unsafe fn load_value<T: Copy>(address: Address) -> T {
    // SAFETY: as this function's.
    unsafe { core::ptr::with_exposed_provenance::<T>(address.0 as usize).read() }
}

/// Writes a slot, a peer's or one's own: relaxed, at system scope. Each of the four words is written at once; they
/// may arrive in any order.
///
/// # Safety
/// `address` is valid for a write of 16 bytes and aligned to 16, and every concurrent access is a [`poll`].
#[inline(always)]
pub unsafe fn push(address: Address, pack: Pack) {
    // SAFETY: as this function's.
    unsafe { imp::push(address, pack) }
}

/// Reads one's own slot while peers write it: relaxed, at system scope. Each word is read at once.
///
/// # Safety
/// `address` is valid for a read of 16 bytes and aligned to 16, and every concurrent access is a [`push`].
#[inline(always)]
pub unsafe fn poll(address: Address) -> Pack {
    // SAFETY: as this function's.
    unsafe { imp::poll(address) }
}

/// [`push`], of the pack's first `words` words alone: 1, 2 or 4, a constant.
///
/// # Safety
/// As [`push`], for as many bytes.
#[inline(always)]
pub unsafe fn push_words(address: Address, pack: Pack, words: u32) {
    let Pack([first, second, ..]) = pack;
    // SAFETY: as this function's.
    unsafe {
        match words {
            1 => imp::push_word(address, first),
            2 => imp::push_pair(address, [first, second]),
            _ => imp::push(address, pack),
        }
    }
}

/// [`poll`], of the pack's first `words` words alone: 1, 2 or 4, a constant. The others are 0.
///
/// # Safety
/// As [`poll`], for as many bytes.
#[inline(always)]
pub unsafe fn poll_words(address: Address, words: u32) -> Pack {
    // SAFETY: as this function's.
    unsafe {
        match words {
            1 => Pack([imp::poll_word(address), 0, 0, 0]),
            2 => {
                let [first, second] = imp::poll_pair(address);
                Pack([first, second, 0, 0])
            }
            _ => imp::poll(address),
        }
    }
}

/// Replaces a word that is 0, and says whether it did: relaxed, at system scope, since the host may do the same.
///
/// # Safety
/// `address` is valid for a read and write of four bytes and aligned to 4, and is accessed atomically only.
#[inline(always)]
pub unsafe fn replace_zero(address: Address, value: u32) -> bool {
    // SAFETY: as this function's.
    unsafe { imp::replace_zero(address, value) }
}

/// Reads a word that the host or another block may write: relaxed, at system scope.
///
/// # Safety
/// `address` is valid for a read of four bytes and aligned to 4, and is written atomically only.
#[inline(always)]
pub unsafe fn load_relaxed(address: Address) -> u32 {
    // SAFETY: as this function's.
    unsafe { imp::load_relaxed(address) }
}

/// Reads a double word that another block may add to: relaxed, at system scope.
///
/// # Safety
/// `address` is valid for a read of eight bytes and aligned to 8, and is written atomically only.
#[inline(always)]
pub unsafe fn load_relaxed_u64(address: Address) -> u64 {
    // SAFETY: as this function's.
    unsafe { imp::load_relaxed_u64(address) }
}

/// Writes a word that the host reads: release, at system scope. Who reads it (acquire) sees what this thread wrote
/// before.
///
/// # Safety
/// `address` is valid for a write of four bytes and aligned to 4, and is accessed atomically only.
#[inline(always)]
pub unsafe fn store_release(address: Address, value: u32) {
    // SAFETY: as this function's.
    unsafe { imp::store_release(address, value) }
}
