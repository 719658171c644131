//! The making of a rank's addend, ahead of the collective.
//!
//! The addend of most operations lies in memory. A [`Prologue`] makes it instead, as [`Experts`] does: MoE's last step. Each
//! thread makes the packs that it will push or sum, and leaves them in [`Activations::input`](crate::launch::Activations),
//! where it reads them as any other input. So a prologue takes up no registers of a collective, and stands in a kernel once.

use fused_collective_core::{dtype::Element, pack::Pack};

use crate::{
    convert,
    epilogue::PackIndex,
    launch::{Activations, Address, Experts},
    simt,
};

/// The making of a rank's addend. Implement it to fuse something else.
pub trait Prologue<E: Element>: Copy {
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

/// No prologue: the addend lies in `input`.
#[derive(Clone, Copy, Debug)]
pub struct Given;

impl<E: Element> Prologue<E> for Given {
    #[inline(always)]
    fn makes_addend(&self, _activations: &Activations) -> bool {
        false
    }

    #[inline(always)]
    unsafe fn addend(&self, _index: PackIndex) -> Pack {
        Pack::default()
    }
}

/// Calls `each` for so many experts, by a loop that stays one.
#[inline(always)]
fn for_each(experts: u32, mut each: impl FnMut(u32)) {
    let mut expert = 0;
    while expert < experts {
        each(expert);
        // `black_box`, or a compiler has the loop's body several times.
        expert = simt::black_box_u32(expert + 1);
    }
}

/// The place of an expert of token `token` in a tensor of `top_k` values a token.
#[inline(always)]
fn place(experts: &Experts, token: u64, expert: u32) -> u64 {
    token * experts.top_k as u64 + expert as u64
}

/// The address of the pack of an expert's row; `None` for one on another rank.
///
/// # Safety
/// As [`Prologue::addend`].
#[inline(always)]
unsafe fn pack_of(experts: &Experts, index: PackIndex, expert: u32) -> Option<Address> {
    let at = experts.index.offset(place(experts, index.token, expert) * 4);
    // SAFETY: inside the tensor, which nobody writes meanwhile.
    let row = unsafe { simt::load_value::<i32>(at) };
    (row >= 0).then(|| {
        let pack = row as u64 * index.row_packs as u64 + index.pack as u64;
        experts.rows.offset(pack * Pack::BYTES)
    })
}

/// The scale of an expert.
///
/// # Safety
/// As [`Prologue::addend`].
#[inline(always)]
unsafe fn scale_of<E: Element>(experts: &Experts, token: u64, expert: u32) -> f32 {
    let place = place(experts, token, expert);
    // SAFETY: inside the tensor, which nobody writes meanwhile.
    unsafe {
        if E::LANES == 4 || experts.scales_f32 != 0 {
            return f32::from_bits(simt::load_value::<u32>(experts.scales.offset(place * 4)));
        }
        let bits = u32::from(simt::load_value::<u16>(experts.scales.offset(place * 2)));
        convert::widen::<E>(Pack([bits, 0, 0, 0])).as_ref()[0]
    }
}

impl<E: Element> Prologue<E> for Experts {
    #[inline(always)]
    fn makes_addend(&self, activations: &Activations) -> bool {
        activations.has(Activations::EXPERTS)
    }

    #[inline(always)]
    unsafe fn addend(&self, index: PackIndex) -> Pack {
        // SAFETY: as this function's; so below. All rows are on their way before the first is added.
        for_each(self.top_k, |expert| unsafe {
            if let Some(pack) = pack_of(self, index, expert) {
                simt::prefetch_l1(pack);
            }
        });
        let mut sum = E::WIDE_ZERO;
        // SAFETY: see above.
        for_each(self.top_k, |expert| unsafe {
            if let Some(pack) = pack_of(self, index, expert) {
                let scale = scale_of::<E>(self, index.token, expert);
                for (sum, value) in
                    sum.as_mut().iter_mut().zip(convert::widen::<E>(simt::load(pack)).as_ref())
                {
                    *sum = simt::fma(scale, *value, *sum);
                }
            }
        });
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
