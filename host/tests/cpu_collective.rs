//! The CPU backend against the reference, ranks as threads that share memory as processes would.

use std::{
    cell::UnsafeCell,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use fused_collective::{
    Error, ErrorKind,
    cpu::{self, Communicator, Inputs, Operand, Outputs, Plain},
    group::{Thread, threads},
};
use fused_collective_core::{
    dtype::{Element, bf16, f16},
    fusion::{Mode, Norm, Operation, Residual, Rounding, WeightType},
    norm::Weights,
    plan::{Limits, Plan, owner},
    quant::{GroupScale, Quantization, ScaleLayout},
    specification::{Observed, Row, Token},
};
use proptest::prelude::*;
use zerocopy::IntoBytes as _;

/// Runs `rank` on a thread for each rank of a group and returns what they return, in rank order.
fn group<R: Send>(
    world_size: u32,
    max_row_bytes: u64,
    deadline: Duration,
    rank: impl Fn(Communicator) -> R + Sync,
) -> Vec<R> {
    let options = cpu::Options { max_row_bytes, deadline };
    thread::scope(|scope| {
        let start = |bootstrap: Thread| {
            let rank = &rank;
            scope.spawn(move || rank(Communicator::join(&bootstrap, options).unwrap()))
        };
        let ranks: Vec<_> = threads(world_size, PATIENT).into_iter().map(start).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

const PATIENT: Duration = Duration::from_secs(30);

/// One rank's results of one operation.
#[derive(Clone, Debug, PartialEq)]
struct Results<E> {
    residual_out: Vec<E>,
    norm_out: Vec<E>,
    quant_out: Vec<u8>,
    scale_out: Vec<u8>,
}

/// The inputs of one operation on all ranks: pseudo-random, with zeros of both signs among them.
struct Case<E> {
    operation: Operation,
    inputs: Vec<Vec<E>>,
    residual: Vec<E>,
    bias: Vec<E>,
    gamma: Vec<E>,
    gamma_f32: Vec<f32>,
    scale: f32,
}

impl<E: Plain> Case<E> {
    fn new(operation: Operation, world_size: u32, seed: u64) -> Self {
        let elements = (operation.tokens * operation.hidden) as usize;
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            match state >> 58 {
                0 => -0.0,
                1 => 0.0,
                _ => (state >> 40) as f32 / (1 << 22) as f32 - 2.0,
            }
        };
        let mut tensor = |length: usize| (0..length).map(|_| E::from_f32(next())).collect::<Vec<E>>();
        let inputs = (0..world_size).map(|_| tensor(elements)).collect();
        let residual = tensor(elements);
        let [bias, gamma] = [(); 2].map(|()| tensor(operation.hidden as usize));
        let gamma_f32 = gamma.iter().map(|weight| weight.to_f32()).collect();
        Case { operation, inputs, residual, bias, gamma, gamma_f32, scale: 0.37 }
    }

    fn gamma(&self) -> Weights<'_, E> {
        match self.operation.norm {
            Some(Norm { gamma: WeightType::F32, .. }) => Weights::F32(&self.gamma_f32),
            _ => Weights::Element(&self.gamma),
        }
    }

    /// Runs the operation on one rank, outputs poisoned before.
    fn run(&self, communicator: &mut Communicator, mode: Mode) -> Result<Results<E>, Error> {
        self.run_operation(communicator, &Operation { mode, ..self.operation })
    }

    /// The rows of `tensor` that lie with a rank whose residual is as the operation says.
    fn residual_rows(&self, operation: &Operation, rank: u32, tensor: &[E]) -> Vec<E> {
        let (hidden, world_size) = (operation.hidden as usize, self.inputs.len() as u32);
        let is_held =
            |token: u64| operation.residual != Residual::Sharded || owner(token, world_size) == rank;
        let rows = (0..operation.tokens).zip(tensor.chunks(hidden)).filter(|(token, _)| is_held(*token));
        rows.flat_map(|(_, row)| row.to_vec()).collect()
    }

    /// Runs the operation, or one on the same inputs.
    fn run_operation(
        &self,
        communicator: &mut Communicator,
        operation: &Operation,
    ) -> Result<Results<E>, Error> {
        let (quantization, tokens, hidden) = (operation.quantization, operation.tokens, operation.hidden);
        let poison = E::from_f32(f32::NAN);
        let elements = (tokens * hidden) as usize;
        let residual = self.residual_rows(operation, communicator.rank(), &self.residual);
        let mut results = Results {
            residual_out: vec![poison; residual.len()],
            norm_out: vec![poison; if operation.writes_norm() { elements } else { 0 }],
            quant_out: vec![0xaa; (tokens * quantization.value_bytes_per_row(hidden)) as usize],
            scale_out: vec![0xaa; quantization.scale_bytes(tokens, hidden).unwrap() as usize],
        };
        let inputs = Inputs {
            input: Operand::Apart(&self.inputs[communicator.rank() as usize][..]),
            residual: operation.residual.is_some().then_some(Operand::Apart(&residual[..])),
            bias: operation.bias.then_some(&self.bias[..]),
            gamma: self.gamma(),
            scale: self.scale,
        };
        let outputs = Outputs {
            residual_out: &mut results.residual_out,
            norm_out: &mut results.norm_out,
            quant_out: &mut results.quant_out,
            scale_out: &mut results.scale_out,
        };
        communicator.all_reduce(operation, inputs, outputs)?;
        Ok(results)
    }

    fn check(&self, results: &Results<E>) {
        let hidden = self.operation.hidden as usize;
        let row_bytes = self.operation.quantization.value_bytes_per_row(self.operation.hidden) as usize;
        for index in 0..self.operation.tokens {
            let row = index as usize * hidden..(index as usize + 1) * hidden;
            let rows: Vec<&[E]> = self.inputs.iter().map(|input| &input[row.clone()]).collect();
            let token = Token {
                inputs: &rows,
                residual: self.operation.residual.is_some().then_some(&self.residual[row.clone()]),
                bias: self.operation.bias.then_some(&self.bias[..]),
                post_gamma: None,
                experts: None,
                gamma: self.gamma(),
                scale: self.scale,
                index,
            };
            let values = index as usize * row_bytes;
            let observed = Observed {
                residual_out: &results.residual_out[row.clone()],
                norm_out: results.norm_out.get(row).unwrap_or_default(),
                values: &results.quant_out[values..values + row_bytes],
                scales: &results.scale_out,
            };
            let zeros = vec![E::default(); hidden];
            let mut row = Row {
                residual_out: &mut zeros.clone(),
                norm: &mut zeros.clone(),
                values: &mut vec![0; row_bytes],
                scales: &mut vec![0; Row::<E>::scale_bytes(&self.operation) as usize],
            };
            row.compute(&self.operation, &token).unwrap();
            row.compare(&self.operation, index, &observed).unwrap();
        }
    }
}

/// Both modes on every rank: right, the same bits on all ranks and in both modes.
fn check<E: Plain>(operation: Operation, world_size: u32, seed: u64) {
    let case = Case::<E>::new(operation, world_size, seed);
    let results = group(world_size, operation.row_bytes(), PATIENT, |mut communicator| {
        [Mode::OneShot, Mode::TwoShot, Mode::Auto].map(|mode| case.run(&mut communicator, mode).unwrap())
    });
    case.check(&results[0][0]);
    for (rank, modes) in results.iter().enumerate() {
        for (mode, result) in modes.iter().enumerate() {
            assert!(
                bytes_equal(result, &results[0][0]),
                "rank {rank}, mode {mode} differs from rank 0, one-shot"
            );
        }
    }
}

/// An operation with a sharded residual, between others: what it leaves of a token on the owner, and on all ranks, is
/// what the replicated one leaves; and all ranks get the same bits.
fn check_sharded<E: Plain>(operation: Operation, world_size: u32, seed: u64) {
    check_sharded_case(Case::<E>::new(operation, world_size, seed));
}

fn check_sharded_case<E: Plain>(case: Case<E>) {
    let (operation, world_size) =
        (Operation { residual: Residual::Sharded, ..case.operation }, case.inputs.len() as u32);
    let results = group(world_size, operation.row_bytes(), PATIENT, |mut communicator| {
        let replicated = case.run(&mut communicator, Mode::OneShot).unwrap();
        let sharded = [Mode::Auto, Mode::TwoShot]
            .map(|mode| case.run_operation(&mut communicator, &Operation { mode, ..operation }).unwrap());
        assert!(bytes_equal(&case.run(&mut communicator, Mode::TwoShot).unwrap(), &replicated));
        assert!(bytes_equal(&sharded[0], &sharded[1]), "a repeated run gave other bits");
        (replicated, sharded[0].clone())
    });
    for (rank, (replicated, sharded)) in (0..).zip(&results) {
        let rows = case.residual_rows(&operation, rank, &replicated.residual_out);
        let same = Results { residual_out: rows, ..replicated.clone() };
        assert!(bytes_equal(&same, sharded), "rank {rank}");
        let same_everywhere = Results { residual_out: results[0].1.residual_out.clone(), ..sharded.clone() };
        assert!(bytes_equal(&same_everywhere, &results[0].1), "rank {rank} differs from rank 0");
    }
    // Held to the specification as well, with every token's row of the sum from its owner.
    case.check(&Results { residual_out: results[0].0.residual_out.clone(), ..results[0].1.clone() });
}

fn bytes_equal<E: Plain>(a: &Results<E>, b: &Results<E>) -> bool {
    a.residual_out.as_bytes() == b.residual_out.as_bytes()
        && a.norm_out.as_bytes() == b.norm_out.as_bytes()
        && (&a.quant_out, &a.scale_out) == (&b.quant_out, &b.scale_out)
}

fn operation<E: Plain>(tokens: u64, hidden: u64) -> Operation {
    Operation {
        dtype: E::DTYPE,
        tokens,
        hidden,
        residual: Residual::Replicated,
        norm: Some(Norm::default()),
        quantization: Quantization::None,
        keep_norm: false,
        rounding: Rounding::Once,
        bias: false,
        post_norm: None,
        experts: None,
        mode: Mode::Auto,
    }
}

fn quantizations() -> impl Strategy<Value = Quantization> {
    (prop::sample::select(&ScaleLayout::ALL[..]), 0usize..10).prop_map(|(layout, kind)| match kind {
        0 => Quantization::None,
        1 => Quantization::Fp8Static,
        2 => Quantization::Fp8PerToken,
        3 => Quantization::Fp8PerGroup { group: 32, scales: GroupScale::Ue8m0, layout },
        4 => Quantization::Fp8PerGroup { group: 64, scales: GroupScale::Ue8m0, layout },
        5 => Quantization::Fp8PerGroup { group: 128, scales: GroupScale::Ue8m0, layout },
        9 if layout.takes(4) => Quantization::Fp8PerGroup { group: 64, scales: GroupScale::F32, layout },
        6 => Quantization::NvFp4 { layout },
        7 => Quantization::MxFp8 { layout },
        _ => Quantization::MxFp4 { layout },
    })
}

fn operations() -> impl Strategy<Value = Operation> {
    let norm = (any::<bool>(), any::<bool>()).prop_map(|(gemma, wide)| Norm {
        weight_bias: if gemma { 1.0 } else { 0.0 },
        gamma: if wide { WeightType::F32 } else { WeightType::Element },
        ..Norm::default()
    });
    let shape = (0u64..12, 1u64..20, any::<bool>(), any::<bool>());
    (shape, proptest::option::weighted(0.9, norm), quantizations(), any::<bool>()).prop_map(
        |((tokens, blocks, residual, bias), norm, quantization, keep_norm)| {
            let quantization = if norm.is_some() { quantization } else { Quantization::None };
            let hidden = blocks * quantization.block().unwrap_or(16);
            let residual = Residual::replicated(residual);
            Operation { residual, bias, norm, quantization, keep_norm, ..operation::<f32>(tokens, hidden) }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn any_operation_is_right_on_every_rank_in_every_mode(
        operation in operations(),
        dtype in 0..3,
        world_size in 1u32..=6,
        seed: u64,
    ) {
        match dtype {
            0 => check::<f32>(operation, world_size, seed),
            1 => check::<f16>(Operation { dtype: f16::DTYPE, ..operation }, world_size, seed),
            _ => check::<bf16>(Operation { dtype: bf16::DTYPE, ..operation }, world_size, seed),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn any_operation_with_a_sharded_residual_gives_what_the_replicated_one_does(
        tokens in 0u64..12,
        blocks in 1u64..20,
        quantization in quantizations(),
        dtype in 0..3,
        world_size in 1u32..=6,
        seed: u64,
    ) {
        let hidden = blocks * quantization.block().unwrap_or(16);
        let operation = |dtype| Operation { dtype, quantization, ..operation::<f32>(tokens, hidden) };
        match dtype {
            0 => check_sharded::<f32>(operation(f32::DTYPE), world_size, seed),
            1 => check_sharded::<f16>(operation(f16::DTYPE), world_size, seed),
            _ => check_sharded::<bf16>(operation(bf16::DTYPE), world_size, seed),
        }
    }
}

#[test]
fn a_sharded_residual_goes_through_rounds_and_the_largest_rows() {
    let nvfp4 = Quantization::NvFp4 { layout: ScaleLayout::Swizzled128x4 };
    check_sharded::<bf16>(Operation { quantization: nvfp4, ..operation::<bf16>(300, 2880) }, 3, 3);
    check_sharded::<bf16>(
        Operation { quantization: Quantization::Fp8Static, ..operation::<bf16>(37, 48) },
        16,
        4,
    );
    check_sharded::<f32>(operation::<f32>(5, 65_536), 2, 2);
}

/// Rows of zeros become words of norms and codes that would all be the sentinel, if they were sent as they are.
#[test]
fn results_that_are_the_sentinel_arrive() {
    let nvfp4 = Quantization::NvFp4 { layout: ScaleLayout::Linear };
    for (quantization, elements_of_a_word) in
        [(Quantization::None, 2), (Quantization::Fp8Static, 4), (nvfp4, 8)]
    {
        let operation = Operation { quantization, ..operation::<bf16>(4, 96) };
        let mut case = Case::<bf16>::new(operation, 3, 1);
        case.inputs.iter_mut().chain([&mut case.residual]).for_each(|tensor| tensor.fill(bf16::ZERO));
        for (index, gamma) in case.gamma.iter_mut().enumerate() {
            let is_last = index % elements_of_a_word == elements_of_a_word - 1;
            *gamma = if is_last { bf16::NEG_ONE } else { bf16::ONE };
        }
        check_sharded_case(case);
    }
}

#[test]
fn a_whole_residual_is_refused_where_a_share_is_due() {
    let case = Case::<bf16>::new(operation::<bf16>(5, 64), 2, 6);
    let sharded = Operation { residual: Residual::Sharded, ..case.operation };
    group(2, 128, PATIENT, |mut communicator| {
        let inputs = Inputs {
            input: Operand::Apart(&case.inputs[0][..]),
            residual: Some(Operand::Apart(&case.residual[..])),
            bias: case.operation.bias.then_some(&case.bias[..]),
            gamma: case.gamma(),
            scale: 1.0,
        };
        let (mut out, mut norm_out) = (vec![bf16::ZERO; 3 * 64], vec![bf16::ZERO; 5 * 64]);
        let outputs = Outputs {
            residual_out: &mut out,
            norm_out: &mut norm_out,
            quant_out: &mut [],
            scale_out: &mut [],
        };
        let error = communicator.all_reduce(&sharded, inputs, outputs).unwrap_err();
        let rows = if communicator.rank() == 0 { 192 } else { 128 };
        assert_eq!(error.to_string(), format!("residual has length 320, the operation needs {rows}"));
        case.check(&case.run(&mut communicator, Mode::TwoShot).unwrap());
    });
}

#[test]
fn sixteen_ranks_agree() {
    check::<bf16>(operation::<bf16>(5, 48), 16, 1);
}

#[test]
fn the_largest_hidden_size_works() {
    check::<f32>(operation::<f32>(3, 65_536), 2, 2);
}

#[test]
fn an_operation_larger_than_a_slot_takes_several_rounds() {
    let rounds = |mode| {
        let slot_bytes = cpu::layout(3, 2880 * 2).unwrap().slot_bytes();
        let limits =
            Limits { world_size: 3, slot_bytes, compute_units: 1, max_cluster: 1, one_shot_bytes: u64::MAX };
        let operation = Operation { mode, ..operation::<bf16>(300, 2880) };
        Plan::new(&operation, &limits).unwrap().rounds().count()
    };
    assert!(rounds(Mode::OneShot) > 2 && rounds(Mode::TwoShot) > 2);
    check::<bf16>(operation::<bf16>(300, 2880), 3, 3);
    // Two tiles of scales and a part of the third, which no round ends with but the last.
    let nvfp4 = Quantization::NvFp4 { layout: ScaleLayout::Swizzled128x4 };
    check::<bf16>(Operation { quantization: nvfp4, ..operation::<bf16>(300, 2880) }, 3, 4);
}

#[test]
fn operations_follow_each_other_in_any_order() {
    let shapes = [(1, 8192), (7, 48), (0, 16), (200, 1024), (2, 16), (33, 2880)];
    let cases: Vec<Case<bf16>> = shapes
        .iter()
        .map(|&(tokens, hidden)| Case::new(operation::<bf16>(tokens, hidden), 3, tokens))
        .collect();
    let wide = Case::<f32>::new(operation::<f32>(9, 96), 3, 77);
    group(3, 8192 * 4, PATIENT, |mut communicator| {
        let modes = [Mode::OneShot, Mode::TwoShot];
        for turn in 0..60usize {
            let case = &cases[turn * 5 % cases.len()];
            case.check(&case.run(&mut communicator, modes[turn % 2]).unwrap());
            if turn % 3 == 0 {
                wide.check(&wide.run(&mut communicator, modes[turn / 3 % 2]).unwrap());
            }
        }
    });
}

#[test]
fn a_gamma_of_another_type_is_refused_before_anything_is_sent() {
    let norm = Norm { gamma: WeightType::F32, ..Norm::default() };
    let case = Case::<bf16>::new(Operation { norm: Some(norm), ..operation::<bf16>(4, 64) }, 2, 6);
    let wrong = Case::<bf16>::new(operation::<bf16>(4, 64), 2, 6);
    group(2, 128, PATIENT, |mut communicator| {
        let inputs = Inputs {
            input: Operand::Apart(&case.inputs[0][..]),
            residual: Some(Operand::Apart(&case.residual[..])),
            bias: case.operation.bias.then_some(&case.bias[..]),
            gamma: wrong.gamma(),
            scale: 1.0,
        };
        let (mut out, mut norm_out) = (vec![bf16::ZERO; 4 * 64], vec![bf16::ZERO; 4 * 64]);
        let outputs = Outputs {
            residual_out: &mut out,
            norm_out: &mut norm_out,
            quant_out: &mut [],
            scale_out: &mut [],
        };
        let error = communicator.all_reduce(&case.operation, inputs, outputs).unwrap_err();
        assert_eq!(
            error.to_string(),
            "gamma holds bfloat16, the operation needs float32 beside the element type"
        );
        // Nothing was sent: the next operation is right.
        case.check(&case.run(&mut communicator, Mode::OneShot).unwrap());
    });
}

#[test]
fn tensors_that_do_not_fit_the_operation_are_refused_before_anything_is_sent() {
    let case = Case::<bf16>::new(operation::<bf16>(4, 64), 2, 5);
    group(2, 128, PATIENT, |mut communicator| {
        let mut out = vec![bf16::ZERO; 4 * 64];
        let mut short = vec![bf16::ZERO; 4 * 64 - 16];
        let inputs = Inputs {
            input: Operand::Apart(&case.inputs[0][..]),
            residual: Some(Operand::Apart(&case.residual[..])),
            bias: case.operation.bias.then_some(&case.bias[..]),
            gamma: case.gamma(),
            scale: 1.0,
        };
        let (mut nothing, mut none) = ([], []);
        let outputs = Outputs {
            residual_out: &mut out,
            norm_out: &mut short,
            quant_out: &mut nothing,
            scale_out: &mut none,
        };
        let error = communicator.all_reduce(&case.operation, inputs, outputs).unwrap_err();
        assert_eq!(error.to_string(), "norm_out has length 240, the operation needs 256");
        // Nothing was sent: the next operation is right.
        case.check(&case.run(&mut communicator, Mode::OneShot).unwrap());
    });
}

#[test]
fn a_scale_or_a_weight_bias_that_is_not_valid_is_refused_before_anything_is_sent() {
    let fp8 = Operation { quantization: Quantization::Fp8Static, ..operation::<bf16>(4, 64) };
    let nvfp4 = Operation {
        quantization: Quantization::NvFp4 { layout: ScaleLayout::Linear },
        ..operation::<bf16>(4, 64)
    };
    group(2, 128, PATIENT, |mut communicator| {
        for operation in [fp8, nvfp4] {
            for scale in [0.0, -0.0, -1.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
                let case = Case::<bf16> { scale, ..Case::new(operation, 2, 8) };
                let error = case.run(&mut communicator, Mode::OneShot).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Invalid);
                assert!(error.to_string().contains("is not valid: use a"), "{error}");
            }
        }
        for bias in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            let norm = Some(Norm { weight_bias: bias, ..Norm::default() });
            let case = Case::<bf16>::new(Operation { norm, ..operation::<bf16>(4, 64) }, 2, 8);
            let error = case.run(&mut communicator, Mode::OneShot).unwrap_err();
            assert_eq!(error.to_string(), format!("weight bias {bias} is not valid: use a finite number"));
        }
        // Without a quantization no scale is read.
        let case = Case::<bf16> { scale: f32::NAN, ..Case::new(operation::<bf16>(4, 64), 2, 8) };
        case.check(&case.run(&mut communicator, Mode::OneShot).unwrap());
    });
}

/// The norm in the input's memory, the sum in the residual's, in one round and in many.
#[test]
fn outputs_in_place_are_those_apart() {
    fn check<E: Plain>(operation: Operation, world_size: u32) {
        let case = Case::<E>::new(operation, world_size, 9);
        group(world_size, operation.row_bytes(), PATIENT, |mut communicator| {
            let rank = communicator.rank();
            let sharded = Operation { residual: Residual::Sharded, mode: Mode::TwoShot, ..operation };
            let modes = [Mode::OneShot, Mode::TwoShot].map(|mode| Operation { mode, ..operation });
            for operation in modes.into_iter().chain([sharded]) {
                let apart = case.run_operation(&mut communicator, &operation).unwrap();
                let (mut residual, mut input) = (
                    case.residual_rows(&operation, rank, &case.residual),
                    case.inputs[rank as usize].clone(),
                );
                let inputs = Inputs {
                    input: Operand::InPlace,
                    residual: Some(Operand::InPlace),
                    bias: case.operation.bias.then_some(&case.bias[..]),
                    gamma: case.gamma(),
                    scale: case.scale,
                };
                let outputs = Outputs {
                    residual_out: &mut residual,
                    norm_out: &mut input,
                    quant_out: &mut [],
                    scale_out: &mut [],
                };
                communicator.all_reduce(&operation, inputs, outputs).unwrap();
                assert!(residual.as_bytes() == apart.residual_out.as_bytes(), "{operation:?}");
                assert!(input.as_bytes() == apart.norm_out.as_bytes(), "{operation:?}");
            }
        });
    }
    check::<bf16>(operation::<bf16>(3, 80), 2);
    check::<f32>(operation::<f32>(200, 4096), 3);

    // Without a norm in the elements there is no place for it.
    let operation = Operation { quantization: Quantization::Fp8Static, ..operation::<bf16>(3, 64) };
    let case = Case::<bf16>::new(operation, 2, 10);
    group(2, 128, PATIENT, |mut communicator| {
        let inputs = Inputs {
            input: Operand::InPlace,
            residual: Some(Operand::Apart(&case.residual[..])),
            bias: case.operation.bias.then_some(&case.bias[..]),
            gamma: case.gamma(),
            scale: case.scale,
        };
        let (mut sum, mut codes) = (case.residual.clone(), vec![0; 3 * 64]);
        let outputs =
            Outputs { residual_out: &mut sum, norm_out: &mut [], quant_out: &mut codes, scale_out: &mut [] };
        let error = communicator.all_reduce(&operation, inputs, outputs).unwrap_err();
        assert_eq!(
            error.to_string(),
            "input is to be in the memory of norm_out, which the operation does not write"
        );
    });
}

/// Two ranks write one plain number. `cargo xtask test` runs this under ThreadSanitizer, which must find it.
#[test]
#[ignore = "it is a data race: to show that ThreadSanitizer finds one"]
fn a_planted_race() {
    struct Shared(UnsafeCell<u64>);
    // SAFETY: it is not, and that is to be found.
    unsafe impl Sync for Shared {}
    let shared = &Shared(UnsafeCell::new(0));
    let arrived = AtomicU32::new(0);
    group(2, 64, PATIENT, |mut communicator| {
        communicator.barrier().unwrap();
        // Both are past the barrier, and relaxed accesses put nothing in order: so the ranks race in every run.
        arrived.fetch_add(1, Ordering::Relaxed);
        while arrived.load(Ordering::Relaxed) < 2 {
            thread::yield_now();
        }
        // SAFETY: none; only a sanitizer runs this.
        unsafe { *shared.0.get() += u64::from(communicator.rank()) };
    });
}
