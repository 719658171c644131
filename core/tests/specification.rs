//! The specification: the order of its sums, its reciprocal root, its distance from exact arithmetic, and the comparison with
//! an implementation.

use fused_collective_core::{
    dtype::{Element, bf16, f16},
    fusion::{Mode, Norm, Operation, PartialSums, Residual, Rounding},
    norm::{self, Weights},
    quant::{Quantization, ScaleLayout, ScaleTensor, e4m3},
    reference::check_token,
    specification::{Observed, Output, Row, Token},
};

/// The sum of `term(index)` of all indices below `count`, as the documentation says it.
fn sum_by_halves(indices: &[usize], term: &impl Fn(usize) -> f32) -> f32 {
    match indices {
        [] => 0.0,
        [index] => term(*index),
        _ => {
            let every_second = |from: usize| indices[from..].iter().copied().step_by(2).collect::<Vec<_>>();
            sum_by_halves(&every_second(0), term) + sum_by_halves(&every_second(1), term)
        }
    }
}

#[test]
fn squares_are_summed_in_the_documented_order() {
    fn check<E: Element>(hidden: usize) {
        let row: Vec<E> =
            (0..hidden).map(|index| E::from_f32(((index * 7919 + 13) % 1009) as f32 / 97.0 - 5.0)).collect();
        let value = |index: usize| row.get(index).map_or(0.0, |value| value.to_f32());
        let pair =
            |index: usize| value(2 * index + 1).mul_add(value(2 * index + 1), value(2 * index).powi(2));
        let indices = |from: usize, count: usize| (from..from + count).collect::<Vec<_>>();
        let (pairs, packs) = (E::LANES / 2, hidden.div_ceil(E::LANES));
        let pack = |index: usize| sum_by_halves(&indices(index * pairs, pairs), &pair);
        // A line has 32 packs, also where the row has fewer: a missing one is 0.
        let line = |index: usize| sum_by_halves(&indices(index * 32, 32), &pack);
        let expected = sum_by_halves(&indices(0, packs.div_ceil(32)), &line);
        assert_eq!(norm::sum_of_squares(&row).to_bits(), expected.to_bits(), "{} {hidden}", E::DTYPE);
    }
    for hidden in [16, 48, 64, 256, 272, 1008, 2880, 4096, 5120, 7168, 8192, 12_288, 65_536] {
        check::<f32>(hidden);
        check::<f16>(hidden);
        check::<bf16>(hidden);
    }
}

/// The relative error of `rsqrt(value)`, in units of 2^-24.
fn rsqrt_error(value: f32) -> f64 {
    let exact = 1.0 / f64::from(value).sqrt();
    (f64::from(norm::rsqrt(value, f32::mul_add)) - exact).abs() / exact * f64::from(1 << 24)
}

#[test]
fn the_reciprocal_root_of_every_significand_is_within_its_bound() {
    // An estimate by exponents: what holds for two in a row holds for all.
    let largest = (1.0f32.to_bits()..4.0f32.to_bits())
        .map(|bits| rsqrt_error(f32::from_bits(bits)))
        .fold(0.0, f64::max);
    println!("largest relative error {largest:.3} * 2^-24");
    assert!(largest < 2.0, "{largest}");
    for exponent in 1..255u32 {
        for significand in (0..1 << 23).step_by(77_777) {
            assert!(rsqrt_error(f32::from_bits(exponent << 23 | significand)) < 2.0);
        }
    }
}

#[test]
fn the_reciprocal_root_of_what_is_not_normal_is_defined() {
    let rsqrt = |value| norm::rsqrt(value, f32::mul_add);
    let of_smallest = rsqrt(f32::MIN_POSITIVE);
    assert!((of_smallest - 2.0f32.powi(63)).abs() <= of_smallest * f32::EPSILON);
    for subnormal in [0.0, 1e-45, 1e-39] {
        assert_eq!(rsqrt(subnormal).to_bits(), of_smallest.to_bits());
    }
    assert_eq!(rsqrt(f32::INFINITY).to_bits(), 0.0f32.to_bits());
    assert!(rsqrt(f32::NAN).is_nan() && rsqrt(-f32::NAN).is_nan());
}

#[test]
fn multiply_adds_in_software_are_those_of_the_processor() {
    let numbers =
        [0.0f32, 1e-45, 1e-39, 1.17e-38, 1e-20, 0.3, 1.0, 1.000_000_1, 7e18, 2e19, 3e38, f32::INFINITY];
    for a in numbers {
        for b in numbers {
            for c in numbers {
                for (a, c) in [(a, c), (-a, c), (a, -c)] {
                    let (software, processor) = (libm::fmaf(a, b, c), a.mul_add(b, c));
                    let same =
                        software.to_bits() == processor.to_bits() || software.is_nan() && processor.is_nan();
                    assert!(same, "{a:e} * {b:e} + {c:e}: {software:e} and {processor:e}");
                }
            }
        }
    }
}

/// Rows that rounding is hard on.
fn adversarial<E: Element>(hidden: usize) -> Vec<(&'static str, Vec<E>)> {
    let scale = if E::from_f32(1e6).to_f32().is_finite() { 1e15 } else { 3e4 };
    let rows: [(&str, &dyn Fn(usize) -> f32); 7] = [
        ("even", &|index| 0.5 + (index % 17) as f32 / 16.0),
        ("huge and tiny", &move |index| if index % 3 == 0 { scale } else { 1.0 / scale }),
        ("alternating", &|index| if index % 2 == 0 { 1.0 + (index % 5) as f32 } else { -1.0 }),
        ("one outlier", &move |index| if index == 3 { scale } else { 0.01 + index as f32 * 1e-6 }),
        ("falling", &|index| 1.0 / (1.0 + index as f32)),
        ("subnormal", &|index| (1 + index % 7) as f32 * 1e-39),
        ("noise", &|index| ((index * 1_103_515_245 + 12_345) >> 8 & 0xffff) as f32 / 32768.0 - 1.0),
    ];
    rows.map(|(name, value)| (name, (0..hidden).map(|index| E::from_f32(value(index))).collect())).into()
}

/// One token with a residual, a norm that is kept, and no quantization.
fn operation<E: Element>(hidden: usize) -> Operation {
    Operation {
        dtype: E::DTYPE,
        tokens: 1,
        hidden: hidden as u64,
        residual: Residual::Replicated,
        norm: Some(Norm::default()),
        quantization: Quantization::None,
        keep_norm: true,
        rounding: Rounding::Once,
        bias: false,
        post_norm: None,
        experts: None,
        wire: None,
        partial_sums: PartialSums::F32,
        mode: Mode::Auto,
    }
}

/// Both ranks' operation on a row: the largest error of any output in units in the last place.
fn error_of<E: Element>(row: &[E], quantization: Quantization) -> f64 {
    let hidden = row.len();
    let operation = Operation { quantization, ..operation::<E>(hidden) };
    let other: Vec<E> = row.iter().rev().copied().collect();
    let gamma: Vec<E> = (0..hidden).map(|index| E::from_f32(0.5 + (index % 7) as f32)).collect();
    let token = Token {
        inputs: &[row, &other],
        hosts: 1,
        residual: Some(row),
        bias: None,
        post_gamma: None,
        experts: None,
        gamma: Weights::Element(&gamma),
        scale: 0.25,
        index: 0,
    };
    let zeros = vec![E::default(); hidden];
    let mut row = Row {
        residual_out: &mut zeros.clone(),
        norm: &mut zeros.clone(),
        values: &mut vec![0; quantization.value_bytes_per_row(hidden as u64) as usize],
        scales: &mut vec![0; Row::<E>::scale_bytes(&operation) as usize],
    };
    row.compute(&operation, &token).unwrap();
    let observed = Observed {
        residual_out: row.residual_out,
        norm_out: row.norm,
        values: row.values,
        scales: row.scales,
    };
    row.compare(&operation, 0, &observed).unwrap();
    check_token(&operation, &token, &observed).unwrap_or_else(|wrong| panic!("{wrong} ({operation:?})"))
}

#[test]
fn adversarial_rows_stay_near_exact_arithmetic() {
    const LINEAR: ScaleLayout = ScaleLayout::Linear;
    fn check<E: Element>(most: f64) {
        for hidden in [16, 2880, 8192, 65_536] {
            for (name, row) in adversarial::<E>(hidden) {
                let error = error_of(&row, Quantization::None);
                println!("{} {hidden} {name}: {error:.3}", E::DTYPE);
                assert!(error <= most, "{} {hidden} {name}: {error}", E::DTYPE);
                for quantization in [Quantization::Fp8Static, Quantization::NvFp4 { layout: LINEAR }] {
                    error_of(&row, quantization);
                }
            }
        }
    }
    // In units in the last place of the element type, half of which is lost by rounding alone.
    check::<f32>(4.0);
    check::<f16>(0.51);
    check::<bf16>(0.51);
}

/// A change of a sum, a norm, codes and scales.
type Change<'a> = dyn Fn(&mut [f32], &mut [f32], &mut [u8], &mut [u8]) + 'a;

#[test]
fn any_other_bit_is_found_and_a_nan_is_a_nan() {
    let hidden = 64;
    let operation = Operation {
        tokens: 3,
        residual: Residual::None,
        quantization: Quantization::NvFp4 { layout: ScaleLayout::Swizzled128x4 },
        ..operation::<f32>(hidden)
    };
    let tensor = ScaleTensor { layout: ScaleLayout::Swizzled128x4, rows: 3, cols: 4, size: 1 };
    let compare = |change: &Change<'_>, input: &[f32]| {
        let gamma = vec![1.0; hidden];
        let token = Token {
            inputs: &[input],
            hosts: 1,
            residual: None,
            bias: None,
            post_gamma: None,
            experts: None,
            gamma: Weights::F32(&gamma),
            scale: 100.0,
            index: 2,
        };
        let (mut sum, mut norm) = (vec![0.0; hidden], vec![0.0; hidden]);
        let (mut values, mut scales) = (vec![0; hidden / 2], vec![0; hidden / 16]);
        let mut row =
            Row { residual_out: &mut sum, norm: &mut norm, values: &mut values, scales: &mut scales };
        row.compute(&operation, &token).unwrap();
        let mut all = vec![0; tensor.bytes().unwrap() as usize];
        for (col, &scale) in (0..).zip(&*row.scales) {
            all[tensor.offset(2, col) as usize] = scale;
        }
        let (mut sum, mut norm, mut values) =
            (row.residual_out.to_vec(), row.norm.to_vec(), row.values.to_vec());
        change(&mut sum, &mut norm, &mut values, &mut all);
        let observed = Observed { residual_out: &sum, norm_out: &norm, values: &values, scales: &all };
        row.compare(&operation, 2, &observed)
    };
    let input: Vec<f32> = (0..hidden).map(|index| index as f32 / 7.0 - 3.0).collect();
    assert_eq!(compare(&|_, _, _, _| {}, &input), Ok(()));
    let flip = |value: &mut f32| *value = f32::from_bits(value.to_bits() ^ 1);
    let found = |change: &Change<'_>| {
        let mismatch = compare(change, &input).unwrap_err();
        assert_eq!(mismatch.token, 2);
        (mismatch.output, mismatch.index)
    };
    assert_eq!(found(&|sum, _, _, _| flip(&mut sum[63])), (Output::Residual, 63));
    assert_eq!(found(&|_, norm, _, _| flip(&mut norm[0])), (Output::Norm, 0));
    assert_eq!(found(&|_, _, values, _| values[5] ^= 0x10), (Output::Value, 11));
    assert_eq!(found(&|_, _, values, _| values[5] ^= 0x01), (Output::Value, 10));
    let offset = tensor.offset(2, 3) as usize;
    assert_eq!(found(&|_, _, _, scales| scales[offset] ^= 1), (Output::Scale, 3));
    // The sign of a zero is a bit as well, and another NaN is none.
    let mut special = input.clone();
    special[1] = 0.0;
    let negative = compare(&|sum, _, _, _| sum[1] = -0.0, &special).unwrap_err();
    assert_eq!((negative.output, negative.index), (Output::Residual, 1));
    special[2] = f32::NAN;
    let other_nan = |sum: &mut [f32], norm: &mut [f32], _: &mut [u8], _: &mut [u8]| {
        sum[2] = -f32::NAN;
        norm[7] = f32::from_bits(0x7fff_ffff);
    };
    assert_eq!(compare(&other_nan, &special), Ok(()));
    assert_eq!(e4m3::encode(f32::NAN), e4m3::NAN);
}
