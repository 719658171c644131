//! NaN, infinities, subnormal numbers, zeros and the largest numbers on the CPU backend. They have the same results as in
//! separate operations, and stay in their rows.

use std::{thread, time::Duration};

use bytemuck::Pod;
use fused_collective::{
    cpu::{Communicator, Options},
    group::{Bootstrap as _, Thread, threads},
};
use fused_collective_cli::{
    backend::{
        collective::Collective,
        cpu::Engine,
        problem::{Problem, Tensor},
        steps::Step,
    },
    pattern::Pattern,
};
use fused_collective_core::{
    dtype::{DType, Element, bf16, f16},
    fusion::{Mode, Norm, PartialSums},
    norm::Weights,
    quant::{Quantization, ScaleLayout},
    reference::Special,
    specification::{Observed, Row, Token},
};

const RANKS: u32 = 3;
/// Every special kind between ordinary rows.
const TOKENS: u64 = 2 * Special::ALL.len() as u64;
const HIDDEN: usize = 96;

const QUANTIZATIONS: [Quantization; 3] =
    [Quantization::None, Quantization::Fp8Static, Quantization::NvFp4 { layout: ScaleLayout::Linear }];

/// The outputs of one run: `residual_out`, `quant_out`, `scale_out`, and `norm_out` unless it is quantized.
type Outputs = [Vec<u8>; 4];

/// The kind of a row. If `special`, every other row has special numbers.
fn kind(token: u64, special: bool) -> Special {
    if special { Special::of_token(token) } else { Special::Ordinary }
}

fn row<E: Element>(rank: u32, token: u64, special: bool) -> Vec<E> {
    let mut row = vec![E::from_f32(0.0); HIDDEN];
    kind(token, special).fill(rank, token, &mut row);
    row
}

fn gamma<E: Element>() -> Vec<E> {
    (0..HIDDEN).map(|index| E::from_f32(0.5 + (index % 5) as f32 / 4.0)).collect()
}

fn bytes<E: Pod>(rows: impl IntoIterator<Item = Vec<E>>) -> Vec<u8> {
    rows.into_iter().flat_map(|row| bytemuck::cast_slice(&row).to_vec()).collect()
}

/// The rank whose rows are the residual. It is not in the group.
const RESIDUAL: u32 = RANKS;

fn residual<E: Element>(token: u64) -> Vec<E> {
    row(RESIDUAL, token, false)
}

/// Runs each sequence of steps on every rank, with outputs poisoned before. Returns each sequence's outputs for each rank.
fn run<E: Element + Pod>(problem: &Problem, special: bool, sequences: &[Vec<Step>]) -> Vec<Vec<Outputs>> {
    let max_row_bytes = problem.row_bytes();
    let deadline = Duration::from_secs(30);
    let rank = |bootstrap: Thread| {
        let rank = bootstrap.rank();
        let communicator = Communicator::join(&bootstrap, Options { max_row_bytes, deadline }).unwrap();
        let mut engine = Engine::new(communicator);
        engine.prepare(problem).unwrap();
        let mut write = |tensor, bytes: Vec<u8>| engine.write(tensor, 0, &bytes).unwrap();
        write(Tensor::Input, bytes((0..TOKENS).map(|token| row::<E>(rank, token, special))));
        write(Tensor::Gamma, bytes([gamma::<E>()]));
        // A residual that the problem does not have is full of NaN.
        write(Tensor::Residual, vec![0xff; problem.activation_bytes() as usize]);
        if problem.residual {
            write(Tensor::Residual, bytes((0..TOKENS).map(residual::<E>)));
        }
        let mut outputs = |steps: &Vec<Step>| {
            for tensor in Tensor::OUTPUTS {
                let length = problem.bytes(tensor).unwrap() as usize;
                engine.write(tensor, 0, &vec![0xff; length]).unwrap();
            }
            engine.run(steps).unwrap();
            let norm = (problem.quantization == Quantization::None).then_some(Tensor::NormOut);
            let [residual, quant, scale] = [Tensor::ResidualOut, Tensor::QuantOut, Tensor::ScaleOut]
                .map(|tensor| engine.read(tensor).unwrap());
            [residual, quant, scale, norm.map(|norm| engine.read(norm).unwrap()).unwrap_or_default()]
        };
        sequences.iter().map(&mut outputs).collect()
    };
    thread::scope(|scope| {
        let rank = &rank;
        let ranks: Vec<_> = threads(RANKS, deadline)
            .into_iter()
            .map(|bootstrap| scope.spawn(move || rank(bootstrap)))
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn problem(dtype: DType, residual: bool, quantization: Quantization) -> Problem {
    let scale = if quantization == Quantization::Fp8Static { 0.03 } else { 200.0 };
    Problem {
        dtype,
        tokens: TOKENS,
        hidden: HIDDEN as u64,
        residual,
        sharded: false,
        norm: Norm::default(),
        pattern: Pattern::AllReduceNorm,
        quantization,
        scale,
        partial_sums: PartialSums::F32,
    }
}

/// Calls `each` for every fusion.
fn for_every_problem(dtype: DType, each: impl Fn(&Problem)) {
    for quantization in QUANTIZATIONS {
        for residual in [true, false] {
            each(&problem(dtype, residual, quantization));
        }
    }
}

const MODES: [Mode; 2] = [Mode::OneShot, Mode::TwoShot];

fn fused_is_separate<E: Element + Pod>() {
    for_every_problem(E::DTYPE, |problem| {
        let fused = MODES.map(|mode| vec![Step::fused(mode)]);
        let separate = MODES.map(|mode| {
            let quantize = (problem.quantization != Quantization::None).then_some(Step::Quantize);
            [Step::AllReduce(mode), Step::AddRmsNorm].into_iter().chain(quantize).collect()
        });
        let ranks = run::<E>(problem, true, &[fused, separate].concat());
        for (rank, outputs) in ranks.iter().enumerate() {
            for (sequence, outputs) in outputs.iter().enumerate() {
                // One-shot, two-shot, fused, separate, on every rank: all the same bits.
                assert!(outputs == &ranks[0][0], "rank {rank}, sequence {sequence}, {problem:?}");
            }
        }
        check::<E>(problem, &ranks[0][0]);
    });
}

fn check<E: Element + Pod>(problem: &Problem, [residual_out, values, scales, norm]: &Outputs) {
    let elements = |bytes: &Vec<u8>| bytemuck::allocation::pod_collect_to_vec::<u8, E>(bytes);
    let (residual_out, norm) = (elements(residual_out), elements(norm));
    let gamma = gamma::<E>();
    let row_values = problem.quantization.value_bytes_per_row(problem.hidden) as usize;
    for token in 0..TOKENS {
        let inputs: Vec<Vec<E>> = (0..RANKS).map(|rank| row(rank, token, true)).collect();
        let inputs: Vec<&[E]> = inputs.iter().map(Vec::as_slice).collect();
        let residual = residual(token);
        let first = token as usize * HIDDEN;
        let token = Token {
            inputs: &inputs,
            hosts: 1,
            residual: problem.residual.then_some(&residual),
            bias: None,
            post_gamma: None,
            experts: None,
            gamma: Weights::Element(&gamma),
            scale: problem.scale,
            index: token,
        };
        let observed = Observed {
            residual_out: &residual_out[first..first + HIDDEN],
            norm_out: norm.get(first..first + HIDDEN).unwrap_or_default(),
            values: &values[token.index as usize * row_values..][..row_values],
            scales,
        };
        let operation = problem.operation(Mode::Auto);
        let mut specified = Row {
            residual_out: &mut [E::default(); HIDDEN],
            norm: &mut [E::default(); HIDDEN],
            values: &mut vec![0; row_values],
            scales: &mut vec![0; Row::<E>::scale_bytes(&operation) as usize],
        };
        specified.compute(&operation, &token).unwrap();
        specified
            .compare(&operation, token.index, &observed)
            .unwrap_or_else(|wrong| panic!("{:?}: {wrong} ({problem:?})", Special::of_token(token.index)));
    }
}

#[test]
fn special_numbers_come_through_as_in_separate_operations() {
    fused_is_separate::<f32>();
    fused_is_separate::<f16>();
    fused_is_separate::<bf16>();
}

fn other_rows_are_the_same<E: Element + Pod>() {
    for_every_problem(E::DTYPE, |problem| {
        let sequences = MODES.map(|mode| vec![Step::fused(mode)]);
        let [special, ordinary] =
            [true, false].map(|special| run::<E>(problem, special, &sequences).swap_remove(0));
        for (special, ordinary) in special.iter().zip(&ordinary) {
            for (special, ordinary) in special.iter().zip(ordinary) {
                // Every output has its rows one after the other.
                let row_bytes = special.len() / TOKENS as usize;
                for token in (0..TOKENS as usize).filter(|token| token % 2 == 0) {
                    let range = token * row_bytes..(token + 1) * row_bytes;
                    assert!(special[range.clone()] == ordinary[range], "token {token}, {problem:?}");
                }
            }
        }
        assert!(special != ordinary, "the special rows made no difference ({problem:?})");
    });
}

#[test]
fn special_numbers_stay_in_their_rows() {
    other_rows_are_the_same::<f32>();
    other_rows_are_the_same::<f16>();
    other_rows_are_the_same::<bf16>();
}
