//! One-shot: every rank pushes its input to every peer and sums what it gets. One hop: for few tokens and, as two
//! ranks send no more bytes this way than in two hops, for any number of tokens between two.
//!
//! ```text
//! prologue    read gamma and scales; wait for the kernels before
//!             make the addend, where it is not given; read the epoch; let the next kernel start
//! push        push(the team's first token)
//!             advance the epochs
//! complete    for each token of the team, in order:
//!                 load its rows of the input and the residual (and the next token's of the input: see `reads_ahead`)
//!                 poll the own slot until it has arrived from every peer; refill it with the sentinel
//!                 row = round(the sum in rank order + the residual)
//!                 push(the team's next token)
//!                 store the row; normalize, quantize and store it
//!
//! push(token): write its row, stripped of the sentinel or encoded, to this rank's place in every peer's slot
//! ```
//! The next token is pushed before the one that came is completed: so the links are never idle, and never so full of
//! stores that loads wait behind them.
//!
//! Ranks cannot wait in a circle, whatever their grids are: a token is pushed when tokens before it have arrived, and
//! the first of a team waits for nothing.

use core::marker::PhantomData;

use fused_collective_core::{dtype::Element, pack::Pack, workspace::SlotRows};

use super::{
    begun::{Begun, fill_padding, serves},
    ranks::{first_slot, for_peers, peer},
    sum::{bias_of, encode, load_row, make_addend, residual_out, sum_of},
    wait::Awaited,
};
use crate::{
    epilogue::Epilogue,
    launch::{Activations, Address, Fused, Group, Shape},
    prologue::Prologue,
    row::{Prepared, Team, ThreadSlice, residual_of_sum},
    simt,
    wire::Wire,
};

/// The kernel, for groups of at most `N` ranks, with `P` packs of a row in each thread: all of its share if
/// `RESIDENT`, else a chunk of it.
///
/// # Safety
/// Called once by every thread of a grid launched by the rules in [`launch`](crate::launch), with parameters as
/// their documentation says.
#[inline(always)]
pub unsafe fn one_shot<E, X, I, W, const N: usize, const P: usize, const RESIDENT: bool>(
    params: &Fused<X>,
    prologue: &I,
    wire: &W,
) where
    E: Element,
    X: Epilogue<E>,
    I: Prologue<E>,
    W: Wire<E>,
{
    if !serves::<N>(&params.group, 2) {
        return;
    }
    let Fused { group, shape, activations, epilogue, extras } = params;
    let mut team = Team::join(X::ROW_SUM || X::ROW_MAX);
    let team_index = team.index;
    let slice = ThreadSlice::<P, RESIDENT>::new(&team, shape);
    // SAFETY of all accesses below: as this function's. Packs of `slice` and tokens below `shape.tokens` are inside the
    // tensors and the slots, and by the launch rules this thread's alone.
    let residual_of_sum = residual_of_sum(I::EXTRAS, activations);
    let has_residual = !residual_of_sum.is_null();
    let rounds_sum = I::EXTRAS && activations.has(Activations::ROUNDS_SUM);
    let rows = SlotRows::of_elements(group.world_size, shape.tokens as u64, wire.row_bytes(shape));
    // A pack of elements is as far from a slot's first row as it is from the row of the round's first token in a tensor: with this
    // subtracted, from the tensor's start.
    let before_round = if W::ELEMENTS { shape.first_token * shape.row_bytes() } else { 0 };
    let from = |source: u32| rows.one_shot(source, 0).wrapping_sub(before_round);

    // Prologue. Where there are registers for it, the first push is made ready here, its input read together with the state, and
    // what is pushed is kept until it is summed. Every team has a token.
    let keeps = const { W::ELEMENTS && RESIDENT && P == 1 && N == 2 };
    let first_index = slice.indices(shape.operation_token(team_index), 0)[0];
    let mine = keeps && slice.pack(0, 0).is_some();
    let first_input = first_index.of(activations.input);
    let makes_addend = prologue.makes_addend(activations);
    let mut first_to = Address::NULL;
    if mine {
        first_to = first_index.of(first_slot::<N>(group, peer(group, 1)).offset(from(group.rank)));
        if !makes_addend {
            // SAFETY: see above.
            unsafe { simt::prefetch(first_input) };
        }
    }
    let epoch = Begun::epoch(group);

    // SAFETY: see above. What is constant may be read now.
    let prepared = unsafe { Prepared::<E, X, N, P, RESIDENT>::new(epilogue, slice, &team) };
    simt::wait_for_prerequisites();
    let mut own = [Pack::default(); P];
    let mut token = team_index;
    // What is pushed first need not go through memory. The loop makes it, too, so that the code is there once.
    while makes_addend && token < shape.tokens {
        let kept = if keeps && token == team_index { own.first_mut() } else { None };
        // SAFETY: see above.
        unsafe { make_addend::<E, I, P, RESIDENT>(prologue, activations, shape, slice, token, kept) };
        token += simt::clusters();
    }
    if mine && !makes_addend {
        // SAFETY: see above.
        own[0] = unsafe { simt::load(first_input) };
    }
    // SAFETY: see above.
    let mut begun = unsafe { Begun::read(group, epoch) };
    simt::launch_dependents();

    // Push.
    let rank_bytes = from(group.rank);
    let push =
        Push { wire, group, shape, input: activations.input, slice, rank_bytes, element: PhantomData::<E> };
    let keeps_sent = const { !W::ELEMENTS && RESIDENT };
    // What decodes waits for itself, not for the links: the input of its next row may as well be on its way meanwhile. Scales
    // take the registers for it. With one pack a thread there are few rows, and they got slower.
    let reads_ahead = const { !W::ELEMENTS && RESIDENT && N == 2 && P == 2 && !X::SCALES };
    if !keeps {
        slice.for_chunks(|chunk| {
            // SAFETY: see above.
            let sent = unsafe { push.push::<N>(&begun, team_index, chunk, || push.read(team_index, chunk)) };
            if keeps_sent {
                own = sent;
            }
        });
    } else if mine {
        own = kept::<E, W, P>(own);
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
            let read = (activations, I::EXTRAS.then_some(extras));
            prepared.complete::<false>(&mut team, shape, read, token, |chunk, indices, row| {
                // Both are read while the peers' packs are on their way.
                let own = if keeps || keeps_sent {
                    own
                } else {
                    let own = load_row(activations.input, slice, chunk, indices);
                    kept::<E, W, P>(encode(wire, slice, chunk, own))
                };
                let residual = load_row(residual_of_sum, slice, chunk, indices);
                let ahead = if reads_ahead { push.read(next, chunk) } else { [Pack::default(); P] };
                let slot = begun.slot_of::<N>(group.rank).offset(before_round.wrapping_neg());
                let of_source = |source: u32| {
                    // `black_box` for the same reason as in `slot_of`.
                    let stride = rows.one_shot(1, 0);
                    let stride = if N == 2 { stride } else { simt::black_box_u64(stride) };
                    let slot = if N == 2 { slot } else { Address(simt::black_box_u64(slot.0)) };
                    slot.offset(source as u64 * stride)
                };
                let packs = begun.waiter.all::<N, P, RESIDENT>(
                    slice,
                    chunk,
                    |source, p, _| wire.poll(of_source(source), token, indices[p]),
                    |source, p, _| wire.refill(of_source(source), token, indices[p]),
                    Awaited { shape, token, hop: 1 },
                );
                slice.for_each(chunk, |p, pack| {
                    row[p] = residual_out::<E>(
                        sum_of::<E, W, N>(wire, group, indices[p], &packs[p], own[p]),
                        bias_of(I::EXTRAS, activations, extras, pack),
                        has_residual.then_some(residual[p]),
                        rounds_sum,
                    );
                });
                // The links carry the next row while this one is normalized.
                let input = || if reads_ahead { ahead } else { push.read(next, chunk) };
                next_own = push.push::<N>(&begun, next, chunk, input);
            });
        }
        own = next_own;
        token = next;
    }
}

/// Packs as they are pushed and then summed: elements are stripped once for both.
#[inline(always)]
fn kept<E: Element, W: Wire<E>, const P: usize>(packs: [Pack; P]) -> [Pack; P] {
    if W::ELEMENTS { packs.map(Pack::strip) } else { packs }
}

/// The parts of a push that are the same for every token.
struct Push<'a, E, W, const P: usize, const RESIDENT: bool> {
    wire: &'a W,
    group: &'a Group,
    shape: &'a Shape,
    input: Address,
    slice: ThreadSlice<P, RESIDENT>,
    /// Bytes of a slot before this rank's rows.
    rank_bytes: u64,
    element: PhantomData<E>,
}

impl<E: Element, W: Wire<E>, const P: usize, const RESIDENT: bool> Push<'_, E, W, P, RESIDENT> {
    /// Reads a token's chunk of the input, unless there is no such token.
    ///
    /// # Safety
    /// As [`one_shot`].
    #[inline(always)]
    unsafe fn read(&self, token: u32, chunk: u32) -> [Pack; P] {
        if token >= self.shape.tokens {
            return [Pack::default(); P];
        }
        let indices = self.slice.indices(self.shape.operation_token(token), chunk);
        // SAFETY: as this function's.
        unsafe { load_row(self.input, self.slice, chunk, &indices) }
    }

    /// Pushes a token's chunk, `input`, to every peer, unless there is no such token, and returns it as it was pushed.
    ///
    /// # Safety
    /// As [`one_shot`].
    #[inline(always)]
    unsafe fn push<const N: usize>(
        &self,
        begun: &Begun<'_>,
        token: u32,
        chunk: u32,
        input: impl FnOnce() -> [Pack; P],
    ) -> [Pack; P] {
        let mut packs = [Pack::default(); P];
        // A warp encodes together, whoever of it has failed.
        if token >= self.shape.tokens || W::ELEMENTS && begun.waiter.failed {
            return packs;
        }
        let indices = self.slice.indices(self.shape.operation_token(token), chunk);
        packs = kept::<E, W, P>(encode(self.wire, self.slice, chunk, input()));
        if !W::ELEMENTS && begun.waiter.failed {
            return packs;
        }
        self.slice.for_each(chunk, |p, _| {
            for_peers::<N>(self.group, |distance| {
                let row = begun.slot_of::<N>(peer(self.group, distance)).offset(self.rank_bytes);
                // SAFETY: as this function's.
                unsafe { self.wire.push(row, token, indices[p], packs[p]) };
            });
        });
        packs
    }
}
