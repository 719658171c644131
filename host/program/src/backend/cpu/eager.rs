//! The operations of an eager framework, each a pass over whole tensors.

use std::marker::PhantomData;

use fused_collective::cpu::Plain;
use fused_collective_core::{
    norm,
    quant::{e4m3, scale},
};
use pulp::{Simd, WithSimd};

use super::tensors::Tensors;
use crate::backend::{problem::Problem, steps::Eager};

/// One eager operation over whole tensors.
pub(super) struct EagerPass<'a, E> {
    pub(super) eager: Eager,
    pub(super) problem: &'a Problem,
    pub(super) tensors: &'a mut Tensors,
    pub(super) element: PhantomData<E>,
}

impl<E: Plain> WithSimd for EagerPass<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let EagerPass { eager, problem, tensors, .. } = self;
        let hidden = problem.hidden as usize;
        let Tensors {
            residual,
            gamma,
            reduced,
            residual_out,
            norm_out,
            quant_out,
            wide_a,
            wide_b,
            per_token,
            ..
        } = tensors;
        match eager {
            Eager::AddResidual => {
                let addends = reduced.elements::<E>().iter().zip(residual.elements::<E>());
                for (sum, (reduced, residual)) in residual_out.elements_mut::<E>().iter_mut().zip(addends) {
                    *sum = E::from_f32(reduced.to_f32() + residual.to_f32());
                }
            }
            Eager::WidenResidual => map(residual_out.elements::<E>(), wide_a.elements_mut(), E::to_f32),
            Eager::Square => {
                map(wide_a.elements::<f32>(), wide_b.elements_mut::<f32>(), |value| value * value)
            }
            Eager::MeanRsqrt => {
                let rows = wide_b.elements::<f32>().chunks_exact(hidden);
                for (factor, row) in per_token.elements_mut::<f32>().iter_mut().zip(rows) {
                    let mut sums = [0.0f32; 32];
                    for values in row.chunks(sums.len()) {
                        sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
                    }
                    let mean = norm::sum_by_halves(sums) / hidden as f32;
                    *factor = 1.0 / (mean + problem.norm.epsilon).sqrt();
                }
            }
            Eager::ScaleRows => {
                let rows = wide_a.elements_mut::<f32>().chunks_exact_mut(hidden);
                for (row, &factor) in rows.zip(per_token.elements::<f32>()) {
                    row.iter_mut().for_each(|value| *value *= factor);
                }
            }
            Eager::Weight => {
                for row in wide_a.elements_mut::<f32>().chunks_exact_mut(hidden) {
                    for (value, gamma) in row.iter_mut().zip(gamma.elements::<E>()) {
                        *value *= problem.norm.weight_bias + gamma.to_f32();
                    }
                }
            }
            Eager::RoundNorm => map(wide_a.elements::<f32>(), norm_out.elements_mut(), E::from_f32),
            Eager::WidenNorm => map(norm_out.elements::<E>(), wide_a.elements_mut(), E::to_f32),
            Eager::Rescale => {
                let multiplier = scale::fp8_multiplier(problem.scale);
                wide_a.elements_mut::<f32>().iter_mut().for_each(|value| *value *= multiplier);
            }
            Eager::Clamp => {
                for value in wide_a.elements_mut::<f32>() {
                    *value = value.clamp(-e4m3::MAX, e4m3::MAX);
                }
            }
            Eager::RoundFp8 => map(wide_a.elements::<f32>(), quant_out.bytes_mut(), e4m3::encode),
        }
    }
}

#[inline(always)]
fn map<A: Copy, B>(from: &[A], to: &mut [B], convert: impl Fn(A) -> B) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to = convert(from);
    }
}
