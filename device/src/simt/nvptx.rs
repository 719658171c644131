//! `simt` as PTX. Each function is one instruction, or the few that its comment names.
//!
//! LLVM does not know that threads execute `asm!` together, and is free to copy it into branches that one warp takes
//! both of. Barriers are therefore the forms without `.aligned`, which may meet from different copies; shuffles may
//! not, and are LLVM's own intrinsics, which it never copies.

use core::arch::asm;

use fused_collective_core::pack::Pack;

use super::limits::{COUNTERS, SHARED_FLOATS, WARP};
use crate::launch::Address;

pub(super) const POLLS_PER_CHECK: u32 = 256;
pub(super) const CHECKS_PER_ABORT_LOOK: u32 = 1024;

macro_rules! special_register {
    ($name:ident, $register:literal) => {
        #[inline(always)]
        pub(super) fn $name() -> u32 {
            let value;
            // SAFETY: reads a special register. Not `pure`: to read it again costs less than to keep it.
            unsafe { asm!(concat!("mov.u32 {0}, %", $register, ";"), out(reg32) value, options(nomem)) }
            value
        }
    };
}

special_register!(thread, "tid.x");
special_register!(threads, "ntid.x");
special_register!(block, "ctaid.x");
special_register!(blocks, "nctaid.x");
#[cfg(target_feature = "sm_90")]
special_register!(cluster_rank, "cluster_ctarank");
#[cfg(target_feature = "sm_90")]
special_register!(cluster_size, "cluster_nctarank");
#[cfg(target_feature = "sm_90")]
special_register!(cluster, "clusterid.x");
#[cfg(target_feature = "sm_90")]
special_register!(clusters, "nclusterid.x");

#[cfg(not(target_feature = "sm_90"))]
#[inline(always)]
pub(super) fn cluster_rank() -> u32 {
    0
}

#[cfg(not(target_feature = "sm_90"))]
#[inline(always)]
pub(super) fn cluster_size() -> u32 {
    1
}

#[cfg(not(target_feature = "sm_90"))]
#[inline(always)]
pub(super) fn cluster() -> u32 {
    block()
}

#[cfg(not(target_feature = "sm_90"))]
#[inline(always)]
pub(super) fn clusters() -> u32 {
    blocks()
}

#[inline(always)]
pub(super) fn block_barrier() {
    // SAFETY: every thread of the block gets here, by the contract of the caller's kernel.
    unsafe { asm!("barrier.sync 0;") }
}

#[inline(always)]
pub(super) fn block_any(value: bool) -> bool {
    let any: u32;
    // SAFETY: as `block_barrier`.
    unsafe {
        asm!(
            "{{ .reg .pred any; setp.ne.u32 any, {1}, 0; barrier.red.or.pred any, 0, any; selp.u32 {0}, 1, 0, any; }}",
            out(reg32) any, in(reg32) u32::from(value),
        );
    }
    any != 0
}

unsafe extern "C" {
    /// `shfl.sync.bfly.b32`: `value` of the lane whose number differs in the bits of `distance`. All lanes of `mask`
    /// execute it together.
    #[link_name = "llvm.nvvm.shfl.sync.bfly.f32"]
    fn shuffle_f32(mask: u32, value: f32, distance: u32, clamp: u32) -> f32;

    /// [`shuffle_f32`], of an integer.
    #[link_name = "llvm.nvvm.shfl.sync.bfly.i32"]
    fn shuffle_u32(mask: u32, value: u32, distance: u32, clamp: u32) -> u32;

    /// `bar.warp.sync`: all lanes of `mask` go on together.
    #[link_name = "llvm.nvvm.bar.warp.sync"]
    fn synchronize(mask: u32);
}

/// The shuffles' clamp: lanes of the whole warp.
const WHOLE_WARP: u32 = 31;

#[inline(always)]
pub(super) fn warp_barrier() {
    // SAFETY: all 32 lanes are here.
    unsafe { synchronize(u32::MAX) }
}

#[inline(always)]
pub(super) fn warp_sum(mut value: f32) -> f32 {
    // A butterfly: in each step both partners add the same two numbers, so all lanes end with the same bits.
    let mut distance = WARP / 2;
    while distance > 0 {
        // SAFETY: all 32 lanes are here.
        value += unsafe { shuffle_f32(u32::MAX, value, distance, WHOLE_WARP) };
        distance /= 2;
    }
    value
}

#[inline(always)]
pub(super) fn two_warp_sums(first: f32, second: f32) -> f32 {
    let is_second = thread() & (WARP / 2) != 0;
    let (mut value, other) = if is_second { (second, first) } else { (first, second) };
    let mut distance = WARP / 2;
    // SAFETY: all 32 lanes are here; so below.
    value += unsafe { shuffle_f32(u32::MAX, other, distance, WHOLE_WARP) };
    while distance > 1 {
        distance /= 2;
        value += unsafe { shuffle_f32(u32::MAX, value, distance, WHOLE_WARP) };
    }
    value
}

#[inline(always)]
pub(super) fn tile_sum(mut value: f32, lanes: u32) -> f32 {
    // As above. Written out: the distances of a loop would be in registers.
    macro_rules! add {
        ($($distance:literal)*) => {$(
            if lanes > $distance {
                // SAFETY: all 32 lanes are here, as `lanes` is the same in all of them.
                value += unsafe { shuffle_f32(u32::MAX, value, $distance, WHOLE_WARP) };
            }
        )*};
    }
    add!(4 2 1);
    value
}

/// `value` combined with those of the other lanes of a tile.
macro_rules! over_tile {
    ($value:ident, $tile:ident, $lanes:ident, $combine:expr) => {{
        // The same in all lanes: one for each tile would part the warp into tiles that go on one after the other.
        let mask = u32::MAX >> (WARP - $lanes);
        let combine: fn(u32, u32) -> u32 = $combine;
        over_tile!(@ $value $tile mask combine 16 8 4 2 1);
        $value
    }};
    // Written out: the distances of a loop would be in registers.
    (@ $value:ident $tile:ident $mask:ident $combine:ident $($distance:literal)*) => {$(
        if $tile > $distance {
            // SAFETY: all lanes of the mask are here, with the same mask and tile.
            $value = $combine($value, unsafe { shuffle_u32($mask, $value, $distance, WHOLE_WARP) });
        }
    )*};
}

#[inline(always)]
pub(super) fn tile_max(mut value: u32, tile: u32, lanes: u32) -> u32 {
    over_tile!(value, tile, lanes, |a, b| a.max(b))
}

#[inline(always)]
pub(super) fn tile_or(mut value: u32, tile: u32, lanes: u32) -> u32 {
    over_tile!(value, tile, lanes, |a, b| a | b)
}

/// An address in shared memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shared(u32);

impl Shared {
    #[inline(always)]
    pub(super) fn take() -> Shared {
        let address;
        // SAFETY: declares an array in shared memory, local to this block of PTX, and takes its address.
        unsafe {
            asm!(
                "{{ .shared .align 16 .b8 shared_floats[{bytes}]; mov.u32 {address}, shared_floats; }}",
                bytes = const SHARED_FLOATS * 4 + COUNTERS * 8,
                address = out(reg32) address,
                options(nomem),
            );
        }
        Shared(address)
    }

    #[inline(always)]
    pub(super) fn load(self, index: u32) -> f32 {
        let value;
        // SAFETY: inside the array, as the callers' indices are below SHARED_FLOATS.
        unsafe { asm!("ld.shared.f32 {0}, [{1}];", out(reg32) value, in(reg32) self.0 + index * 4) }
        value
    }

    #[inline(always)]
    pub(super) fn load_four(self, index: u32) -> [f32; 4] {
        let (a, b, c, d);
        // SAFETY: as `load`. The array is aligned to 16 bytes, and `index` a multiple of 4.
        unsafe {
            asm!(
                "ld.shared.v4.f32 {{{0}, {1}, {2}, {3}}}, [{4}];",
                out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) self.0 + index * 4,
            );
        }
        [a, b, c, d]
    }

    #[inline(always)]
    pub(super) fn store(self, index: u32, value: f32) {
        // SAFETY: as `load`.
        unsafe { asm!("st.shared.f32 [{0}], {1};", in(reg32) self.0 + index * 4, in(reg32) value) }
    }

    /// The address of a counter, an `mbarrier` that follows the floats.
    #[cfg(target_feature = "sm_90")]
    #[inline(always)]
    fn counter(self, counter: u32) -> u32 {
        self.0 + SHARED_FLOATS * 4 + counter * 8
    }

    #[inline(always)]
    pub(super) fn connect(self) {
        #[cfg(target_feature = "sm_90")]
        // SAFETY: the counters are in the array, and nobody uses them before the barrier. `expect` is the one arrival
        // of a phase. The barrier need not release anything: the fence makes the counters visible, and there is
        // nothing else.
        unsafe {
            if thread() == 0 {
                for counter in 0..COUNTERS {
                    asm!("mbarrier.init.shared::cta.b64 [{0}], 1;", in(reg32) self.counter(counter));
                }
                asm!("fence.mbarrier_init.release.cluster;");
            }
            asm!("barrier.cluster.arrive.relaxed; barrier.cluster.wait;");
        }
    }

    #[inline(always)]
    pub(super) fn expect(self, counter: u32, floats: u32) {
        #[cfg(target_feature = "sm_90")]
        // SAFETY: a counter that `connect` started.
        unsafe {
            asm!(
                "mbarrier.arrive.expect_tx.shared::cta.b64 _, [{0}], {1};",
                in(reg32) self.counter(counter), in(reg32) floats * 4,
            );
        }
        #[cfg(not(target_feature = "sm_90"))]
        let _ = (counter, floats); // there are no clusters
    }

    #[inline(always)]
    pub(super) fn send(self, rank: u32, index: u32, value: f32, counter: u32) {
        #[cfg(target_feature = "sm_90")]
        // SAFETY: as `load`; the other block runs, by this function's contract.
        unsafe {
            asm!(
                "{{ .reg .b32 at, counter; \
                 mapa.shared::cluster.u32 at, {0}, {2}; \
                 mapa.shared::cluster.u32 counter, {1}, {2}; \
                 st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [at], {3}, [counter]; }}",
                in(reg32) self.0 + index * 4, in(reg32) self.counter(counter), in(reg32) rank,
                in(reg32) value.to_bits(),
            );
        }
        #[cfg(not(target_feature = "sm_90"))]
        let _ = (rank, index, value, counter);
    }

    #[inline(always)]
    pub(super) fn wait(self, counter: u32, phase: u32) {
        #[cfg(target_feature = "sm_90")]
        loop {
            let done: u32;
            // SAFETY: a counter that `connect` started. The instruction suspends the thread for a while.
            unsafe {
                asm!(
                    "{{ .reg .pred done; \
                     mbarrier.try_wait.parity.shared::cta.b64 done, [{1}], {2}; \
                     selp.u32 {0}, 1, 0, done; }}",
                    out(reg32) done, in(reg32) self.counter(counter), in(reg32) phase % 2,
                );
            }
            if done != 0 {
                break;
            }
        }
        #[cfg(not(target_feature = "sm_90"))]
        let _ = (counter, phase);
    }
}

#[inline(always)]
pub(super) fn wait_for_prerequisites() {
    #[cfg(target_feature = "sm_90")]
    // SAFETY: only waits.
    unsafe {
        asm!("griddepcontrol.wait;")
    }
}

#[inline(always)]
pub(super) fn launch_dependents() {
    #[cfg(target_feature = "sm_90")]
    // SAFETY: has no effect on this kernel.
    unsafe {
        asm!("griddepcontrol.launch_dependents;")
    }
}

#[inline(always)]
pub(super) fn nanoseconds() -> u64 {
    let time;
    // SAFETY: reads a clock.
    unsafe { asm!("mov.u64 {0}, %globaltimer;", out(reg64) time, options(nomem)) }
    time
}

#[inline(always)]
pub(super) fn fma(a: f32, b: f32, c: f32) -> f32 {
    let result;
    // SAFETY: arithmetic.
    unsafe {
        asm!("fma.rn.f32 {0}, {1}, {2}, {3};", out(reg32) result, in(reg32) a, in(reg32) b, in(reg32) c, options(pure, nomem));
    }
    result
}

#[inline(always)]
pub(super) fn black_box(pack: Pack) -> Pack {
    let [mut a, mut b, mut c, mut d] = pack.0;
    // SAFETY: nothing. Volatile, or it would be moved out of the loop as well.
    unsafe {
        asm!("// {0} {1} {2} {3}", inout(reg32) a, inout(reg32) b, inout(reg32) c, inout(reg32) d, options(nomem));
    }
    Pack([a, b, c, d])
}

#[inline(always)]
pub(super) fn black_box_u32(mut value: u32) -> u32 {
    // SAFETY: nothing. Volatile, as above.
    unsafe { asm!("// {0}", inout(reg32) value, options(nomem)) }
    value
}

#[inline(always)]
pub(super) fn black_box_u64(mut value: u64) -> u64 {
    // SAFETY: nothing. Volatile, as above.
    unsafe { asm!("// {0}", inout(reg64) value, options(nomem)) }
    value
}

/// # Safety
/// As the public function of this name.
#[inline(always)]
pub(super) unsafe fn prefetch(address: Address) {
    // SAFETY: as this function's.
    unsafe { asm!("prefetch.global.L2 [{0}];", in(reg64) address.0) }
}

/// # Safety
/// As the public function of this name.
#[inline(always)]
pub(super) unsafe fn load_if(condition: bool, address: Address) -> Pack {
    let (mut a, mut b, mut c, mut d) = (0u32, 0u32, 0u32, 0u32);
    // SAFETY: as this function's.
    unsafe {
        asm!(
            "{{ .reg .pred is; setp.ne.u32 is, {5}, 0; @is ld.global.v4.u32 {{{0}, {1}, {2}, {3}}}, [{4}]; }}",
            inout(reg32) a, inout(reg32) b, inout(reg32) c, inout(reg32) d,
            in(reg64) address.0, in(reg32) condition as u32,
        );
    }
    Pack([a, b, c, d])
}

macro_rules! load_value_if {
    ($name:ident, $instruction:literal) => {
        /// # Safety
        /// As the public function of this name.
        #[inline(always)]
        pub(super) unsafe fn $name(condition: bool, address: Address, otherwise: u32) -> u32 {
            let mut value = otherwise;
            // SAFETY: as this function's.
            unsafe {
                asm!(
                    concat!("{{ .reg .pred is; setp.ne.u32 is, {2}, 0; @is ", $instruction, " {0}, [{1}]; }}"),
                    inout(reg32) value, in(reg64) address.0, in(reg32) condition as u32,
                );
            }
            value
        }
    };
}

load_value_if!(load_u32_if, "ld.global.u32");
load_value_if!(load_u16_if, "ld.global.u16");

macro_rules! load_pack {
    ($name:ident, $instruction:literal) => {
        /// # Safety
        /// As the public function of this name.
        #[inline(always)]
        pub(super) unsafe fn $name(address: Address) -> Pack {
            let (a, b, c, d);
            // SAFETY: as this function's.
            unsafe {
                asm!(
                    concat!($instruction, ".v4.u32 {{{0}, {1}, {2}, {3}}}, [{4}];"),
                    out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg64) address.0,
                );
            }
            Pack([a, b, c, d])
        }
    };
}

macro_rules! store_pack {
    ($name:ident, $instruction:literal) => {
        /// # Safety
        /// As the public function of this name.
        #[inline(always)]
        pub(super) unsafe fn $name(address: Address, pack: Pack) {
            let [a, b, c, d] = pack.0;
            // SAFETY: as this function's.
            unsafe {
                asm!(
                    concat!($instruction, ".v4.u32 [{4}], {{{0}, {1}, {2}, {3}}};"),
                    in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d, in(reg64) address.0,
                );
            }
        }
    };
}

load_pack!(load_constant, "ld.global.nc");
load_pack!(load, "ld.global");
load_pack!(poll, "ld.relaxed.sys.global");
store_pack!(store, "st.global");
store_pack!(push, "st.relaxed.sys.global");

/// # Safety
/// As [`push`], for eight bytes.
#[inline(always)]
pub(super) unsafe fn push_pair(address: Address, [a, b]: [u32; 2]) {
    // SAFETY: as this function's.
    unsafe {
        asm!("st.relaxed.sys.global.v2.u32 [{2}], {{{0}, {1}}};", in(reg32) a, in(reg32) b, in(reg64) address.0)
    }
}

/// # Safety
/// As [`poll`], for eight bytes.
#[inline(always)]
pub(super) unsafe fn poll_pair(address: Address) -> [u32; 2] {
    let (a, b);
    // SAFETY: as this function's.
    unsafe {
        asm!("ld.relaxed.sys.global.v2.u32 {{{0}, {1}}}, [{2}];", out(reg32) a, out(reg32) b, in(reg64) address.0)
    }
    [a, b]
}

/// # Safety
/// As [`push`], for four bytes.
#[inline(always)]
pub(super) unsafe fn push_word(address: Address, word: u32) {
    // SAFETY: as this function's.
    unsafe { asm!("st.relaxed.sys.global.u32 [{1}], {0};", in(reg32) word, in(reg64) address.0) }
}

/// # Safety
/// As [`poll`], for four bytes.
#[inline(always)]
pub(super) unsafe fn poll_word(address: Address) -> u32 {
    // SAFETY: as this function's.
    unsafe { load_relaxed(address) }
}

/// # Safety
/// As the public function of this name.
#[inline(always)]
pub(super) unsafe fn load_constant_u32(address: Address) -> u32 {
    let value;
    // SAFETY: as this function's.
    unsafe { asm!("ld.global.nc.u32 {0}, [{1}];", out(reg32) value, in(reg64) address.0) }
    value
}

/// # Safety
/// As the public function of this name.
#[inline(always)]
pub(super) unsafe fn replace_zero(address: Address, value: u32) -> bool {
    let old: u32;
    // SAFETY: as this function's.
    unsafe {
        asm!("atom.relaxed.sys.global.cas.b32 {0}, [{1}], 0, {2};", out(reg32) old, in(reg64) address.0, in(reg32) value);
    }
    old == 0
}

/// # Safety
/// As the public function of this name.
#[inline(always)]
pub(super) unsafe fn load_relaxed(address: Address) -> u32 {
    let value;
    // SAFETY: as this function's.
    unsafe { asm!("ld.relaxed.sys.global.u32 {0}, [{1}];", out(reg32) value, in(reg64) address.0) }
    value
}

/// # Safety
/// As the public function of this name.
#[inline(always)]
pub(super) unsafe fn load_relaxed_u64(address: Address) -> u64 {
    let value;
    // SAFETY: as this function's.
    unsafe { asm!("ld.relaxed.sys.global.u64 {0}, [{1}];", out(reg64) value, in(reg64) address.0) }
    value
}

/// # Safety
/// As the public function of this name.
#[inline(always)]
pub(super) unsafe fn store_release(address: Address, value: u32) {
    // SAFETY: as this function's.
    unsafe { asm!("st.release.sys.global.u32 [{0}], {1};", in(reg64) address.0, in(reg32) value) }
}
