//! One-shot: every rank pushes its input to every peer and sums what it gets. One hop, for few tokens.

use fused_collective_core::{dtype::Element, pack::Pack, workspace::SlotRows};

use super::{Begun, load_row, peer, peers, region, residual_out, wait::Awaited};
use crate::{
    epilogue::{Epilogue, Place},
    params::{Address, Fused},
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
pub unsafe fn one_shot<E, X, const N: usize, const P: usize, const RESIDENT: bool>(params: &Fused<X>)
where
    E: Element,
    X: Epilogue<E>,
{
    if peers::<N>(&params.group).is_none() {
        return;
    }
    let Fused { group, shape, activations, epilogue } = params;
    let mut team = Team::join(X::ROW_SUM);
    let team_index = team.index;
    let share = Share::<P, RESIDENT>::new(&team, shape);
    let has_residual = !activations.residual.is_null();
    // SAFETY: as this function's. Packs of `share` and tokens below `shape.tokens` are inside the tensors and the
    // slots, and by the launch rules this thread's alone. The same holds for the blocks below.
    let prepared = unsafe { Prepared::<E, X, P, RESIDENT>::new(epilogue, share) };
    let rows =
        SlotRows { world_size: group.world_size, tokens: shape.tokens as u64, row_bytes: shape.row_bytes() };
    let stride = rows.one_shot(1, 0);
    let place = |token: u32, pack| Place {
        token: shape.first_token + token as u64,
        pack,
        row_packs: shape.row_packs,
    };
    // The regions are read ahead: the first push should not wait for them.
    let mut regions = [Address::NULL; N];
    for (distance, at) in regions.iter_mut().enumerate() {
        if (distance as u32) < group.world_size {
            // SAFETY: see above; the rank is in the group.
            *at = unsafe { region(group, peer(group, distance as u32)) };
        }
    }

    // SAFETY: see above.
    let input =
        |token, chunk| unsafe { load_row(activations.input, share, chunk, |pack| place(token, pack)) };

    simt::wait_for_prerequisites();
    // Read together with the state, and kept, where there are registers for it. Every team has a token.
    let keeps = const { RESIDENT && P == 1 && N == 2 };
    let first = if keeps { input(team.index, 0) } else { [Pack::default(); P] };
    // SAFETY: see above.
    let mut begun = unsafe { Begun::read(group) };
    simt::launch_dependents();
    begun.take_ticket();

    let own = |token, chunk| if keeps && token == team_index { first } else { input(token, chunk) };
    let mut token = team.index;
    while token < shape.tokens {
        let row = begun.slot_offset() + rows.one_shot(group.rank, token as u64);
        share.for_chunks(|chunk| {
            let packs = own(token, chunk);
            share.for_each(chunk, |p, pack| {
                for (distance, at) in regions.iter().enumerate().skip(1) {
                    if (distance as u32) < group.world_size {
                        // SAFETY: see above.
                        unsafe { simt::push(at.offset(row + pack as u64 * Pack::BYTES), packs[p].strip()) };
                    }
                }
            });
        });
        token += team.teams;
    }
    let mut token = team.index;
    while token < shape.tokens {
        let awaited = Awaited { token, hop: 1 };
        // SAFETY: see above.
        unsafe {
            let stride = simt::opaque_u64(stride);
            let from_first = begun.slot_of(group.rank).offset(rows.one_shot(0, token as u64));
            prepared.complete(&mut team, shape, activations, token, |chunk, row| {
                // Both are read while the peers' packs are on their way.
                let own = own(token, chunk);
                let residual = load_row(activations.residual, share, chunk, |pack| place(token, pack));
                let packs = begun.waiter.all::<N, P, RESIDENT>(from_first, stride, share, chunk, awaited);
                share.for_each(chunk, |p, _| {
                    row[p] =
                        residual_out::<E, N>(group, &packs[p], own[p], has_residual.then_some(residual[p]));
                });
            });
        }
        token += team.teams;
    }
    team.leave();
    // SAFETY: see above.
    unsafe { begun.end() };
}
