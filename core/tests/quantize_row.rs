//! Quantized rows against the formulas of the scales, computed apart from the code under test: products and
//! quotients in `f32` or exactly in `f64`, and the nearest code found by looking at every one.

use fused_collective_core::{
    dtype::{Element, bf16, f16},
    quant::{GroupScale, Quantization, RowError, ScaleLayout, e2m1, e4m3, quantize_row, scale, ue4m3},
};
use proptest::prelude::*;

const LINEAR: ScaleLayout = ScaleLayout::Linear;
const SWIZZLED: ScaleLayout = ScaleLayout::Swizzled128x4;
/// The content of buffers before a call: no code or scale of these tests.
const POISON: u8 = 0xa5;

/// The code among `codes` whose value is nearest to `value`, the even one of two; saturates.
fn nearest(value: f64, codes: std::ops::RangeInclusive<u8>, decode: impl Fn(u8) -> f32) -> u8 {
    let value = value.abs().min(f64::from(decode(*codes.end())));
    let distance = |code: u8| (f64::from(decode(code)) - value).abs();
    let least = codes.clone().map(distance).fold(f64::INFINITY, f64::min);
    let candidates: Vec<u8> = codes.filter(|&code| distance(code) == least).collect();
    *candidates.iter().find(|&code| code % 2 == 0).unwrap_or(&candidates[0])
}

fn nearest_e4m3(value: f64) -> u8 {
    if value.is_nan() {
        return 0x7f;
    }
    let code = if value.is_infinite() { 0x7e } else { nearest(value, 0..=0x7e, e4m3::decode) };
    code | if value.is_sign_negative() { 0x80 } else { 0 }
}

fn nearest_e2m1(value: f64) -> u8 {
    if value.is_nan() {
        return 0x7;
    }
    let code = if value.is_infinite() { 0x7 } else { nearest(value, 0..=0x7, e2m1::decode) };
    code | if value.is_sign_negative() { 0x8 } else { 0 }
}

fn nearest_ue4m3(value: f64) -> u8 {
    match value {
        _ if value.is_nan() => 0x7f,
        _ if value == f64::INFINITY => 0x7e,
        _ => nearest(value.max(0.0), 0..=0x7e, ue4m3::decode),
    }
}

/// The exponent of the least power of two in UE8M0 that is not below `value`; `None` for NaN.
fn exponent_up(value: f64) -> Option<i32> {
    (!value.is_nan()).then(|| (-127..127).find(|&e| 2f64.powi(e) >= value).unwrap_or(127))
}

/// A row of codes and its scales, in order of their columns.
#[derive(Debug, PartialEq)]
struct Quantized {
    values: Vec<u8>,
    scales: Vec<u8>,
}

/// The right result of `quantize_row`, by the formulas.
fn expected(quantization: Quantization, row: &[f32], scale: f32) -> Quantized {
    let amax =
        |block: &[f32]| block.iter().filter(|x| !x.is_nan()).fold(0f32, |largest, x| largest.max(x.abs()));
    let amax_or_nan = |block: &[f32]| if block.iter().any(|x| x.is_nan()) { f32::NAN } else { amax(block) };
    let fp8 = |x: &f32, multiplier: f32| nearest_e4m3(f64::from(x * multiplier));
    let fp4 = |block: &[f32], multiplier: f32| -> Vec<u8> {
        let code = |x: f32| nearest_e2m1(f64::from(x * multiplier));
        block.chunks(2).map(|pair| code(pair[0]) + 16 * code(pair[1])).collect()
    };
    let (mut values, mut scales) = (Vec::new(), Vec::new());
    match quantization {
        Quantization::None => {}
        // A scale that is not valid multiplies by 0.
        Quantization::Fp8Static => {
            let multiplier = if quantization.check_scale(scale).is_ok() { 1.0 / scale } else { 0.0 };
            values.extend(row.iter().map(|x| fp8(x, multiplier)));
        }
        Quantization::Fp8PerToken => {
            let scale = (amax(row) / 448.0).max(1.0 / (448.0 * 512.0));
            values.extend(row.iter().map(|x| nearest_e4m3(f64::from(x / scale))));
            scales.extend(scale.to_bits().to_le_bytes());
        }
        Quantization::Fp8PerGroup { group, scales: GroupScale::F32, .. } => {
            for block in row.chunks(group as usize) {
                let scale = amax(block).max(1e-10) / 448.0;
                values.extend(block.iter().map(|x| nearest_e4m3(f64::from(x / scale))));
                scales.extend(scale.to_bits().to_le_bytes());
            }
        }
        Quantization::Fp8PerGroup { .. } | Quantization::MxFp8 { .. } => {
            for block in row.chunks(quantization.block().unwrap() as usize) {
                let exponent = exponent_up(f64::from(amax(block)) / 448.0).unwrap();
                values.extend(block.iter().map(|x| nearest_e4m3(f64::from(*x) * 2f64.powi(-exponent))));
                scales.push((exponent + 127) as u8);
            }
        }
        Quantization::MxFp4 { .. } => {
            for block in row.chunks(32) {
                let exponent = exponent_up(f64::from(amax_or_nan(block)) / 6.0);
                values.extend(fp4(block, exponent.map_or(f32::NAN, |e| 2f64.powi(-e) as f32)));
                scales.push(exponent.map_or(255, |e| (e + 127) as u8));
            }
        }
        Quantization::NvFp4 { .. } => {
            let scale = if quantization.check_scale(scale).is_ok() { scale } else { 0.0 };
            for block in row.chunks(16) {
                let code = nearest_ue4m3(f64::from(scale * (amax_or_nan(block) / 6.0)));
                let multiplier = if code == 0 { 0.0 } else { scale / ue4m3::decode(code) };
                values.extend(fp4(block, multiplier));
                scales.push(code);
            }
        }
    }
    Quantized { values, scales }
}

/// Runs `quantize_row` among poisoned buffers, and checks that it wrote the row, its scales and its padding
/// columns and nothing else.
fn quantize<E: Element>(
    quantization: Quantization,
    row: &[E],
    (token, tokens): (u64, u64),
    scale: f32,
) -> Result<Quantized, RowError> {
    let hidden = row.len() as u64;
    let mut values = vec![POISON; quantization.value_bytes_per_row(hidden) as usize];
    let mut all_scales = vec![POISON; quantization.scale_bytes(tokens, hidden).unwrap() as usize];
    let result = quantize_row(quantization, row, token, tokens, scale, &mut values, &mut all_scales);
    let mut scales = Vec::new();
    let mut take = |offset: u64| std::mem::replace(&mut all_scales[offset as usize], POISON);
    if let Some(tensor) = quantization.scales(tokens, hidden)
        && result.is_ok()
    {
        let bytes = |col| (0..tensor.size).map(move |byte| tensor.offset(token, col) + byte);
        scales.extend((0..tensor.cols).flat_map(bytes).map(&mut take));
        for offset in tensor.padding_cols().flat_map(bytes) {
            assert_eq!(take(offset), 0, "padding at {offset}");
        }
    }
    assert!(all_scales.iter().all(|&byte| byte == POISON), "another row's scales were written");
    result.map(|()| Quantized { values, scales })
}

fn any_quantization() -> impl Strategy<Value = Quantization> {
    let layout = || prop::sample::select(&ScaleLayout::ALL[..]);
    let f32_layout = prop::sample::select(&[LINEAR, ScaleLayout::ColumnMajor, ScaleLayout::DeepGemm][..]);
    let group = || prop_oneof![Just(32), Just(64), Just(128)];
    prop_oneof![
        Just(Quantization::None),
        Just(Quantization::Fp8Static),
        Just(Quantization::Fp8PerToken),
        (group(), layout()).prop_map(|(group, layout)| Quantization::Fp8PerGroup {
            group,
            scales: GroupScale::Ue8m0,
            layout
        }),
        (group(), f32_layout).prop_map(|(group, layout)| Quantization::Fp8PerGroup {
            group,
            scales: GroupScale::F32,
            layout
        }),
        layout().prop_map(|layout| Quantization::NvFp4 { layout }),
        layout().prop_map(|layout| Quantization::MxFp8 { layout }),
        layout().prop_map(|layout| Quantization::MxFp4 { layout }),
    ]
}

/// Activations, for the most part; some rows are of any bit patterns, NaN, infinities and subnormals among them.
fn any_row() -> impl Strategy<Value = Vec<f32>> {
    let usual = (-8f32..8.0, -20i32..20).prop_map(|(x, e)| x * 2f32.powi(e / 4));
    let any =
        prop_oneof![20 => any::<u32>().prop_map(f32::from_bits), 1 => Just(f32::NAN), 1 => Just(-f32::NAN)];
    let length = 0usize..9;
    prop_oneof![
        4 => length.clone().prop_flat_map(move |n| prop::collection::vec(usual.clone(), n * 128)),
        1 => length.prop_flat_map(move |n| prop::collection::vec(any.clone(), n * 128)),
    ]
}

fn follows_the_formula<E: Element>(
    quantization: Quantization,
    row: &[f32],
    place: (u64, u64),
    scale: f32,
) -> Result<(), TestCaseError> {
    let block = quantization.block().unwrap_or(16) as usize;
    // Not only multiples of 128: an odd number of blocks where there is more than one.
    let length = if row.len() > block { row.len() - block } else { row.len() };
    let row: Vec<E> = row[..length].iter().map(|&x| E::from_f32(x)).collect();
    let wide: Vec<f32> = row.iter().map(|x| x.to_f32()).collect();
    let found = quantize(quantization, &row, place, scale).unwrap();
    let mut expected = expected(quantization, &wide, scale);
    if matches!(quantization, Quantization::NvFp4 { .. } | Quantization::MxFp4 { .. }) {
        // Two codes in a byte. A pack's only -0, in the last place behind +0, is +0.
        for pack in expected.values.chunks_mut(E::LANES / 2) {
            let (last, before) = pack.split_last_mut().unwrap();
            if *last == 0x80 && before.iter().all(|&byte| byte == 0) {
                *last = 0;
            }
        }
    }
    prop_assert_eq!(found.scales, expected.scales, "{}", E::DTYPE);
    prop_assert_eq!(found.values.len(), expected.values.len());
    for (index, (found, expected)) in found.values.iter().zip(&expected.values).enumerate() {
        prop_assert_eq!(found, expected, "{}, byte {} of {:?}", E::DTYPE, index, &wide);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn every_row_follows_the_formula(
        quantization in any_quantization(),
        row in any_row(),
        tokens in 1u64..300,
        token: prop::sample::Index,
        scale in prop_oneof![8 => 1e-3f32..1e3, 1 => any::<f32>()],
    ) {
        let place = (token.index(tokens as usize) as u64, tokens);
        follows_the_formula::<f32>(quantization, &row, place, scale)?;
        follows_the_formula::<f16>(quantization, &row, place, scale)?;
        follows_the_formula::<bf16>(quantization, &row, place, scale)?;
    }
}

#[test]
fn no_finite_element_saturates_under_a_power_of_two_scale() {
    for (rule, largest) in [(scale::fp8_block as fn(f32) -> u8, 448f32), (scale::mxfp4_block, 6.0)] {
        for exponent in -120..=118 {
            // Around a power of two: the quotient is rounded, and must not be rounded down onto the power.
            let border = (largest * 2f32.powi(exponent)).to_bits();
            for bits in border - 9..border + 9 {
                let amax = f32::from_bits(bits);
                let code = i32::from(rule(amax));
                let scaled = f64::from(amax) * 2f64.powi(127 - code);
                assert!(scaled <= f64::from(largest), "{amax:e} under scale {code} is {scaled}");
                assert!(
                    scaled > f64::from(largest) / 2.0,
                    "{amax:e} has a scale larger than need be: {code}"
                );
            }
        }
    }
}

#[test]
fn amax_passes_over_nan_and_amax_or_nan_keeps_it() {
    let values = [1.0, -3.0, f32::NAN, 2.0, -f32::NAN, -0.0];
    assert_eq!(values.into_iter().fold(0.0, scale::amax), 3.0);
    assert!(values.into_iter().fold(0.0, scale::amax_or_nan).is_nan());
    let finite = [1.0, -3.0, 2.0];
    assert_eq!(finite.into_iter().fold(0.0, scale::amax_or_nan), 3.0);
    let infinite = [1.0, f32::NEG_INFINITY, f32::NAN];
    assert_eq!(infinite.into_iter().fold(0.0, scale::amax), f32::INFINITY);
}

const BLOCK_QUANTIZATIONS: [Quantization; 5] = [
    Quantization::Fp8PerGroup { group: 32, scales: GroupScale::Ue8m0, layout: LINEAR },
    Quantization::Fp8PerGroup { group: 128, scales: GroupScale::Ue8m0, layout: SWIZZLED },
    Quantization::NvFp4 { layout: SWIZZLED },
    Quantization::MxFp8 { layout: LINEAR },
    Quantization::MxFp4 { layout: LINEAR },
];

fn plain_row() -> Vec<f32> {
    (0..384u16).map(|i| f32::from(i % 23) - 11.0).collect()
}

#[test]
fn a_nan_becomes_a_nan_code_in_fp8_and_changes_no_other() {
    let (clean, mut row) = (plain_row(), plain_row());
    // In the place of a zero, which no scale depends on.
    assert_eq!(row[149], 0.0);
    row[149] = -f32::NAN;
    for quantization in [Quantization::Fp8Static, Quantization::Fp8PerToken]
        .into_iter()
        .chain(BLOCK_QUANTIZATIONS.into_iter().filter(|q| q.value_bytes_per_row(384) == 384))
    {
        let mut expected = quantize(quantization, &clean, (0, 1), 0.25).unwrap();
        expected.values[149] = 0x7f;
        assert_eq!(quantize(quantization, &row, (0, 1), 0.25).unwrap(), expected, "{quantization:?}");
    }
}

#[test]
fn a_nan_in_fp4_makes_its_blocks_scale_nan_and_changes_no_other() {
    let (clean, mut row) = (plain_row(), plain_row());
    row[149] = f32::NAN;
    for (quantization, block, nan) in [
        (Quantization::NvFp4 { layout: SWIZZLED }, 16, 0x7f),
        (Quantization::MxFp4 { layout: LINEAR }, 32, 0xff),
    ] {
        let mut expected = quantize(quantization, &clean, (0, 1), 64.0).unwrap();
        expected.scales[149 / block] = nan;
        let first = 149 / block * block / 2;
        expected.values[first..first + block / 2].fill(0x77);
        assert_eq!(quantize(quantization, &row, (0, 1), 64.0).unwrap(), expected, "{quantization:?}");
    }
}

#[test]
fn an_infinity_saturates_in_its_own_block_and_changes_no_other() {
    let (clean, mut row) = (plain_row(), plain_row());
    row[149] = f32::NEG_INFINITY;
    for quantization in BLOCK_QUANTIZATIONS {
        let block = quantization.block().unwrap() as usize;
        let expected = quantize(quantization, &clean, (0, 1), 64.0).unwrap();
        let quantized = quantize(quantization, &row, (0, 1), 64.0).unwrap();
        let codes_per_byte = 384 / quantized.values.len();
        let saturated = if codes_per_byte == 1 { 0xfe } else { 0xf0 };
        assert_eq!(quantized.values[149 / codes_per_byte] & saturated, saturated, "{quantization:?}");
        let largest_scale = if let Quantization::NvFp4 { .. } = quantization { 0x7e } else { 254 };
        for (index, (found, expected)) in quantized.scales.iter().zip(&expected.scales).enumerate() {
            let expected = if index == 149 / block { &largest_scale } else { expected };
            assert_eq!(found, expected, "{quantization:?}: scale {index}");
        }
        for (index, (found, expected)) in quantized.values.iter().zip(&expected.values).enumerate() {
            assert!(
                found == expected || index * codes_per_byte / block == 149 / block,
                "{quantization:?}: {index}"
            );
        }
    }
}

#[test]
fn an_infinity_makes_its_tokens_f32_scale_infinite() {
    let mut row = plain_row();
    row[149] = f32::NEG_INFINITY;
    let quantized = quantize(Quantization::Fp8PerToken, &row, (2, 3), 1.0).unwrap();
    assert_eq!(quantized.scales, f32::INFINITY.to_le_bytes());
    for (index, code) in quantized.values.iter().enumerate() {
        assert_eq!(code & 0x7f, if index == 149 { 0x7f } else { 0 }, "{index}");
    }
}

#[test]
fn zeros_have_the_smallest_scale_and_keep_their_sign() {
    let row = [0.0f32, -0.0].repeat(64);
    for quantization in BLOCK_QUANTIZATIONS {
        let quantized = quantize(quantization, &row, (0, 1), 448.0).unwrap();
        assert!(quantized.scales.iter().all(|&scale| scale == 0), "{quantization:?}");
        let zeros: &[u8] = if quantized.values.len() == 128 { &[0, 0x80] } else { &[0x80] };
        assert_eq!(quantized.values, zeros.repeat(64), "{quantization:?}");
    }
    let quantized = quantize(Quantization::Fp8PerToken, &row, (0, 1), 1.0).unwrap();
    assert_eq!(quantized.scales, (1f32 / (448.0 * 512.0)).to_le_bytes());
    assert_eq!(quantized.values, [0, 0x80].repeat(64));
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_written() {
    let nvfp4 = Quantization::NvFp4 { layout: SWIZZLED };
    let group = |group| Quantization::Fp8PerGroup { group, scales: GroupScale::F32, layout: LINEAR };
    let row = [bf16::ONE; 48];
    // quantization, hidden, token, tokens, bytes for values, bytes for scales, the error
    let cases = [
        (nvfp4, 48, 3, 3, 24, 512, RowError::Token { token: 3, tokens: 3 }),
        (nvfp4, 40, 0, 3, 20, 512, RowError::Block { hidden: 40, block: 16 }),
        (group(48), 48, 0, 3, 48, 3, RowError::Block { hidden: 48, block: 48 }),
        (group(0), 48, 0, 3, 48, 3, RowError::Block { hidden: 48, block: 0 }),
        (nvfp4, 48, 0, 3, 23, 512, RowError::Values { needed: 24, given: 23 }),
        (nvfp4, 48, 0, 3, 25, 512, RowError::Values { needed: 24, given: 25 }),
        (nvfp4, 48, 0, 3, 24, 511, RowError::Scales { needed: Some(512), given: 511 }),
        (nvfp4, 48, 0, u64::MAX, 24, 512, RowError::Scales { needed: None, given: 512 }),
        (Quantization::Fp8PerToken, 48, 2, 3, 48, 11, RowError::Scales { needed: Some(12), given: 11 }),
        (Quantization::None, 48, 0, 1, 1, 0, RowError::Values { needed: 0, given: 1 }),
    ];
    for (quantization, hidden, token, tokens, value_bytes, scale_bytes, error) in cases {
        let (mut values, mut scales) = (vec![POISON; value_bytes], vec![POISON; scale_bytes]);
        let result = quantize_row(quantization, &row[..hidden], token, tokens, 1.0, &mut values, &mut scales);
        assert_eq!(result, Err(error), "{quantization:?}");
        assert!(values.iter().chain(&scales).all(|&byte| byte == POISON), "{quantization:?}");
    }
}
