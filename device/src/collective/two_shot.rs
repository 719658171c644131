//! Two-shot: every token has an owner that sums it and pushes the result to all. Two hops, for many tokens.
//!
//! A team first pushes its share of the tokens that other ranks own, all of them, then takes its share of the work
//! list: the tokens that this rank owns, then those that it gets from their owners. Both kinds are spread evenly
//! over teams, so that owning is nobody's job alone.

use core::num::NonZeroU32;

use fused_collective_core::{
    dtype::Element,
    pack::Pack,
    plan::{owned_token, owned_tokens},
    workspace::SlotRows,
};

use super::{Begun, load_optional, peer, peers, residual_out, wait::Awaited};
use crate::{
    epilogue::{Epilogue, Place},
    params::Fused,
    row::{Prepared, Share, Team},
    simt,
};

/// The kernel, for groups of at most `N` ranks, with `P` packs of a row in each thread: all of its share if
/// `RESIDENT`, else a chunk of it.
///
/// # Safety
/// Called once by every thread of a grid launched by the rules in [`params`](crate::params), with parameters as
/// their documentation says.
#[inline(always)]
pub unsafe fn two_shot<E, X, const N: usize, const P: usize, const RESIDENT: bool>(params: &Fused<X>)
where
    E: Element,
    X: Epilogue<E>,
{
    let Some(peers) = peers::<N>(&params.group) else {
        return;
    };
    let Fused { group, shape, activations, epilogue } = params;
    let mut team = Team::join(X::ROW_SUM);
    let share = Share::<P, RESIDENT>::new(&team, shape);
    // SAFETY: as this function's. Packs of `share` and tokens below `shape.tokens` are inside the tensors and the
    // slots, and by the launch rules this thread's alone. The same holds for the blocks below.
    let prepared = unsafe { Prepared::<E, X, P, RESIDENT>::new(epilogue, share) };
    let rows =
        SlotRows { world_size: group.world_size, tokens: shape.tokens as u64, row_bytes: shape.row_bytes() };
    let (row_bytes, stride) = (shape.row_bytes(), rows.first_hop(1, 0));
    let owned = owned_tokens(shape.tokens as u64, group.rank, group.world_size) as u32;
    let place = |token: u32, pack| Place {
        token: shape.first_token + token as u64,
        pack,
        row_packs: shape.row_packs,
    };

    simt::wait_for_prerequisites();
    // SAFETY: see above.
    let mut begun = unsafe { Begun::read(group) };
    simt::launch_dependents();

    let mut work = team.index;
    while work < shape.tokens {
        if work >= owned {
            let (token, owner) = received(group.rank, peers, work - owned);
            // SAFETY: see above.
            unsafe {
                let row = begun
                    .slot_of(owner)
                    .offset(group.rank as u64 * stride + (token / group.world_size) as u64 * row_bytes);
                share.for_chunks(|chunk| {
                    let mut packs = [Pack::default(); P];
                    share.for_each(chunk, |p, pack| {
                        packs[p] = simt::load(place(token, pack).of(activations.input))
                    });
                    share.for_each(chunk, |p, pack| {
                        simt::push(row.offset(pack as u64 * Pack::BYTES), packs[p].strip());
                    });
                });
            }
        }
        work += team.teams;
    }

    // The second hop's rows follow the first's. Computed where it is used, so as to take up no registers before.
    let result = |token: u32| group.world_size as u64 * simt::opaque_u64(stride) + token as u64 * row_bytes;
    let mut work = team.index;
    while work < shape.tokens {
        let own_work = work < owned;
        let (token, owner) = if own_work {
            (owned_token(work as u64, group.rank, group.world_size) as u32, group.rank)
        } else {
            received(group.rank, peers, work - owned)
        };
        // SAFETY: see above.
        unsafe {
            let slot = begun.slot_of(group.rank);
            prepared.complete(&mut team, shape, activations, token, |chunk, row| {
                if !own_work {
                    let awaited = Awaited { token, hop: 2 };
                    *row = begun.waiter.row(slot.offset(result(token)), share, chunk, owner, awaited);
                    return;
                }
                share.for_each(chunk, |p, pack| {
                    let own = simt::load(place(token, pack).of(activations.input)).strip();
                    let residual = load_optional(activations.residual, place(token, pack));
                    let bytes = pack as u64 * Pack::BYTES;
                    let first = slot.offset(work as u64 * row_bytes + bytes);
                    let packs = begun.waiter.all::<N>(
                        first,
                        simt::opaque_u64(stride),
                        own,
                        Awaited { token, hop: 1 },
                    );
                    row[p] = residual_out::<E, N>(group.world_size, &packs, residual);
                    if !begun.waiter.failed {
                        let result = result(token);
                        for distance in 1..group.world_size {
                            let peer_slot = begun.slot_of(peer(group, distance));
                            simt::push(peer_slot.offset(result + bytes), row[p]);
                        }
                    }
                });
            });
        }
        work += team.teams;
    }
    team.leave();
    // SAFETY: see above.
    unsafe { begun.end() };
}

/// The `index`-th of the tokens that this rank does not own, and its owner. Tokens are dealt out in rows of one to
/// each rank; this rank's is left out of each.
#[inline(always)]
fn received(rank: u32, peers: NonZeroU32, index: u32) -> (u32, u32) {
    let (row, other) = (index / peers, index % peers);
    let owner = if other < rank { other } else { other + 1 };
    (row * (peers.get() + 1) + owner, owner)
}
