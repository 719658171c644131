//! Whole tensors: quantization against that of rows, dequantization against its formula in `f64`, one as the inverse of
//! the other, and the arguments that both refuse.

use fused_collective_core::{
    dtype::{Element, bf16, f16},
    quant::{
        GroupScale, Quantization, ScaleError, ScaleLayout, TensorError, TensorPart, dequantize, e2m1, e4m3,
        quantize, quantize_row, scale, ue4m3, ue8m0,
    },
};
use proptest::prelude::*;

/// Every format in every layout.
fn formats() -> Vec<Quantization> {
    let blocks = ScaleLayout::ALL.into_iter().flat_map(|layout| {
        let groups = [32, 64, 128].into_iter().flat_map(move |group| {
            let of = move |scales| Quantization::Fp8PerGroup { group, scales, layout };
            [of(GroupScale::Ue8m0), of(GroupScale::F32)]
        });
        let others =
            [Quantization::NvFp4 { layout }, Quantization::MxFp8 { layout }, Quantization::MxFp4 { layout }];
        groups.chain(others).filter(|quantization| quantization.has_layout())
    });
    [Quantization::Fp8Static, Quantization::Fp8PerToken].into_iter().chain(blocks).collect()
}

/// True for formats whose scales are powers of two, computed from the elements.
fn has_ue8m0_scales(quantization: Quantization) -> bool {
    quantization.block().is_some()
        && !matches!(
            quantization,
            Quantization::NvFp4 { .. } | Quantization::Fp8PerGroup { scales: GroupScale::F32, .. }
        )
}

/// Codes and scales of a tensor.
#[derive(Clone, Debug, PartialEq)]
struct Quantized {
    codes: Vec<u8>,
    scales: Vec<u8>,
}

/// Buffers of the right sizes, full of `fill`.
fn filled(quantization: Quantization, [tokens, hidden]: [u64; 2], fill: u8) -> Quantized {
    let codes = tokens * quantization.value_bytes_per_row(hidden);
    let scales = quantization.scale_bytes(tokens, hidden).unwrap();
    Quantized { codes: vec![fill; codes as usize], scales: vec![fill; scales as usize] }
}

/// [`quantize`] into buffers full of `poison`.
fn quantized<E: Element>(
    quantization: Quantization,
    shape: [u64; 2],
    elements: &[E],
    scale: f32,
    poison: u8,
) -> Quantized {
    let mut out = filled(quantization, shape, poison);
    quantize(quantization, shape, elements, scale, &mut out.codes, &mut out.scales).unwrap();
    out
}

/// [`dequantize`] into a buffer full of NaN.
fn dequantized<E: Element>(
    quantization: Quantization,
    [tokens, hidden]: [u64; 2],
    tensor: &Quantized,
    scale: f32,
) -> Vec<E> {
    let mut elements = vec![E::from_f32(f32::NAN); (tokens * hidden) as usize];
    let Quantized { codes, scales } = tensor;
    dequantize(quantization, [tokens, hidden], codes, scales, scale, &mut elements).unwrap();
    elements
}

/// The numbers that the code of element `index` and its scale stand for; the scale is `global` without others.
fn number_and_scale(
    quantization: Quantization,
    hidden: u64,
    tensor: &Quantized,
    index: usize,
    global: f32,
) -> (f32, f32) {
    let (row, column) = (index as u64 / hidden, index as u64 % hidden);
    let number = if quantization.value_bytes_per_row(hidden) == hidden {
        e4m3::decode(tensor.codes[index])
    } else {
        e2m1::decode(tensor.codes[index / 2] >> (4 * (index % 2)))
    };
    let Some(scales) =
        quantization.scales(tensor.codes.len() as u64 / quantization.value_bytes_per_row(hidden), hidden)
    else {
        return (number, global);
    };
    let block = quantization.block().unwrap_or(hidden);
    let bits = scales.get(&tensor.scales, row, column / block).unwrap();
    let scale = match quantization {
        _ if scales.size == 4 => f32::from_bits(bits),
        _ if has_ue8m0_scales(quantization) => ue8m0::decode(bits as u8),
        _ => ue4m3::decode(bits as u8),
    };
    (number, scale)
}

/// Bits of a number, with one pattern for every NaN.
fn bits(number: impl Element) -> u32 {
    let wide = number.to_f32();
    if wide.is_nan() { u32::MAX } else { wide.to_bits() }
}

/// Shapes with a few tokens, or just around one tile of scales.
fn shapes() -> impl Strategy<Value = [u64; 2]> {
    let tokens = prop_oneof![9 => 0u64..6, 1 => 127u64..130];
    (tokens, 1u64..4).prop_map(|(tokens, blocks)| [tokens, blocks * 128])
}

/// A tensor of activations, or one of any bits, NaN and infinities among them.
fn tensors() -> impl Strategy<Value = ([u64; 2], Vec<f32>)> {
    let usual = (-8f32..8.0, -20i32..20).prop_map(|(x, e)| x * 2f32.powi(e / 4)).boxed();
    let special = prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0]);
    let any = prop_oneof![20 => any::<u32>().prop_map(f32::from_bits), 1 => special].boxed();
    (shapes(), prop::sample::select(vec![usual, any])).prop_flat_map(|(shape, element)| {
        let count = (shape[0] * shape[1]) as usize;
        (Just(shape), prop::collection::vec(element, count))
    })
}

/// A tensor of any codes under any scales, `f32` scales among them.
fn any_quantized() -> impl Strategy<Value = (Quantization, [u64; 2], Quantized)> {
    (prop::sample::select(formats()), shapes()).prop_flat_map(|(quantization, shape)| {
        let Quantized { codes, scales } = filled(quantization, shape, 0);
        let codes = prop::collection::vec(any::<u8>(), codes.len());
        let scales = prop::collection::vec(any::<u8>(), scales.len());
        let tensor = (codes, scales).prop_map(|(codes, scales)| Quantized { codes, scales });
        (Just(quantization), Just(shape), tensor)
    })
}

fn quantizes_as_rows<E: Element>(
    quantization: Quantization,
    [tokens, hidden]: [u64; 2],
    tensor: &[f32],
    scale: f32,
) -> Result<(), TestCaseError> {
    let elements: Vec<E> = tensor.iter().map(|&x| E::from_f32(x)).collect();
    // Padding is never written here, so it stays 0.
    let mut expected = filled(quantization, [tokens, hidden], 0);
    let row_bytes = quantization.value_bytes_per_row(hidden) as usize;
    let rows = elements.chunks(hidden as usize).zip(expected.codes.chunks_mut(row_bytes));
    for (token, (row, codes)) in (0..).zip(rows) {
        quantize_row(quantization, row, token, tokens, scale, codes, &mut expected.scales).unwrap();
    }
    for poison in [0xa5, 0x5a] {
        let found = quantized(quantization, [tokens, hidden], &elements, scale, poison);
        prop_assert_eq!(&found, &expected, "{:?} of {}", quantization, E::DTYPE);
    }
    Ok(())
}

/// The last column of the table in the documentation, in `f64`, where no product is inexact.
fn dequantizes_by_formula<E: Element>(
    quantization: Quantization,
    shape: [u64; 2],
    tensor: &Quantized,
    global: f32,
) -> Result<(), TestCaseError> {
    let found = dequantized::<E>(quantization, shape, tensor, global);
    for (index, &found) in found.iter().enumerate() {
        let (number, scale) = number_and_scale(quantization, shape[1], tensor, index, global);
        let mut exact = f64::from(number) * f64::from(scale);
        if let Quantization::NvFp4 { .. } = quantization {
            exact /= f64::from(global);
        }
        prop_assert_eq!(bits(found), bits(E::from_f32(exact as f32)), "{:?}: {}", quantization, index);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(120))]

    #[test]
    fn a_tensor_is_quantized_as_its_rows_and_padding_is_zeroed(
        (shape, tensor) in tensors(),
        quantization in prop::sample::select(formats()),
        scale in 1e-3f32..1e3,
    ) {
        quantizes_as_rows::<f32>(quantization, shape, &tensor, scale)?;
        quantizes_as_rows::<f16>(quantization, shape, &tensor, scale)?;
        quantizes_as_rows::<bf16>(quantization, shape, &tensor, scale)?;
    }

    #[test]
    fn any_codes_under_any_scales_dequantize_by_the_formula(
        (quantization, shape, tensor) in any_quantized(),
        global in prop_oneof![
            Just(scale::MIN_FP8_STATIC),
            Just(scale::MAX_NVFP4_GLOBAL),
            1e-3f32..1e3,
            1e-38f32..1e-36,
        ],
    ) {
        dequantizes_by_formula::<f32>(quantization, shape, &tensor, global)?;
        dequantizes_by_formula::<f16>(quantization, shape, &tensor, global)?;
        dequantizes_by_formula::<bf16>(quantization, shape, &tensor, global)?;
    }

    #[test]
    fn padding_of_scales_is_not_read(
        (shape, tensor) in tensors(),
        quantization in prop::sample::select(formats()),
    ) {
        let mut tensor = quantized(quantization, shape, &tensor, 2.0, 0);
        let clean = dequantized::<f32>(quantization, shape, &tensor, 2.0);
        if let Some(scales) = quantization.scales(shape[0], shape[1]) {
            for row in 0..scales.rows_padded() {
                let first = if row < shape[0] { scales.cols } else { 0 };
                for col in first..scales.cols_padded() {
                    tensor.scales[scales.offset(row, col) as usize] = 0xff;
                }
            }
        }
        let poisoned = dequantized::<f32>(quantization, shape, &tensor, 2.0);
        prop_assert!(clean.iter().zip(&poisoned).all(|(&a, &b)| bits(a) == bits(b)));
    }

    #[test]
    fn under_powers_of_two_dequantized_tensors_survive_another_round(
        (quantization, shape, tensor) in any_quantized(),
    ) {
        prop_assume!(has_ue8m0_scales(quantization));
        let mut once = dequantized::<f32>(quantization, shape, &tensor, 1.0);
        let block = quantization.block().unwrap() as usize;
        for block in once.chunks_mut(block).filter(|block| block.iter().any(|x| x.is_infinite())) {
            block.fill(0.0);
        }
        let tensor = quantized(quantization, shape, &once, 1.0, 0xa5);
        let twice = dequantized::<f32>(quantization, shape, &tensor, 1.0);
        for (&once, &twice) in once.iter().zip(&twice) {
            // The last of a pack of E2M1 zeros loses its sign.
            let is_zero = matches!(quantization, Quantization::MxFp4 { .. }) && once == 0.0 && twice == 0.0;
            prop_assert!(bits(once) == bits(twice) || is_zero, "{quantization:?}: {once} became {twice}");
        }
    }

    #[test]
    fn elements_come_back_within_half_the_spacing_of_their_format(
        (shape, tensor) in tensors(),
        quantization in prop::sample::select(formats()),
        global in 1e-2f32..1e2,
    ) {
        // Far from overflow; `f32` arithmetic may itself be off by a few times 2^-24.
        let tensor: Vec<f32> = tensor.iter().map(|&x| if x.abs() < 1e30 { x } else { 0.0 }).collect();
        let codes = quantized(quantization, shape, &tensor, global, 0xa5);
        let restored = dequantized::<f32>(quantization, shape, &codes, global);
        let is_fp8 = quantization.value_bytes_per_row(shape[1]) == shape[1];
        let (max, least_exponent, mantissa) = if is_fp8 { (448.0, -6, 3) } else { (6.0, 0, 1) };
        for (index, (&x, &restored)) in tensor.iter().zip(&restored).enumerate() {
            let (_, scale) = number_and_scale(quantization, shape[1], &codes, index, global);
            let unit = match quantization {
                Quantization::NvFp4 { .. } => f64::from(scale) / f64::from(global),
                _ => f64::from(scale),
            };
            let (x, restored) = (f64::from(x), f64::from(restored));
            if unit == 0.0 {
                // The block is so small that the nearest scale is 0: less than half the smallest one.
                prop_assert!(x.abs() * f64::from(global) / 6.0 <= 0.5 / 512.0 && restored == 0.0);
                continue;
            }
            let scaled = (x / unit).abs();
            if scaled > max * (1.0 + 1e-6) {
                prop_assert!(!has_ue8m0_scales(quantization) && quantization != Quantization::Fp8PerToken);
                prop_assert_eq!(restored.abs() as f32, (max * unit) as f32, "saturated");
            } else {
                let exponent = (scaled.log2().floor() as i32).max(least_exponent);
                let half = unit * 2f64.powi(exponent - mantissa - 1);
                prop_assert!(
                    (x - restored).abs() <= half * (1.0 + 1e-4),
                    "{:?}: {} came back as {} under {}", quantization, x, restored, unit
                );
            }
        }
    }
}

/// All pairs of E2M1 codes, as the codes of a row.
fn all_bytes() -> Vec<u8> {
    (0..=u8::MAX).collect()
}

#[test]
fn every_code_under_every_power_of_two_is_exact_and_encodes_back() {
    for scale_code in 0..=u8::MAX {
        for (quantization, hidden) in [
            (Quantization::MxFp8 { layout: ScaleLayout::Linear }, 256),
            (Quantization::MxFp4 { layout: ScaleLayout::Linear }, 512),
        ] {
            let scales = vec![scale_code; hidden as usize / 32];
            let tensor = Quantized { codes: all_bytes(), scales };
            let elements = dequantized::<f32>(quantization, [1, hidden], &tensor, 1.0);
            for (index, &element) in elements.iter().enumerate() {
                let (number, scale) = number_and_scale(quantization, hidden, &tensor, index, 1.0);
                let exact = f64::from(number) * f64::from(scale);
                if exact.is_nan() {
                    assert!(element.is_nan());
                    continue;
                }
                if exact.abs() > f64::from(f32::MAX) {
                    assert_eq!(f64::from(element), exact.signum() * f64::INFINITY);
                    continue;
                }
                assert_eq!(f64::from(element), exact, "{quantization:?}: {number} * {scale:e}");
                let again = element * ue8m0::decode_reciprocal(scale_code);
                let again = if hidden == 256 {
                    e4m3::decode(e4m3::encode(again))
                } else {
                    e2m1::decode(e2m1::encode(again))
                };
                assert_eq!(again.to_bits(), number.to_bits(), "{quantization:?} under {scale:e}");
            }
        }
    }
}

/// The ends of what [`Quantization::check_scale`] accepts up to `most`, and numbers of every magnitude in between.
fn scales_up_to(least: f32, most: f32) -> impl Iterator<Item = f32> {
    let between = (least.to_bits()..most.to_bits()).step_by(0x0031_7321).map(f32::from_bits);
    between.chain([least, most])
}

#[test]
fn every_code_of_static_fp8_is_quantized_back_under_every_magnitude_of_scale() {
    // Beyond, the largest codes are infinite as `f32`.
    let most = f32::MAX / 448.0;
    for scale in scales_up_to(scale::MIN_FP8_STATIC, most) {
        let tensor = Quantized { codes: all_bytes(), scales: vec![] };
        let elements = dequantized::<f32>(Quantization::Fp8Static, [1, 256], &tensor, scale);
        let mut again = quantized(Quantization::Fp8Static, [1, 256], &elements, scale, 0xa5);
        assert_eq!(again.codes[0xff], 0x7f, "a NaN loses its sign");
        again.codes[0xff] = 0xff;
        assert_eq!(again, tensor, "{scale:e}");
    }
}

#[test]
fn every_code_of_nvfp4_encodes_back_under_every_block_scale_and_magnitude_of_global_scale() {
    let quantization = Quantization::NvFp4 { layout: ScaleLayout::Linear };
    // Below, the largest codes are infinite as `f32`.
    let least = 448.0 * 6.0 / f32::MAX * 1.01;
    for global in scales_up_to(least, scale::MAX_NVFP4_GLOBAL) {
        for block_scale in 0..=ue4m3::NAN {
            let tensor = Quantized { codes: all_bytes(), scales: vec![block_scale; 32] };
            let elements = dequantized::<f32>(quantization, [1, 512], &tensor, global);
            let multiplier = scale::nvfp4_multiplier(block_scale, global);
            for (&byte, pair) in tensor.codes.iter().zip(elements.as_chunks::<2>().0) {
                let [first, second] = pair.map(|element| e2m1::encode(element * multiplier));
                let expected = match block_scale {
                    0 => byte & 0x88, // zeros, with their signs
                    ue4m3::NAN => 0x77,
                    _ => byte,
                };
                assert_eq!(e2m1::pack(first, second), expected, "{block_scale} of {global:e}");
            }
        }
    }
}

#[test]
fn a_zero_is_a_zero_under_every_scale_that_is_accepted_and_no_other() {
    let nvfp4 = Quantization::NvFp4 { layout: ScaleLayout::Linear };
    for (quantization, least, most) in [
        (Quantization::Fp8Static, scale::MIN_FP8_STATIC, f32::MAX),
        (nvfp4, f32::from_bits(1), scale::MAX_NVFP4_GLOBAL),
    ] {
        for scale in scales_up_to(least, most) {
            assert_eq!(quantization.check_scale(scale), Ok(()), "{scale:e}");
            assert!(scale::fp8_multiplier(scale).is_finite() || quantization == nvfp4);
            assert!(scale::nvfp4_multiplier(1, scale).is_finite() || quantization != nvfp4);
            let tensor = quantized(quantization, [1, 32], &[0.0f32; 32], scale, 0xa5);
            assert!(tensor.codes.iter().all(|&code| code == 0), "{quantization:?}: {scale:e}");
        }
    }
    // One step further, multipliers would be infinite, and zeros times them NaN.
    let (small, large) = (scale::MIN_FP8_STATIC.next_down(), scale::MAX_NVFP4_GLOBAL.next_up());
    assert!((1.0 / small).is_infinite() && scale::nvfp4_multiplier(1, large).is_infinite());
    for bad in [small, 0.0, -0.0, -1.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
        assert_eq!(scale::fp8_multiplier(bad).to_bits(), 0);
    }
    for bad in [large, 0.0, -0.0, -1.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
        assert_eq!(scale::nvfp4_global(bad).to_bits(), 0);
    }
}

#[test]
fn scales_that_cannot_be_meant_are_refused_and_nothing_is_written() {
    let nvfp4 = Quantization::NvFp4 { layout: ScaleLayout::Swizzled128x4 };
    let bad = [0.0, -0.0, -1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    let of =
        |quantization, more: [f32; 2]| bad.into_iter().chain(more).map(move |scale| (quantization, scale));
    let small = [1e-45, scale::MIN_FP8_STATIC.next_down()];
    let large = [1e38, scale::MAX_NVFP4_GLOBAL.next_up()];
    for (quantization, scale) in of(Quantization::Fp8Static, small).chain(of(nvfp4, large)) {
        let mut tensor = filled(quantization, [2, 32], 0xa5);
        let untouched = tensor.clone();
        let Quantized { codes, scales } = &mut tensor;
        let errors = [
            quantize(quantization, [2, 32], &[0.0f32; 64], scale, codes, scales),
            dequantize(quantization, [2, 32], codes, scales, scale, &mut [0.0f32; 64]),
        ];
        for error in errors {
            let found = match (quantization, error.unwrap_err()) {
                (Quantization::Fp8Static, TensorError::Scale(ScaleError::Fp8Static(found)))
                | (Quantization::NvFp4 { .. }, TensorError::Scale(ScaleError::NvFp4(found))) => found,
                (_, error) => panic!("{quantization:?} under {scale:e}: {error:?}"),
            };
            assert_eq!(found.to_bits(), scale.to_bits());
        }
        assert_eq!(tensor, untouched);
    }
    // The other formats read no scale of the caller.
    for quantization in formats().into_iter().filter(|&q| q != Quantization::Fp8Static && q != nvfp4) {
        let reads = matches!(quantization, Quantization::NvFp4 { .. });
        assert_eq!(quantization.check_scale(f32::NAN).is_err(), reads, "{quantization:?}");
    }
}

#[test]
fn shapes_and_slices_that_do_not_fit_are_refused_and_nothing_is_written() {
    const NVFP4: Quantization = Quantization::NvFp4 { layout: ScaleLayout::Swizzled128x4 };
    let group =
        |group| Quantization::Fp8PerGroup { group, scales: GroupScale::F32, layout: ScaleLayout::Linear };
    let length = |part, needed, given| TensorError::Length { part, needed, given };
    let (elements, codes, scales) = (TensorPart::Elements, TensorPart::Codes, TensorPart::Scales);
    // format, shape, lengths of elements, codes and scales, the error
    let cases = [
        (Quantization::None, [2, 48], [96, 0, 0], TensorError::NotQuantized),
        (NVFP4, [2, 40], [80, 40, 512], TensorError::Hidden { hidden: 40, multiple: 16 }),
        (NVFP4, [2, 0], [0, 0, 0], TensorError::Hidden { hidden: 0, multiple: 16 }),
        (Quantization::Fp8Static, [2, 0], [0, 0, 0], TensorError::Hidden { hidden: 0, multiple: 1 }),
        (group(64), [2, 96], [192, 192, 2], TensorError::Hidden { hidden: 96, multiple: 64 }),
        (group(48), [2, 48], [96, 96, 2], TensorError::Group(48)),
        (group(0), [2, 48], [96, 96, 2], TensorError::Group(0)),
        (NVFP4, [2, 48], [95, 48, 512], length(elements, Some(96), 95)),
        (NVFP4, [2, 48], [97, 48, 512], length(elements, Some(96), 97)),
        (NVFP4, [2, 48], [96, 47, 512], length(codes, Some(48), 47)),
        (NVFP4, [2, 48], [96, 49, 512], length(codes, Some(48), 49)),
        (NVFP4, [2, 48], [96, 48, 511], length(scales, Some(512), 511)),
        (NVFP4, [2, 48], [96, 48, 513], length(scales, Some(512), 513)),
        (Quantization::Fp8Static, [2, 48], [96, 96, 1], length(scales, Some(0), 1)),
        (Quantization::Fp8PerToken, [2, 48], [96, 96, 2], length(scales, Some(8), 2)),
        (NVFP4, [u64::MAX, 48], [96, 48, 512], length(elements, None, 96)),
    ];
    for (quantization, shape, [elements, codes, scales], error) in cases {
        let mut elements = vec![bf16::ONE; elements];
        let (mut codes, mut scales) = (vec![0xa5; codes], vec![0xa5; scales]);
        let result = quantize(quantization, shape, &elements, 1.0, &mut codes, &mut scales);
        assert_eq!(result, Err(error), "{quantization:?}");
        let result = dequantize(quantization, shape, &codes, &scales, 1.0, &mut elements);
        assert_eq!(result, Err(error), "{quantization:?}");
        assert!(codes.iter().chain(&scales).all(|&byte| byte == 0xa5), "{quantization:?}");
        assert!(elements.iter().all(|&element| element == bf16::ONE), "{quantization:?}");
    }
}

#[test]
fn errors_name_the_value_and_what_would_be_valid() {
    let cases = [
        (
            TensorError::Hidden { hidden: 40, multiple: 16 },
            "hidden size 40 is not valid: use a positive multiple of 16",
        ),
        (TensorError::Group(48), "groups of 48 elements are not supported: use 32, 64 or 128"),
        (
            TensorError::Length { part: TensorPart::Codes, needed: Some(48), given: 47 },
            "the slice of codes has 47 bytes: use one of 48",
        ),
        (
            TensorError::Scale(ScaleError::Fp8Static(-1.0)),
            "scale -1e0 of static FP8 is not valid: use a finite number of at least 2.938737e-39",
        ),
        (
            TensorError::Scale(ScaleError::NvFp4(1e38)),
            "global scale 1e38 of NVFP4 is not valid: use a number above 0 and at most 6.6461396e35",
        ),
    ];
    for (error, message) in cases {
        assert_eq!(error.to_string(), message);
    }
}

#[test]
fn a_tensor_without_tokens_is_converted_to_nothing() {
    for quantization in formats() {
        let tensor = quantized::<f32>(quantization, [0, 128], &[], 1.0, 0);
        assert_eq!((tensor.codes.len(), tensor.scales.len()), (0, 0), "{quantization:?}");
        assert_eq!(dequantized::<f32>(quantization, [0, 128], &tensor, 1.0), []);
    }
}
