//! Formats between ranks: their error, the words that are sent, and numbers at both ends of the range.

use std::array;

use fused_collective_core::{
    dtype::{DType, Element, bf16},
    fusion::{Mode, Norm, Operation, PartialSums, Residual, Rounding},
    lamport,
    norm::Weights,
    quant::Quantization,
    specification::{Row, Token},
    wire::{BLOCK, WireFormat},
};
use proptest::{option, prelude::*};

fn encoded(format: WireFormat, row: &[f32]) -> Vec<u8> {
    let mut sent = vec![0xaa; format.row_bytes(row.len() as u64) as usize];
    format.encode(row, &mut sent);
    sent
}

/// `row` as it is received.
fn received(format: WireFormat, row: &[f32]) -> Vec<f32> {
    let mut sum = vec![0.0; row.len()];
    format.add(&encoded(format, row), &mut sum);
    sum
}

/// The largest step of a block.
fn step(format: WireFormat, block: &[f32]) -> f64 {
    let largest = block.iter().fold(0.0, |most: f64, x| most.max(f64::from(x.abs())));
    (largest / f64::from(1 << (format.bits() - 1))).max(f64::from(f32::MIN_POSITIVE))
}

fn assert_complete(sent: &[u8]) {
    for word in sent.as_chunks().0 {
        assert!(lamport::is_complete(u32::from_le_bytes(*word)), "{sent:x?}");
    }
}

/// Rows of numbers of any exponent, and of one exponent.
fn rows() -> impl Strategy<Value = Vec<f32>> {
    let bits = prop::collection::vec(any::<u32>(), 16 * 5);
    (bits, option::of(0u32..255), 1usize..6).prop_map(|(bits, exponent, blocks)| {
        let number = |bits: u32| {
            let exponent = exponent.unwrap_or((bits >> 23 & 0xff).min(254));
            f32::from_bits(exponent << 23 | bits & 0x807f_ffff)
        };
        bits[..16 * blocks].iter().map(|bits| number(*bits)).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn an_element_misses_by_steps_and_is_never_larger_than_its_block(row in rows(), int4: bool) {
        let format = WireFormat::ALL[usize::from(int4)];
        let received = received(format, &row);
        for (block, received) in row.chunks(BLOCK).zip(received.chunks(BLOCK)) {
            let (step, most) = (step(format, block), block.iter().fold(0.0, |most: f32, x| most.max(x.abs())));
            for (x, got) in block.iter().zip(received) {
                prop_assert!((f64::from(*x) - f64::from(*got)).abs() <= 3.0 * step, "{:e} became {:e}", x, got);
                let larger = f64::from(got.abs()) - f64::from(most);
                prop_assert!(larger <= f64::from(f32::MIN_POSITIVE) / 2.0, "{:e} became {:e}", x, got);
                let inner = f64::from(got.abs()) <= f64::from(most) - 3.0 * step;
                prop_assert!(!inner || (f64::from(*x) - f64::from(*got)).abs() <= 0.501 * step, "{:e} became {:e}", x, got);
            }
        }
    }

    #[test]
    fn no_word_is_the_sentinel(bits in prop::collection::vec(any::<u32>(), 48), int4: bool) {
        let row: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        assert_complete(&encoded(WireFormat::ALL[usize::from(int4)], &row));
    }
}

/// Every element of a word has the largest code, the sign opposite to the extreme's.
#[test]
fn words_that_would_be_the_sentinel_are_sent_as_their_neighbours() {
    for format in WireFormat::ALL {
        let codes = f32::from(1u16 << (format.bits() - 1));
        for sign in [1.0, -1.0] {
            let mut row = [-sign; 64];
            // The scale is that of 1.
            row[13] = sign * 1.001;
            let [first, second, .., third, fourth] = received(format, &row)[..] else {
                panic!("a row is shorter")
            };
            assert_complete(&encoded(format, &row));
            assert_eq!([first, second], [2.0, 1.0].map(|less| -sign * (1.0 - less / codes)), "{format}");
            // In a block of one number it has the least code.
            assert_eq!([third, fourth], [-sign; 2], "{format}");
        }
    }
}

#[test]
fn rows_of_zeros_stay_zeros() {
    for format in WireFormat::ALL {
        for zero in [0.0, -0.0] {
            let received = received(format, &[zero; 80]);
            assert!(received.iter().all(|x| x.to_bits() == 0), "{format}");
        }
    }
}

#[test]
fn nan_and_infinity_stay_in_their_block() {
    for format in WireFormat::ALL {
        for bits in
            [f32::NAN.to_bits(), f32::INFINITY.to_bits(), f32::NEG_INFINITY.to_bits(), u32::MAX, 0x7f80_0001]
        {
            let mut row = [3.0; 80];
            row[40] = f32::from_bits(bits);
            assert_complete(&encoded(format, &row));
            let received = received(format, &row);
            assert!(received[32..64].iter().all(|x| x.is_nan()), "{format}, {bits:#x}");
            assert!(received[..32].iter().chain(&received[64..]).all(|x| *x == 3.0), "{format}, {bits:#x}");
        }
    }
}

#[test]
fn the_smallest_and_the_largest_numbers_neither_vanish_nor_overflow() {
    for format in WireFormat::ALL {
        for x in [f32::MAX, 65_504.0, 8.0 * f32::MIN_POSITIVE, f32::MIN_POSITIVE] {
            let least = if x < 1e-37 { x } else { 0.99 * x };
            assert!(
                received(format, &[x; 16]).iter().all(|got| (least..=x).contains(got)),
                "{format}, {x:e}"
            );
        }
        // Below half of the least step.
        assert_eq!(received(format, &[f32::from_bits(1); 16]), [0.0; 16]);
    }
}

/// A number of a normal distribution for each element: 12 uniform ones added up.
fn normal(seed: u64) -> f32 {
    let uniform = |place: u64| {
        let mut bits = (seed * 12 + place).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((bits ^ bits >> 31) >> 40) as f32 / (1 << 24) as f32
    };
    (0..12).map(uniform).sum::<f32>() - 6.0
}

const HIDDEN: usize = 8192;

/// The sum of a row of each rank, by `operation`, and the exact one.
fn sums(operation: &Operation, ranks: u64) -> (Vec<f32>, Vec<f64>) {
    let rows: Vec<Vec<f32>> =
        (0..ranks).map(|rank| (0..HIDDEN as u64).map(|i| normal(rank << 32 | i)).collect()).collect();
    let inputs: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
    let (mut sum, mut norm) = (vec![0.0; HIDDEN], vec![0.0; HIDDEN]);
    let token = token(&inputs, None);
    let mut row = Row { residual_out: &mut sum, norm: &mut norm, values: &mut [], scales: &mut [] };
    row.compute(operation, &token).unwrap();
    let exact = (0..HIDDEN).map(|index| rows.iter().map(|row| f64::from(row[index])).sum()).collect();
    (sum, exact)
}

fn token<'a, E: Element>(inputs: &'a [&'a [E]], residual: Option<&'a [E]>) -> Token<'a, E> {
    Token {
        hosts: 1,
        inputs,
        experts: None,
        residual,
        bias: None,
        post_gamma: None,
        gamma: Weights::Element(&[]),
        scale: 1.0,
        index: 0,
    }
}

fn operation(dtype: DType, mode: Mode, wire: Option<WireFormat>) -> Operation {
    Operation {
        dtype,
        tokens: 1,
        hidden: HIDDEN as u64,
        residual: Residual::None,
        norm: None,
        quantization: Quantization::None,
        keep_norm: false,
        rounding: Rounding::Once,
        bias: false,
        post_norm: None,
        experts: None,
        wire,
        partial_sums: PartialSums::F32,
        mode,
    }
}

#[test]
fn the_error_of_normal_rows_is_what_the_documentation_says() {
    for (format, most) in [(WireFormat::Int8, 0.0055), (WireFormat::Int4, 0.087)] {
        for ranks in [2, 4, 8] {
            for (mode, hops) in [(Mode::OneShot, 1.0f64), (Mode::TwoShot, 2.0)] {
                let (sum, exact) = sums(&operation(DType::F32, mode, Some(format)), ranks);
                let squares: f64 = exact.iter().map(|x| x * x).sum();
                let errors: f64 = exact.iter().zip(&sum).map(|(x, got)| (x - f64::from(*got)).powi(2)).sum();
                let error = (errors / squares).sqrt();
                println!("{format}, {ranks} ranks, {mode:?}: {:.3}%", error * 100.0);
                assert!(error < most * hops.sqrt(), "{format}, {ranks} ranks, {mode:?}: {error}");
            }
        }
    }
}

/// Sums of addends that went through the format; in two-shot the sum does too; the residual never does.
#[test]
fn addends_and_sums_go_through_the_format_and_the_residual_does_not() {
    let rows: [Vec<bf16>; 4] =
        array::from_fn(|rank| (0..48).map(|i| bf16::from_f32(normal((rank as u64) << 32 | i))).collect());
    let wide = |row: &[bf16]| row.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
    let [a, b, c, residual] = &rows;
    for format in WireFormat::ALL {
        for (mode, kind) in [
            (Mode::OneShot, Residual::Replicated),
            (Mode::TwoShot, Residual::Replicated),
            (Mode::TwoShot, Residual::Sharded),
            (Mode::Auto, Residual::Sharded),
        ] {
            let mut sum = vec![0.0f32; 48];
            for row in [a, b, c] {
                sum.iter_mut().zip(received(format, &wide(row))).for_each(|(sum, x)| *sum += x);
            }
            if (mode, kind) == (Mode::TwoShot, Residual::Replicated) {
                sum = received(format, &sum);
            }
            let expected: Vec<bf16> =
                sum.iter().zip(residual).map(|(sum, x)| bf16::from_f32(sum + x.to_f32())).collect();
            let norm = Some(Norm::default());
            let operation =
                Operation { hidden: 48, residual: kind, norm, ..operation(DType::Bf16, mode, Some(format)) };
            let inputs = [&a[..], b, c];
            let (mut out, mut normed) = (vec![bf16::ZERO; 48], vec![bf16::ZERO; 48]);
            let ones = [bf16::ONE; 48];
            let token = Token { gamma: Weights::Element(&ones), ..token(&inputs, Some(residual)) };
            let mut row = Row { residual_out: &mut out, norm: &mut normed, values: &mut [], scales: &mut [] };
            row.compute(&operation, &token).unwrap();
            assert_eq!(out, expected, "{format}, {mode:?}, {kind:?}");
        }
    }
}

/// Either format is bytes after one mask: of eight codes of four bits, the first four are the low halves of a word's bytes.
#[test]
fn codes_lie_where_the_layout_says() {
    let row: [f32; 16] = array::from_fn(|index| index as f32 - 8.0);
    let mut sent = [0; 16];
    WireFormat::Int4.encode(&row, &mut sent);
    let eight =
        |first: u8| array::from_fn::<u8, 4, _>(|byte| (first + byte as u8) | ((first + 4 + byte as u8) << 4));
    assert_eq!(sent[..8], [eight(0), eight(8)].concat());

    let row: [f32; 16] = array::from_fn(|index| index as f32 * 16.0 - 128.0);
    let mut sent = [0; 32];
    WireFormat::Int8.encode(&row, &mut sent);
    assert_eq!(sent[..16], array::from_fn::<u8, 16, _>(|index| index as u8 * 16));
}
