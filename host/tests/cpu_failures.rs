//! What ends a group on the CPU backend ends it on every rank, at once or at the deadline, with an error that names who
//! waited for whom; and after it a new group in the same processes is right. Ranks are threads here.

use std::{
    thread,
    time::{Duration, Instant},
};

use fused_collective::{
    Error,
    cpu::{self, Communicator, Inputs, Operand, Outputs, Plain},
    group::failure::{Cause, Disagreement, Failure, Fault, GaveUp, What},
    group::{Aborter, Thread, threads},
};
use fused_collective_core::{
    dtype::{DType, bf16, f16},
    fusion::{Mode, Norm, Operation, PartialSums, Residual, Rounding, WeightType},
    norm::Weights,
    quant::{Quantization, ScaleLayout},
};

const PATIENT: Duration = Duration::from_secs(60);
/// Far less than a deadline that is not meant to pass, and enough for a busy machine.
const AT_ONCE: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(300);

/// Runs `rank` on a thread for each rank of a new group; what they return, in rank order.
fn group<R: Send>(world_size: u32, deadline: Duration, rank: impl Fn(Communicator) -> R + Sync) -> Vec<R> {
    let max_row_bytes = 4096;
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

fn operation() -> Operation {
    Operation {
        dtype: DType::Bf16,
        tokens: 8,
        hidden: 128,
        residual: Residual::Replicated,
        norm: Some(Norm::default()),
        quantization: Quantization::Fp8Static,
        keep_norm: false,
        rounding: Rounding::Once,
        bias: false,
        post_norm: None,
        experts: None,
        wire: None,
        partial_sums: PartialSums::F32,
        mode: Mode::OneShot,
    }
}

/// Runs `operation` on inputs of ones; the sum's first element.
fn run(communicator: &mut Communicator, operation: &Operation, scale: f32) -> Result<f32, Error> {
    match operation.dtype {
        DType::F32 => run_typed::<f32>(communicator, operation, scale),
        DType::F16 => run_typed::<f16>(communicator, operation, scale),
        DType::Bf16 => run_typed::<bf16>(communicator, operation, scale),
    }
}

fn run_typed<E: Plain>(
    communicator: &mut Communicator,
    operation: &Operation,
    scale: f32,
) -> Result<f32, Error> {
    let Operation { tokens, hidden, quantization, .. } = *operation;
    let elements = (tokens * hidden) as usize;
    let ones = vec![E::from_f32(1.0); elements.max(hidden as usize)];
    let wide = vec![1.0; hidden as usize];
    let mut residual_out = vec![E::default(); elements];
    let mut norm_out = vec![E::default(); if operation.writes_norm() { elements } else { 0 }];
    let mut quant_out = vec![0; (tokens * quantization.value_bytes_per_row(hidden)) as usize];
    let mut scale_out = vec![0; quantization.scale_bytes(tokens, hidden).unwrap() as usize];
    let inputs = Inputs {
        input: Operand::Apart(&ones[..elements]),
        residual: operation.residual.is_some().then_some(Operand::Apart(&ones[..elements])),
        bias: operation.bias.then_some(&ones[..hidden as usize]),
        post_gamma: None,
        experts: None,
        gamma: match operation.norm {
            Some(Norm { gamma: WeightType::F32, .. }) => Weights::F32(&wide),
            _ => Weights::Element(&ones[..hidden as usize]),
        },
        scale,
    };
    let outputs = Outputs {
        residual_out: &mut residual_out,
        norm_out: &mut norm_out,
        quant_out: &mut quant_out,
        scale_out: &mut scale_out,
    };
    communicator.all_reduce(operation, inputs, outputs)?;
    Ok(residual_out.first().map_or(0.0, |sum| sum.to_f32()))
}

/// A new group of three is right.
fn assert_right() {
    let expected = [4.0; 3];
    for mode in [Mode::OneShot, Mode::TwoShot] {
        let sums = group(3, PATIENT, |mut communicator| {
            run(&mut communicator, &Operation { mode, ..operation() }, 0.5).unwrap()
        });
        assert_eq!(sums, expected);
    }
}

fn failure(result: Result<f32, Error>) -> Failure {
    match result {
        Err(Error::Failed(failure)) => *failure,
        other => panic!("a failure, not {other:?}"),
    }
}

#[test]
fn a_rank_that_does_not_come_is_named_with_what_was_awaited_and_the_communicator_is_poisoned() {
    for mode in [Mode::OneShot, Mode::TwoShot] {
        let operation = Operation { mode, ..operation() };
        let outcomes = group(3, SHORT, |mut communicator| {
            (communicator.rank() != 1).then(|| {
                let first = run(&mut communicator, &operation, 0.5);
                let began = Instant::now();
                let again = [run(&mut communicator, &operation, 0.5), communicator.barrier().map(|()| 0.0)];
                (first, again, began.elapsed())
            })
        });
        let (mut deadlines, mut told) = (0, 0);
        for (rank, outcome) in outcomes.into_iter().enumerate().filter(|(rank, _)| *rank != 1) {
            let (first, again, time) = outcome.unwrap();
            let text = first.as_ref().unwrap_err().to_string();
            let first = failure(first);
            assert_eq!(first.rank, rank as u32);
            let wait = first.wait.unwrap();
            assert_eq!((wait.operation, wait.call.is_some()), (0, true));
            match &first.cause {
                Cause::Deadline(SHORT) => {
                    // In two-shot a token's owner may be what is missed, which itself misses rank 1.
                    assert!(mode == Mode::TwoShot || wait.from == 1, "{text}");
                    assert!(text.starts_with(&format!("waited 0.3 s for rank {}'s ", wait.from)), "{text}");
                    deadlines += 1;
                }
                Cause::GaveUp(GaveUp { fault: Fault::Late, .. }) => told += 1,
                other => panic!("{other:?}"),
            }
            assert!(matches!(wait.what, What::Input(0..8) | What::Sum(0..8)), "{text}");
            let shape = "8 tokens of 128 bfloat16, residual, norm (epsilon 1e-6), fp8, scale 5e-1)";
            assert!(text.contains(shape) && text.contains("in operation 0 ("), "{text}");
            for again in again {
                assert!(matches!(&again, Err(Error::Poisoned(same)) if **same == first), "{again:?}");
            }
            assert!(time < SHORT, "a poisoned communicator waited {time:?}");
        }
        assert!(deadlines >= 1 && deadlines + told == 2);
        assert_right();
    }
}

#[test]
fn an_abort_from_another_thread_ends_the_wait_on_every_rank_at_once() {
    for (mode, aborts) in [(Mode::OneShot, 0), (Mode::TwoShot, 2)] {
        let operation = Operation { mode, ..operation() };
        let began = Instant::now();
        let failures = group(3, PATIENT, |mut communicator| {
            let aborter = communicator.aborter();
            thread::scope(|scope| {
                if communicator.rank() == aborts {
                    scope.spawn(move || {
                        thread::sleep(Duration::from_millis(50));
                        aborter.abort();
                    });
                }
                // Rank 1 never comes: without the abort the others would wait for a minute.
                let failed =
                    (communicator.rank() != 1).then(|| failure(run(&mut communicator, &operation, 0.5)));
                let again = failed.is_some().then(|| communicator.barrier().unwrap_err());
                assert!(again.is_none_or(|again| matches!(again, Error::Poisoned(_))));
                failed
            })
        });
        assert!(began.elapsed() < AT_ONCE, "{:?}", began.elapsed());
        for (rank, failure) in (0..).zip(failures).filter(|(rank, _)| *rank != 1) {
            let failure = failure.unwrap();
            let told = GaveUp { rank: aborts, fault: Fault::Aborted, because_of: aborts };
            let expected = if rank == aborts { Cause::Aborted } else { Cause::GaveUp(told) };
            assert_eq!(failure.cause, expected, "rank {rank}");
            assert!(failure.wait.is_some(), "it was waiting");
        }
        assert_right();
    }
}

#[test]
fn an_abort_while_nothing_runs_fails_the_next_call() {
    let outcomes = group(2, PATIENT, |mut communicator| {
        run(&mut communicator, &operation(), 0.5).unwrap();
        let rank = communicator.rank();
        if rank == 0 {
            communicator.aborter().abort();
        }
        failure(run(&mut communicator, &operation(), 0.5)).cause
    });
    assert_eq!(outcomes[0], Cause::Aborted);
    assert_eq!(outcomes[1], Cause::GaveUp(GaveUp { rank: 0, fault: Fault::Aborted, because_of: 0 }));
    assert_right();
}

#[test]
fn an_aborter_may_outlive_its_communicator() {
    let aborters = group(2, PATIENT, |communicator| communicator.aborter());
    aborters.iter().for_each(Aborter::abort);
}

/// What a rank that is out of step calls, in place of the others' operation.
type Other = (&'static str, Operation, f32);

/// Every way in which an operation can differ on one rank.
fn other_operations() -> Vec<Other> {
    let usual = operation();
    let norm = Norm::default();
    let with_norm = |norm| Operation { norm: Some(norm), ..usual };
    let nvfp4 = |layout| Operation { quantization: Quantization::NvFp4 { layout }, ..usual };
    vec![
        ("more tokens", Operation { tokens: 9, ..usual }, 0.5),
        ("no tokens", Operation { tokens: 0, ..usual }, 0.5),
        ("as many elements in another shape", Operation { tokens: 4, hidden: 256, ..usual }, 0.5),
        ("another element type of the same size", Operation { dtype: DType::F16, ..usual }, 0.5),
        ("another element type", Operation { dtype: DType::F32, ..usual }, 0.5),
        ("no residual", Operation { residual: Residual::None, ..usual }, 0.5),
        ("no norm", Operation { norm: None, quantization: Quantization::None, ..usual }, 0.5),
        ("another epsilon", with_norm(Norm { epsilon: 1e-5, ..norm }), 0.5),
        ("another weight bias", with_norm(Norm { weight_bias: 1.0, ..norm }), 0.5),
        ("another type of gamma", with_norm(Norm { gamma: WeightType::F32, ..norm }), 0.5),
        ("no quantization", Operation { quantization: Quantization::None, ..usual }, 0.5),
        ("another quantization", nvfp4(ScaleLayout::Linear), 0.5),
        ("another scale", usual, 0.25),
        ("the norm kept", Operation { keep_norm: true, ..usual }, 0.5),
        ("another mode", Operation { mode: Mode::TwoShot, ..usual }, 0.5),
    ]
}

/// Every rank's call failed because the calls differ, at once, and names it.
#[track_caller]
fn assert_out_of_step(name: &str, results: Vec<Result<f32, Error>>, began: Instant) {
    assert!(began.elapsed() < AT_ONCE, "{name}: {:?}", began.elapsed());
    for (rank, result) in results.into_iter().enumerate() {
        match failure(result).cause {
            Cause::OutOfStep(Disagreement { rank: other, .. }) => {
                assert!(rank == 1 || other == 1, "{name}: rank {rank} blames rank {other}");
            }
            Cause::GaveUp(GaveUp { fault: Fault::OutOfStep, .. }) => {}
            other => panic!("{name}: rank {rank}: {other:?}"),
        }
    }
}

#[test]
fn whatever_one_rank_calls_differently_is_an_error_on_every_rank_and_never_a_result() {
    for mode in [Mode::OneShot, Mode::TwoShot] {
        for (name, other, scale) in other_operations() {
            let usual = Operation { mode, ..operation() };
            let swap = |mode| if mode == Mode::OneShot { Mode::TwoShot } else { Mode::OneShot };
            let other = Operation { mode: if name == "another mode" { swap(mode) } else { mode }, ..other };
            let began = Instant::now();
            let results = group(3, PATIENT, |mut communicator| {
                // One that agrees goes ahead.
                run(&mut communicator, &usual, 0.5).unwrap();
                if communicator.rank() != 1 {
                    return run(&mut communicator, &usual, 0.5);
                }
                // Without tokens nobody waits, so the rank itself learns of it at its next call.
                match run(&mut communicator, &other, scale) {
                    Ok(_) if other.tokens == 0 => run(&mut communicator, &usual, 0.5),
                    result => result,
                }
            });
            assert_out_of_step(name, results, began);
        }
    }
    assert_right();
}

#[test]
fn ranks_that_make_the_same_calls_in_another_order_all_learn_of_it() {
    let began = Instant::now();
    let results = group(3, PATIENT, |mut communicator| {
        if communicator.rank() == 1 {
            communicator.barrier().map(|()| 0.0).and_then(|_| run(&mut communicator, &operation(), 0.5))
        } else {
            run(&mut communicator, &operation(), 0.5).and_then(|_| communicator.barrier()).map(|()| 0.0)
        }
    });
    assert_out_of_step("another order", results, began);
}

#[test]
fn a_scale_that_nothing_reads_may_differ() {
    let operation = Operation { quantization: Quantization::None, ..operation() };
    let sums = group(2, PATIENT, |mut communicator| {
        let scale = communicator.rank() as f32;
        run(&mut communicator, &operation, scale).unwrap()
    });
    assert_eq!(sums, [3.0; 2]);
}

#[test]
fn ranks_that_use_different_layouts_do_not_join() {
    let join = |bootstrap: &Thread, max_row_bytes| {
        Communicator::join(bootstrap, cpu::Options { max_row_bytes, deadline: SHORT })
    };
    let mut ranks = threads(2, PATIENT).into_iter();
    let (first, second) = (ranks.next().unwrap(), ranks.next().unwrap());
    thread::scope(|scope| {
        let first = scope.spawn(|| join(&first, 4096).map(drop));
        let error = join(&second, 1 << 20).unwrap_err();
        assert!(
            error.to_string().starts_with("could not share memory between the ranks: the shared memory has "),
            "{error}"
        );
        let error = first.join().unwrap().unwrap_err();
        assert_eq!(
            error.to_string(),
            "waited 0.3 s for rank 1 to join: it is stuck, or slower than the deadline"
        );
    });
}
