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

/// Experts whose rows are on their way at the same time.
const AT_ONCE: u32 = 4;

/// The rows of expert `expert` of a token and of those after it, with their scales: less than 0, and 0, for one that is on
/// another rank, or past the last. `first` is the place of the token's first expert in tensors of `top_k` values a token.
///
/// # Safety
/// As [`Prologue::addend`].
#[inline(always)]
unsafe fn chosen<E: Element>(experts: &Experts, first: u64, expert: u32) -> [(i32, f32); AT_ONCE as usize] {
    // Without branches, so that no load waits for another. Written out: an array of registers needs constant indices.
    let place = |next: u32| first + (expert + next) as u64;
    let none = -1i32 as u32;
    let row = |next: u32| {
        let address = experts.index.offset(place(next) * 4);
        // SAFETY: inside the tensor, which nobody writes meanwhile; so below.
        unsafe { simt::load_u32_if(expert + next < experts.top_k, address, none) as i32 }
    };
    let rows = [row(0), row(1), row(2), row(3)];
    let scales = if E::LANES == 4 || experts.scales_f32 != 0 {
        let scale = |next: u32| {
            let address = experts.scales.offset(place(next) * 4);
            // SAFETY: see above.
            f32::from_bits(unsafe { simt::load_u32_if(rows[next as usize] >= 0, address, 0) })
        };
        [scale(0), scale(1), scale(2), scale(3)]
    } else {
        let scale = |next: u32| {
            let address = experts.scales.offset(place(next) * 2);
            // SAFETY: see above.
            let bits = unsafe { simt::load_u16_if(rows[next as usize] >= 0, address, 0) };
            convert::widen::<E>(Pack([bits, 0, 0, 0])).as_ref()[0]
        };
        [scale(0), scale(1), scale(2), scale(3)]
    };
    [(rows[0], scales[0]), (rows[1], scales[1]), (rows[2], scales[2]), (rows[3], scales[3])]
}

impl<E: Element> Prologue<E> for Experts {
    #[inline(always)]
    fn makes_addend(&self, activations: &Activations) -> bool {
        activations.has(Activations::EXPERTS)
    }

    #[inline(always)]
    unsafe fn addend(&self, index: PackIndex) -> Pack {
        let mut sum = E::WIDE_ZERO;
        let first = index.token * self.top_k as u64;
        let mut expert = 0;
        while expert < self.top_k {
            // SAFETY: as this function's.
            let four = unsafe { chosen::<E>(self, first, expert) };
            let pack = |(row, _): (i32, f32)| {
                let place = (row.max(0) as u64) * index.row_packs as u64 + index.pack as u64;
                // SAFETY: the index of an expert names a row.
                unsafe { simt::load_if(row >= 0, self.rows.offset(place * Pack::BYTES)) }
            };
            let packs = [pack(four[0]), pack(four[1]), pack(four[2]), pack(four[3])];
            // Zero times zero adds nothing to a sum that has begun with zero.
            let mut add = |(_, scale): (i32, f32), pack: Pack| {
                for (sum, value) in sum.as_mut().iter_mut().zip(convert::widen::<E>(pack).as_ref()) {
                    *sum = simt::fma(scale, *value, *sum);
                }
            };
            add(four[0], packs[0]);
            add(four[1], packs[1]);
            add(four[2], packs[2]);
            add(four[3], packs[3]);
            // `black_box`, or a compiler has the loop's body several times.
            expert = simt::black_box_u32(expert + AT_ONCE);
        }
        if !self.shared.is_null() {
            // SAFETY: inside the tensor.
            let shared = convert::widen::<E>(unsafe { simt::load(index.of(self.shared)) });
            for (sum, value) in sum.as_mut().iter_mut().zip(shared.as_ref()) {
                *sum += value;
            }
        }
        convert::narrow::<E>(sum)
    }
}
