//! The CPU backend against the reference, ranks as threads that share memory as processes would.

mod cases;
mod refusals;

use std::{cell::UnsafeCell, thread, time::Duration};

use fused_collective::cpu::{self, Inputs, Operand, Outputs, Plain};
use fused_collective_core::{
    dtype::{Element as _, bf16, f16},
    fusion::{Experts, Mode, Norm, Operation, Residual, WeightType},
    plan::{Limits, Plan},
    quant::{Quantization, ScaleLayout},
    reference::Special,
    wire::WireFormat,
};
use proptest::prelude::*;
use zerocopy::IntoBytes as _;

use cases::{
    Case, PATIENT, before_residual, check, check_case, check_sharded, check_sharded_case, group, operation,
    operations, quantizations,
};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn any_operation_is_right_on_every_rank_in_every_mode(
        operation in operations(),
        dtype in 0..3,
        world_size in 1u32..=8,
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
        (rounding, post_norm, experts, wire) in before_residual(),
        quantization in quantizations(),
        dtype in 0..3,
        world_size in 1u32..=8,
        seed: u64,
    ) {
        let hidden = blocks * quantization.block().unwrap_or(16);
        let operation = |dtype| Operation {
            dtype,
            quantization,
            rounding,
            post_norm,
            experts,
            wire,
            ..operation::<f32>(tokens, hidden)
        };
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

/// Through rounds that are as large as a slot allows, and rows of special numbers, which stay in their rows.
#[test]
fn wire_formats_go_through_rounds_and_take_any_number() {
    fn check<E: Plain>(wire: WireFormat) {
        let operation = Operation { wire: Some(wire), ..operation::<E>(2 * Special::ALL.len() as u64, 96) };
        let mut case = Case::<E>::new(operation, 3, 5);
        let ordinary = case.inputs.clone();
        for (rank, input) in (0..).zip(&mut case.inputs) {
            for (token, row) in (0..).zip(input.chunks_mut(96)) {
                if Special::of_token(token) != Special::Ordinary {
                    Special::of_token(token).fill(rank, token, row);
                }
            }
        }
        check_case(Case { inputs: case.inputs.clone(), ..Case::new(operation, 3, 5) });
        let ordinary = Case { inputs: ordinary, ..Case::new(operation, 3, 5) };
        group(3, operation.row_bytes(), PATIENT, |mut communicator| {
            for mode in [Mode::OneShot, Mode::TwoShot] {
                let [special, ordinary] =
                    [&case, &ordinary].map(|case| case.run(&mut communicator, mode).unwrap().norm_out);
                for row in (0..special.len()).step_by(2 * 96) {
                    assert!(special[row..row + 96] == ordinary[row..row + 96]);
                }
            }
        });
        check_sharded_case(case);
    }
    for wire in WireFormat::ALL {
        check::<f32>(wire);
        check::<f16>(wire);
        check::<bf16>(wire);
        let limits = Limits {
            world_size: 3,
            hosts: 1,
            slot_bytes: cpu::layout(3, 2880 * 2).unwrap().slot_bytes(),
            compute_units: 1,
            max_cluster: 1,
            one_shot_bytes: 0,
        };
        let operation = Operation { wire: Some(wire), ..operation::<bf16>(600, 2880) };
        assert!(Plan::new(&operation, &limits).unwrap().rounds().count() > 2);
        check_case(Case::<bf16>::new(operation, 3, 3));
        check_sharded::<bf16>(operation, 3, 3);
    }
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
        let limits = Limits {
            world_size: 3,
            hosts: 1,
            slot_bytes,
            compute_units: 1,
            max_cluster: 1,
            one_shot_bytes: u64::MAX,
        };
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

/// Tokens of which no rank has an expert, and tensors without rows.
#[test]
fn tokens_without_experts_are_zero() {
    let experts = Some(Experts { top_k: 3, scales: WeightType::Element, shared: false });
    let operation = Operation { experts, residual: Residual::None, ..operation::<bf16>(4, 64) };
    let mut case = Case::<bf16>::new(operation, 2, 5);
    case.expert_index.iter_mut().for_each(|index| index.fill(-1));
    case.expert_rows.iter_mut().for_each(Vec::clear);
    group(2, 128, PATIENT, |mut communicator| {
        let results = case.run(&mut communicator, Mode::TwoShot).unwrap();
        assert!(results.residual_out.iter().all(|value| value.to_bits() == 0));
        case.check(&results);
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
                let inputs = Inputs { input: Operand::InPlace, ..case.tensors(rank, Some(Operand::InPlace)) };
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
    let post_norm = Some(Norm { weight_bias: 1.0, ..Norm::default() });
    check::<bf16>(Operation { post_norm, ..operation::<bf16>(300, 2880) }, 3);
    // The norm takes the place of the shared expert's rows.
    let experts = Some(Experts { top_k: 4, scales: WeightType::F32, shared: true });
    check::<bf16>(Operation { experts, ..operation::<bf16>(300, 2880) }, 3);
    for wire in WireFormat::ALL.map(Some) {
        check::<bf16>(Operation { wire, post_norm, ..operation::<bf16>(3, 80) }, 2);
        check::<f16>(Operation { wire, ..operation::<f16>(300, 2880) }, 3);
    }

    // Without a norm in the elements there is no place for it.
    let operation = Operation { quantization: Quantization::Fp8Static, ..operation::<bf16>(3, 64) };
    let case = Case::<bf16>::new(operation, 2, 10);
    group(2, 128, PATIENT, |mut communicator| {
        let inputs = Inputs {
            input: Operand::InPlace,
            ..case.tensors(communicator.rank(), Some(Operand::Apart(&case.residual[..])))
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
    group(2, 64, PATIENT, |mut communicator| {
        communicator.barrier().unwrap();
        // Nothing puts what follows in order, and a sleep does not either. Without it both might write in the same instant, and
        // the sanitizer, which looks up the last access and then notes its own, might see neither.
        thread::sleep(Duration::from_millis(20) * communicator.rank());
        // SAFETY: none; only a sanitizer runs this.
        unsafe { *shared.0.get() += u64::from(communicator.rank()) };
    });
}
