//! The CPU backend against the reference, ranks as threads that share memory as processes would.

use std::{
    cell::UnsafeCell,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use fused_collective::{
    Error, ErrorKind,
    cpu::{self, Communicator, ExpertRows, Inputs, Operand, Outputs, Plain},
    group::{Thread, threads},
};
use fused_collective_core::{
    dtype::{Element, bf16, f16},
    fusion::{Experts, Mode, Norm, Operation, Residual, Rounding, WeightType},
    norm::Weights,
    plan::{Limits, Plan, owner},
    quant::{GroupScale, Quantization, ScaleLayout},
    reference::Special,
    specification::{Observed, Row, Token},
    wire::WireFormat,
};
use proptest::{option, prelude::*};
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
    /// The rows of each rank's experts.
    expert_rows: Vec<Vec<E>>,
    /// Their indices for all tokens and the most experts.
    expert_index: Vec<Vec<i32>>,
    expert_scales: Vec<E>,
    expert_scales_f32: Vec<f32>,
    scale: f32,
}

/// Rows of each rank's experts, and the most experts of a token.
const EXPERTS: usize = 5;

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
        let expert_rows = (0..world_size).map(|_| tensor(EXPERTS * operation.hidden as usize)).collect();
        let chosen = operation.tokens as usize * EXPERTS;
        let expert_scales = tensor(chosen);
        // Of these, one in six is on another rank.
        let index = |seed: usize| (seed * seed % 37 % (EXPERTS + 1)) as i32 - 1;
        let indices = |rank: usize| (0..chosen).map(|place| index(place * 7 + rank)).collect();
        Case {
            operation,
            inputs,
            residual,
            bias,
            gamma,
            gamma_f32,
            expert_rows,
            expert_index: (0..world_size as usize).map(indices).collect(),
            expert_scales_f32: expert_scales.iter().map(|scale| scale.to_f32() / 3.0).collect(),
            expert_scales,
            scale: 0.37,
        }
    }

    fn weights(&self, of: WeightType) -> Weights<'_, E> {
        match of {
            WeightType::F32 => Weights::F32(&self.gamma_f32),
            WeightType::Element => Weights::Element(&self.gamma),
        }
    }

    fn gamma(&self) -> Weights<'_, E> {
        self.weights(self.operation.norm.map_or(WeightType::Element, |norm| norm.gamma))
    }

    /// The weight of the post-norm: that of the norm, maybe in another type.
    fn post_gamma(&self) -> Option<Weights<'_, E>> {
        self.operation.post_norm.map(|norm| self.weights(norm.gamma))
    }

    fn experts(&self, rank: usize) -> Option<ExpertRows<'_, E>> {
        let Experts { top_k, scales, .. } = self.operation.experts?;
        let chosen = 0..self.operation.tokens as usize * top_k as usize;
        let scales = match scales {
            WeightType::Element => Weights::Element(&self.expert_scales[..]),
            WeightType::F32 => Weights::F32(&self.expert_scales_f32[..]),
        };
        Some(ExpertRows {
            rows: &self.expert_rows[rank],
            index: &self.expert_index[rank][chosen.clone()],
            scales: scales.range(chosen),
        })
    }

    /// The tensors that rank `rank` reads, with this residual.
    fn tensors<'a>(&'a self, rank: u32, residual: Option<Operand<&'a [E]>>) -> Inputs<'a, E> {
        let input = &self.inputs[rank as usize][..];
        Inputs {
            input: Operand::Apart(if self.operation.reads_input() { input } else { &[] }),
            residual,
            bias: self.operation.bias.then_some(&self.bias[..]),
            post_gamma: self.post_gamma(),
            experts: self.experts(rank as usize),
            gamma: self.gamma(),
            scale: self.scale,
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
        let residual = operation.residual.is_some().then_some(Operand::Apart(&residual[..]));
        let inputs = self.tensors(communicator.rank(), residual);
        let outputs = Outputs {
            residual_out: &mut results.residual_out,
            norm_out: &mut results.norm_out,
            quant_out: &mut results.quant_out,
            scale_out: &mut results.scale_out,
        };
        communicator.all_reduce(operation, inputs, outputs)?;
        Ok(results)
    }

    /// Holds results of `mode` to the specification.
    fn check_mode(&self, mode: Mode, results: &Results<E>) {
        let operation = Operation { mode, ..self.operation };
        let hidden = self.operation.hidden as usize;
        let row_bytes = self.operation.quantization.value_bytes_per_row(self.operation.hidden) as usize;
        for index in 0..self.operation.tokens {
            let row = index as usize * hidden..(index as usize + 1) * hidden;
            let rows: Vec<&[E]> = self.inputs.iter().map(|input| &input[row.clone()]).collect();
            let experts = self.operation.experts.map(|experts| {
                let of_rank = |rank| self.experts(rank).unwrap().of_token(index as usize, &experts);
                (0..self.inputs.len()).map(of_rank).collect::<Vec<_>>()
            });
            let token = Token {
                inputs: &rows,
                residual: self.operation.residual.is_some().then_some(&self.residual[row.clone()]),
                bias: self.operation.bias.then_some(&self.bias[..]),
                post_gamma: self.post_gamma(),
                experts: experts.as_deref(),
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
            row.compute(&operation, &token).unwrap();
            row.compare(&operation, index, &observed).unwrap();
        }
    }

    /// As [`check_mode`](Self::check_mode), where the mode shows in no bit.
    fn check(&self, results: &Results<E>) {
        assert_eq!(self.operation.wire, None);
        self.check_mode(Mode::Auto, results);
    }
}

/// Both modes on every rank: right, the same bits on all ranks and in both modes, which a wire format tells apart.
fn check<E: Plain>(operation: Operation, world_size: u32, seed: u64) {
    check_case(Case::<E>::new(operation, world_size, seed));
}

fn check_case<E: Plain>(case: Case<E>) {
    let (operation, world_size) = (case.operation, case.inputs.len() as u32);
    let results = group(world_size, operation.row_bytes(), PATIENT, |mut communicator| {
        [Mode::OneShot, Mode::TwoShot, Mode::Auto].map(|mode| case.run(&mut communicator, mode).unwrap())
    });
    let [one_shot, two_shot, automatic] = &results[0];
    case.check_mode(Mode::OneShot, one_shot);
    case.check_mode(Mode::TwoShot, two_shot);
    let same = bytes_equal(one_shot, two_shot);
    assert!(same || operation.wire.is_some(), "two-shot differs from one-shot");
    assert!([one_shot, two_shot].iter().any(|result| bytes_equal(result, automatic)));
    for (rank, modes) in results.iter().enumerate() {
        for (mode, (result, first)) in modes.iter().zip(&results[0]).enumerate() {
            assert!(bytes_equal(result, first), "rank {rank}, mode {mode} differs from rank 0");
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
        let two_shot = case.run(&mut communicator, Mode::TwoShot).unwrap();
        assert!(bytes_equal(&two_shot, &replicated) || operation.wire.is_some());
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
    // Its second hop carries results, and no sum, as in one-shot.
    let whole = Results { residual_out: results[0].0.residual_out.clone(), ..results[0].1.clone() };
    case.check_mode(Mode::OneShot, &whole);
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
        wire: None,
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

fn weight_types() -> impl Strategy<Value = WeightType> {
    prop_oneof![Just(WeightType::Element), Just(WeightType::F32)]
}

fn norms() -> impl Strategy<Value = Norm> {
    (any::<bool>(), weight_types()).prop_map(|(gemma, gamma)| Norm {
        weight_bias: if gemma { 1.0 } else { 0.0 },
        gamma,
        ..Norm::default()
    })
}

type BeforeResidual = (Rounding, Option<Norm>, Option<Experts>, Option<WireFormat>);

/// Roundings, post-norms, experts and wire formats.
fn before_residual() -> impl Strategy<Value = BeforeResidual> {
    let rounding = prop_oneof![Just(Rounding::Once), Just(Rounding::AfterAllReduce)];
    let experts = (1..=EXPERTS as u32, weight_types(), any::<bool>());
    let experts = experts.prop_map(|(top_k, scales, shared)| Experts { top_k, scales, shared });
    let wire = option::of(prop::sample::select(&WireFormat::ALL[..]));
    (rounding, option::weighted(0.3, norms()), option::weighted(0.3, experts), wire)
}

fn operations() -> impl Strategy<Value = Operation> {
    let shape = (0u64..12, 1u64..20, any::<bool>(), any::<bool>());
    let norm = option::weighted(0.9, norms());
    (shape, norm, before_residual(), quantizations(), any::<bool>()).prop_map(
        |(
            (tokens, blocks, residual, bias),
            norm,
            (rounding, post_norm, experts, wire),
            quantization,
            keep_norm,
        )| {
            let quantization = if norm.is_some() { quantization } else { Quantization::None };
            Operation {
                residual: Residual::replicated(residual),
                bias,
                norm,
                post_norm: post_norm.filter(|_| norm.is_some()),
                experts,
                wire,
                rounding,
                quantization,
                keep_norm,
                ..operation::<f32>(tokens, blocks * quantization.block().unwrap_or(16))
            }
        },
    )
}

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

#[test]
fn a_whole_residual_is_refused_where_a_share_is_due() {
    let case = Case::<bf16>::new(operation::<bf16>(5, 64), 2, 6);
    let sharded = Operation { residual: Residual::Sharded, ..case.operation };
    group(2, 128, PATIENT, |mut communicator| {
        let inputs = case.tensors(0, Some(Operand::Apart(&case.residual[..])));
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
        let inputs =
            Inputs { gamma: wrong.gamma(), ..case.tensors(0, Some(Operand::Apart(&case.residual[..]))) };
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
        let inputs = case.tensors(0, Some(Operand::Apart(&case.residual[..])));
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
fn a_row_that_no_expert_has_is_refused_by_name_before_anything_is_sent() {
    let experts = Experts { top_k: 3, scales: WeightType::Element, shared: false };
    let case = Case::<bf16>::new(Operation { experts: Some(experts), ..operation::<bf16>(4, 64) }, 2, 5);
    let index = |place: usize, row: i32| {
        let mut index = case.expert_index[0][..12].to_vec();
        index[place] = row;
        index
    };
    let (past, first) = (index(7, 5), index(0, 0));
    group(2, 128, PATIENT, |mut communicator| {
        let mut refused = |inputs: Inputs<'_, bf16>| {
            let (mut out, mut norm_out) = (vec![bf16::ZERO; 4 * 64], vec![bf16::ZERO; 4 * 64]);
            let outputs = Outputs {
                residual_out: &mut out,
                norm_out: &mut norm_out,
                quant_out: &mut [],
                scale_out: &mut [],
            };
            communicator.all_reduce(&case.operation, inputs, outputs).unwrap_err().to_string()
        };
        let whole = case.tensors(0, Some(Operand::Apart(&case.residual[..])));
        let rows = whole.experts.unwrap();
        let with = |experts| Inputs { experts: Some(experts), ..whole };
        assert_eq!(
            refused(with(ExpertRows { index: &past, ..rows })),
            "expert_index has row 5 for token 2: use 0 to 4, or -1 for an expert on another rank"
        );
        assert_eq!(
            refused(with(ExpertRows { rows: &[], index: &first, ..rows })),
            "expert_index has row 0 for token 0: use -1, as there are no rows"
        );
        assert_eq!(
            refused(with(ExpertRows { rows: &rows.rows[1..], ..rows })),
            "expert_rows has length 319, which is not a multiple of the hidden size 64"
        );
        assert_eq!(
            refused(with(ExpertRows { index: &rows.index[1..], ..rows })),
            "expert_index has length 11, the operation needs 12"
        );
        assert_eq!(
            refused(with(ExpertRows { scales: Weights::F32(&case.expert_scales_f32[..12]), ..rows })),
            "expert_scales holds float32 beside the element type, the operation needs bfloat16"
        );
        let input = Operand::Apart(&case.inputs[0][..]);
        assert_eq!(refused(Inputs { input, ..whole }), "input has length 256, the operation needs 0");
        assert_eq!(
            refused(Inputs { input: Operand::InPlace, ..whole }),
            "input is given, and the operation has none"
        );
        assert_eq!(
            refused(Inputs { experts: None, ..whole }),
            "expert_rows is missing: the operation has one"
        );
        // Nothing was sent: the next operation is right.
        case.check(&case.run(&mut communicator, Mode::OneShot).unwrap());
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
        check::<f16>(Operation { wire, ..operation::<f16>(600, 2880) }, 3);
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
