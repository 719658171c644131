//! One-shot: every rank pushes its input to every peer and sums what it gets. One hop: for few tokens and, as two
//! ranks send no more bytes this way than in two hops, for any number of tokens between two.
//!
//! ```text
//! prologue    read gamma and scales; wait for the kernels before
//!             make the addend, where it is not given; read the epoch; let the next kernel start
//! push        push(the team's first token)
//!             advance the epochs
//! complete    for each token of the team, in order:
//!                 load its rows of the input and the residual
//!                 poll the own slot until it has arrived from every peer; refill it with the sentinel
//!                 row = round(the sum in rank order + the residual)
//!                 push(the team's next token)
//!                 store the row; normalize, quantize and store it
//!
//! push(token): write its row, stripped of the sentinel, to this rank's place in every peer's slot
//! ```
//! The next token is pushed before the one that came is completed: so the links are never idle, and never so full of
//! stores that loads wait behind them.
//!
//! Ranks cannot wait in a circle, whatever their grids are: a token is pushed when tokens before it have arrived, and
//! the first of a team waits for nothing.

use fused_collective_core::{dtype::Element, pack::Pack, workspace::SlotRows};

use super::{
    begun::{Begun, fill_padding, serves},
    ranks::{first_slot, for_peers, peer},
    sum::{bias_of, load_row, make_addend, residual_of_sum, residual_out},
    wait::Awaited,
};
use crate::{
    epilogue::Epilogue,
    launch::{Activations, Address, Fused},
    prologue::Prologue,
    row::{Prepared, Team, ThreadSlice},
    simt,
};

/// The kernel, for groups of at most `N` ranks, with `P` packs of a row in each thread: all of its share if
/// `RESIDENT`, else a chunk of it.
///
/// # Safety
/// Called once by every thread of a grid launched by the rules in [`launch`](crate::launch), with parameters as
/// their documentation says.
#[inline(always)]
pub unsafe fn one_shot<E, X, I, const N: usize, const P: usize, const RESIDENT: bool>(
    params: &Fused<X>,
    prologue: &I,
) where
    E: Element,
    X: Epilogue<E>,
    I: Prologue<E>,
{
    if !serves::<N>(&params.group) {
        return;
    }
    let Fused { group, shape, activations, epilogue, extras } = params;
    let mut team = Team::join(X::ROW_SUM || X::ROW_MAX);
    let team_index = team.index;
    let slice = ThreadSlice::<P, RESIDENT>::new(&team, shape);
    // SAFETY of all accesses below: as this function's. Packs of `slice` and tokens below `shape.tokens` are inside the
    // tensors and the slots, and by the launch rules this thread's alone.
    let residual_of_sum = residual_of_sum(activations);
    let has_residual = !residual_of_sum.is_null();
    let rounds_sum = activations.has(Activations::ROUNDS_SUM);
    let rows = SlotRows::of_elements(group.world_size, shape.tokens as u64, shape.row_bytes());
    // A pack is as far from a slot's first row as it is from the row of the round's first token in a tensor: with this
    // subtracted, from the tensor's start.
    let before_round = shape.first_token * shape.row_bytes();
    let from = |source: u32| rows.one_shot(source, 0).wrapping_sub(before_round);

    // Prologue. Where there are registers for it, the first push is made ready here, its input read together with the state, and
    // what is pushed is kept until it is summed. Every team has a token.
    let keeps = const { RESIDENT && P == 1 && N == 2 };
    let first_index = slice.indices(shape.operation_token(team_index), 0)[0];
    let mine = keeps && slice.pack(0, 0).is_some();
    let first_input = first_index.of(activations.input);
    let mut first_to = Address::NULL;
    if mine {
        first_to = first_index.of(first_slot::<N>(group, peer(group, 1)).offset(from(group.rank)));
        // SAFETY: see above.
        unsafe { simt::prefetch(first_input) };
    }
    let epoch = Begun::epoch(group);

    // SAFETY: see above. What is constant may be read now.
    let prepared = unsafe { Prepared::<E, X, N, P, RESIDENT>::new(epilogue, slice, &team) };
    simt::wait_for_prerequisites();
    // SAFETY: see above.
    unsafe {
        let mut token = team_index;
        while prologue.makes_addend(activations) && token < shape.tokens {
            make_addend::<E, I, P, RESIDENT>(prologue, activations, shape, slice, token);
            token += simt::clusters();
        }
    }
    let mut own = [Pack::default(); P];
    if mine {
        // SAFETY: see above.
        own[0] = unsafe { simt::load(first_input) };
    }
    // SAFETY: see above.
    let mut begun = unsafe { Begun::read(group, epoch) };
    simt::launch_dependents();

    // Push. Returns a token's chunk as it was pushed.
    let push = |begun: &Begun<'_>, token: u32, chunk: u32| {
        let mut packs = [Pack::default(); P];
        if token >= shape.tokens || begun.waiter.failed {
            return packs;
        }
        let indices = slice.indices(shape.operation_token(token), chunk);
        // SAFETY: see above.
        packs = unsafe { load_row(activations.input, slice, chunk, &indices) }.map(Pack::strip);
        slice.for_each(chunk, |p, _| {
            for_peers::<N>(group, |distance| {
                let row = begun.slot_of::<N>(peer(group, distance)).offset(from(group.rank));
                // SAFETY: see above.
                unsafe { simt::push(indices[p].of(row), packs[p]) };
            });
        });
        packs
    };
    if !keeps {
        slice.for_chunks(|chunk| {
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
    // SAFETY: see above.
    unsafe { fill_padding::<E, X>(epilogue, shape) };

    // Complete.
    let mut token = team_index;
    while token < shape.tokens {
        // The number of teams, read again: to keep it would take up a register.
        let next = token + simt::clusters();
        let mut next_own = [Pack::default(); P];
        // SAFETY: see above.
        unsafe {
            prepared.complete::<true>(&mut team, shape, activations, extras, token, |chunk, indices, row| {
                // Both are read while the peers' packs are on their way.
                let own = if keeps {
                    own
                } else {
                    load_row(activations.input, slice, chunk, indices).map(Pack::strip)
                };
                let residual = load_row(residual_of_sum, slice, chunk, indices);
                let slot = begun.slot_of::<N>(group.rank).offset(before_round.wrapping_neg());
                let packs = begun.waiter.all::<N, P, RESIDENT>(
                    slice,
                    chunk,
                    |source, p, _| {
                        // `black_box` for the same reason as in `slot_of`.
                        let stride = rows.one_shot(1, 0);
                        let stride = if N == 2 { stride } else { simt::black_box_u64(stride) };
                        let slot = if N == 2 { slot } else { Address(simt::black_box_u64(slot.0)) };
                        indices[p].of(slot.offset(source as u64 * stride))
                    },
                    Awaited { shape, token, hop: 1 },
                );
                slice.for_each(chunk, |p, pack| {
                    row[p] = residual_out::<E, N>(
                        group,
                        &packs[p],
                        own[p],
                        bias_of(activations, extras, pack),
                        has_residual.then_some(residual[p]),
                        rounds_sum,
                    );
                });
                // The links carry the next row while this one is normalized.
                next_own = push(&begun, next, chunk);
            });
        }
        own = next_own;
        token = next;
    }
}
