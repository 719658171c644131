//! The work on a row from its sum to the last store.

use fused_collective_core::{dtype::Element, norm, pack::Pack};

use super::{slice::ThreadSlice, team::Team};
use crate::{
    convert,
    epilogue::{Epilogue, PackIndex, RowValues, weights},
    launch::{Activations, Address, Extras, PostNorm, Shape},
    simt,
};

/// An epilogue with what it keeps in registers.
#[derive(Clone, Copy, Debug)]
pub struct Prepared<'a, E: Element, X: Epilogue<E>, const N: usize, const P: usize, const RESIDENT: bool> {
    epilogue: &'a X,
    constants: X::Constants,
    /// The weights of this thread's only pack. More would cost registers that the row itself needs: those are
    /// read for each row, from a cache.
    weights: X::Weights,
    /// The same, ready, where there are registers for it.
    ready: X::Ready,
    slice: ThreadSlice<P, RESIDENT>,
}

impl<'a, E: Element, X: Epilogue<E>, const N: usize, const P: usize, const RESIDENT: bool>
    Prepared<'a, E, X, N, P, RESIDENT>
{
    const HOLDS_WEIGHTS: bool = RESIDENT && P == 1;
    /// True if there are registers for more than what a row itself needs: kernels for two ranks hold fewer packs. A maximum
    /// over the row takes them.
    const SPARE: bool = RESIDENT && P == 1 && N == 2 && !X::ROW_MAX;

    /// Reads what is constant. Every thread of the team's blocks calls this once, before the first row; `N` is for how
    /// many ranks the kernel is.
    ///
    /// # Safety
    /// The addresses in `epilogue` are as its documentation says.
    #[inline(always)]
    pub unsafe fn new(epilogue: &'a X, slice: ThreadSlice<P, RESIDENT>, team: &Team) -> Self {
        if X::ROW_SUM || X::ROW_MAX {
            team.clear::<RESIDENT>(slice.lines());
        }
        let (mut weights, mut ready) = (X::Weights::default(), X::Ready::default());
        if Self::HOLDS_WEIGHTS {
            slice.for_each(0, |_, pack| {
                // SAFETY: as this function's.
                weights = unsafe { epilogue.weights(pack) };
                if Self::SPARE {
                    // SAFETY: as this function's.
                    ready = unsafe { epilogue.ready(pack, weights) };
                }
            });
        }
        // SAFETY: as this function's.
        let constants = unsafe { epilogue.constants() };
        Prepared { epilogue, constants, weights, ready, slice }
    }

    /// Completes token `token` of the round: `sum` puts this thread's packs of one chunk of `residual_out` into the
    /// array it is given, or with extras of the sum that there may be a norm of; `residual_out` is stored, and the epilogue
    /// gets the row. Every thread of the team calls this. Kernels without extras pass `None`, a constant. `LOCAL` says that
    /// the kernel has no collective: then there may be no `residual_out`.
    ///
    /// # Safety
    /// The addresses are as their documentation says, `token` is one of the round, and no other team completes it.
    #[inline(always)]
    pub unsafe fn complete<const LOCAL: bool>(
        &self,
        team: &mut Team,
        shape: &Shape,
        (activations, extras): (&Activations, Option<&Extras>),
        token: u32,
        mut sum: impl FnMut(u32, &[PackIndex; P], &mut [Pack; P]),
    ) {
        let token = shape.operation_token(token);
        let mut indices = self.slice.indices(token, 0);
        if Self::SPARE {
            indices = indices.map(PackIndex::kept);
        }
        let mut row = [Pack::default(); P];
        let mut row_sum = 0.0;
        let (has_row_sum, has_row_max) = (self.epilogue.row_sum(), self.epilogue.row_max());
        // A kernel without extras and without a collective has nothing to settle.
        if RESIDENT && has_row_sum && (!LOCAL || extras.is_some()) {
            sum(0, &indices, &mut row);
            // SAFETY: as this function's.
            row_sum =
                unsafe { self.settle::<LOCAL>(team, (activations, extras), &mut row, |p, _| indices[p]) };
        } else {
            self.slice.for_chunks(|chunk| {
                let mut addends = [0.0; P];
                if !RESIDENT {
                    indices = self.slice.indices(token, chunk);
                }
                sum(chunk, &indices, &mut row);
                self.slice.for_each(chunk, |p, _| {
                    if !activations.residual_out.is_null() {
                        // SAFETY: inside the tensor; the pack is this thread's alone.
                        unsafe { simt::store(indices[p].of(activations.residual_out), row[p]) };
                    }
                    if has_row_sum {
                        addends[p] = self.epilogue.addend(row[p]);
                    } else if !has_row_max {
                        // SAFETY: as this function's.
                        unsafe { self.finish(indices[p], row[p], RowValues::default()) };
                    }
                });
                if has_row_sum {
                    team.add::<P, RESIDENT>(chunk, addends);
                }
            });
            if has_row_sum {
                row_sum = team.sum::<P, RESIDENT>();
            }
        }
        if !has_row_sum && !has_row_max {
            return;
        }
        let read = |index: PackIndex| {
            // SAFETY: this thread wrote the pack above, or nobody writes the input.
            unsafe { simt::load(index.of(row_in_memory(activations))) }
        };
        // SAFETY: as this function's.
        let of_row = unsafe { self.row_values(team, row_sum, token, &row, read) };
        self.slice.for_chunks(|chunk| {
            if !Self::SPARE {
                // `black_box`, or they would be kept.
                indices = self.slice.indices(simt::black_box_u64(token), chunk);
            }
            self.slice.for_each(chunk, |p, _| {
                if !RESIDENT {
                    row[p] = read(indices[p]);
                }
                // SAFETY: as this function's.
                unsafe { self.finish(indices[p], row[p], of_row) };
            });
        });
    }

    /// Makes `residual_out` of the sum of all ranks in `row`, which it is already unless there is a norm of the sum. Stores it
    /// unless its address is null, which only `LOCAL` kernels allow. Returns the sum over it. `index` gives a pack's index in the
    /// residual.
    ///
    /// The norm of the sum and the sum over `residual_out` are turns of one loop: so the code of a sum over a row is in a
    /// kernel once.
    ///
    /// # Safety
    /// As [`complete`](Self::complete).
    #[inline(always)]
    unsafe fn settle<const LOCAL: bool>(
        &self,
        team: &mut Team,
        (activations, extras): (&Activations, Option<&Extras>),
        row: &mut [Pack; P],
        index: impl Fn(usize, u32) -> PackIndex,
    ) -> f32 {
        let post_norm = extras.map(|extras| &extras.post_norm);
        let mut left = match post_norm {
            Some(_) => simt::black_box_u32(activations.flags) & Activations::POST_NORM,
            None => 0,
        };
        loop {
            let mut addends = [0.0; P];
            self.slice.for_each(0, |p, pack| {
                if left == 0 && (!LOCAL || !activations.residual_out.is_null()) {
                    // SAFETY: inside the tensor; the pack is this thread's alone.
                    unsafe { simt::store(index(p, pack).of(activations.residual_out), row[p]) };
                }
                addends[p] = self.epilogue.addend(row[p]);
            });
            team.add::<P, RESIDENT>(0, addends);
            let sum = team.sum::<P, RESIDENT>();
            let Some(post_norm) = post_norm.filter(|_| left != 0) else { return sum };
            // `black_box`, or a compiler knows that the next turn is the last, and has the loop twice.
            left = simt::black_box_u32(0);
            let inverse_rms = norm::inverse_rms(sum, post_norm.inverse_hidden, post_norm.epsilon, simt::fma);
            self.slice.for_each(0, |p, pack| {
                // SAFETY: as this function's.
                row[p] = unsafe {
                    post_norm_out::<E>((activations, post_norm), index(p, pack), row[p], inverse_rms)
                };
            });
        }
    }

    /// The values of a row that the epilogue needs, of which `row_sum` is the sum. `row` are this thread's packs, or where they
    /// are not resident `read` has them, of row `token` of its tensor.
    ///
    /// # Safety
    /// As [`complete`](Self::complete).
    #[inline(always)]
    unsafe fn row_values(
        &self,
        team: &mut Team,
        row_sum: f32,
        token: u64,
        row: &[Pack; P],
        read: impl Fn(PackIndex) -> Pack,
    ) -> RowValues {
        let value = if self.epilogue.row_sum() { self.epilogue.row_value(row_sum) } else { 0.0 };
        let mut max = 0.0;
        if self.epilogue.row_max() {
            self.slice.for_chunks(|chunk| {
                self.slice.for_each(chunk, |p, pack| {
                    let index = || PackIndex::new(simt::black_box_u64(token), pack, self.slice.row_packs);
                    let row = if RESIDENT { row[p] } else { read(index()) };
                    // SAFETY: as this function's.
                    let weights = unsafe { self.ready(pack) };
                    max = f32::max(max, self.epilogue.magnitude(row, value, weights));
                });
            });
            max = team.max::<P, RESIDENT>(max);
        }
        RowValues { value, max }
    }

    /// Completes a token of this rank's as [`complete`](Self::complete), but gives what the epilogue makes of each pack
    /// to `send`, with the pack: what it became and, for the first of those that share a word of scales, this word.
    /// The row of `residual_out` is `owned`, the token's row among this rank's. `context` is what both closures work on.
    ///
    /// # Safety
    /// As [`complete`](Self::complete).
    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "a struct of them would have to be taken apart again")]
    pub unsafe fn make<C>(
        &self,
        team: &mut Team,
        shape: &Shape,
        (activations, extras): (&Activations, Option<&Extras>),
        owned: u32,
        context: &mut C,
        sum: impl Fn(&mut C, u32, &mut [Pack; P]),
        send: impl Fn(&mut C, u32, Pack, u32),
    ) {
        let index = |pack| PackIndex::new(owned as u64, pack, shape.row_packs);
        let mut row = [Pack::default(); P];
        let mut row_sum = 0.0;
        if RESIDENT && X::ROW_SUM {
            sum(context, 0, &mut row);
            // SAFETY: as this function's.
            row_sum =
                unsafe { self.settle::<false>(team, (activations, extras), &mut row, |_, pack| index(pack)) };
        } else {
            self.slice.for_chunks(|chunk| {
                let mut addends = [0.0; P];
                sum(context, chunk, &mut row);
                self.slice.for_each(chunk, |p, pack| {
                    // SAFETY: inside the tensor; the pack is this thread's alone.
                    unsafe { simt::store(index(pack).of(activations.residual_out), row[p]) };
                    if X::ROW_SUM {
                        addends[p] = self.epilogue.addend(row[p]);
                    }
                });
                if X::ROW_SUM {
                    team.add::<P, RESIDENT>(chunk, addends);
                }
            });
            if X::ROW_SUM {
                row_sum = team.sum::<P, RESIDENT>();
            }
        }
        // SAFETY: this thread wrote the packs above.
        let read = |index: PackIndex| unsafe { simt::load(index.of(activations.residual_out)) };
        // SAFETY: as this function's.
        let of_row = unsafe { self.row_values(team, row_sum, owned as u64, &row, read) };
        self.slice.for_chunks(|chunk| {
            self.slice.for_lanes(chunk, |p, pack| {
                let inside = pack < shape.row_packs;
                if !RESIDENT {
                    row[p] = if inside { read(index(pack)) } else { Pack::default() };
                }
                // SAFETY: as this function's.
                let weights = if inside { unsafe { self.ready(pack) } } else { X::Ready::default() };
                // `black_box`, so that the second pack's registers are not taken while the first's are in use.
                let (words, scales) = self.epilogue.make(
                    index(pack),
                    if P > 1 || X::ROW_MAX { simt::black_box(row[p]) } else { row[p] },
                    of_row,
                    weights,
                    self.constants,
                );
                if inside {
                    send(context, pack, words, scales);
                }
            });
        });
    }

    /// The weights of a pack of the row.
    ///
    /// # Safety
    /// As [`complete`](Self::complete).
    #[inline(always)]
    unsafe fn ready(&self, pack: u32) -> X::Ready {
        if Self::SPARE {
            self.ready
        } else if Self::HOLDS_WEIGHTS {
            // SAFETY: as this function's; so below.
            unsafe { self.epilogue.ready(pack, self.weights) }
        } else {
            // SAFETY: see above.
            unsafe { self.epilogue.ready(pack, self.epilogue.weights(pack)) }
        }
    }

    /// # Safety
    /// As [`complete`](Self::complete).
    #[inline(always)]
    unsafe fn finish(&self, index: PackIndex, row: Pack, of_row: RowValues) {
        // SAFETY: as this function's.
        unsafe {
            let weights = self.ready(index.pack);
            // As in `make`; and so that what `magnitude` made of the row is made again, not kept.
            let row = if P > 1 || X::ROW_MAX { simt::black_box(row) } else { row };
            self.epilogue.finish(index, row, of_row, weights, self.constants);
        }
    }
}

/// The residual that is added to the sum of all ranks: null if there is none, or if it is added to the norm of the sum.
/// `has_extras` says if the kernel has code for [`Extras`].
#[inline(always)]
pub(crate) fn residual_of_sum(has_extras: bool, activations: &Activations) -> Address {
    if !has_extras {
        return activations.residual;
    }
    // `black_box`, so that this is asked where it is used, and takes up no registers before.
    let flags = simt::black_box_u32(activations.flags);
    if flags & Activations::POST_NORM == 0 { activations.residual } else { Address::NULL }
}

/// A pack of `residual_out`, of a pack of the sum of all ranks: the norm of the sum, plus the residual's pack `index`.
///
/// # Safety
/// The addresses are as their documentation says, and `index` is inside the residual.
#[inline(always)]
unsafe fn post_norm_out<E: Element>(
    (activations, post_norm): (&Activations, &PostNorm),
    index: PackIndex,
    sum: Pack,
    inverse_rms: f32,
) -> Pack {
    let PostNorm { gamma, weight_bias, gamma_f32, .. } = *post_norm;
    // SAFETY: gamma has a row's packs and is constant.
    let weights = unsafe { weights::<E>(gamma, gamma_f32 != 0, index.pack) };
    let mut norm = convert::widen::<E>(sum);
    for (value, weight) in norm.as_mut().iter_mut().zip(weights.as_ref()) {
        *value = *value * inverse_rms * (weight_bias + weight);
    }
    if activations.has(Activations::ROUNDS_SUM) {
        norm = convert::widen::<E>(convert::narrow::<E>(norm));
    }
    if !activations.residual.is_null() {
        // SAFETY: as this function's.
        let residual = convert::widen::<E>(unsafe { simt::load(index.of(activations.residual)) });
        for (value, residual) in norm.as_mut().iter_mut().zip(residual.as_ref()) {
            *value += residual;
        }
    }
    convert::narrow::<E>(norm)
}

/// Where a finished row can be read again. Without `residual_out` there is no residual, and the row is the input.
#[inline(always)]
fn row_in_memory(activations: &Activations) -> Address {
    if activations.residual_out.is_null() { activations.input } else { activations.residual_out }
}
