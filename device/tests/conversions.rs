//! Conversions that the device crate has algorithms of its own for, against `core`'s. GPUs compare all 2^32 numbers:
//! `fused-collective verify`.

use fused_collective_core::{
    dtype::{Element, bf16, f16},
    quant::{e2m1, e4m3, scale},
};
use fused_collective_device::convert::{self, Divisor};
use fused_collective_device_tests::Random;

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

/// Elements of a row under its scale, where the largest magnitude's significand is a multiple of 7: so some quotients are ties.
fn codes_are_those_of_quotients<E: Element>(mantissas: u32, elements: impl Iterator<Item = E> + Clone) {
    let mut ties = 0;
    for mantissa in (0..mantissas).filter(|mantissa| (mantissas + mantissa).is_multiple_of(7)) {
        let amax = 1.0 + mantissa as f32 / mantissas as f32;
        for scale in [scale::fp8_per_token(amax), scale::fp8_group(amax)] {
            let divisor = Divisor::new(scale);
            for value in elements.clone().map(E::to_f32).filter(|value| value.abs() <= amax) {
                let (quotient, found) = (value / scale, divisor.divide::<E>(value));
                ties += u32::from(quotient.to_bits() & 0x000f_ffff == 0x0008_0000);
                assert_eq!(e4m3::encode(found), e4m3::encode(quotient), "{value:e} / {scale:e}");
                assert_eq!(found.is_sign_negative(), quotient.is_sign_negative(), "{value:e} / {scale:e}");
            }
        }
    }
    assert!(ties > 1000, "{ties}");
}

#[test]
fn codes_under_the_scale_of_a_token_or_group_are_those_of_quotients() {
    let elements = |bits: u16| (bits, bits ^ 0x8000);
    let bf16s = (0..0x7f80).map(elements).flat_map(|(plus, minus)| [plus, minus].map(bf16::from_bits));
    codes_are_those_of_quotients(128, bf16s);
    let f16s = (0..0x7c00).map(elements).flat_map(|(plus, minus)| [plus, minus].map(f16::from_bits));
    codes_are_those_of_quotients(1024, f16s);
}

#[test]
fn quotients_of_f32_are_rounded_as_a_division_is() {
    let mut random = Random(1);
    for _ in 0..1_000_000 {
        let bits = random.bits();
        let divisor = f32::from_bits(bits as u32 & 0x007f_ffff | 0x3f80_0000);
        let value = f32::from_bits((bits >> 32) as u32 & 0x83ff_ffff | 0x3c00_0000);
        assert_eq!(Divisor::new(divisor).divide::<f32>(value), value / divisor, "{value:e} / {divisor:e}");
    }
}

#[test]
fn an_infinite_scale_makes_zeros_with_their_signs_and_nan_of_infinity() {
    let divisor = Divisor::new(f32::INFINITY);
    for value in [0.0, -0.0, 1.0, -1.0, f32::MAX, -f32::MIN_POSITIVE] {
        assert_eq!(divisor.divide::<bf16>(value).to_bits(), (value / f32::INFINITY).to_bits(), "{value}");
    }
    assert!(divisor.divide::<bf16>(f32::INFINITY).is_nan() && divisor.divide::<f32>(f32::NAN).is_nan());
}
