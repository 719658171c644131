//! Two-shot: every token has an owner that sums it and pushes the result to all. Two hops, for many tokens.
//!
//! ```text
//! prologue    read gamma and scales; wait for the kernels before
//!             make the addend, where it is not given; read the epoch; let the next kernel start
//! push        for each token of the team that another rank owns:
//!                 write its row, stripped of the sentinel or encoded, to this rank's place in the owner's slot
//!             advance the epochs
//! complete    for each token of the team, in order:
//!                 if this rank owns it:
//!                     poll the own slot until it has arrived from every peer; refill it with the sentinel
//!                     row = round(the sum in rank order + the residual)
//!                     write the row to the token's place in every peer's slot
//!                 else:
//!                     row = poll the own slot until it has arrived from its owner; refill it with the sentinel
//!                 store the row; normalize, quantize and store it
//! ```
//! The links carry the sums while the rows that came are normalized.
//!
//! In a wire format an owner encodes the sum of all ranks, and sends that; the owner as well adds the residual to what the
//! format leaves of the sum.
//!
//! Ranks cannot wait in a circle, whatever their grids are: an owner waits only for pushes that wait for nothing, a
//! receiver of a token only for its owner, and before either a team completes only tokens that come before that one.

use fused_collective_core::{dtype::Element, pack::Pack, workspace::SlotRows};

use super::{
    begun::{Begun, fill_padding, serves},
    partials::{Origin, Ranks},
    ranks::{deal, dealt, peer, row_of},
    sum::{bias_of, encode, load_row, make_addend, residual_out, sum_of},
    wait::Awaited,
};
use crate::{
    epilogue::{Epilogue, PackIndex},
    launch::{Activations, Address, Fused, HOST_FAILED},
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
pub unsafe fn two_shot<E, X, I, W, const N: usize, const P: usize, const RESIDENT: bool>(
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
    unsafe { two_hops::<E, X, I, W, _, N, P, RESIDENT>(params, prologue, wire, &Ranks) }
}

/// The kernel, or its second hop alone: of sums of what is from `origin`.
///
/// # Safety
/// As [`two_shot`].
#[inline(always)]
pub(super) unsafe fn two_hops<E, X, I, W, S, const N: usize, const P: usize, const RESIDENT: bool>(
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
    if !serves::<N>(&params.group, S::LEAST_RANKS) {
        return;
    }
    let Fused { group, shape, activations, epilogue, extras } = params;
    let mut team = Team::join(X::ROW_SUM || X::ROW_MAX);
    let (team_index, teams) = (team.index, team.teams);
    let slice = ThreadSlice::<P, RESIDENT>::new(&team, shape);
    let residual_of_sum = residual_of_sum(I::EXTRAS, activations);
    let has_residual = !residual_of_sum.is_null();
    let rounds_sum = I::EXTRAS && activations.has(Activations::ROUNDS_SUM);
    let row_bytes = wire.row_bytes(shape);
    let rows = SlotRows::of_elements(group.world_size, shape.tokens as u64, row_bytes);
    let stride = rows.first_hop(1, 0);
    let in_row = |pack: u32| PackIndex::new(0, pack, shape.row_packs);

    // SAFETY: as this function's. Packs of `slice` and tokens below `shape.tokens` are inside the tensors and the slots,
    // and by the launch rules this thread's alone. The same holds for the blocks below.
    let input = |token, chunk| unsafe {
        if !S::FIRST_HOP {
            return [Pack::default(); P];
        }
        load_row(activations.input, slice, chunk, &slice.indices(shape.operation_token(token), chunk))
    };

    // Prologue.
    // SAFETY: see above. What is constant may be read now.
    let prepared = unsafe { Prepared::<E, X, N, P, RESIDENT>::new(epilogue, slice, &team) };
    simt::wait_for_prerequisites();
    // SAFETY: see above.
    unsafe {
        if prologue.makes_addend(activations) {
            deal(team_index, teams, shape.tokens, |token| {
                make_addend::<E, I, P, RESIDENT>(prologue, activations, shape, slice, token, None);
            });
        }
    }
    // Read together with the state, and kept, where there are registers for it. Every team has a token.
    let keeps = const { RESIDENT && P == 1 && N == 2 };
    let first = if keeps { input(team.index, 0) } else { [Pack::default(); P] };
    // SAFETY: see above.
    let mut begun = unsafe { Begun::read(group, Begun::epoch(group)) };
    simt::launch_dependents();

    // Push.
    let own = |token, chunk| if keeps && token == team_index { first } else { input(token, chunk) };
    if S::FIRST_HOP {
        deal(team_index, teams, shape.tokens, |token| {
            let (owner, index) = dealt(token, group.world_size);
            if owner == group.rank || begun.waiter.failed {
                return;
            }
            // SAFETY: see above.
            unsafe {
                let row =
                    begun.slot_of::<N>(owner).offset(group.rank as u64 * stride + index as u64 * row_bytes);
                slice.for_chunks(|chunk| {
                    let packs = encode(wire, slice, chunk, own(token, chunk));
                    slice.for_each(chunk, |p, pack| wire.push(row, 0, in_row(pack), packs[p]));
                });
            }
        });
    }
    // SAFETY: see above.
    unsafe { origin.begin(&mut begun, shape) };
    begun.advance();
    // SAFETY: see above.
    unsafe { fill_padding::<E, X>(epilogue, shape) };

    // Complete. The second hop's rows follow the first's. Computed where it is used, so as to take up no registers before.
    let result =
        |token: u32| group.world_size as u64 * simt::black_box_u64(stride) + token as u64 * row_bytes;
    deal(team_index, teams, shape.tokens, |token| {
        let (owner, index) = dealt(token, group.world_size);
        // SAFETY: see above.
        unsafe {
            let slot = begun.slot_of::<N>(group.rank);
            let read = (activations, I::EXTRAS.then_some(extras));
            prepared.complete::<false>(&mut team, shape, read, token, |chunk, indices, row| {
                let residual = || load_row(residual_of_sum, slice, chunk, indices);
                let complete = |sum, p: usize, pack, residual: &[Pack; P]| {
                    let residual = has_residual.then_some(residual[p]);
                    residual_out::<E>(
                        sum,
                        bias_of(I::EXTRAS, activations, extras, pack),
                        residual,
                        rounds_sum,
                    )
                };
                let push = |begun: &Begun<'_>, pack: u32, sent: Pack| {
                    if begun.waiter.failed {
                        return;
                    }
                    let result = result(token);
                    for distance in 1..group.world_size {
                        let row = begun.slot_of::<N>(peer(group, distance)).offset(result);
                        wire.push(row, 0, in_row(pack), sent);
                    }
                };
                // Read while it is waited for what is added to it.
                let after = if W::ELEMENTS { [Pack::default(); P] } else { residual() };
                if owner != group.rank {
                    // `black_box`, so that addresses are computed in the loop: kept, they would take up registers.
                    let row_at = slot.offset(result(token));
                    let row_at = || Address(simt::black_box_u64(row_at.0));
                    *row = begun.waiter.one(
                        slice,
                        chunk,
                        |_, pack| wire.poll(row_at(), 0, in_row(pack)),
                        |_, pack| wire.refill(row_at(), 0, in_row(pack)),
                        owner,
                        Awaited { shape, token, hop: 2 },
                    );
                } else {
                    let own = encode(wire, slice, chunk, own(token, chunk));
                    let residual = if W::ELEMENTS { residual() } else { after };
                    let packs = if S::FIRST_HOP {
                        let row_at = slot.offset(index as u64 * row_bytes);
                        begun.waiter.all::<N, P, RESIDENT>(
                            slice,
                            chunk,
                            |source, _, pack| wire.poll(row_of(row_at, source, stride), 0, in_row(pack)),
                            |source, _, pack| wire.refill(row_of(row_at, source, stride), 0, in_row(pack)),
                            Awaited { shape, token, hop: 1 },
                        )
                    } else {
                        [[Pack::default(); N]; P]
                    };
                    let mut sums = [E::WIDE_ZERO; P];
                    slice.for_each(chunk, |p, pack| {
                        sums[p] = if S::FIRST_HOP {
                            sum_of::<E, W, N>(wire, group, in_row(pack), &packs[p], own[p])
                        } else {
                            origin.sum(
                                &mut begun.waiter,
                                index,
                                pack,
                                Awaited { shape, token, hop: HOST_FAILED },
                            )
                        };
                        if W::ELEMENTS {
                            row[p] = complete(sums[p], p, pack, &residual);
                            push(&begun, pack, row[p]);
                        }
                    });
                    if !W::ELEMENTS {
                        slice.for_lanes(chunk, |p, pack| row[p] = wire.encode_sum(in_row(pack), sums[p]));
                        slice.for_each(chunk, |p, pack| push(&begun, pack, row[p]));
                    }
                }
                if !W::ELEMENTS {
                    slice.for_each(chunk, |p, pack| {
                        row[p] = complete(wire.first(in_row(pack), row[p]), p, pack, &after);
                    });
                }
            });
        }
    });
}
