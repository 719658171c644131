//! The addend that a rank makes of its experts' rows: the order of its sum, experts elsewhere, and exact arithmetic.

use fused_collective_core::{
    dtype::{DType, Element, bf16, f16},
    fusion::{Experts, Mode, Norm, Operation, PartialSums, Residual, Rounding, WeightType},
    norm::Weights,
    quant::Quantization,
    reference::check_token,
    specification::{Observed, Output, Row, Token, TokenExperts},
};

const HIDDEN: usize = 64;
const ROWS: usize = 5;

fn numbers<E: Element>(seed: usize, count: usize) -> Vec<E> {
    (0..count).map(|i| E::from_f32(((i * 37 + seed * 101) % 251) as f32 / 64.0 - 1.9)).collect()
}

fn operation(dtype: DType, experts: Experts) -> Operation {
    Operation {
        dtype,
        tokens: 1,
        hidden: HIDDEN as u64,
        residual: Residual::Replicated,
        norm: Some(Norm::default()),
        quantization: Quantization::None,
        keep_norm: false,
        rounding: Rounding::Once,
        bias: false,
        post_norm: None,
        experts: Some(experts),
        wire: None,
        partial_sums: PartialSums::F32,
        mode: Mode::Auto,
    }
}

/// Each product and its addition rounded once, the shared expert last.
fn expected<E: Element>(experts: &TokenExperts<'_, E>, shared: Option<&[E]>) -> Vec<E> {
    let mut sum = vec![0.0f32; HIDDEN];
    for (k, &row) in experts.index.iter().enumerate().filter(|&(_, &row)| row >= 0) {
        for (index, sum) in sum.iter_mut().enumerate() {
            *sum = experts.scales.get(k).mul_add(experts.rows[row as usize * HIDDEN + index].to_f32(), *sum);
        }
    }
    let shared = |index: usize, sum: f32| shared.map_or(sum, |row| sum + row[index].to_f32());
    sum.iter().enumerate().map(|(index, &sum)| E::from_f32(shared(index, sum))).collect()
}

fn bits<E: Element>(row: &[E]) -> Vec<u32> {
    row.iter().map(|element| element.to_bits()).collect()
}

#[test]
fn the_addend_is_summed_in_the_order_of_the_token_and_experts_elsewhere_are_left_out() {
    fn check<E: Element>() {
        let (rows, shared) = (numbers::<E>(1, ROWS * HIDDEN), numbers::<E>(2, HIDDEN));
        let (scales, wide) =
            (numbers::<E>(3, 4), numbers::<f32>(4, 4).iter().map(|s| s / 3.0).collect::<Vec<_>>());
        let mut seen = Vec::new();
        for index in [[0, 1, 2, 3], [3, 2, 1, 0], [-1, 4, -7, 4], [i32::MIN, -1, -1, -1]] {
            for scales in [Weights::Element(&scales), Weights::F32(&wide)] {
                for shared in [None, Some(&shared[..])] {
                    let experts = TokenExperts { rows: &rows, index: &index, scales };
                    let mut addend = vec![E::default(); HIDDEN];
                    experts.addend(shared, &mut addend);
                    assert_eq!(bits(&addend), bits(&expected(&experts, shared)), "{} {index:?}", E::DTYPE);
                    seen.push(bits(&addend));
                }
            }
        }
        // Nothing but +0 comes of no expert, and the shared row of it alone.
        assert_eq!(seen[12], vec![0; HIDDEN]);
        assert_eq!(seen[13], bits(&shared));
        assert_ne!(seen[0], seen[2], "the types of the scales differ");
        assert_ne!(seen[0], seen[1], "the shared expert counts");
    }
    check::<f32>();
    check::<f16>();
    check::<bf16>();
}

#[test]
fn a_scale_that_is_nan_reaches_every_element_unless_its_expert_is_elsewhere() {
    let rows = numbers::<bf16>(1, ROWS * HIDDEN);
    let scales = [1.0, f32::NAN];
    let addend = |index: [i32; 2]| {
        let mut addend = vec![bf16::ZERO; HIDDEN];
        TokenExperts { rows: &rows, index: &index, scales: Weights::F32(&scales) }.addend(None, &mut addend);
        addend
    };
    assert!(addend([0, 1]).iter().all(|value| value.is_nan()));
    assert_eq!(addend([3, -1]), rows[3 * HIDDEN..4 * HIDDEN]);
}

#[test]
fn the_sum_is_that_of_rounded_addends_and_exact_arithmetic_accepts_it() {
    fn check<E: Element>(scale_of_nan: bool, shared: bool, elsewhere: bool) {
        let rows = [1, 2].map(|rank| numbers::<E>(rank, ROWS * HIDDEN));
        let inputs = [3, 4].map(|rank| numbers::<E>(rank, HIDDEN));
        let mut scales = [5, 6].map(|rank| numbers::<f32>(rank, 3));
        if scale_of_nan {
            scales[1][0] = f32::NAN;
        }
        let index = if elsewhere { [[-1; 3]; 2] } else { [[4, -1, 2], [0, 0, -1]] };
        let experts: [_; 2] = std::array::from_fn(|rank| TokenExperts {
            rows: &rows[rank],
            index: &index[rank],
            scales: Weights::F32(&scales[rank]),
        });
        let operation = operation(E::DTYPE, Experts { top_k: 3, scales: WeightType::F32, shared });
        let residual = numbers::<E>(7, HIDDEN);
        let inputs: Vec<&[E]> = inputs.iter().map(|row| &row[..]).collect();
        let token = Token {
            inputs: if shared { &inputs } else { &[] },
            hosts: 1,
            residual: Some(&residual),
            bias: None,
            post_gamma: None,
            experts: Some(&experts),
            gamma: Weights::Element(&residual),
            scale: 1.0,
            index: 0,
        };
        let compute = |operation: &Operation, token: &Token<'_, E>| {
            let (mut sum, mut norm) = (residual.clone(), residual.clone());
            let mut row = Row { residual_out: &mut sum, norm: &mut norm, values: &mut [], scales: &mut [] };
            row.compute(operation, token).unwrap();
            (sum, norm)
        };
        let (mut sum, norm) = compute(&operation, &token);
        let addends: Vec<Vec<E>> =
            (0..2).map(|rank| expected(&experts[rank], shared.then(|| inputs[rank]))).collect();
        let addends: Vec<&[E]> = addends.iter().map(|row| &row[..]).collect();
        let plain = Operation { experts: None, ..operation };
        let (of_addends, _) = compute(&plain, &Token { inputs: &addends, experts: None, ..token });
        let is_nan = |row: &[E]| row.iter().all(|value| value.to_f32().is_nan());
        assert!(bits(&sum) == bits(&of_addends) || is_nan(&sum) && is_nan(&of_addends));
        assert_eq!(is_nan(&sum), scale_of_nan && !elsewhere);
        let check = |sum: &[E]| {
            let observed = Observed { residual_out: sum, norm_out: &norm, values: &[], scales: &[] };
            check_token(&operation, &token, &observed)
        };
        check(&sum).unwrap_or_else(|wrong| panic!("{wrong}"));
        sum[9] = E::from_f32(sum[9].to_f32() * 1.02 + 0.02);
        if !is_nan(&sum) {
            let mismatch = check(&sum).unwrap_err();
            assert_eq!((mismatch.output, mismatch.index), (Output::Residual, 9));
        }
    }
    for scale_of_nan in [false, true] {
        for shared in [false, true] {
            for elsewhere in [false, true] {
                check::<f32>(scale_of_nan, shared, elsewhere);
                check::<f16>(scale_of_nan, shared, elsewhere);
                check::<bf16>(scale_of_nan, shared, elsewhere);
            }
        }
    }
}
