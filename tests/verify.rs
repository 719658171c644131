//! `fused-collective verify` runs its matrix on real rank processes and says how every part of it went; and what it
//! checks beyond the benchmark's verification is found when it is wrong.
//!
//! The program has no switch that makes a backend wrong, so the tests of that run the matrix on a backend that is: the
//! CPU's, with something changed after the fused two-shot operation.

use std::{
    os::fd::AsFd,
    process::{Command, id},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use fused_collective::{
    collective::{Collective, Error, Problem, Step, Tensor},
    cpu::{self, Communicator, Engine, Watch},
    rendezvous::{Group, Membership},
    report::progress::Progress,
    verify::{self, Settings, Tally},
};
use fused_collective_core::{dtype::DType, fusion::Mode};
use fused_collective_tests::{command, run};

/// `verify` on the CPU backend with `options`, which spaces separate.
fn verify(options: &str) -> Command {
    let mut command = command(&["verify", "--backend", "cpu", "--deadline", "60"]);
    command.args(options.split(' '));
    command
}

/// Runs the program, which must find everything right, and returns the lines between the first and the last.
#[track_caller]
fn verified(options: &str, ranks: u32, cases: u64) -> Vec<String> {
    let outcome = run(&mut verify(options));
    outcome.assert_success();
    let mut lines: Vec<String> = outcome.stdout.lines().map(str::to_owned).collect();
    assert_eq!(lines.remove(0), format!("cpu backend, {ranks} ranks, {cases} cases, seed 0"));
    assert_eq!(lines.pop(), Some(format!("{cases} cases verified, 0 FAILED")), "{outcome}");
    lines
}

#[test]
fn the_matrix_is_told_of_by_element_type_quantization_and_hidden_size() {
    let lines = verified("--num-tokens 0 1 5 --hidden-dim 48,64 --nproc-per-node 2", 2, 216);
    let mut expected = Vec::new();
    for dtype in ["float32", "float16", "bfloat16"] {
        for quant_mode in ["none", "fp8", "fp4"] {
            for hidden in [48, 64] {
                expected.push(format!(
                    "{dtype:<8}  {quant_mode:<4}  hidden {hidden:>5}   12 cases, largest error "
                ));
            }
        }
    }
    assert_eq!(lines.len(), expected.len());
    for (line, expected) in lines.iter().zip(expected) {
        let error = line.strip_prefix(&expected).and_then(|rest| rest.strip_suffix(" ulp"));
        let error: f64 = error.and_then(|error| error.parse().ok()).unwrap_or_else(|| panic!("{line}"));
        // Random inputs round; in 16-bit types once, where cancellation cannot magnify it.
        assert!(error > 0.0 && (error < 1.0 || line.starts_with("float32")), "{line}");
    }
}

#[test]
fn lists_replace_those_of_quick_and_three_ranks_are_right() {
    let lines = verified("--quick --num-tokens 2 7 --hidden-dim 80 --nproc-per-node 3", 3, 72);
    assert_eq!(lines.len(), 9);
}

#[test]
fn an_operation_without_tokens_is_right() {
    for line in verified("--num-tokens 0 --hidden-dim 16", 2, 36) {
        assert!(line.ends_with("  4 cases, largest error 0.00 ulp"), "{line}");
    }
}

#[test]
fn bad_options_are_refused_in_one_line() {
    let refused = [
        ("--num-tokens -1", "--num-tokens: '-1' is not a number of tokens: use whole numbers from 0"),
        (
            "--hidden-dim 48 100",
            "--hidden-dim: hidden size 100 is not valid: use a multiple of 16 from 16 to 65536",
        ),
        (
            "--num-tokens 2000000000 --hidden-dim 65536",
            "--num-tokens: 2000000000 tokens of hidden size 65536 on 2 ranks need",
        ),
    ];
    for (options, line) in refused {
        let outcome = run(&mut verify(options));
        assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(2), ""), "{outcome}");
        let start = format!("fused-collective: {line}");
        assert!(outcome.stderr.starts_with(&start) && outcome.stderr.lines().count() == 1, "{outcome}");
    }
}

/// The CPU backend with a fault, which does its harm after every fused two-shot operation.
struct Faulty {
    engine: Engine,
    fault: fn(&mut Engine, &Problem) -> Result<(), Error>,
    problem: Option<Problem>,
}

impl Collective for Faulty {
    fn prepare(&mut self, problem: &Problem) -> Result<(), Error> {
        self.problem = Some(*problem);
        self.engine.prepare(problem)
    }

    fn write(&mut self, tensor: Tensor, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.engine.write(tensor, offset, bytes)
    }

    fn read(&mut self, tensor: Tensor) -> Result<Vec<u8>, Error> {
        self.engine.read(tensor)
    }

    fn run(&mut self, steps: &[Step]) -> Result<(), Error> {
        self.engine.run(steps)?;
        match self.problem {
            Some(problem) if steps == [Step::Fused(Mode::TwoShot)] => {
                (self.fault)(&mut self.engine, &problem)
            }
            _ => Ok(()),
        }
    }

    fn time(&mut self, steps: &[Step], operations: u32) -> Result<f64, Error> {
        self.engine.time(steps, operations)
    }

    fn copy_time(&mut self, bytes: u64) -> Result<f64, Error> {
        self.engine.copy_time(bytes)
    }

    fn set_cold(&mut self, cold: bool) {
        self.engine.set_cold(cold);
    }

    fn cache_bytes(&self) -> u64 {
        self.engine.cache_bytes()
    }
}

/// What the matrix of one small shape gives with a fault on both of two ranks, which are threads, and the lines of the
/// cases that failed.
fn matrix_with(fault: fn(&mut Engine, &Problem) -> Result<(), Error>) -> (Tally, Vec<String>) {
    const RANKS: u32 = 2;
    const DEADLINE: Duration = Duration::from_secs(60);
    static GROUPS: AtomicU32 = AtomicU32::new(0);
    let settings = Settings { num_tokens: vec![3], hidden_dims: vec![48], ..Settings::default() };
    let key = format!("faulty matrix {} {}", id(), GROUPS.fetch_add(1, Ordering::Relaxed));
    let layout = cpu::layout(RANKS, 48 * 4).unwrap();
    let memory = cpu::create_shared_memory(&layout).unwrap();
    let rank = |rank| {
        let membership = Membership { rank, world_size: RANKS, key: &key, config: b"", deadline: DEADLINE };
        let group = Group::join(&membership).unwrap();
        let communicator =
            Communicator::join(memory.as_fd(), layout, rank, DEADLINE, Watch::new(|| None)).unwrap();
        let mut backend = Faulty { engine: Engine::new(communicator), fault, problem: None };
        let mut failed = Vec::new();
        let tally = verify::run(&settings, &group, &mut backend, &Progress::hidden(), |line| {
            if line.starts_with("FAILED ") {
                failed.push(line.to_owned());
            }
        })
        .unwrap();
        group.farewell().unwrap();
        assert_eq!(tally.failed, failed.len() as u64);
        (tally, failed)
    };
    thread::scope(|scope| {
        let other = scope.spawn(|| rank(1));
        let found = rank(0);
        assert_eq!(other.join().unwrap(), found, "ranks disagree on what failed");
        found
    })
}

/// So many of the 36 cases fail, all of them in two-shot, for this reason.
#[track_caller]
fn check(fault: fn(&mut Engine, &Problem) -> Result<(), Error>, failures: u64, reason: &str) {
    let (tally, failed) = matrix_with(fault);
    assert_eq!((tally.verified, tally.failed), (36 - failures, failures), "{failed:?}");
    for line in failed {
        assert!(line.contains(", hidden 48, 3 tokens, ") && line.contains("_twoshot: "), "{line}");
        assert!(line.ends_with(reason), "{line}");
    }
}

#[test]
fn a_wrong_element_is_found() {
    let fault = |engine: &mut Engine, problem: &Problem| {
        engine.write(Tensor::ResidualOut, 0, &vec![0x3f; problem.dtype.bytes() as usize])
    };
    let (tally, failed) = matrix_with(fault);
    assert_eq!((tally.verified, tally.failed), (18, 18));
    assert!(failed.iter().all(|line| line.contains("rank 0: residual_out[0, 0] is ")), "{failed:?}");
}

#[test]
fn a_tensor_of_the_separate_operations_that_was_written_is_found() {
    let fault = |engine: &mut Engine, _: &Problem| engine.write(Tensor::WideB, 7, &[0]);
    check(fault, 18, "rank 0: WideB is not the operation's, and byte 7 of it was written");
}

#[test]
fn a_norm_that_is_written_although_it_is_quantized_is_found() {
    let fault = |engine: &mut Engine, problem: &Problem| match problem.operation(Mode::Auto).writes_norm() {
        true => Ok(()),
        false => engine.write(Tensor::NormOut, 0, &[0]),
    };
    check(fault, 12, "rank 0: NormOut is not the operation's, and byte 0 of it was written");
}

#[test]
fn a_residual_that_was_changed_is_found_where_there_should_be_none() {
    let fault = |engine: &mut Engine, problem: &Problem| match problem.residual {
        true => Ok(()),
        false => engine.write(Tensor::Residual, 0, &[0]),
    };
    check(fault, 9, "rank 0: the residual was changed");
}

#[test]
fn modes_that_differ_within_what_the_reference_allows_are_found() {
    // In float32 the reference allows the last bit of a sum to be either.
    let fault = |engine: &mut Engine, problem: &Problem| {
        if problem.dtype != DType::F32 || problem.residual {
            return Ok(());
        }
        let last_bit = engine.read(Tensor::ResidualOut)?[0] ^ 1;
        engine.write(Tensor::ResidualOut, 0, &[last_bit])
    };
    check(fault, 3, "residual_out is not the same bits as one-shot's");
}
