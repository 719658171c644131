//! The addend that a rank makes of its experts' rows, in vectors: the last step of a mixture of experts.

use std::borrow::Borrow;

use fused_collective_core::{
    fusion::{Experts, MAX_TOP_K},
    norm::Weights,
    specification::TokenExperts,
};
use pulp::{Simd, WithSimd};

use super::{
    lanes::{self, WideLine, vectors},
    line::Line,
    rows::{Plain, lines, lines_mut, padded},
    sum::add,
};
use crate::error::TensorProblem;

/// The experts' tensors on one rank: see [`Experts`].
#[derive(Clone, Copy, Debug)]
pub struct ExpertRows<'a, E> {
    /// `[any, hidden]`: `expert_rows`.
    pub rows: &'a [E],
    /// `[tokens, top_k]`: a row for each expert of each token; less than 0 for an expert on another rank.
    pub index: &'a [i32],
    /// `[tokens, top_k]`.
    pub scales: Weights<'a, E>,
}

impl<'a, E: Plain> ExpertRows<'a, E> {
    /// Checks that every index is one of a row, or less than 0.
    ///
    /// # Errors
    /// [`TensorProblem::Index`].
    pub(crate) fn check(&self, top_k: u32, hidden: u64) -> Result<(), TensorProblem> {
        let rows = self.rows.len() as u64 / hidden;
        match self.index.iter().position(|&index| index >= 0 && index as u64 >= rows) {
            Some(place) => {
                let token = place as u64 / u64::from(top_k);
                Err(TensorProblem::Index { token, index: self.index[place], rows })
            }
            None => Ok(()),
        }
    }

    /// The experts of token `token`.
    pub fn of_token(&self, token: usize, experts: &Experts) -> TokenExperts<'a, E> {
        let top_k = experts.top_k as usize;
        let range = token * top_k..(token + 1) * top_k;
        TokenExperts { rows: self.rows, index: &self.index[range.clone()], scales: self.scales.range(range) }
    }
}

/// `out = round(0 + scale_0 * row_0 + ... + shared)`: [`TokenExperts::addend`].
pub struct CombineRow<'a, E> {
    /// The experts of the token.
    pub experts: TokenExperts<'a, E>,
    /// `[hidden]`: the shared expert's row, if there is one.
    pub shared: Option<&'a [E]>,
    /// `[hidden]`.
    pub out: &'a mut [E],
}

impl<E: Plain> WithSimd for CombineRow<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let CombineRow { experts, shared, out } = self;
        let mut rows = [(0.0, lines::<E>(&[])); MAX_TOP_K as usize];
        let mut count = 0;
        for (place, (scale, row)) in rows.iter_mut().zip(experts.chosen(out.len())) {
            *place = (scale, lines(row));
            count += 1;
        }
        let (rows, shared) = (&rows[..count], shared.map(lines));
        let (out, out_rest) = lines_mut(out);
        for (index, out) in out.iter_mut().enumerate() {
            let rows = rows.iter().map(|&(scale, (row, _))| (scale, &row[index]));
            combine_line::<E, S>(simd, rows, shared.map(|(row, _)| &row[index]), out);
        }
        if !out_rest.is_empty() {
            let mut sum = padded(&[]);
            let rows = rows.iter().map(|&(scale, (_, rest))| (scale, padded(rest)));
            combine_line::<E, S>(simd, rows, shared.map(|(_, rest)| padded(rest)), &mut sum);
            out_rest.copy_from_slice(&sum[..out_rest.len()]);
        }
    }
}

#[inline(always)]
fn combine_line<E: Plain, S: Simd>(
    simd: S,
    rows: impl Iterator<Item = (f32, impl Borrow<Line>)>,
    shared: Option<impl Borrow<Line>>,
    out: &mut Line,
) {
    let mut sum: WideLine<S> = lanes::zeros(simd);
    for (scale, row) in rows {
        let (scale, row) = (simd.splat_f32s(scale), lanes::widen::<E, S>(simd, row.borrow()));
        for (sum, row) in sum.iter_mut().zip(row).take(vectors::<S>()) {
            for (sum, row) in sum[..E::PER_WORD].iter_mut().zip(row) {
                *sum = simd.mul_add_f32s(scale, row, *sum);
            }
        }
    }
    if let Some(shared) = shared {
        add::<E, S>(simd, &mut sum, &lanes::widen::<E, S>(simd, shared.borrow()));
    }
    lanes::round::<E, S>(simd, &sum, out);
}

#[cfg(test)]
mod tests {
    use fused_collective_core::dtype::{bf16, f16};
    use pulp::Arch;

    use super::*;
    use crate::cpu::rows::tests::row;

    fn check<E: Plain>(arch: Arch) {
        for hidden in (2..=208).step_by(2) {
            let rows: Vec<E> = (0..4).flat_map(|number| row::<E>(number, hidden)).collect();
            let shared = row::<E>(9, hidden);
            let scales = [0.3, -2.0, 1e-3, 7.0, 1e-30];
            for (index, shared) in [
                ([3, -1, 0, 2, 2], None),
                ([-1; 5], Some(&shared[..])),
                ([1, 2, -9, -1, 0], Some(&shared[..])),
            ] {
                let experts = TokenExperts { rows: &rows, index: &index, scales: Weights::F32(&scales) };
                let [mut found, mut expected] = [(); 2].map(|()| vec![E::default(); hidden]);
                arch.dispatch(CombineRow { experts, shared, out: &mut found });
                experts.addend(shared, &mut expected);
                for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    let nan = found.to_f32().is_nan() && expected.to_f32().is_nan();
                    let same = found.to_bits() == expected.to_bits();
                    assert!(nan || same, "{} {hidden}, {index}: {found:?}, not {expected:?}", E::DTYPE);
                }
            }
        }
    }

    #[test]
    fn rows_of_every_length_are_combined_as_elements_are() {
        for arch in [Arch::Scalar, Arch::new()] {
            check::<f32>(arch);
            check::<f16>(arch);
            check::<bf16>(arch);
        }
    }
}
