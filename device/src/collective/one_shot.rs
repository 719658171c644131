//! One-shot: every rank pushes its input to every peer and sums what it gets. One hop: for few tokens and, as two
//! ranks send no more bytes this way than in two hops, for any number of tokens between two.
//!
//! A team pushes its first token, then completes its tokens in turn; each time a token has arrived from all peers, it
//! pushes the next one before it completes the one that came. So the links are never idle, and never so full of stores
//! that loads wait behind them.
//!
//! Ranks cannot wait in a circle, whatever their grids are: a token is pushed when tokens before it have arrived, and
//! the first of a team waits for nothing.

use fused_collective_core::{dtype::Element, pack::Pack, workspace::SlotRows};

use super::{Begun, first_slot, for_peers, load_row, peer, peers, residual_out, wait::Awaited};
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
    // SAFETY: see above.
    let input =
        |token, chunk| unsafe { load_row(activations.input, share, chunk, |pack| place(token, pack)) };

    // Where there are registers for it, the first push is made ready here, its input read together with the state, and
    // kept. Every team has a token.
    let keeps = const { RESIDENT && P == 1 && N == 2 };
    let mine = if keeps { share.pack(0, 0) } else { None };
    let first_place = place(team_index, mine.unwrap_or(0));
    let first_input = first_place.of(activations.input);
    let row = rows.one_shot(group.rank, team_index as u64);
    let mut first_to = [Address::NULL; N];
    if mine.is_some() {
        for_peers::<N>(group, |distance| {
            let slot = first_slot::<N>(group, peer(group, distance));
            first_to[distance as usize] = slot.offset(row + first_place.pack as u64 * Pack::BYTES);
        });
        // SAFETY: inside the tensor.
        unsafe { simt::prefetch(first_input) };
    }
    let turn = Begun::turn(group);

    simt::wait_for_prerequisites();
    let mut first = [Pack::default(); P];
    if mine.is_some() {
        // SAFETY: see above.
        first[0] = unsafe { simt::load(first_input) };
    }
    // SAFETY: see above.
    let mut begun = unsafe { Begun::read(group, turn) };
    simt::launch_dependents();

    // SAFETY: see above.
    let push = |begun: &Begun<'_>, token: u32, chunk: u32| {
        if token >= shape.tokens || begun.waiter.failed {
            return;
        }
        let packs = input(token, chunk);
        // Opaque for the same reason as in `slot_of`.
        let row = rows.one_shot(simt::opaque_u64(group.rank as u64) as u32, token as u64);
        share.for_each(chunk, |p, pack| {
            for_peers::<N>(group, |distance| {
                let row = begun.slot_of::<N>(peer(group, distance)).offset(row);
                // SAFETY: see above.
                unsafe { simt::push(row.offset(pack as u64 * Pack::BYTES), packs[p].strip()) };
            });
        });
    };
    if !keeps {
        share.for_chunks(|chunk| push(&begun, team_index, chunk));
    } else if mine.is_some() && !begun.waiter.failed {
        for_peers::<N>(group, |distance| {
            let at = first_to[distance as usize].offset(begun.slot_offset());
            // SAFETY: see above.
            unsafe { simt::push(at, first[0].strip()) };
        });
    }
    begun.advance();
    // SAFETY: see above.
    unsafe {
        epilogue.fill_padding(
            shape,
            simt::block() * simt::threads() + simt::thread(),
            simt::blocks() * simt::threads(),
        )
    };
    let own = |token, chunk| if keeps && token == team_index { first } else { input(token, chunk) };
    let mut token = team_index;
    while token < shape.tokens {
        // The number of teams, read again: to keep it would take up a register.
        let next = token + simt::clusters();
        // SAFETY: see above.
        unsafe {
            let stride = simt::opaque_u64(stride);
            let from_first = begun.slot_of::<N>(group.rank).offset(rows.one_shot(0, token as u64));
            prepared.complete(&mut team, shape, activations, token, |chunk, row| {
                // Both are read while the peers' packs are on their way.
                let own = own(token, chunk);
                let residual = load_row(activations.residual, share, chunk, |pack| place(token, pack));
                let packs = begun.waiter.all::<N, P, RESIDENT>(
                    from_first,
                    stride,
                    share,
                    chunk,
                    Awaited { shape, token, hop: 1 },
                );
                share.for_each(chunk, |p, _| {
                    row[p] =
                        residual_out::<E, N>(group, &packs[p], own[p], has_residual.then_some(residual[p]));
                });
                // The links carry the next row while this one is normalized.
                push(&begun, next, chunk);
            });
        }
        token = next;
    }
}
