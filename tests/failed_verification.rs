//! A variant with wrong results is FAILED with the reason, in every form of the report. The others are measured as usual.
//!
//! The tests run the benchmark on a wrong backend: the CPU's, with one output changed after the fused one-shot operation.

use std::{
    process::id,
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
        steps::{Fused, Step},
    },
    commands::bench::{
        report::{
            data::{Report, Row, RowOutcome},
            json, markdown, plot, table,
        },
        run,
        settings::Settings,
    },
    measurement::Kind,
    peers::Peers,
    quant_mode::QuantMode,
    report::{grid, progress::Progress},
};
use fused_collective_core::{fusion::Mode, plan::Limits};
use fused_collective_tests::forward;

const RANKS: u32 = 2;
const DEADLINE: Duration = Duration::from_secs(60);

/// The fault of the fused one-shot operation.
#[derive(Clone, Copy)]
struct Fault {
    tensor: Tensor,
    /// From the start of the tensor, in bytes.
    offset: u64,
    /// The bytes that are written there.
    bytes: &'static [u8],
    /// The rank, if not all.
    rank: Option<u32>,
    /// True if only the first run is wrong.
    once: bool,
    /// The trials before a fault that shows in trials only; `None` for one that shows in other runs. If no bytes are written,
    /// such a trial runs nothing.
    late: Option<u32>,
}

/// The CPU backend with a fault.
struct Faulty {
    engine: Engine,
    fault: Fault,
    here: bool,
    runs: u32,
    /// The trials of the fused one-shot operation.
    trials: u32,
    /// The steps of untimed runs, in which variants are verified.
    ran: Vec<Vec<Step>>,
}

/// True for the fused one-shot operation, in place or not.
fn is_one_shot(steps: &[Step]) -> bool {
    matches!(steps, [Step::Fused(Fused { mode: Mode::OneShot, .. })])
}

impl Collective for Faulty {
    forward!(engine: prepare write fill digest read copy_time find_stray_write set_cold limits cache_bytes);

    fn run(&mut self, steps: &[Step]) -> Result<(), Error> {
        self.engine.run(steps)?;
        self.ran.push(steps.to_vec());
        if is_one_shot(steps) && self.here {
            self.runs += 1;
            if self.fault.late.is_none() && (!self.fault.once || self.runs == 1) {
                self.engine.write(self.fault.tensor, self.fault.offset, self.fault.bytes)?;
            }
        }
        Ok(())
    }

    fn time(&mut self, steps: &[Step], operations: u32) -> Result<f64, Error> {
        let harmed = is_one_shot(steps);
        assert!(!harmed || self.fault.late.is_some(), "a variant that is wrong was timed");
        // An all-reduce by itself is no variant. It is timed to choose one for the separate operations.
        let is_variant = !matches!(steps, [Step::AllReduce(_)]);
        assert!(!is_variant || self.ran.iter().any(|ran| ran == steps), "{steps:?} is timed first");
        self.trials += u32::from(harmed);
        if !harmed || !self.here || self.fault.late.is_none_or(|trials| self.trials <= trials) {
            return self.engine.time(steps, operations);
        }
        if self.fault.bytes.is_empty() {
            return Ok(1.0);
        }
        let time = self.engine.time(steps, operations)?;
        self.engine.write(self.fault.tensor, self.fault.offset, self.fault.bytes)?;
        Ok(time)
    }
}

fn settings(quant_mode: QuantMode) -> Settings {
    Settings {
        num_tokens: vec![4],
        hidden_dim: 48,
        quant_modes: vec![quant_mode],
        warmup: 0,
        trials: 2,
        ..Settings::default()
    }
}

/// The report of a benchmark with this fault. Ranks are threads.
fn report(settings: &Settings, fault: Fault) -> Report {
    static GROUPS: AtomicU32 = AtomicU32::new(0);
    let key = format!("faulty {} {}", id(), GROUPS.fetch_add(1, Ordering::Relaxed));
    let max_row_bytes = settings.hidden_dim * 4;
    let rank = |rank| {
        let membership = Membership { rank, world_size: RANKS, key: &key, config: b"", deadline: DEADLINE };
        let group = Group::join(&membership).unwrap();
        let communicator =
            Communicator::join(&group, cpu::Options { max_row_bytes, deadline: DEADLINE }).unwrap();
        let here = fault.rank.is_none_or(|only| only == rank);
        let engine = Engine::new(communicator);
        let mut backend = Faulty { engine, fault, here, runs: 0, trials: 0, ran: Vec::new() };
        let mut report = Report::new(vec!["bench".to_owned()], "cpu", RANKS, settings.clone());
        let mut peers = Peers::default();
        let progress = Progress::hidden();
        run::run(settings, &group, &mut backend, &mut peers, &progress, |measured| {
            report.push(measured.case, measured.notes, measured.variants);
        })
        .unwrap();
        assert_eq!(progress.steps(), run::count(settings, 1), "the progress bar ends with the work");
        group.farewell().unwrap();
        report
    };
    thread::scope(|scope| {
        let other = scope.spawn(|| rank(1));
        let report = rank(0);
        let failures =
            |report: &Report| report.failures().map(|(_, _, why)| why.to_owned()).collect::<Vec<_>>();
        assert_eq!(failures(&other.join().unwrap()), failures(&report), "ranks disagree on what failed");
        report
    })
}

/// Only the one-shot variant fails, with a reason that contains `reason`.
#[track_caller]
fn check(quant_mode: QuantMode, fault: Fault, reason: &str) -> Report {
    check_with(&settings(quant_mode), fault, reason)
}

#[track_caller]
fn check_with(settings: &Settings, fault: Fault, reason: &str) -> Report {
    let report = report(settings, fault);
    let failures: Vec<_> = report.failures().collect();
    let [(_, row, why)] = failures[..] else { panic!("not one failure: {failures:?}") };
    assert!(row.variant.starts_with("fused_") && row.variant.ends_with("_oneshot"), "{}", row.variant);
    assert!(why.contains(reason), "{why}");
    let timed = report.configurations[0].rows.iter().filter(|row| row.figures().is_some()).count();
    assert_eq!(timed, report.configurations[0].rows.len() - 1);
    report
}

/// 1.0 as bfloat16: a plausible value in the wrong place.
const ONE: &[u8] = &[0x80, 0x3f];

/// Element 5 of token 2.
const ELEMENT: u64 = (2 * 48 + 5) * 2;

fn fault(tensor: Tensor, offset: u64, bytes: &'static [u8]) -> Fault {
    Fault { tensor, offset, bytes, rank: None, once: false, late: None }
}

#[test]
fn one_wrong_element_of_the_residual_is_found() {
    check(QuantMode::None, fault(Tensor::ResidualOut, ELEMENT, ONE), "residual_out[2, 5]");
}

#[test]
fn one_wrong_element_of_the_norm_is_found() {
    check(QuantMode::None, fault(Tensor::NormOut, ELEMENT, ONE), "norm_out[2, 5]");
}

#[test]
fn a_nan_is_found() {
    check(QuantMode::None, fault(Tensor::NormOut, ELEMENT, &[0xff, 0xff]), "norm_out[2, 5]");
}

#[test]
fn a_wrong_code_is_found() {
    check(QuantMode::Fp8, fault(Tensor::QuantOut, 2 * 48 + 5, &[0x7e]), "quant_out[2, 5]");
}

#[test]
fn a_wrong_block_scale_is_found() {
    // The swizzled layout has row 0, column 0 first.
    check(QuantMode::Fp4, fault(Tensor::ScaleOut, 0, &[0x08]), "scale_out[0, 0]");
}

#[test]
fn padding_that_is_not_zero_is_found() {
    // Three of four columns are used: the fourth byte of the first row is padding.
    check(QuantMode::Fp4, fault(Tensor::ScaleOut, 3, &[1]), "scale_out[0, 3] is padding");
}

#[test]
fn a_rank_whose_bits_differ_from_the_others_is_found() {
    // Token 1 is rank 1's to check, so only the comparison of ranks can find this on rank 0, or the other way round.
    for (rank, token) in [(0, 1), (1, 0)] {
        let fault = Fault { rank: Some(rank), ..fault(Tensor::NormOut, (token * 48 + 5) * 2, ONE) };
        check(QuantMode::None, fault, "rank 1's outputs are not the same bits as rank 0's");
    }
}

#[test]
fn a_result_that_comes_and_goes_is_found() {
    let fault = Fault { once: true, rank: Some(1), ..fault(Tensor::NormOut, 5 * 2, ONE) };
    check(QuantMode::None, fault, "a repeated run gave other bits");
}

#[test]
fn a_result_that_is_wrong_only_after_the_timed_trials_is_found() {
    // The first trial chooses the number of operations, and two count.
    let late = |rank, tensor, offset, bytes| Fault { late: Some(3), rank, ..fault(tensor, offset, bytes) };
    let other = late(Some(1), Tensor::NormOut, 5 * 2, ONE);
    check(QuantMode::None, other, "after 2 trials: rank 1's outputs are not the same bits as rank 0's");
    let wrong = late(None, Tensor::ResidualOut, ELEMENT, ONE);
    check(QuantMode::None, wrong, "residual_out[2, 5]");
    // A trial that writes nothing leaves no older result in the outputs.
    let nothing = late(None, Tensor::NormOut, 0, &[]);
    check(QuantMode::None, nothing, "after 2 trials: rank 0: residual_out[0, 0]");
}

/// In place, the outputs after a trial are those of all its operations, each on the outputs of the one before.
#[test]
fn a_trial_in_place_that_is_wrong_or_has_not_run_is_found() {
    let in_place = |quant_mode| Settings { in_place: true, ..settings(quant_mode) };
    let late = |tensor, bytes| Fault { late: Some(3), ..fault(tensor, ELEMENT, bytes) };
    for quant_mode in [QuantMode::None, QuantMode::Fp8] {
        check_with(&in_place(quant_mode), late(Tensor::Residual, ONE), "residual_out[2, 5]");
        let nothing = late(Tensor::Residual, &[]);
        check_with(&in_place(quant_mode), nothing, "after 2 trials: rank 0: residual_out[0, 0]");
    }
    check_with(&in_place(QuantMode::None), late(Tensor::Input, ONE), "norm_out[2, 5]");
    // Found ahead of all trials, too.
    check_with(&in_place(QuantMode::None), fault(Tensor::Input, ELEMENT, ONE), "norm_out[2, 5]");
}

/// The backend panics if the wrong variant is timed, or any variant before its verification.
#[test]
fn no_variant_is_timed_before_it_is_verified_and_a_wrong_one_never() {
    let report = check(QuantMode::Fp8, fault(Tensor::QuantOut, 2 * 48 + 5, &[0x7e]), "quant_out[2, 5]");
    let rows = &report.configurations[0].rows;
    let is_baseline = |row: &&Row| row.figures().is_some_and(|figures| figures.is_baseline);
    let baselines: Vec<Kind> = rows.iter().filter(is_baseline).map(|row| row.kind).collect();
    assert_eq!(baselines, [Kind::Standard]);
}

#[test]
fn every_form_of_the_report_says_failed_and_why() {
    let report = check(QuantMode::None, fault(Tensor::NormOut, ELEMENT, ONE), "norm_out");
    let variant = "fused_allreduce_rmsnorm_oneshot";
    let (_, _, reason) = report.failures().next().unwrap();
    let line = format!("FAILED {variant}: {reason}\n");
    let table = table::configuration(&report.configurations[0], grid::WIDTH);
    let row = table.lines().find(|line| line.starts_with(variant)).unwrap();
    assert_eq!(row.split_whitespace().collect::<Vec<_>>(), [variant, "FAILED", "-", "-", "-", "-", "-"]);
    assert!(table.ends_with(&line), "{table}");
    let markdown = markdown::to_string(&report);
    assert!(markdown.contains(&format!("| `{variant}` | FAILED | - | - | - | - | - |\n")), "{markdown}");
    assert!(markdown.ends_with(&format!("- FAILED `{variant}`: {reason}\n")), "{markdown}");
    assert!(plot::to_svg(&report, plot::Lines::All).unwrap().contains(&format!("{variant}: FAILED")));
    let read = json::parse(&json::to_string(&report).unwrap()).unwrap();
    let failed = &read.configurations[0].rows.iter().find(|row| row.variant == variant).unwrap().outcome;
    assert_eq!(*failed, RowOutcome::Failed { reason: reason.to_owned() });
}
