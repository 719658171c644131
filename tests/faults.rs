//! `fused-collective faults` on the CPU backend: every other rank reports every fault in every phase in time, and nothing is
//! left behind.

use std::process::Command;

use fused_collective_cli::commands::faults::case::{Case, Fault, Phase};
use fused_collective_tests::{command, run};

fn faults(options: &str) -> Command {
    let mut command = command(&["faults", "--backend", "cpu", "--deadline", "1.5"]);
    command.args(options.split_whitespace());
    command
}

/// Runs `cases` in a group of `ranks`. All must succeed. Returns their lines.
#[track_caller]
fn promised(ranks: u32, cases: &[Case]) -> Vec<String> {
    let names: Vec<String> = cases.iter().map(Case::to_string).collect();
    let outcome = run(&mut faults(&format!("--nproc-per-node {ranks} --cases {}", names.join(" "))));
    outcome.assert_success();
    let mut lines: Vec<String> = outcome.stdout.lines().map(str::to_owned).collect();
    let count = cases.len();
    assert_eq!(lines.remove(0), format!("cpu backend, {ranks} ranks, {count} cases, deadline 1.5 s"));
    assert_eq!(lines.pop(), Some(format!("{count} cases, 0 FAILED")));
    assert_eq!(lines.len(), count);
    for (line, name) in lines.iter().zip(names) {
        assert!(line.starts_with(&name) && !line.contains("FAILED"), "{line}");
    }
    lines
}

fn cases(phases: &[Phase], rank: u32) -> Vec<Case> {
    Case::all(rank).filter(|case| phases.contains(&case.phase)).collect()
}

#[test]
fn every_fault_while_a_group_is_set_up_is_reported() {
    promised(3, &cases(&[Phase::Start, Phase::Joined, Phase::Ready], 1));
}

#[test]
fn every_fault_during_operations_and_at_the_end_is_reported() {
    let mut cases = cases(&[Phase::Operations, Phase::Replays, Phase::End], 1);
    // Without graphs a replay is what operations are: one mismatch in it is enough.
    let is_extra = |case: &Case| case.phase == Phase::Replays && case.fault.is_mismatch();
    cases.retain(|case| !is_extra(case) || case.fault == Fault::OtherOrder);
    promised(3, &cases);
}

#[test]
fn the_rank_that_all_others_are_connected_to_is_no_exception() {
    let faults = [Fault::Kill, Fault::Stop, Fault::Abort];
    let phases = [Phase::Start, Phase::Ready, Phase::Operations, Phase::Replays, Phase::End];
    let mut cases = cases(&phases, 0);
    cases.retain(|case| faults.contains(&case.fault));
    promised(4, &cases);
}

#[test]
fn a_rank_that_is_out_of_step_is_named_with_both_calls() {
    let case: Case = "operations/other-shape/1".parse().unwrap();
    let line = promised(2, &[case]).remove(0);
    let called = |tokens| {
        format!("({tokens} tokens of 1024 bfloat16, residual, norm (epsilon 1e-6), fp8, scale 1.5625e-2)")
    };
    let (theirs, ours) = (called("one-shot, 65"), called("one-shot, 64"));
    assert!(line.contains(&format!("rank 1 called {theirs}, this rank {ours}")), "{line}");
}

#[test]
fn bad_options_are_refused_in_one_line() {
    let refused = [
        ("--cases end/abort/1", "--cases: 'end/abort/1' is not a case: use PHASE/FAULT/RANK with "),
        ("--cases nccl/kill/1", "--cases: nccl/kill/1: NCCL needs the cuda backend: leave it out"),
        ("--cases end/kill/2 --nproc-per-node 2", "--cases: end/kill/2: there is no rank 2 in a group of 2"),
    ];
    for (options, line) in refused {
        let outcome = run(&mut faults(options));
        assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(2), ""), "{outcome}");
        let start = format!("fused-collective: {line}");
        assert!(outcome.stderr.starts_with(&start) && outcome.stderr.lines().count() == 1, "{outcome}");
    }
    let outcome = run(faults("").env("RANK", "0").env("WORLD_SIZE", "2").env("MASTER_PORT", "29500"));
    outcome.assert_failure(
        2,
        "rank 0: faults starts its own ranks, to watch how they end: start it plainly, not as a rank",
    );
}
