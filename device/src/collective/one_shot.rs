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

use super::{
    begun::Begun,
    ranks::{first_slot, for_peers, peer, peers},
    sum::{load_row, residual_out},
    wait::Awaited,
};
use crate::{
    epilogue::Epilogue,
    launch::{Address, Fused},
    row::{Prepared, Share, Team},
    simt,
};

/// The kernel, for groups of at most `N` ranks, with `P` packs of a row in each thread: all of its share if
/// `RESIDENT`, else a chunk of it.
///
/// # Safety
/// Called once by every thread of a grid launched by the rules in [`launch`](crate::launch), with parameters as
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
    // SAFETY of all accesses below: as this function's. Packs of `share` and tokens below `shape.tokens` are inside the
    // tensors and the slots, and by the launch rules this thread's alone.
    let has_residual = !activations.residual.is_null();
    let rows =
        SlotRows { world_size: group.world_size, tokens: shape.tokens as u64, row_bytes: shape.row_bytes() };
    // A pack is as far from a slot's first row as it is from the row of the round's first token in a tensor: with this
    // subtracted, from the tensor's start.
    let before_round = shape.first_token * shape.row_bytes();
    let from = |source: u32| rows.one_shot(source, 0).wrapping_sub(before_round);

    // Where there are registers for it, the first push is made ready here, its input read together with the state, and
    // what is pushed is kept until it is summed. Every team has a token.
    let keeps = const { RESIDENT && P == 1 && N == 2 };
    let first_place = share.places(shape.operation_token(team_index), 0)[0];
    let mine = keeps && share.pack(0, 0).is_some();
    let first_input = first_place.of(activations.input);
    let mut first_to = Address::NULL;
    if mine {
        first_to = first_place.of(first_slot::<N>(group, peer(group, 1)).offset(from(group.rank)));
        // SAFETY: see above.
        unsafe { simt::prefetch(first_input) };
    }
    let turn = Begun::turn(group);

    simt::wait_for_prerequisites();
    let mut own = [Pack::default(); P];
    if mine {
        // SAFETY: see above.
        own[0] = unsafe { simt::load(first_input) };
    }
    // SAFETY: see above.
    let mut begun = unsafe { Begun::read(group, turn) };
    simt::launch_dependents();

    // Pushes a token, and returns it as it was pushed.
    let push = |begun: &Begun<'_>, token: u32, chunk: u32| {
        let mut packs = [Pack::default(); P];
        if token >= shape.tokens || begun.waiter.failed {
            return packs;
        }
        let places = share.places(shape.operation_token(token), chunk);
        // SAFETY: see above.
        packs = unsafe { load_row(activations.input, share, chunk, &places) }.map(Pack::strip);
        share.for_each(chunk, |p, _| {
            for_peers::<N>(group, |distance| {
                let row = begun.slot_of::<N>(peer(group, distance)).offset(from(group.rank));
                // SAFETY: see above.
                unsafe { simt::push(places[p].of(row), packs[p]) };
            });
        });
        packs
    };
    if !keeps {
        share.for_chunks(|chunk| {
            push(&begun, team_index, chunk);
        });
    } else if mine {
        own = own.map(Pack::strip);
        if !begun.waiter.failed {
            // SAFETY: see above.
            unsafe { simt::push(first_to.offset(begun.slot_offset()), own[0]) };
        }
    }
    begun.advance();
    // What is constant is read when the links have work, and not before: where blocks fill the multiprocessors, the
    // next operation's start when these end.
    // SAFETY: see above.
    let prepared = unsafe { Prepared::<E, X, N, P, RESIDENT>::new(epilogue, share, &team) };
    // SAFETY: see above.
    unsafe {
        epilogue.fill_padding(
            shape,
            simt::block() * simt::threads() + simt::thread(),
            simt::blocks() * simt::threads(),
        )
    };
    let mut token = team_index;
    while token < shape.tokens {
        // The number of teams, read again: to keep it would take up a register.
        let next = token + simt::clusters();
        let mut next_own = [Pack::default(); P];
        // SAFETY: see above.
        unsafe {
            prepared.complete(&mut team, shape, activations, token, |chunk, places, row| {
                // Both are read while the peers' packs are on their way.
                let own = if keeps {
                    own
                } else {
                    load_row(activations.input, share, chunk, places).map(Pack::strip)
                };
                let residual = load_row(activations.residual, share, chunk, places);
                let slot = begun.slot_of::<N>(group.rank).offset(before_round.wrapping_neg());
                let packs = begun.waiter.all::<N, P, RESIDENT>(
                    share,
                    chunk,
                    |source, p, _| {
                        // Opaque for the same reason as in `slot_of`.
                        let stride = rows.one_shot(1, 0);
                        let stride = if N == 2 { stride } else { simt::opaque_u64(stride) };
                        let slot = if N == 2 { slot } else { Address(simt::opaque_u64(slot.0)) };
                        places[p].of(slot.offset(source as u64 * stride))
                    },
                    Awaited { shape, token, hop: 1 },
                );
                share.for_each(chunk, |p, _| {
                    row[p] =
                        residual_out::<E, N>(group, &packs[p], own[p], has_residual.then_some(residual[p]));
                });
                // The links carry the next row while this one is normalized.
                next_own = push(&begun, next, chunk);
            });
        }
        own = next_own;
        token = next;
    }
}
