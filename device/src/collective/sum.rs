//! Rows of tensors, and the sum of all ranks'.

use fused_collective_core::{dtype::Element, pack::Pack};

use crate::{
    convert,
    epilogue::PackIndex,
    launch::{Activations, Address, Extras, Group, Shape},
    prologue::Prologue,
    row::ThreadSlice,
    simt,
    wire::Wire,
};

/// The pack `pack` of the bias; null if there is none. `has_extras`, here and below, is the kernel's [`Prologue::EXTRAS`].
#[inline(always)]
pub(super) fn bias_of(has_extras: bool, activations: &Activations, extras: &Extras, pack: u32) -> Address {
    // `black_box` for the same reason as in `load_row`.
    if !has_extras || simt::black_box_u32(activations.flags) & Activations::BIAS == 0 {
        return Address::NULL;
    }
    Address(simt::black_box_u64(extras.bias.0)).offset(simt::black_box_u32(pack) as u64 * Pack::BYTES)
}

/// Makes this thread's packs of the addend of token `token` of the round, and stores them where the input lies, or in `kept` if there
/// is one: then there is one pack at most. The team that reads a token's addend makes it.
///
/// # Safety
/// After the dependent-launch wait; the addresses are as their documentation says.
#[inline(always)]
pub(super) unsafe fn make_addend<E, I, const P: usize, const RESIDENT: bool>(
    prologue: &I,
    activations: &Activations,
    shape: &Shape,
    slice: ThreadSlice<P, RESIDENT>,
    token: u32,
    mut kept: Option<&mut Pack>,
) where
    E: Element,
    I: Prologue<E>,
{
    slice.for_packs(|pack| {
        let index = PackIndex::new(shape.operation_token(token), pack, shape.row_packs);
        // SAFETY: as this function's; the pack is inside the tensors, and this thread's alone.
        let addend = unsafe { prologue.addend(index) };
        match &mut kept {
            Some(kept) => **kept = addend,
            // SAFETY: see above.
            None => unsafe { simt::store(index.of(activations.input), addend) },
        }
    });
}

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

/// Makes of this thread's packs of a chunk of a row, `packs`, what is sent, but for the sentinel in elements. All lanes of a warp
/// call this together.
#[inline(always)]
pub(super) fn encode<E, W, const P: usize, const RESIDENT: bool>(
    wire: &W,
    slice: ThreadSlice<P, RESIDENT>,
    chunk: u32,
    packs: [Pack; P],
) -> [Pack; P]
where
    E: Element,
    W: Wire<E>,
{
    let mut sent = packs;
    if W::ELEMENTS {
        return sent;
    }
    slice.for_lanes(chunk, |p, pack| {
        sent[p] = wire.encode(PackIndex::new(0, pack, slice.row_packs()), packs[p]);
    });
    sent
}

/// The sum in rank order of what all ranks sent for a pack of a row, `own` among the peers' as [`Waiter::all`] gives them.
#[inline(always)]
pub(super) fn sum_of<E, W, const N: usize>(
    wire: &W,
    group: &Group,
    index: PackIndex,
    peers: &[Pack; N],
    own: Pack,
) -> E::Wide
where
    E: Element,
    W: Wire<E>,
{
    let own = if W::ELEMENTS { own.strip() } else { own };
    let mut sum;
    if N == 2 {
        // Two addends give the same sum in either order.
        sum = wire.first(index, peers[0]);
        wire.add(&mut sum, index, own);
    } else {
        let addend = |rank: usize| if rank as u32 == group.rank { own } else { peers[rank] };
        sum = wire.first(index, addend(0));
        // Written out: an array of registers needs constant indices, and a compiler may leave a long loop a loop.
        const { assert!(N <= 8) };
        macro_rules! add_rank {
            ($($rank:literal)*) => {$(
                if $rank < N && $rank < group.world_size {
                    wire.add(&mut sum, index, addend(if $rank < N { $rank } else { 0 }));
                }
            )*};
        }
        add_rank!(1 2 3 4 5 6 7);
    }
    sum
}

/// `residual_out`: the sum of all ranks, plus the pack of the bias at `bias`, unless that is null, plus the residual, rounded
/// (before it is added as well, if `rounds_sum`), and stripped of the sentinel: two-shot must strip it before it sends it, and
/// both modes give the same bits.
///
/// # Safety
/// `bias` is null, or a pack of a bias.
#[inline(always)]
pub(super) unsafe fn residual_out<E: Element>(
    mut sum: E::Wide,
    bias: Address,
    residual: Option<Pack>,
    rounds_sum: bool,
) -> Pack {
    if !bias.is_null() {
        // SAFETY: as this function's. Read for each row, from a cache, where there is a bias at all.
        add::<E>(&mut sum, unsafe { simt::load_constant(bias) });
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
fn add<E: Element>(sum: &mut E::Wide, pack: Pack) {
    for (sum, value) in sum.as_mut().iter_mut().zip(convert::widen::<E>(pack).as_ref()) {
        *sum += value;
    }
}
