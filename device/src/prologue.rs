//! The making of a rank's addend, ahead of the collective.
//!
//! The addend of most operations lies in memory. A [`Prologue`] makes it instead, as [`Experts`] does: MoE's last step. Each
//! thread makes the packs that it will push or sum, and leaves them in [`Activations::input`](crate::launch::Activations),
//! where it reads them as any other input. So a prologue takes up no registers of a collective, and stands in a kernel once.

use fused_collective_core::{dtype::Element, pack::Pack};

use crate::{
    convert,
    epilogue::PackIndex,
    launch::{Activations, Experts},
    simt,
};

/// The making of a rank's addend. Implement it to fuse something else.
pub trait Prologue<E: Element>: Copy {
    /// False for kernels of operations that are [plain](fused_collective_core::kernels::is_plain): they have no code for
    /// [`Extras`](crate::launch::Extras) and rounding.
    const EXTRAS: bool = true;

    /// True if the addend is to be made: the same for all threads of a launch. Else it lies in `input`.
    #[inline(always)]
    fn makes_addend(&self, _activations: &Activations) -> bool {
        true
    }

    /// Makes one pack of the addend. Called after the dependent-launch wait.
    ///
    /// # Safety
    /// The addresses in `self` are as its documentation says; `index` is inside the tensors.
    unsafe fn addend(&self, index: PackIndex) -> Pack;
}

/// No prologue, and no other extras: the addend lies in `input`.
#[derive(Clone, Copy, Debug)]
pub struct Given;

impl<E: Element> Prologue<E> for Given {
    const EXTRAS: bool = false;

    #[inline(always)]
    fn makes_addend(&self, _activations: &Activations) -> bool {
        false
    }

    #[inline(always)]
    unsafe fn addend(&self, _index: PackIndex) -> Pack {
        Pack::default()
    }
}

/// The most experts whose rows are on their way at the same time.
const MOST: usize = 8;

/// An array of what a closure gives for each of the first `at_once` of [`MOST`] experts, and else `otherwise`. Written out: an
/// array of registers needs constant indices.
macro_rules! each {
    ($at_once:expr, $otherwise:expr, $of:expr) => {
        each!(@ $at_once, $otherwise, $of, 0 1 2 3 4 5 6 7)
    };
    (@ $at_once:expr, $otherwise:expr, $of:expr, $($next:literal)*) => {
        [$(if $next < $at_once { $of($next) } else { $otherwise }),*]
    };
}

/// The rows of expert `expert` of a token and of those after it, `AT_ONCE` together: less than 0 for one that is on another rank,
/// or past the last. `first` is the place of the token's first expert in tensors of `top_k` values a token.
///
/// # Safety
/// As [`Prologue::addend`].
#[inline(always)]
unsafe fn rows_of<const AT_ONCE: usize>(experts: &Experts, first: u64, expert: u32) -> [i32; MOST] {
    // Without branches, so that no load waits for another.
    each!(AT_ONCE, -1, |next: usize| {
        let expert = expert + next as u32;
        let address = experts.index.offset((first + expert as u64) * 4);
        // SAFETY: inside the tensor, which nobody writes meanwhile.
        unsafe { simt::load_u32_if(expert < experts.top_k, address, -1i32 as u32) as i32 }
    })
}

/// The scales of experts whose rows are `rows`: 0 for those without one. The rest is as in [`rows_of`].
///
/// # Safety
/// As [`Prologue::addend`].
#[inline(always)]
unsafe fn scales_of<E: Element, const AT_ONCE: usize>(
    experts: &Experts,
    first: u64,
    expert: u32,
    rows: [i32; MOST],
) -> [f32; MOST] {
    let place = |next: usize| first + (expert + next as u32) as u64;
    if E::LANES == 4 || experts.scales_f32 != 0 {
        each!(AT_ONCE, 0.0, |next: usize| {
            let address = experts.scales.offset(place(next) * 4);
            // SAFETY: inside the tensor, which nobody writes meanwhile; so below.
            f32::from_bits(unsafe { simt::load_u32_if(rows[next] >= 0, address, 0) })
        })
    } else {
        each!(AT_ONCE, 0.0, |next: usize| {
            let address = experts.scales.offset(place(next) * 2);
            // SAFETY: see above.
            let bits = unsafe { simt::load_u16_if(rows[next] >= 0, address, 0) };
            convert::widen::<E>(Pack([bits, 0, 0, 0])).as_ref()[0]
        })
    }
}

/// Makes one pack of the addend, with the rows of `AT_ONCE` experts on their way at the same time, [`MOST`] at most: more take
/// more registers.
///
/// # Safety
/// As [`Prologue::addend`].
#[inline(always)]
pub(crate) unsafe fn addend_of<E: Element, const AT_ONCE: usize>(
    experts: &Experts,
    index: PackIndex,
) -> Pack {
    // What waits for nothing is on its way first.
    let has_shared = !experts.shared.is_null();
    // SAFETY: inside the tensor, if there is one.
    let shared = unsafe { simt::load_if(has_shared, index.of(experts.shared)) };
    let mut sum = E::WIDE_ZERO;
    let first = index.token * experts.top_k as u64;
    let mut expert = 0;
    while expert < experts.top_k {
        // SAFETY: as this function's; so below.
        let rows = unsafe { rows_of::<AT_ONCE>(experts, first, expert) };
        let packs = each!(AT_ONCE, Pack::default(), |next: usize| {
            let row = rows[next];
            let place = (row.max(0) as u64) * index.row_packs as u64 + index.pack as u64;
            // SAFETY: the index of an expert names a row.
            unsafe { simt::load_if(row >= 0, experts.rows.offset(place * Pack::BYTES)) }
        });
        // SAFETY: see above.
        let scales = unsafe { scales_of::<E, AT_ONCE>(experts, first, expert, rows) };
        // Zero times zero adds nothing to a sum that has begun with zero. To skip it, by a branch that all threads take alike, took 3%
        // longer at 1 token.
        let mut add = |next: usize| {
            for (sum, value) in sum.as_mut().iter_mut().zip(convert::widen::<E>(packs[next]).as_ref()) {
                *sum = simt::fma(scales[next], *value, *sum);
            }
        };
        each!(AT_ONCE, (), add);
        // `black_box`, or a compiler has the loop's body several times.
        expert = simt::black_box_u32(expert + AT_ONCE as u32);
    }
    if has_shared {
        for (sum, value) in sum.as_mut().iter_mut().zip(convert::widen::<E>(shared).as_ref()) {
            *sum += value;
        }
    }
    convert::narrow::<E>(sum)
}

impl<E: Element> Prologue<E> for Experts {
    #[inline(always)]
    fn makes_addend(&self, activations: &Activations) -> bool {
        activations.has(Activations::EXPERTS)
    }

    #[inline(always)]
    unsafe fn addend(&self, index: PackIndex) -> Pack {
        // SAFETY: as this function's.
        unsafe { addend_of::<E, MOST>(self, index) }
    }
}
