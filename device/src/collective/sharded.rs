//! Two-shot with a sharded residual: a token's owner sums it, adds the residual, which no other rank has, makes of the
//! row what the epilogue makes of it, and sends that to all. The second hop carries codes in place of elements, half as
//! many bytes or a quarter; who gets them stores them as they are.
//!
//! ```text
//! prologue    read gamma and scales, where there are registers for them; wait for the kernels before
//!             make the addend, where it is not given; read the epoch; let the next kernel start
//! push        for each other rank's token of the team, or the first alone:
//!                 write its row, stripped of the sentinel or encoded, to this rank's place in the owner's slot
//!             advance the epochs
//! complete    in each turn, until the team has no more tokens:
//!                 a token of this rank's:
//!                     poll the own slot until it has arrived from every peer; refill it with the sentinel
//!                     push a row as above, if not all were pushed
//!                     row = round(the sum in rank order + the residual); store it
//!                     words = the row normalized and quantized, stripped of the sentinel; store them
//!                     write the words to the token's place in every peer's slot
//!                 other ranks' tokens, of the turn before:
//!                     poll the own slot until the words have arrived; refill it; store them
//! ```
//! An owner stores what it sends, which is stripped of the sentinel: that changes no number. [`turns`](super::turns) says in
//! which order a team completes tokens.
//!
//! The second hop is short, so it should not begin only when the first is done: where it can, a team pushes a row only
//! when it sums the token before that of its own, each time what it waits for has arrived. So owners sum and quantize
//! while the links carry the rows of later tokens.

use fused_collective_core::{dtype::Element, lamport, pack::Pack, workspace::SlotRows};

use super::{
    begun::{Begun, fill_padding, serves},
    partials::{Origin, Ranks},
    ranks::{first_slot, opaque, peer, row_of},
    sum::{bias_of, encode, load_row, make_addend, residual_out, sum_of},
    turns::{Token, Tokens},
    wait::{Awaited, Waiter},
};
use crate::{
    epilogue::{Epilogue, PackIndex},
    launch::{Activations, Address, Fused, HOST_FAILED},
    prologue::Prologue,
    row::{Prepared, Team, ThreadSlice, residual_of_sum},
    simt,
    wire::Wire,
};

/// Bytes of a word.
const WORD: u64 = 4;
/// How many rows of other ranks' tokens a team pushes before it sums its first token; 0 is all of them.
///
/// With one pack a thread there are no registers to spare, and mostly as many teams as tokens. What more than two ranks
/// gain has not been measured.
const fn turns_ahead(ranks: usize, packs: usize, resident: bool) -> u32 {
    if ranks > 2 || resident && packs == 1 { 0 } else { 1 }
}

/// The kernel, for groups of at most `N` ranks, with `P` packs of a row in each thread: all of its share if
/// `RESIDENT`, else a chunk of it.
///
/// # Safety
/// Called once by every thread of a grid launched by the rules in [`launch`](crate::launch), with parameters as
/// their documentation says for a sharded residual.
#[inline(always)]
pub unsafe fn sharded<E, X, I, W, const N: usize, const P: usize, const RESIDENT: bool>(
    params: &Fused<X>,
    prologue: &I,
    wire: &W,
) where
    E: Element,
    X: Epilogue<E>,
    I: Prologue<E>,
    W: Wire<E>,
{
    // SAFETY: as this function's.
    unsafe { sharded_of::<E, X, I, W, _, N, P, RESIDENT>(params, prologue, wire, &Ranks) }
}

/// The kernel, or its second hop alone: of sums of what is from `origin`.
///
/// # Safety
/// As [`sharded`].
#[inline(always)]
pub(super) unsafe fn sharded_of<E, X, I, W, S, const N: usize, const P: usize, const RESIDENT: bool>(
    params: &Fused<X>,
    prologue: &I,
    wire: &W,
    origin: &S,
) where
    E: Element,
    X: Epilogue<E>,
    I: Prologue<E>,
    W: Wire<E>,
    S: Origin<E>,
{
    const { assert!(X::WORDS > 0, "this epilogue's results are not sent") }
    if !serves::<N>(&params.group, S::LEAST_RANKS) {
        return;
    }
    let Fused { group, shape, activations, epilogue, extras } = params;
    let mut team = Team::join(X::ROW_SUM || X::ROW_MAX);
    let (team_index, teams) = (team.index, team.teams);
    let tokens = Tokens::<N>::new(group, shape);
    let slice = ThreadSlice::<P, RESIDENT>::new(&team, shape);
    let rows = SlotRows::of_elements(group.world_size, shape.tokens as u64, wire.row_bytes(shape));
    let (row_bytes, stride) = (rows.row_bytes, rows.first_hop(1, 0));
    let in_row = |pack: u32| PackIndex::new(0, pack, shape.row_packs);
    let index_of = |token: u32, pack| PackIndex::new(shape.operation_token(token), pack, shape.row_packs);
    // SAFETY: as this function's. Packs of `slice` and tokens below `shape.tokens` are inside the tensors and the slots,
    // and by the launch rules this thread's alone. The same holds for the blocks below.
    let own = |token, chunk| unsafe {
        if !S::FIRST_HOP {
            return [Pack::default(); P];
        }
        load_row(activations.input, slice, chunk, &slice.indices(shape.operation_token(token), chunk))
    };

    // Prologue.
    // SAFETY: see above. What is constant may be read now, and is where there are registers to keep it.
    let prepare = || unsafe { Prepared::<E, X, N, P, RESIDENT>::new(epilogue, slice, &team) };
    let prepared = const { N == 2 && P == 1 }.then(prepare);
    simt::wait_for_prerequisites();
    // SAFETY: see above.
    unsafe {
        let (mut index, mut other) = (team_index, tokens.first_other(team_index, teams));
        while prologue.makes_addend(activations)
            && let Some(Token { token, owner, .. }) = tokens.own(index).or_else(|| tokens.other(other))
        {
            make_addend::<E, I, P, RESIDENT>(prologue, activations, shape, slice, token, None);
            if owner == group.rank {
                index += teams;
            } else {
                other += teams as i32;
            }
        }
    }
    // SAFETY: see above.
    let mut begun = unsafe { Begun::read(group, Begun::epoch(group)) };
    simt::launch_dependents();
    let slot_of = |waiter: &Waiter<'_>, rank: u32| {
        // `black_box` for the same reason as in `Begun::slot_of`.
        let rank = simt::black_box_u64(rank as u64) as u32;
        let group = opaque(group);
        first_slot::<N>(&group, rank).offset(waiter.slot as u64 * group.slot_bytes)
    };
    // Pushes this rank's row of a token that another one owns, if there is such a token.
    let push = |waiter: &Waiter<'_>, other: i32, chunk: u32| {
        let Some(Token { token, owner, index }) = tokens.other(other) else { return };
        // A warp encodes together, whoever of it has failed.
        if W::ELEMENTS && waiter.failed {
            return;
        }
        // SAFETY: see above.
        unsafe {
            let row = slot_of(waiter, owner).offset(group.rank as u64 * stride + index as u64 * row_bytes);
            let packs = encode(wire, slice, chunk, own(token, chunk));
            if !W::ELEMENTS && waiter.failed {
                return;
            }
            slice.for_each(chunk, |p, pack| wire.push(row, 0, in_row(pack), packs[p]));
        }
    };
    // Push.
    let turns_ahead = const { turns_ahead(N, P, RESIDENT) };
    let mut other = tokens.first_other(team_index, teams);
    let mut pushed = 0;
    while S::FIRST_HOP && (turns_ahead == 0 || pushed < turns_ahead) && tokens.other(other).is_some() {
        slice.for_chunks(|chunk| push(&begun.waiter, other, chunk));
        other += teams as i32;
        pushed += 1;
    }
    // SAFETY: see above.
    unsafe { origin.begin(&mut begun, shape) };
    begun.advance();
    // SAFETY: see above.
    unsafe { fill_padding::<E, X>(epilogue, shape) };
    let prepared = prepared.unwrap_or_else(prepare);

    // The second hop's rows follow the first's, as far apart as they would be if they were elements: each starts with
    // the words of its packs, and its scales follow. Computed where they are used, so as to take up no registers before.
    let result_bytes = shape.row_bytes();
    let result =
        |token: u32| group.world_size as u64 * simt::black_box_u64(stride) + token as u64 * result_bytes;
    let words_at = |row: Address, pack: u32| {
        row.offset(simt::black_box_u64(pack as u64) * (epilogue.words() as u64 * WORD))
    };
    let scales_at = |row: Address, pack: u32| {
        let first = simt::black_box_u64(shape.row_packs as u64) * (epilogue.words() as u64 * WORD);
        row.offset(first + (pack >> epilogue.scale_packs_log2()) as u64 * WORD)
    };
    let has_scales =
        |pack: u32| epilogue.sends_scales() && pack & ((1 << epilogue.scale_packs_log2()) - 1) == 0;

    // Complete.
    let waiter = &mut begun.waiter;
    let mut index = team_index;
    let mut other = tokens.first_late(team_index, teams);
    while tokens.remain(index, other) {
        if let Some(Token { token, index, .. }) = tokens.own(index) {
            // SAFETY: see above. The residual's rows are this rank's tokens of the round.
            let sum = |waiter: &mut Waiter<'_>, chunk: u32, row: &mut [Pack; P]| unsafe {
                let own = encode(wire, slice, chunk, own(token, chunk));
                let residual = load_row(
                    residual_of_sum(I::EXTRAS, activations),
                    slice,
                    chunk,
                    &slice.indices(index as u64, chunk),
                );
                let packs = if S::FIRST_HOP {
                    let row_at = slot_of(waiter, group.rank).offset(index as u64 * row_bytes);
                    waiter.all::<N, P, RESIDENT>(
                        slice,
                        chunk,
                        |source, _, pack| wire.poll(row_of(row_at, source, stride), 0, in_row(pack)),
                        |source, _, pack| wire.refill(row_of(row_at, source, stride), 0, in_row(pack)),
                        Awaited { shape, token, hop: 1 },
                    )
                } else {
                    [[Pack::default(); N]; P]
                };
                if S::FIRST_HOP && turns_ahead > 0 {
                    // The team is a turn late with the others' tokens. None of two ranks is left out, as a team has
                    // at most one more of them than of its own.
                    push(waiter, other + ((turns_ahead + 1) * simt::clusters()) as i32, chunk);
                }
                slice.for_each(chunk, |p, pack| {
                    let sum = if S::FIRST_HOP {
                        sum_of::<E, W, N>(wire, group, in_row(pack), &packs[p], own[p])
                    } else {
                        origin.sum(waiter, index, pack, Awaited { shape, token, hop: HOST_FAILED })
                    };
                    row[p] = residual_out::<E>(
                        sum,
                        bias_of(I::EXTRAS, activations, extras, pack),
                        (!residual_of_sum(I::EXTRAS, activations).is_null()).then_some(residual[p]),
                        I::EXTRAS && simt::black_box_u32(activations.flags) & Activations::ROUNDS_SUM != 0,
                    );
                });
            };
            // SAFETY: see above.
            let send = |waiter: &mut Waiter<'_>, pack: u32, words: Pack, scales: u32| unsafe {
                let (words, scales) = (words.strip(), lamport::strip(scales));
                epilogue.store(index_of(token, pack), words);
                if has_scales(pack) {
                    epilogue.store_scales(index_of(token, pack), scales);
                }
                if waiter.failed {
                    return;
                }
                let result = result(token);
                for distance in 1..group.world_size {
                    let row = slot_of(waiter, peer(group, distance)).offset(result);
                    simt::push_words(words_at(row, pack), words, epilogue.words());
                    if has_scales(pack) {
                        simt::push_words(scales_at(row, pack), Pack([scales, 0, 0, 0]), 1);
                    }
                }
            };
            // SAFETY: see above.
            unsafe {
                let read = (activations, I::EXTRAS.then_some(extras));
                prepared.make(&mut team, shape, read, index, waiter, sum, send);
            }
        }
        index += simt::clusters();
        for _ in 1..tokens.ranks() {
            if let Some(Token { token, owner, .. }) = tokens.other(other) {
                let awaited = Awaited { shape, token, hop: 2 };
                slice.for_chunks(|chunk| {
                    // SAFETY: see above.
                    unsafe {
                        let row = slot_of(waiter, group.rank).offset(result(token));
                        let at = |pack| Some(words_at(row, pack));
                        let words = waiter.words(epilogue.words(), slice, chunk, at, owner, awaited);
                        slice.for_each(chunk, |p, pack| epilogue.store(index_of(token, pack), words[p]));
                        if epilogue.sends_scales() {
                            let at = |pack| has_scales(pack).then(|| scales_at(row, pack));
                            let scales = waiter.words(1, slice, chunk, at, owner, awaited);
                            slice.for_each(chunk, |p, pack| {
                                if has_scales(pack) {
                                    epilogue.store_scales(index_of(token, pack), scales[p].0[0]);
                                }
                            });
                        }
                    }
                });
            }
            other += simt::clusters() as i32;
        }
    }
}
