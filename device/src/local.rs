//! An epilogue on a row that needs no collective: RMSNorm with or without a residual, quantization alone, and both in
//! one pass, which is what a graph compiler makes of everything after an all-reduce. With extras, a kernel can normalize the sum
//! first, or only make the addend of an all-reduce.

use fused_collective_core::{dtype::Element, pack::Pack};

use crate::{
    convert,
    epilogue::{Epilogue, PackIndex},
    launch::{Activations, Extras, Local},
    prologue::{Prologue, addend_of},
    row::{Prepared, Team, ThreadSlice, residual_of_sum},
    simt,
};

/// The kernel without a collective: adds the residual, if there is one, and applies the epilogue. `P` and `RESIDENT` as
/// in the [collectives](crate::collective::one_shot). Kernels without code for extras pass `None`, a constant;
/// [`LocalAny`](crate::launch::LocalAny) says what the others do.
///
/// # Safety
/// As the collectives'.
#[inline(always)]
pub unsafe fn local<E, X, const P: usize, const RESIDENT: bool>(params: &Local<X>, extras: Option<&Extras>)
where
    E: Element,
    X: Epilogue<E>,
{
    let Local { shape, activations, epilogue } = params;
    let mut team = Team::join(X::ROW_SUM || X::ROW_MAX);
    let slice = ThreadSlice::<P, RESIDENT>::new(&team, shape);
    // SAFETY: as this function's; each pack of a tensor is one thread's. The same holds for the blocks below.
    let prepared = unsafe { Prepared::<E, X, 2, P, RESIDENT>::new(epilogue, slice, &team) };
    let residual = residual_of_sum(extras.is_some(), activations);
    let has_residual = !residual.is_null();

    simt::wait_for_prerequisites();
    if !activations.has(Activations::HOLDS_DEPENDENTS) {
        simt::launch_dependents();
    }
    let mut token = team.index;
    // The addend is the whole result: the loop below would read each pack again.
    if let Some(Extras { experts, .. }) = extras
        && Prologue::<E>::makes_addend(experts, activations)
    {
        while token < shape.tokens {
            slice.for_packs(|pack| {
                let index = PackIndex::new(shape.operation_token(token), pack, shape.row_packs);
                // SAFETY: see above.
                unsafe { simt::store(index.of(activations.input), addend_of::<E, 4>(experts, index)) };
            });
            token += team.teams;
        }
        return;
    }
    // SAFETY: see above.
    unsafe {
        epilogue.fill_padding(
            shape,
            simt::block() * simt::threads() + simt::thread(),
            simt::blocks() * simt::threads(),
        )
    };
    let read = (activations, extras);
    while token < shape.tokens {
        // SAFETY: see above.
        unsafe {
            prepared.complete::<true>(&mut team, shape, read, token, |chunk, indices, row| {
                let mut residuals = [Pack::default(); P];
                slice.for_each(chunk, |p, _| {
                    row[p] = simt::load(indices[p].of(activations.input));
                    if has_residual {
                        residuals[p] = simt::load(indices[p].of(residual));
                    }
                });
                if has_residual {
                    slice.for_each(chunk, |p, _| row[p] = add::<E>(row[p], residuals[p]));
                }
            });
        }
        token += team.teams;
    }
}

/// The sum of two packs, rounded once.
#[inline(always)]
fn add<E: Element>(a: Pack, b: Pack) -> Pack {
    let mut sum = convert::widen::<E>(a);
    for (sum, value) in sum.as_mut().iter_mut().zip(convert::widen::<E>(b).as_ref()) {
        *sum += value;
    }
    convert::narrow::<E>(sum)
}
