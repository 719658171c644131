//! Operations on groups of threads, and checks of their results.

use std::{thread, time::Duration};

use fused_collective::{
    Error,
    cpu::{self, Communicator, ExpertRows, Inputs, Operand, Outputs, Plain},
    group::{Thread, threads},
};
use fused_collective_core::{
    fusion::{Experts, Mode, Norm, Operation, PartialSums, Residual, Rounding, WeightType},
    norm::Weights,
    plan::owner,
    quant::{GroupScale, Quantization, ScaleLayout},
    specification::{Observed, Row, Token},
    wire::WireFormat,
};
use proptest::{option, prelude::*};
use zerocopy::IntoBytes as _;

/// Runs `rank` on a thread for each rank of a group and returns what they return, in rank order.
pub(crate) fn group<R: Send>(
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

pub(crate) const PATIENT: Duration = Duration::from_secs(30);

/// One rank's results of one operation.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Results<E> {
    pub(crate) residual_out: Vec<E>,
    pub(crate) norm_out: Vec<E>,
    pub(crate) quant_out: Vec<u8>,
    pub(crate) scale_out: Vec<u8>,
}

/// The inputs of one operation on all ranks: pseudo-random, with zeros of both signs among them.
pub(crate) struct Case<E> {
    pub(crate) operation: Operation,
    pub(crate) inputs: Vec<Vec<E>>,
    pub(crate) residual: Vec<E>,
    pub(crate) bias: Vec<E>,
    pub(crate) gamma: Vec<E>,
    pub(crate) gamma_f32: Vec<f32>,
    /// The rows of each rank's experts.
    pub(crate) expert_rows: Vec<Vec<E>>,
    /// Their indices for all tokens and the most experts.
    pub(crate) expert_index: Vec<Vec<i32>>,
    pub(crate) expert_scales: Vec<E>,
    pub(crate) expert_scales_f32: Vec<f32>,
    pub(crate) scale: f32,
}

/// Rows of each rank's experts, and the most experts of a token.
const EXPERTS: usize = 5;

impl<E: Plain> Case<E> {
    pub(crate) fn new(operation: Operation, world_size: u32, seed: u64) -> Self {
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

    pub(crate) fn gamma(&self) -> Weights<'_, E> {
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
    pub(crate) fn tensors<'a>(&'a self, rank: u32, residual: Option<Operand<&'a [E]>>) -> Inputs<'a, E> {
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
    pub(crate) fn run(&self, communicator: &mut Communicator, mode: Mode) -> Result<Results<E>, Error> {
        self.run_operation(communicator, &Operation { mode, ..self.operation })
    }

    /// The rows of `tensor` that lie with a rank whose residual is as the operation says.
    pub(crate) fn residual_rows(&self, operation: &Operation, rank: u32, tensor: &[E]) -> Vec<E> {
        let (hidden, world_size) = (operation.hidden as usize, self.inputs.len() as u32);
        let is_held =
            |token: u64| operation.residual != Residual::Sharded || owner(token, world_size) == rank;
        let rows = (0..operation.tokens).zip(tensor.chunks(hidden)).filter(|(token, _)| is_held(*token));
        rows.flat_map(|(_, row)| row.to_vec()).collect()
    }

    /// Runs the operation, or one on the same inputs.
    pub(crate) fn run_operation(
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
                hosts: 1,
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
    pub(crate) fn check(&self, results: &Results<E>) {
        assert_eq!(self.operation.wire, None);
        self.check_mode(Mode::Auto, results);
    }
}

/// Both modes on every rank: right, the same bits on all ranks and in both modes, which a wire format tells apart.
pub(crate) fn check<E: Plain>(operation: Operation, world_size: u32, seed: u64) {
    check_case(Case::<E>::new(operation, world_size, seed));
}

pub(crate) fn check_case<E: Plain>(case: Case<E>) {
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
pub(crate) fn check_sharded<E: Plain>(operation: Operation, world_size: u32, seed: u64) {
    check_sharded_case(Case::<E>::new(operation, world_size, seed));
}

pub(crate) fn check_sharded_case<E: Plain>(case: Case<E>) {
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

pub(crate) fn operation<E: Plain>(tokens: u64, hidden: u64) -> Operation {
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
        partial_sums: PartialSums::F32,
        mode: Mode::Auto,
    }
}

pub(crate) fn quantizations() -> impl Strategy<Value = Quantization> {
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
pub(crate) fn before_residual() -> impl Strategy<Value = BeforeResidual> {
    let rounding = prop_oneof![Just(Rounding::Once), Just(Rounding::AfterAllReduce)];
    let experts = (1..=EXPERTS as u32, weight_types(), any::<bool>());
    let experts = experts.prop_map(|(top_k, scales, shared)| Experts { top_k, scales, shared });
    let wire = option::of(prop::sample::select(&WireFormat::ALL[..]));
    (rounding, option::weighted(0.3, norms()), option::weighted(0.3, experts), wire)
}

pub(crate) fn operations() -> impl Strategy<Value = Operation> {
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
