//! `fused-collective verify` on real rank processes, and on a wrong backend whose faults it must find.
//!
//! That backend is the CPU's, with something changed after the fused two-shot operation.

use std::{
    cell::Cell,
    process::{Command, id},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use fused_collective::{
    cpu::{self, Communicator},
    group::rendezvous::{Group, Membership},
};
use fused_collective_cli::{
    backend::{
        collective::Collective,
        cpu::Engine,
        error::Error,
        problem::{Problem, Tensor},
        steps::{Conversion, Fused, Step},
    },
    commands::verify::{
        conversions, dependents,
        run::run as run_matrix,
        settings::Settings,
        verdicts::{Place, Tally},
    },
    job::ranks,
    report::progress::Progress,
    wire::Wire,
};
use fused_collective_core::{
    dtype::DType,
    fusion::Mode,
    plan::Limits,
    quant::{Quantization, e2m1, e4m3},
};
use fused_collective_tests::{command, forward, run};

/// `verify` on the CPU backend with `options`, separated by spaces.
fn verify(options: &str) -> Command {
    let mut command = command(&["verify", "--backend", "cpu", "--deadline", "60"]);
    command.args(options.split(' '));
    command
}

const CONVERSIONS: &str = "conversions are core's own, which its tests compare for every float32";

/// The quantizations of rows of every length.
const QUANT_MODES: [&str; 4] = ["none", "fp8", "fp4", "fp8_per_token"];

/// Runs the program, which must find all cases right. Returns the lines between the first and the last.
#[track_caller]
fn verified(options: &str, ranks: u32, cases: u64) -> Vec<String> {
    let outcome = run(&mut verify(options));
    outcome.assert_success();
    let mut lines: Vec<String> = outcome.stdout.lines().map(str::to_owned).collect();
    assert_eq!(lines.remove(0), format!("cpu backend, {ranks} ranks, {cases} cases, seed 0"));
    assert_eq!(lines.pop(), Some(format!("{cases} cases verified, 0 FAILED")), "{outcome}");
    // The CPU has no conversions of its own, and a quick verification does not ask.
    assert_eq!(lines.pop_if(|line| line == CONVERSIONS).is_none(), options.contains("--quick"), "{outcome}");
    lines
}

#[test]
fn the_matrix_is_told_of_by_element_type_quantization_and_hidden_size() {
    let lines = verified("--num-tokens 0 1 5 --hidden-dim 48,64 --nproc-per-node 2", 2, 873);
    let mut expected = Vec::new();
    for dtype in ["float32", "float16", "bfloat16"] {
        for hidden in [48, 64] {
            let of_blocks: &[&str] = if hidden == 64 { &["fp8_group64", "mxfp8", "mxfp4"] } else { &[] };
            for quant_mode in QUANT_MODES.iter().chain(of_blocks) {
                // Without a quantization those with a residual are solved in three formats between ranks.
                let cases = if *quant_mode == "none" { 51 } else { 21 };
                expected.push(format!(
                    "{dtype:<8}  {quant_mode:<4}  hidden {hidden:>5}   {cases} cases, largest error "
                ));
            }
        }
    }
    assert_eq!(lines.len(), expected.len());
    for (line, expected) in lines.iter().zip(expected) {
        let error = line.strip_prefix(&expected).and_then(|rest| rest.strip_suffix(" ulp"));
        let error: f64 = error.and_then(|error| error.parse().ok()).unwrap_or_else(|| panic!("{line}"));
        // Random inputs round; in 16-bit types once, where cancellation cannot magnify it, or at a tie of what is summed.
        assert!(error > 0.0 && (error <= 1.5 || line.starts_with("float32")), "{line}");
    }
}

#[test]
fn lists_replace_those_of_quick_and_three_ranks_are_right() {
    let lines = verified("--quick --num-tokens 2 7 --hidden-dim 80 --nproc-per-node 3", 3, 264);
    assert_eq!(lines.len(), 12);
}

#[test]
fn group_sizes_are_verified_one_after_the_other() {
    let outcome = run(&mut verify("--num-tokens 3 --hidden-dim 48 --nproc-per-node 2,3"));
    outcome.assert_success();
    let lines: Vec<&str> = outcome.stdout.lines().collect();
    let cases = |mode: &str| if mode == "none" { 29 } else { 11 };
    let of_size = |size: usize| {
        let mut expected = vec![format!("cpu backend, {size} ranks, 186 cases, seed 0")];
        for dtype in ["float32", "float16", "bfloat16"] {
            expected.extend(
                QUANT_MODES
                    .map(|mode| format!("{dtype:<8}  {mode:<4}  hidden    48   {} cases", cases(mode))),
            );
        }
        // Once, where no rank is left over.
        expected.extend((size == 3).then(|| CONVERSIONS.to_owned()));
        expected.extend([format!("{size} ranks: 186 cases verified, 0 FAILED"), String::new()]);
        expected
    };
    let expected = [of_size(2), of_size(3), vec!["372 cases verified, 0 FAILED".to_owned()]].concat();
    assert_eq!(lines.len(), expected.len(), "{outcome}");
    for (line, expected) in lines.iter().zip(&expected) {
        assert!(line.starts_with(expected), "{line}");
    }
}

#[test]
fn groups_run_at_the_same_time_and_each_is_verified() {
    let outcome = run(&mut verify("--num-tokens 0 5 --hidden-dim 48 --nproc-per-node 3 2 --groups 2"));
    outcome.assert_success();
    for line in [
        "cpu backend, 2 groups of 3 ranks, 528 cases, seed 0",
        "2 groups of 3 ranks: 528 cases verified, 0 FAILED",
        "cpu backend, 2 groups of 2 ranks, 528 cases, seed 0",
        "2 groups of 2 ranks: 528 cases verified, 0 FAILED",
        "1056 cases verified, 0 FAILED",
    ] {
        assert_eq!(outcome.stdout.lines().filter(|other| *other == line).count(), 1, "{line}: {outcome}");
    }
}

#[test]
fn a_rank_that_does_not_come_is_missed_by_all_others_in_time() {
    let outcome = run(&mut verify("--num-tokens 1 --hidden-dim 48 --nproc-per-node 2 --groups 2 --faults"));
    outcome.assert_success();
    for mode in ["oneshot", "twoshot"] {
        let line = format!("fused_allreduce_rmsnorm_{mode}, a rank withheld    4 cases, largest error ");
        assert_eq!(outcome.stdout.lines().filter(|other| other.starts_with(&line)).count(), 1, "{outcome}");
    }
    assert!(outcome.stdout.ends_with("\n380 cases verified, 0 FAILED\n"), "{outcome}");
}

#[test]
fn special_numbers_come_through_and_stay_in_their_rows() {
    verified("--quick --special --num-tokens 20 --hidden-dim 48,80 --nproc-per-node 3", 3, 372);
}

#[test]
fn dependents_read_finished_outputs() {
    let outcome = run(&mut verify("--num-tokens 0 1 5 --hidden-dim 48 --nproc-per-node 2 --dependents 30"));
    outcome.assert_success();
    for tokens in [1, 5] {
        let line = format!("dependents of {tokens} tokens, hidden 48, 30 times:  12 cases, largest error ");
        assert_eq!(outcome.stdout.lines().filter(|other| other.starts_with(&line)).count(), 1, "{outcome}");
    }
    assert!(outcome.stdout.ends_with("\n366 cases verified, 0 FAILED\n"), "{outcome}");
}

#[test]
fn outputs_that_are_not_always_finished_are_found() {
    /// Leaves one run in 25 unfinished. Of each problem there are 22: two to verify it, 20 with dependents.
    fn now_and_then(engine: &mut Engine, problem: &Problem) -> Result<(), Error> {
        thread_local!(static RUNS: Cell<u32> = const { Cell::new(0) });
        RUNS.set(RUNS.get() + 1);
        match RUNS.get() % 25 {
            0 => engine.write(Tensor::ResidualOut, problem.activation_bytes() - 1, &[0xff]),
            _ => Ok(()),
        }
    }
    let (tally, failed) = on_faulty_ranks(now_and_then, None, |place, tell| {
        let settings =
            Settings { num_tokens: vec![3], hidden_dims: vec![48], dependents: 20, ..Settings::default() };
        dependents::run_dependents(&settings, place, &Progress::hidden(), tell)
    });
    // The first has its 22 runs before the fault.
    assert_eq!((tally.verified, tally.failed), (9, 3), "{failed:?}");
    for line in failed {
        assert!(
            line.contains("3 tokens, with residual, dependents, ") && line.contains("_twoshot: "),
            "{line}"
        );
        assert!(line.contains("rank 0: ResidualOut was wrong after run "), "{line}");
    }
}

#[test]
fn an_operation_without_tokens_is_right() {
    for line in verified("--num-tokens 0 --hidden-dim 16", 2, 186) {
        let cases = if line.contains(" none ") { 29 } else { 11 };
        assert!(line.ends_with(&format!("  {cases} cases, largest error 0.00 ulp")), "{line}");
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

/// The CPU backend with a fault after every run of certain steps.
struct Faulty {
    engine: Engine,
    fault: fn(&mut Engine, &Problem) -> Result<(), Error>,
    problem: Option<Problem>,
    /// The stray write to report after the faulty step. No safe call of the engine makes one.
    stray: Option<&'static str>,
    /// True for the steps with the fault.
    faulty: fn(&[Step]) -> bool,
    /// True if that step ran last.
    has_run: bool,
}

impl Collective for Faulty {
    forward!(engine: write fill digest read time copy_time set_cold limits cache_bytes);

    fn prepare(&mut self, problem: &Problem) -> Result<(), Error> {
        self.problem = Some(*problem);
        self.engine.prepare(problem)
    }

    fn run(&mut self, steps: &[Step]) -> Result<(), Error> {
        self.engine.run(steps)?;
        self.has_run = (self.faulty)(steps);
        match self.problem {
            Some(problem) if self.has_run => (self.fault)(&mut self.engine, &problem),
            _ => Ok(()),
        }
    }

    fn convert(&mut self, to: Conversion, first: u32, count: u32) -> Result<Option<Vec<u8>>, Error> {
        let code = |bits: u32| match to {
            Conversion::E4M3 => e4m3::encode(f32::from_bits(bits)) ^ u8::from(WRONG_BITS.contains(&bits)),
            Conversion::E2M1 => e2m1::encode(f32::from_bits(bits)) ^ u8::from(bits == WRONG_BITS[1]) << 3,
        };
        let codes: Vec<u8> = (0..count).map(|index| code(first.wrapping_add(index))).collect();
        Ok(Some(match to {
            Conversion::E4M3 => codes,
            Conversion::E2M1 => {
                codes.as_chunks().0.iter().map(|&[first, second]| e2m1::pack(first, second)).collect()
            }
        }))
    }

    fn find_stray_write(&mut self, thorough: bool) -> Result<Option<String>, Error> {
        let found = self.engine.find_stray_write(thorough)?;
        Ok(found.or(self.stray.filter(|_| self.has_run && !thorough).map(str::to_owned)))
    }
}

/// Numbers that [`Faulty`] converts wrong: 1 and the one after it, and the one before 2.
const WRONG_BITS: [u32; 3] = [0x3f80_0000, 0x3f80_0001, 0x3fff_ffff];

/// The tally and the failed lines of the matrix of one small shape. Two ranks, which are threads, both have the fault.
fn matrix_with(
    fault: fn(&mut Engine, &Problem) -> Result<(), Error>,
    stray: Option<&'static str>,
) -> (Tally, Vec<String>) {
    on_faulty_ranks(fault, stray, |place, tell| {
        let settings = Settings { num_tokens: vec![3], hidden_dims: vec![48], ..Settings::default() };
        run_matrix(&settings, &[Wire::Exact], place, &Progress::hidden(), tell)
    })
}

/// The tally of `work` on two ranks, which are threads, each with a [`Faulty`] backend, and the lines of the failed cases.
/// Both ranks must agree.
fn on_faulty_ranks(
    fault: fn(&mut Engine, &Problem) -> Result<(), Error>,
    stray: Option<&'static str>,
    work: impl Fn(&mut Place<'_>, &mut dyn FnMut(&str)) -> Result<Tally, ranks::Error> + Sync,
) -> (Tally, Vec<String>) {
    on_ranks_with_a_faulty(|steps| steps == [Step::fused(Mode::TwoShot)], fault, stray, work)
}

/// Like [`on_faulty_ranks`], with the fault after steps that are `faulty`.
fn on_ranks_with_a_faulty(
    faulty: fn(&[Step]) -> bool,
    fault: fn(&mut Engine, &Problem) -> Result<(), Error>,
    stray: Option<&'static str>,
    work: impl Fn(&mut Place<'_>, &mut dyn FnMut(&str)) -> Result<Tally, ranks::Error> + Sync,
) -> (Tally, Vec<String>) {
    const RANKS: u32 = 2;
    const DEADLINE: Duration = Duration::from_secs(60);
    static GROUPS: AtomicU32 = AtomicU32::new(0);
    let key = format!("faulty matrix {} {}", id(), GROUPS.fetch_add(1, Ordering::Relaxed));
    let max_row_bytes = 48 * 4;
    let rank = |rank| {
        let membership = Membership { rank, world_size: RANKS, key: &key, config: b"", deadline: DEADLINE };
        let group = Group::join(&membership).unwrap();
        let communicator =
            Communicator::join(&group, cpu::Options { max_row_bytes, deadline: DEADLINE }).unwrap();
        let mut backend =
            Faulty { engine: Engine::new(communicator), fault, problem: None, stray, faulty, has_run: false };
        let mut failed = Vec::new();
        let mut place = Place { world: &group, own: Some((&group, &mut backend)) };
        let tally = work(&mut place, &mut |line| {
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

/// Asserts that this many of the 132 cases fail, all in two-shot, for this reason.
#[track_caller]
fn check(fault: fn(&mut Engine, &Problem) -> Result<(), Error>, failures: u64, reason: &str) {
    check_failures(matrix_with(fault, None), failures, reason);
}

#[track_caller]
fn check_failures((tally, failed): (Tally, Vec<String>), failures: u64, reason: &str) {
    assert_eq!((tally.verified, tally.failed), (132 - failures, failures), "{failed:?}");
    for line in failed {
        assert!(line.contains(", hidden 48, 3 tokens, ") && line.contains("_twoshot"), "{line}");
        assert!(line.ends_with(reason), "{line}");
    }
}

#[test]
fn a_wrong_element_is_found() {
    let fault = |engine: &mut Engine, problem: &Problem| {
        engine.write(Tensor::ResidualOut, 0, &vec![0x3f; problem.dtype.bytes() as usize])
    };
    let (tally, failed) = matrix_with(fault, None);
    assert_eq!((tally.verified, tally.failed), (84, 48));
    assert!(failed.iter().all(|line| line.contains("rank 0: residual_out[0, 0] is ")), "{failed:?}");
}

/// Every fault of the 36 cases with a sharded residual is found, with the reason.
#[test]
fn a_wrong_share_of_a_sum_is_found() {
    type Fault = fn(&mut Engine, &Problem) -> Result<(), Error>;
    let found = |fault: Fault| {
        let (tally, failed) = on_ranks_with_a_faulty(
            |steps| steps == [Step::fused_sharded()],
            fault,
            None,
            |place, tell| {
                let settings = Settings { num_tokens: vec![3], hidden_dims: vec![48], ..Settings::default() };
                run_matrix(&settings, &[Wire::Exact], place, &Progress::hidden(), tell)
            },
        );
        assert_eq!((tally.verified, tally.failed), (96, 36), "{failed:?}");
        assert!(failed.iter().all(|line| line.contains("_twoshot_sharded: ")), "{failed:?}");
        failed
    };
    // Of the two ranks rank 0 has tokens 0 and 2, rank 1 has token 1.
    let element: Fault = |engine, problem| {
        engine.write(Tensor::ResidualShardOut, 0, &vec![0x3f; problem.dtype.bytes() as usize])
    };
    assert!(found(element).iter().all(|line| line.contains("rank 0: residual_out[0, 0] is ")));
    let beyond: Fault =
        |engine, problem| engine.write(Tensor::ResidualShardOut, problem.activation_bytes() - 1, &[0]);
    assert!(
        found(beyond).iter().all(|line| line.ends_with("residual_out is not the same bits as one-shot's"))
    );
    let residual: Fault =
        |engine, problem| engine.write(Tensor::ResidualShard, problem.activation_bytes() - 1, &[0]);
    assert!(found(residual).iter().all(|line| line.ends_with("the sharded residual was changed")));
    let other: Fault = |engine, _| engine.write(Tensor::ResidualOut, 5, &[1]);
    let why = "ResidualOut is no output of the operation, and byte 5 of it was written";
    assert!(found(other).iter().all(|line| line.ends_with(why)));
}

#[test]
fn a_tensor_of_the_separate_operations_that_was_written_is_found() {
    let fault = |engine: &mut Engine, _: &Problem| engine.write(Tensor::WideB, 7, &[0]);
    // Nothing cleans it for the case that follows, with a sharded residual.
    check(fault, 84, "rank 0: WideB is no output of the operation, and byte 7 of it was written");
}

#[test]
fn a_norm_that_is_written_although_it_is_quantized_is_found() {
    let fault = |engine: &mut Engine, problem: &Problem| match problem.operation(Mode::Auto).writes_norm() {
        true => Ok(()),
        false => engine.write(Tensor::NormOut, 0, &[0]),
    };
    check(fault, 36, "rank 0: NormOut is no output of the operation, and byte 0 of it was written");
}

#[test]
fn a_residual_that_was_changed_is_found_where_there_should_be_none() {
    let fault = |engine: &mut Engine, problem: &Problem| match problem.residual {
        true => Ok(()),
        false => engine.write(Tensor::Residual, 0, &[0]),
    };
    check(fault, 12, "rank 0: the residual was changed");
}

#[test]
fn a_last_bit_that_the_reference_would_allow_is_found() {
    // In float32 the reference allows the last bit of a sum to be either; the specification does not.
    let fault = |engine: &mut Engine, problem: &Problem| {
        if problem.dtype != DType::F32 || problem.residual {
            return Ok(());
        }
        let last_bit = engine.read(Tensor::ResidualOut)?[0] ^ 1;
        engine.write(Tensor::ResidualOut, 0, &[last_bit])
    };
    let (tally, failed) = matrix_with(fault, None);
    assert_eq!((tally.verified, tally.failed), (128, 4));
    assert!(
        failed.iter().all(|line| line.contains("_twoshot: rank 0: residual_out[0, 0] is ")),
        "{failed:?}"
    );
}

/// A fault of calls of some rows, or of calls in place, which is none of a whole call's.
#[test]
fn rows_that_differ_when_they_are_cut_into_calls_are_found() {
    // The calls of two-shot in place, of which `steps` has one or several.
    let fault = |engine: &mut Engine, problem: &Problem| match problem.residual {
        true => engine.write(Tensor::Residual, 0, &vec![0x3f; problem.dtype.bytes() as usize]),
        false => Ok(()),
    };
    let is_faulty: fn(&[Step]) -> bool = |steps| {
        let is_cut = |step: &Step| {
            matches!(step, Step::Fused(Fused { mode: Mode::TwoShot, sharded: false, rows: Some(_), .. }))
        };
        steps.iter().any(is_cut)
    };
    let (tally, failed) = on_ranks_with_a_faulty(is_faulty, fault, None, |place, tell| {
        let settings = Settings { num_tokens: vec![3], hidden_dims: vec![48], ..Settings::default() };
        run_matrix(&settings, &[Wire::Exact], place, &Progress::hidden(), tell)
    });
    assert_eq!((tally.verified, tally.failed), (96, 36), "{failed:?}");
    for line in failed {
        assert!(line.contains("_twoshot: rank 0: in place, in "), "{line}");
        assert!(line.contains(" calls: byte 0 of ResidualOut is 0x3f, not the verified "), "{line}");
    }
}

#[test]
fn a_write_outside_of_all_tensors_is_found() {
    let found = matrix_with(|_, _| Ok(()), Some("NormOut: 3 bytes past its end"));
    check_failures(found, 48, "rank 0: NormOut: 3 bytes past its end is in no tensor, and was written");
}

#[test]
fn codes_and_norms_that_are_not_those_of_the_case_before_are_held_against_the_reference() {
    let fault = |engine: &mut Engine, problem: &Problem| match problem.quantization {
        Quantization::None => Ok(()),
        _ => {
            let code = engine.read(Tensor::QuantOut)?[7] ^ 0x11;
            engine.write(Tensor::QuantOut, 7, &[code])
        }
    };
    let (tally, failed) = matrix_with(fault, None);
    assert_eq!((tally.verified, tally.failed), (96, 36));
    assert!(failed.iter().all(|line| line.contains("rank 0: quant_out[0, ")), "{failed:?}");
    // A scale, in its swizzled place: block 2 of token 1.
    let fault = |engine: &mut Engine, problem: &Problem| match problem.scales() {
        Some(scales) if scales.cols > 2 => {
            let at = scales.offset(1, 2);
            let code = engine.read(Tensor::ScaleOut)?[at as usize] ^ 4;
            engine.write(Tensor::ScaleOut, at, &[code])
        }
        _ => Ok(()),
    };
    let (tally, failed) = matrix_with(fault, None);
    assert_eq!((tally.verified, tally.failed), (120, 12));
    assert!(failed.iter().all(|line| line.contains("rank 1: scale_out[1, 2] is ")), "{failed:?}");
}

#[test]
fn a_conversion_that_is_not_cores_is_found_whichever_rank_has_its_block() {
    let convert = |blocks: std::ops::Range<u32>| {
        on_faulty_ranks(
            |_, _| Ok(()),
            None,
            |place, tell| {
                conversions::run_conversions(
                    &Settings::default(),
                    blocks.clone(),
                    place,
                    &Progress::hidden(),
                    tell,
                )
            },
        )
    };
    // A block is the numbers with one upper byte.
    for blocks in [0x3f..0x40, 0x3e..0x41] {
        let count = blocks.len() << 24;
        let (tally, failed) = convert(blocks);
        assert_eq!((tally.verified, tally.failed), (0, 2), "{failed:?}");
        let expected = [("e4m3", 3, "0x3f800000: 0x39, not 0x38"), ("e2m1", 1, "0x3f800001: 0x0a, not 0x02")];
        for (line, (format, wrong, first)) in failed.iter().zip(expected) {
            let expected = format!(
                "FAILED conversion to {format}, every float32: {wrong} of {count} float32 differ from core's, the first {first}"
            );
            assert_eq!(*line, expected);
        }
    }
    let (tally, failed) = convert(0xc0..0xc2);
    assert_eq!((tally.verified, tally.failed, failed.len()), (2, 0, 0));
}
