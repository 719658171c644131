//! Conversions that the device crate has algorithms of its own for, against `core`'s. GPUs compare all 2^32 numbers:
//! `fused-collective verify`.

use fused_collective_core::quant::e2m1;
use fused_collective_device::convert;

/// Every sign, exponent and upper seven bits of a mantissa, with the lower bits that decide a rounding: none, the least,
/// and those around a tie.
fn numbers() -> impl Iterator<Item = f32> {
    let upper = 0..=u16::MAX;
    upper.flat_map(|upper| {
        [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|lower| f32::from_bits(u32::from(upper) << 16 | lower))
    })
}

fn expected(values: &[f32]) -> u32 {
    values.iter().rev().fold(0, |codes, &value| codes << 4 | u32::from(e2m1::encode(value)))
}

#[test]
fn e2m1_codes_are_those_of_core() {
    let numbers: Vec<f32> = numbers().collect();
    for lanes in [2, 4, 8] {
        // Strides bring different numbers together.
        for stride in [1, 7919] {
            for first in (0..numbers.len()).step_by(lanes) {
                let values: Vec<f32> =
                    (first..first + lanes).map(|index| numbers[index * stride % numbers.len()]).collect();
                assert_eq!(convert::e2m1_codes(&values, 1.0), expected(&values), "{values:?}");
            }
        }
    }
}

#[test]
fn values_are_multiplied_before_they_are_rounded() {
    for multiplier in [0.0, 0.75, 1.0 / 3.0, 4096.5, f32::INFINITY, f32::NAN] {
        for value in [0.0, -0.0, 0.25, -1.25, 3.5, -1e30, f32::MIN_POSITIVE, f32::INFINITY, f32::NAN] {
            let product = value * multiplier;
            let code = if product.is_nan() { e2m1::encode(e2m1::MAX) } else { e2m1::encode(product) };
            let codes = convert::e2m1_codes(&[value; 8], multiplier);
            assert_eq!(codes, 0x1111_1111 * u32::from(code), "{value} * {multiplier}");
        }
    }
}

#[test]
fn ue4m3_codes_are_those_of_core() {
    for code in 0..=u8::MAX {
        let value = fused_collective_core::quant::ue4m3::decode(code);
        assert_eq!(convert::from_ue4m3(code).to_bits(), value.to_bits(), "{code:#x}");
    }
    for value in numbers() {
        assert_eq!(convert::ue4m3(value), fused_collective_core::quant::ue4m3::encode(value), "{value:e}");
    }
}
