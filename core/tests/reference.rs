//! The reference's check: outputs as specified pass, and every kind of wrong one is found.

use fused_collective_core::{
    dtype::{Element, bf16},
    fusion::{Mode, Norm, Operation, PartialSums, Residual, Rounding},
    norm::Weights,
    quant::{GroupScale, Quantization, ScaleLayout, e4m3},
    reference::check_token,
    specification::{Mismatch, Observed, Output, Row, Token},
};

const HIDDEN: usize = 64;

/// One token's outputs.
#[derive(Clone)]
struct Outputs<E> {
    residual_out: Vec<E>,
    norm: Vec<E>,
    values: Vec<u8>,
    scales: Vec<u8>,
}

/// A token of two ranks with a residual, values around 1.
struct Fixture<E> {
    operation: Operation,
    inputs: [Vec<E>; 2],
    residual: Vec<E>,
    gamma: Vec<E>,
}

impl<E: Element> Fixture<E> {
    fn new(quantization: Quantization) -> Self {
        let row = |seed: usize| {
            (0..HIDDEN)
                .map(|i| E::from_f32(((i * 37 + seed * 101) % 251) as f32 / 64.0 - 1.9))
                .collect::<Vec<E>>()
        };
        let operation = Operation {
            dtype: E::DTYPE,
            tokens: 1,
            hidden: HIDDEN as u64,
            residual: Residual::Replicated,
            norm: Some(Norm::default()),
            quantization,
            keep_norm: false,
            rounding: Rounding::Once,
            bias: true,
            post_norm: None,
            experts: None,
            wire: None,
            partial_sums: PartialSums::F32,
            mode: Mode::Auto,
        };
        Fixture { operation, inputs: [row(1), row(2)], residual: row(3), gamma: row(4) }
    }

    fn with_token<R>(&self, work: impl FnOnce(&Token<'_, E>) -> R) -> R {
        let rows = [&self.inputs[0][..], &self.inputs[1][..]];
        work(&Token {
            inputs: &rows,
            hosts: 1,
            residual: Some(&self.residual),
            bias: self.operation.bias.then_some(&self.gamma[..]),
            post_gamma: None,
            experts: None,
            gamma: Weights::Element(&self.gamma),
            scale: 0.01,
            index: 0,
        })
    }

    fn compute(&self, rounding: Rounding) -> Outputs<E> {
        let quantization = self.operation.quantization;
        let mut outputs = Outputs {
            residual_out: vec![E::default(); HIDDEN],
            norm: vec![E::default(); HIDDEN],
            values: vec![0; quantization.value_bytes_per_row(HIDDEN as u64) as usize],
            scales: vec![0; quantization.scale_bytes(1, HIDDEN as u64).unwrap() as usize],
        };
        let Outputs { residual_out, norm, values, scales } = &mut outputs;
        let mut own = vec![0; Row::<E>::scale_bytes(&self.operation) as usize];
        let mut row = Row { residual_out, norm, values, scales: &mut own };
        self.with_token(|token| row.compute(&self.operation(rounding), token)).unwrap();
        if let Some(tensor) = quantization.scales(1, self.operation.hidden) {
            let size = tensor.size as usize;
            for (col, scale) in (0..).zip(own.chunks(size)) {
                let at = tensor.offset(0, col) as usize;
                scales[at..at + size].copy_from_slice(scale);
            }
        }
        outputs
    }

    fn operation(&self, rounding: Rounding) -> Operation {
        Operation { rounding, ..self.operation }
    }

    fn check(&self, rounding: Rounding, outputs: &Outputs<E>) -> Result<f64, Mismatch> {
        let writes_norm = self.operation.quantization == Quantization::None;
        let observed = Observed {
            residual_out: &outputs.residual_out,
            norm_out: if writes_norm { &outputs.norm } else { &[] },
            values: &outputs.values,
            scales: &outputs.scales,
        };
        self.with_token(|token| check_token(&self.operation(rounding), token, &observed))
    }
}

const LAYOUT: ScaleLayout = ScaleLayout::Swizzled128x4;
const QUANTIZATIONS: [Quantization; 8] = [
    Quantization::None,
    Quantization::Fp8Static,
    Quantization::Fp8PerToken,
    Quantization::Fp8PerGroup { group: 64, scales: GroupScale::Ue8m0, layout: LAYOUT },
    Quantization::Fp8PerGroup { group: 64, scales: GroupScale::F32, layout: ScaleLayout::DeepGemm },
    Quantization::NvFp4 { layout: LAYOUT },
    Quantization::MxFp8 { layout: LAYOUT },
    Quantization::MxFp4 { layout: LAYOUT },
];

#[test]
fn the_specification_is_within_half_a_unit_of_exact_arithmetic() {
    for quantization in QUANTIZATIONS {
        for rounding in [Rounding::Once, Rounding::AfterAllReduce] {
            let fixture = Fixture::<bf16>::new(quantization);
            let error = fixture.check(rounding, &fixture.compute(rounding)).unwrap();
            // A code saturates where its block's scale was rounded down: NVFP4's, which is nearest.
            let most = if matches!(quantization, Quantization::NvFp4 { .. }) { 1.0 } else { 0.51 };
            assert!(error > 0.0 && error <= most, "{quantization:?}: {error}");
        }
    }
}

#[test]
fn the_specification_is_the_arithmetic_of_the_definition() {
    // sum = 3, 6, ...; mean square of (3, 4) repeated is 12.5.
    let operation = Operation {
        hidden: 16,
        residual: Residual::None,
        ..Fixture::<f32>::new(Quantization::None).operation
    };
    let input: Vec<f32> = (0..16).map(|i| if i % 2 == 0 { 1.0 } else { 1.5 }).collect();
    let other: Vec<f32> = (0..16).map(|i| if i % 2 == 0 { 2.0 } else { 2.5 }).collect();
    let gamma = [2.0f32; 16];
    let inputs = [&input[..], &other[..]];
    let token = Token {
        inputs: &inputs,
        hosts: 1,
        residual: None,
        bias: None,
        post_gamma: None,
        experts: None,
        gamma: Weights::F32(&gamma),
        scale: 1.0,
        index: 0,
    };
    let (mut residual_out, mut norm) = ([0.0f32; 16], [0.0f32; 16]);
    let mut row = Row { residual_out: &mut residual_out, norm: &mut norm, values: &mut [], scales: &mut [] };
    row.compute(&operation, &token).unwrap();
    assert_eq!(residual_out[..2], [3.0, 4.0]);
    let rms = (12.5f64 + 1e-6).sqrt();
    assert!((f64::from(norm[0]) - 6.0 / rms).abs() < 1e-6 && (f64::from(norm[1]) - 8.0 / rms).abs() < 1e-6);
}

#[test]
fn separate_operations_round_twice_and_the_check_can_tell() {
    let fixture = Fixture::<bf16>::new(Quantization::None);
    let (once, twice) = (fixture.compute(Rounding::Once), fixture.compute(Rounding::AfterAllReduce));
    assert!(once.residual_out != twice.residual_out);
    assert!(fixture.check(Rounding::Once, &twice).is_err());
    assert!(fixture.check(Rounding::AfterAllReduce, &once).is_err());
}

/// The neighbour of a value, one unit in the last place away from zero.
fn next(value: bf16) -> bf16 {
    bf16::from_bits(value.to_bits() + 1)
}

#[test]
fn a_residual_off_by_one_unit_is_found() {
    let fixture = Fixture::<bf16>::new(Quantization::None);
    for index in [0, 1, HIDDEN - 1] {
        let mut outputs = fixture.compute(Rounding::Once);
        outputs.residual_out[index] = next(outputs.residual_out[index]);
        let mismatch = fixture.check(Rounding::Once, &outputs).unwrap_err();
        assert_eq!((mismatch.output, mismatch.index), (Output::Residual, index as u64));
    }
}

#[test]
fn a_norm_off_by_one_unit_is_found() {
    let fixture = Fixture::<bf16>::new(Quantization::None);
    let mut outputs = fixture.compute(Rounding::Once);
    outputs.norm[7] = next(outputs.norm[7]);
    let mismatch = fixture.check(Rounding::Once, &outputs).unwrap_err();
    assert_eq!((mismatch.output, mismatch.index), (Output::Norm, 7));
}

#[test]
fn a_code_off_by_one_is_found() {
    for quantization in &QUANTIZATIONS[1..] {
        let fixture = Fixture::<bf16>::new(*quantization);
        let mut outputs = fixture.compute(Rounding::Once);
        // The magnitude's lowest bit: the neighbouring code of the same sign, in both formats.
        outputs.values[5] ^= 1;
        let mismatch = fixture.check(Rounding::Once, &outputs).unwrap_err();
        assert_eq!(mismatch.output, Output::Value, "{quantization:?}");
    }
}

#[test]
fn a_scale_off_by_one_is_found() {
    for quantization in &QUANTIZATIONS[2..] {
        let fixture = Fixture::<bf16>::new(*quantization);
        let mut outputs = fixture.compute(Rounding::Once);
        outputs.scales[0] ^= 1;
        let mismatch = fixture.check(Rounding::Once, &outputs);
        // A token's `f32` scale may be off in its last bit: the norm it comes from has that allowance.
        if *quantization == Quantization::Fp8PerToken {
            outputs.scales[3] ^= 1;
            assert_eq!(fixture.check(Rounding::Once, &outputs).unwrap_err().output, Output::Scale);
        } else {
            assert_eq!(mismatch.unwrap_err().output, Output::Scale, "{quantization:?}");
        }
    }
}

#[test]
fn an_output_that_was_never_written_is_found() {
    let fixture = Fixture::<bf16>::new(Quantization::Fp8Static);
    let right = fixture.compute(Rounding::Once);
    let mut outputs = right.clone();
    outputs.values.fill(e4m3::NAN);
    assert!(fixture.check(Rounding::Once, &outputs).is_err());
    let mut outputs = right;
    outputs.residual_out[3] = bf16::NAN;
    assert!(fixture.check(Rounding::Once, &outputs).is_err());
}

#[test]
fn nan_and_infinity_come_through_and_are_demanded() {
    let mut fixture = Fixture::<bf16>::new(Quantization::None);
    fixture.inputs[1][2] = bf16::NAN;
    let outputs = fixture.compute(Rounding::Once);
    assert!(outputs.residual_out[2].is_nan() && outputs.norm.iter().all(|norm| norm.is_nan()));
    assert!(fixture.check(Rounding::Once, &outputs).is_ok());
    let mut hidden = outputs.clone();
    hidden.residual_out[2] = bf16::ONE;
    assert_eq!(fixture.check(Rounding::Once, &hidden).unwrap_err().output, Output::Residual);

    let mut fixture = Fixture::<bf16>::new(Quantization::None);
    fixture.inputs[0][4] = bf16::INFINITY;
    let outputs = fixture.compute(Rounding::Once);
    assert_eq!(outputs.residual_out[4], bf16::INFINITY);
    assert!(fixture.check(Rounding::Once, &outputs).is_ok());
    // The root mean square is infinite: what is finite becomes 0, and infinity over infinity NaN.
    assert!(outputs.norm[4].is_nan() && outputs.norm[0] == bf16::ZERO);
}

#[test]
fn a_row_of_zeros_stays_zero_in_every_quantization() {
    for quantization in QUANTIZATIONS {
        let mut fixture = Fixture::<f32>::new(quantization);
        fixture.operation.bias = false;
        fixture.inputs.iter_mut().for_each(|row| row.fill(0.0));
        fixture.residual.fill(0.0);
        let outputs = fixture.compute(Rounding::Once);
        assert!(outputs.norm.iter().all(|&norm| norm == 0.0));
        // Codes are zeros of either sign: of E4M3, or two of E2M1.
        assert!(
            outputs.values.iter().all(|code| [0x00, 0x80, 0x88, 0x08].contains(code)),
            "{quantization:?}"
        );
        assert!(fixture.check(Rounding::Once, &outputs).is_ok(), "{quantization:?}");
    }
}
