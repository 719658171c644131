//! Rows of tensors, and the sum of all ranks'.

use fused_collective_core::{dtype::Element, pack::Pack};

use crate::{
    convert,
    epilogue::PackIndex,
    launch::{Address, Group},
    row::ThreadSlice,
    simt,
};
/// This thread's packs of a chunk of a row, from a tensor that may be absent: then zero.
///
/// # Safety
/// `indices` are this thread's of the chunk, inside the tensor if there is one, and nobody writes it.
#[inline(always)]
pub(super) unsafe fn load_row<const P: usize, const RESIDENT: bool>(
    tensor: Address,
    slice: ThreadSlice<P, RESIDENT>,
    chunk: u32,
    indices: &[PackIndex; P],
) -> [Pack; P] {
    let mut packs = [Pack::default(); P];
    // `black_box`, so that addresses are computed here and not ahead of a loop, where they would take up registers.
    let tensor = Address(simt::black_box_u64(tensor.0));
    if !tensor.is_null() {
        // SAFETY: as this function's.
        slice.for_each(chunk, |p, _| packs[p] = unsafe { simt::load(indices[p].of(tensor)) });
    }
    packs
}

/// `residual_out`: the packs of all ranks, stripped, `own` among the peers' as [`Waiter::all`] gives them, summed in
/// rank order, plus the residual, rounded (before it is added as well, if `rounds_sum`), and stripped of the sentinel: two-shot must strip it before it sends it, and
/// both modes give the same bits.
#[inline(always)]
pub(super) fn residual_out<E: Element, const N: usize>(
    group: &Group,
    peers: &[Pack; N],
    own: Pack,
    residual: Option<Pack>,
    rounds_sum: bool,
) -> Pack {
    let mut sum;
    if N == 2 {
        // Two addends give the same sum in either order.
        sum = convert::widen::<E>(peers[0]);
        add::<E>(&mut sum, own);
    } else {
        let addend = |rank: usize| if rank as u32 == group.rank { own } else { peers[rank] };
        sum = convert::widen::<E>(addend(0));
        // Written out: an array of registers needs constant indices, and a compiler may leave a long loop a loop.
        const { assert!(N <= 8) };
        macro_rules! add_rank {
            ($($rank:literal)*) => {$(
                if $rank < N && $rank < group.world_size {
                    add::<E>(&mut sum, addend(if $rank < N { $rank } else { 0 }));
                }
            )*};
        }
        add_rank!(1 2 3 4 5 6 7);
    }
    if let Some(residual) = residual {
        if rounds_sum {
            // `black_box`, so that this stays a branch: both results would take up registers.
            sum = convert::widen::<E>(simt::black_box(convert::narrow::<E>(sum)));
        }
        add::<E>(&mut sum, residual);
    }
    convert::narrow::<E>(sum).strip()
}

#[inline(always)]
pub(super) fn add<E: Element>(sum: &mut E::Wide, pack: Pack) {
    for (sum, value) in sum.as_mut().iter_mut().zip(convert::widen::<E>(pack).as_ref()) {
        *sum += value;
    }
}
