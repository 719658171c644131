//! Peers: the rows of other packages in the same report, and peers that are missing, fail, hang or write nonsense.
//!
//! `--python` names a program that plays a part in place of Python, so the tests need no package. A test runs the real
//! program with a Python without packages.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Command, time::Duration};

use fused_collective_tests::{
    LIMIT, Outcome, Running, bench,
    report::{Configuration, Report},
    run,
};
use rustix::process::Signal;
use tempfile::TempDir;

const OPTIONS: &str = "--num-tokens 1 2 --hidden-dim 32 --quant-modes none --trials 3 --warmup 0";

/// The frame of every part. A part is the body of `measure`, which returns rows and notes.
const FAKE: &str = r#"#!/usr/bin/env python3
import json, os, subprocess, sys, time

def say(kind, **fields):
    print(json.dumps({"reply": kind, **fields}), flush=True)

def row(name, kind, times):
    return dict(variant=name, kind=kind, max_error_ulp=0.25 + rank, operations_per_trial=7, times_us=times)

def measure(request):
    PART

for line in sys.stdin:
    request = json.loads(line)
    if request["request"] == "start":
        assert (request["peer"], request["world_size"], request["device"]) == ("torch", 2, "cpu"), request
        rank, multicast = request["rank"], request["multicast"]
        say("started", port=4321 if rank == 0 else None)
    elif request["request"] == "join":
        assert request["port"] == 4321, request
        print("noise on standard error", file=sys.stderr)
        say("joined", about="fake 1.0")
    else:
        say("working", on="a part")
        rows, notes = measure(request)
        say("measured", rows=rows, notes=notes)
"#;

/// A program that plays `part` instead of Python.
fn actor(folder: &TempDir, part: &str) -> String {
    let path = folder.path().join("python");
    let part = part.trim().replace('\n', "\n    ");
    fs::write(&path, FAKE.replace("PART", &part)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path.to_str().unwrap().to_owned()
}

fn command(python: &str, options: &str) -> Command {
    let mut command = bench(&format!("{OPTIONS} {options}"));
    command.args(["--peers", "torch", "--python", python]);
    command
}

/// The outcome and the report of a run with a peer that plays `part`.
fn play(part: &str, options: &str) -> (Outcome, Report) {
    let folder = tempfile::tempdir().unwrap();
    let python = actor(&folder, part);
    let json = folder.path().join("report.json");
    let outcome = run(command(&python, options).arg("--json").arg(&json));
    assert!(outcome.survivors.is_empty(), "{outcome}");
    (outcome, Report::read(&json))
}

/// Asserts that this project's own variants are measured, whatever a peer does.
#[track_caller]
fn assert_own_rows(configuration: &Configuration) {
    let own = configuration.rows.iter().filter(|row| !row.variant.starts_with("torch_"));
    assert_eq!(own.map(|row| row.verified().times_us.len()).collect::<Vec<_>>(), [3; 5]);
}

/// Asserts that the peer is left out of the report, with only this note at the first configuration, and that the run
/// succeeds.
#[track_caller]
fn assert_note(outcome: &Outcome, report: &Report, note: &str) {
    outcome.assert_success();
    let notes: Vec<Vec<&str>> = (report.configurations.iter())
        .map(|configuration| {
            configuration.notes.iter().map(String::as_str).filter(|it| it.contains("torch ")).collect()
        })
        .collect();
    assert_eq!(notes, [vec![note], vec![]]);
    assert!(outcome.stdout.contains(&format!("note: {note}\n")), "{outcome}");
    for configuration in &report.configurations {
        assert_own_rows(configuration);
        assert_eq!(configuration.rows.len(), 5);
    }
}

#[test]
fn a_peer_s_rows_stand_in_the_report_with_the_slowest_rank_s_times() {
    let part = r#"
assert (request["num_tokens"], request["hidden_dim"], request["dtype"]) in [(1, 32, "bfloat16"), (2, 32, "bfloat16")]
assert (request["use_residual"], request["quant_mode"], request["oneshot"]) == (True, "none", True)
assert (request["warmup"], request["trials"], request["seed"], request["cache_bytes"]) == (0, 3, 9, 0)
assert 0 < request["epsilon"] < 1e-3 and request["scale"] == 1.0
times = [[5.0, 1.0, 9.0], [4.0, 2.0, 10.0]][rank]
return [row("torch_slow", "standard", [1e12] * 3), row("torch_fused", "fused", times)], [f"a note of rank {rank}"]
"#;
    let (outcome, report) = play(part, "--seed 9");
    outcome.assert_success();
    assert_eq!(report.settings.peers, ["torch"]);
    assert!(!outcome.stdout.contains("noise"), "{outcome}");
    for configuration in &report.configurations {
        assert_own_rows(configuration);
        let [.., slow, fused] = &configuration.rows[..] else { panic!("{configuration:?}") };
        assert_eq!((slow.variant.as_str(), slow.kind.as_str()), ("torch_slow", "standard"));
        assert_eq!((fused.variant.as_str(), fused.kind.as_str()), ("torch_fused", "fused"));
        let figures = fused.verified();
        assert_eq!((&figures.times_us[..], figures.figures.median_us), (&[5.0, 2.0, 10.0][..], 5.0));
        assert_eq!((figures.max_error, figures.operations_per_trial), (1.25, 7));
        for note in ["torch is fake 1.0", "a note of rank 0"] {
            assert!(configuration.notes.iter().any(|known| known == note), "{:?}", configuration.notes);
        }
        assert!(!configuration.notes.iter().any(|note| note == "a note of rank 1"));
    }
}

#[test]
fn peers_are_asked_for_the_pattern_and_for_sums_in_fewer_bits() {
    for (options, wanted) in [
        ("", "(None, None, False)"),
        ("--wire exact,int8", "(None, None, True)"),
        ("--pattern moe", "(None, 8, False)"),
        ("--pattern post-norm", "(1.0, None, False)"),
    ] {
        let part = r#"
asked = request["post_weight_bias"], request["top_k"], request["coded"]
assert asked == WANTED, asked
coded = row("torch_coded", "standard", [1e12] * 3)
coded["sum_error"] = [dict(rms=0.03, largest=0.25), dict(rms=0.04, largest=0.125)][rank]
return [row("torch_slow", "standard", [2e12] * 3), coded], []
"#;
        let (outcome, report) = play(&part.replace("WANTED", wanted), options);
        outcome.assert_success();
        for configuration in &report.configurations {
            let of = |name| configuration.rows.iter().find(|row| row.variant == name).unwrap().verified();
            let error = of("torch_coded").sum_error.expect("an error of its sum");
            assert_eq!((error.rms, error.largest), (0.04, 0.25));
            assert_eq!(of("torch_slow").sum_error, None);
        }
        assert!(outcome.stdout.contains("4.00% / 25.0%"), "{outcome}");
        let sentence = "torch's sum in fewer bits misses by 4.00% of its row, root mean square, and an element by up to 25.0%";
        assert!(outcome.stdout.contains(sentence), "{outcome}");
    }
}

#[test]
fn wrong_results_of_a_peer_fail_the_run() {
    let part = r#"
wrong = dict(variant="torch_wrong", kind="standard", failed=f"rank {rank} has 3 wrong elements")
return [wrong, row("torch_right", "standard", [1e12] * 3)], []
"#;
    let (outcome, report) = play(part, "");
    outcome.assert_failure(1, "2 of 14 variants FAILED");
    assert!(outcome.stdout.contains("FAILED torch_wrong: rank 0 has 3 wrong elements\n"), "{outcome}");
    report.configurations.iter().for_each(assert_own_rows);
}

/// The program's own script, with variants that need no package.
#[test]
fn results_of_a_peer_that_are_wrong_only_after_its_trials_fail_the_row() {
    let script = r#"
import json, sys
from types import SimpleNamespace

sys.stdout.flush()
exec(compile(open(sys.argv[1]).read(), sys.argv[1], "exec"))

class Problem:
    def __init__(self, peer, request):
        self.sets, self.ran = [], []

    def check(self, variant):
        if variant.trials:
            assert self.ran[-1] == variant.name, "what was timed has not run once more"
        if variant.name == "late" and variant.trials:
            raise AssertionError("norm_out: 1 of 64 elements is off")
        return 0.75 if variant.trials else 0.5

class Fake(Peer):
    def __init__(self):
        self.device = SimpleNamespace(type="cpu")

    def variants(self, problem, request, notes):
        yield Variant("late", "fused", None)
        yield Variant("right", "fused", None)

    def prepare(self, problem, variant):
        variant.operations = 7

    def trial(self, problem, variant):
        return 2.5

    def run_timed(self, problem, variant):
        problem.ran.append(variant.name)

    def all_agree(self, well):
        return well

reply("measured", **Fake().measure({"warmup": 1, "trials": 2}))
"#;
    let peer = concat!(env!("CARGO_MANIFEST_DIR"), "/../host/program/src/peers/peer.py");
    let output = Command::new("python3").args(["-c", script, peer]).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let last = said.lines().last().unwrap_or_else(|| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    let reply: serde_json::Value = serde_json::from_str(last).unwrap();
    let expected = serde_json::json!([
        {"variant": "late", "kind": "fused", "failed": "after its trials: norm_out: 1 of 64 elements is off"},
        {"variant": "right", "kind": "fused", "max_error_ulp": 0.75, "sum_error": null, "operations_per_trial": 7, "times_us": [2.5, 2.5]},
    ]);
    assert_eq!(reply["rows"], expected, "{said}");
}

#[test]
fn a_peer_that_ends_early_is_a_note_with_its_last_words() {
    let part = r#"
if rank == 0:
    time.sleep(600)
print("some frame\nSomethingError: it broke", file=sys.stderr)
sys.exit(3)
"#;
    let (outcome, report) = play(part, "");
    let why = "rank 1: it exited with status 3: SomethingError: it broke";
    assert_note(&outcome, &report, &format!("torch was not measured from here on: {why}"));
}

#[test]
fn a_peer_that_is_killed_is_a_note() {
    let (outcome, report) = play("os.kill(os.getpid(), 9)", "");
    let notes = report.configurations[0].notes.join("\n");
    assert!(notes.contains("it was killed by signal 9: noise on standard error"), "{notes}");
    outcome.assert_success();
}

#[test]
fn a_peer_that_says_nothing_is_a_note_and_so_is_what_it_started() {
    // Also what it started in turn is ended.
    let part = r#"subprocess.Popen(["sleep", "600"]); time.sleep(600)"#;
    // A little longer than a busy machine takes to start it.
    let (outcome, report) = play(part, "--peer-deadline 4");
    let notes = report.configurations[0].notes.join("\n");
    assert!(notes.contains("torch was not measured"), "{notes}");
    assert!(notes.contains(": it said nothing for 4.0 s"), "{notes}");
    outcome.assert_success();
    assert!(outcome.time < Duration::from_secs(60), "{outcome}");
}

#[test]
fn what_is_no_reply_is_a_note() {
    let (outcome, report) = play(r#"print("Hello!", flush=True); time.sleep(600)"#, "");
    outcome.assert_success();
    let notes = report.configurations[0].notes.join("\n");
    assert!(notes.contains(": it wrote \"Hello!\", which is no reply"), "{notes}");
}

#[test]
fn rows_that_do_not_fit_each_other_or_the_trials_are_a_note() {
    for (part, why) in [
        (r#"return [row(f"torch_{rank}", "fused", [1.0] * 3)], []"#, "its ranks measured different things"),
        (r#"return [row("torch_a", "fused", [1.0] * (3 - rank))], []"#, "it did not time 3 trials"),
        (r#"return [], ["much ado"] * 65"#, "rank 0: it has 65 rows and notes, more than 64"),
    ] {
        let (outcome, report) = play(part, "");
        assert_note(&outcome, &report, &format!("torch was not measured from here on: {why}"));
    }
}

#[test]
fn what_a_peer_says_at_length_is_cut_short() {
    let (outcome, report) = play(r#"return [], ["x" * 100_000] * 64"#, "");
    outcome.assert_success();
    let long = |note: &&String| note.starts_with("xxx");
    for configuration in &report.configurations {
        let cut: Vec<&String> = configuration.notes.iter().filter(long).collect();
        assert!(cut.len() == 64 && cut.iter().all(|note| note.len() < 400), "{:?}", configuration.notes);
    }
}

#[test]
fn times_that_are_none_fail_the_row() {
    let (outcome, _) = play(r#"return [row("torch_zero", "fused", [0.0] * 3)], []"#, "");
    outcome.assert_failure(1, "2 of 12 variants FAILED");
    assert!(outcome.stdout.contains("FAILED torch_zero: a trial took 0 µs"), "{outcome}");
}

#[test]
fn without_the_package_the_report_says_what_to_install() {
    // The program's own script, and a torch that cannot be imported, whatever Python there is.
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("torch.py"), "raise ImportError('not on this machine')\n").unwrap();
    let json = folder.path().join("report.json");
    let mut command = command("python3", "");
    let outcome = run(command.env("PYTHONPATH", folder.path()).arg("--json").arg(&json));
    let report = Report::read(&json);
    let note = report.configurations[0].notes.last().unwrap();
    assert!(note.starts_with("torch was not measured: "), "{note}");
    let remedy = "run `pip install torch`, or name another Python with --python";
    let end = format!("cannot import torch: ImportError: not on this machine: {remedy}");
    assert!(note.ends_with(&end), "{note}");
    assert_note(&outcome, &report, &note.clone());
}

#[test]
fn without_python_the_report_says_how_to_name_one() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("report.json");
    let outcome = run(command("/nonexistent/python", "").arg("--json").arg(&json));
    let why = "cannot start '/nonexistent/python': No such file or directory (os error 2)";
    let note = format!("torch was not measured: rank 0: {why}: name another Python with --python");
    assert_note(&outcome, &Report::read(&json), &note);
}

#[test]
fn no_peer_outlives_a_run_that_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let started = folder.path().join("started");
    let part = format!("open({started:?} + str(rank), 'w')\ntime.sleep(600)");
    let running = Running::start(&mut command(&actor(&folder, &part), ""));
    let both = || [0, 1].iter().all(|rank| Path::new(&format!("{}{rank}", started.display())).exists());
    // Two ranks and their two peers.
    running.wait_for_children(LIMIT, |children| children.len() == 4 && both());
    running.signal(running.pid(), Signal::KILL);
    let outcome = running.wait(LIMIT);
    assert!(outcome.code.is_none() && outcome.survivors.is_empty(), "{outcome}");
}

#[test]
fn a_variable_that_switches_multicast_off_for_one_library_does_so_for_every_peer() {
    const OFF: [(&str, &str); 3] =
        [("NCCL_NVLS_ENABLE", "0"), ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1"), ("NVSHMEM_DISABLE_NVLS", "1")];
    let part = r#"
names = "NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST", "NVSHMEM_DISABLE_NVLS"
return [], [f"multicast: {multicast}, {[os.environ.get(name) for name in names]}"]
"#;
    let folder = tempfile::tempdir().unwrap();
    let (python, json) = (actor(&folder, part), folder.path().join("report.json"));
    let note_with = |set: Option<(&str, &str)>| {
        let mut command = command(&python, "");
        for (name, _) in OFF {
            command.env_remove(name);
        }
        let outcome = run(command.envs(set).arg("--json").arg(&json));
        outcome.assert_success();
        let notes = Report::read(&json).configurations.swap_remove(0).notes;
        notes.into_iter().find(|note| note.starts_with("multicast: ")).unwrap()
    };
    assert_eq!(note_with(None), "multicast: True, [None, None, None]");
    for set in OFF {
        assert_eq!(note_with(Some(set)), "multicast: False, ['0', '1', '1']", "{set:?}");
    }
}

#[test]
fn cold_operations_say_so_everywhere() {
    let folder = tempfile::tempdir().unwrap();
    let part = r#"
assert request["cache_bytes"] > 0
return [row("torch_cold", "standard", [1e12] * 3)], []
"#;
    let python = actor(&folder, part);
    let (json, markdown) = (folder.path().join("report.json"), folder.path().join("report.md"));
    let mut command = command(&python, "--cold");
    let outcome = run(command.arg("--json").arg(&json).arg("--output-file").arg(&markdown));
    outcome.assert_success();
    let report = Report::read(&json);
    assert!(report.settings.cold);
    assert!(outcome.stdout.lines().next().unwrap().ends_with("to warm up, cold caches"), "{outcome}");
    assert!(fs::read_to_string(markdown).unwrap().contains("**Caches:** cold: tensors come from memory"));
    for configuration in &report.configurations {
        assert_own_rows(configuration);
        assert_eq!(configuration.rows.len(), 6);
        let note = "cold: operations find their tensors in memory, not in the cache of ";
        assert!(configuration.notes.iter().any(|known| known.starts_with(note)), "{:?}", configuration.notes);
    }
}
