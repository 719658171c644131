//! The norm of the sum: the bits of separate operations, by arithmetic in `f64`, and the reference's judgement of it.

use fused_collective_core::{
    dtype::{DType, Element, bf16, f16},
    fusion::{Mode, Norm, Operation, PartialSums, Residual, Rounding, WeightType},
    norm::Weights,
    quant::Quantization,
    reference::check_token,
    specification::{Observed, Output, Row, Token},
};

const HIDDEN: usize = 2880;

fn row<E: Element>(seed: usize) -> Vec<E> {
    (0..HIDDEN).map(|i| E::from_f32(((i * 37 + seed * 101) % 251) as f32 / 64.0 - 1.9)).collect()
}

fn operation(dtype: DType, residual: Residual, rounding: Rounding) -> Operation {
    Operation {
        dtype,
        tokens: 1,
        hidden: HIDDEN as u64,
        residual,
        norm: Some(Norm { weight_bias: 1.0, ..Norm::default() }),
        quantization: Quantization::None,
        keep_norm: false,
        rounding,
        bias: true,
        post_norm: Some(Norm { epsilon: 1e-3, weight_bias: 1.0, gamma: WeightType::Element }),
        experts: None,
        wire: None,
        partial_sums: PartialSums::F32,
        mode: Mode::Auto,
    }
}

/// Runs `work` on a token of two ranks, with a bias, and a residual if `operation` has one.
fn with_token<E: Element, R>(operation: &Operation, work: impl FnOnce(&Token<'_, E>) -> R) -> R {
    let rows: [Vec<E>; 6] = std::array::from_fn(row);
    let wide: Vec<f32> = rows[4].iter().map(|weight| weight.to_f32()).collect();
    work(&Token {
        inputs: &[&rows[0], &rows[1]],
        hosts: 1,
        residual: operation.residual.is_some().then_some(&rows[2]),
        bias: Some(&rows[3]),
        post_gamma: Some(match operation.post_norm.unwrap().gamma {
            WeightType::Element => Weights::Element(&rows[4]),
            WeightType::F32 => Weights::F32(&wide),
        }),
        experts: None,
        gamma: Weights::Element(&rows[5]),
        scale: 1.0,
        index: 0,
    })
}

/// `residual_out` and the norm.
fn compute<E: Element>(operation: &Operation) -> [Vec<E>; 2] {
    let [mut sum, mut norm] = [const { Vec::new() }; 2].map(|mut row: Vec<E>| {
        row.resize(HIDDEN, E::default());
        row
    });
    let mut row = Row { residual_out: &mut sum, norm: &mut norm, values: &mut [], scales: &mut [] };
    with_token(operation, |token| row.compute(operation, token)).unwrap();
    [sum, norm]
}

fn normalized(row: &[f64], norm: &Norm, gamma: impl Fn(usize) -> f64) -> Vec<f64> {
    let mean = row.iter().map(|value| value * value).sum::<f64>() / row.len() as f64;
    let inverse_rms = 1.0 / (mean + f64::from(norm.epsilon)).sqrt();
    let weight = |index| f64::from(norm.weight_bias) + gamma(index);
    row.iter().enumerate().map(|(index, value)| value * inverse_rms * weight(index)).collect()
}

/// `residual_out` by operations that are separate, and round what they store.
fn separately<E: Element>(operation: &Operation, token: &Token<'_, E>) -> Vec<E> {
    let wide = |row: &[E], index: usize| f64::from(row[index].to_f32());
    let round = |value: f64| f64::from(E::from_f64(value).to_f32());
    let sum = |index| {
        let addends = token.inputs.iter().copied().chain(token.bias);
        round(addends.map(|row| wide(row, index)).sum())
    };
    let sums: Vec<f64> = (0..HIDDEN).map(sum).collect();
    let gamma = token.post_gamma.unwrap();
    let norm = normalized(&sums, &operation.post_norm.unwrap(), |index| gamma.get(index).into());
    let twice = operation.rounding == Rounding::AfterAllReduce;
    let add = |(index, &norm): (usize, &f64)| {
        let norm = if twice { round(norm) } else { norm };
        E::from_f64(token.residual.map_or(norm, |residual| norm + wide(residual, index)))
    };
    norm.iter().enumerate().map(add).collect()
}

fn operations(dtype: DType) -> impl Iterator<Item = Operation> {
    let residuals = [Residual::None, Residual::Replicated];
    residuals.into_iter().flat_map(move |residual| {
        [Rounding::Once, Rounding::AfterAllReduce].map(|rounding| operation(dtype, residual, rounding))
    })
}

#[test]
fn it_is_what_separate_operations_compute() {
    fn check<E: Element>() {
        for operation in operations(E::DTYPE) {
            let [sum, _] = compute::<E>(&operation);
            let expected = with_token(&operation, |token| separately::<E>(&operation, token));
            let differ = sum.iter().zip(&expected).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
            // Those that `f32` arithmetic brings to the other side of a tie.
            assert!(differ <= 4, "{differ} of {HIDDEN} differ ({operation:?})");
            for (got, expected) in sum.iter().zip(&expected) {
                let apart = (got.to_f32() - expected.to_f32()).abs();
                assert!(apart <= 0.01 * got.to_f32().abs() + 1e-4, "{got:?}, not {expected:?}");
            }
        }
    }
    check::<bf16>();
    check::<f16>();
}

#[test]
fn exact_arithmetic_accepts_it_and_no_unit_more() {
    fn check<E: Element>() {
        for base in operations(E::DTYPE) {
            for gamma in [WeightType::Element, WeightType::F32] {
                let post_norm = base.post_norm.map(|norm| Norm { gamma, ..norm });
                let operation = Operation { post_norm, ..base };
                let [mut sum, norm] = compute::<E>(&operation);
                let check = |sum: &[E], norm_out: &[E]| {
                    let observed = Observed { residual_out: sum, norm_out, values: &[], scales: &[] };
                    with_token(&operation, |token| check_token(&operation, token, &observed))
                };
                let error = check(&sum, &norm).unwrap();
                let most = if E::DTYPE == DType::F32 { 20.0 } else { 0.51 };
                assert!(error > 0.0 && error <= most, "{error} ({operation:?})");
                if E::DTYPE != DType::F32 {
                    sum[7] = E::from_bits(sum[7].to_bits() + 1);
                    let mismatch = check(&sum, &norm).unwrap_err();
                    assert_eq!((mismatch.output, mismatch.index), (Output::Residual, 7));
                }
            }
        }
    }
    check::<f32>();
    check::<f16>();
    check::<bf16>();
}

#[test]
fn the_norm_is_rounded_where_separate_operations_round_it() {
    let of = |rounding| operation(DType::Bf16, Residual::Replicated, rounding);
    let [once, twice] =
        [Rounding::Once, Rounding::AfterAllReduce].map(|rounding| compute::<bf16>(&of(rounding)));
    assert_ne!(once[0], twice[0]);
    let alone = |rounding| operation(DType::Bf16, Residual::None, rounding);
    assert_eq!(
        compute::<bf16>(&alone(Rounding::Once)),
        compute::<bf16>(&alone(Rounding::AfterAllReduce)),
        "without a residual there is one rounding"
    );
}

#[test]
fn a_sum_that_overflows_or_is_nan_is_judged_as_it_is_specified() {
    let operation = operation(DType::Bf16, Residual::Replicated, Rounding::Once);
    for special in [f32::NAN, f32::INFINITY, 3e38, 1e30, 1e-40] {
        let first: Vec<bf16> =
            (0..HIDDEN).map(|i| bf16::from_f32(if i % 7 == 3 { special } else { 1.0 })).collect();
        let other: Vec<bf16> = row(1);
        let token = Token {
            inputs: &[&first, &other],
            hosts: 1,
            residual: Some(&other),
            bias: None,
            post_gamma: Some(Weights::Element(&other)),
            experts: None,
            gamma: Weights::Element(&other),
            scale: 1.0,
            index: 0,
        };
        let (mut sum, mut norm) = (first.clone(), first.clone());
        let mut row = Row { residual_out: &mut sum, norm: &mut norm, values: &mut [], scales: &mut [] };
        row.compute(&operation, &token).unwrap();
        let observed = Observed { residual_out: &sum, norm_out: &norm, values: &[], scales: &[] };
        check_token(&operation, &token, &observed).unwrap_or_else(|wrong| panic!("{special}: {wrong}"));
        assert_eq!(sum[3].is_nan(), !special.is_finite());
        assert_eq!(sum[0].is_nan(), special.is_nan());
    }
}
