//! `--compare`: the comparison of an earlier report with this run.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
    thread,
};

use fused_collective_tests::{Outcome, bench, command, report::Report, run};
use serde_json::{Value, json};
use tempfile::TempDir;

const OPTIONS: &str = "--num-tokens 2 3 --hidden-dim 64 --quant-modes none --trials 3 --warmup 0";
const ONESHOT: &str = "fused_allreduce_rmsnorm_oneshot";
const CUSTOM: &str = "standard_allreduce_custom_rms_norm";
/// A factor larger than the difference of any two runs.
const FAR: f64 = 1e6;

/// An earlier report of `OPTIONS`, as JSON.
fn earlier() -> Value {
    static EARLIER: OnceLock<String> = OnceLock::new();
    let text = EARLIER.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("earlier.json");
        run(bench(OPTIONS).arg("--json").arg(&file)).assert_success();
        fs::read_to_string(file).unwrap()
    });
    serde_json::from_str(text).unwrap()
}

/// Multiplies the times of one row of one configuration.
fn scale(report: &mut Value, configuration: usize, variant: &str, factor: f64) {
    let rows = report["configurations"][configuration]["rows"].as_array_mut().unwrap();
    let row = rows.iter_mut().find(|row| row["variant"] == variant).unwrap();
    let outcome = &mut row["outcome"];
    let scaled = |time: &Value| json!(time.as_f64().unwrap() * factor);
    outcome["times_us"] = outcome["times_us"].as_array().unwrap().iter().map(scaled).collect();
    for figure in ["median_us", "min_us", "p99_us"] {
        outcome["figures"][figure] = scaled(&outcome["figures"][figure]);
    }
}

/// A run that is compared with `earlier` and writes a report of its own.
struct Compared {
    folder: TempDir,
    outcome: Outcome,
}

impl Compared {
    fn run(options: &str, earlier: &Value) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("earlier.json"), earlier.to_string()).unwrap();
        let mut bench = bench(options);
        bench.current_dir(folder.path()).args(["--json", "now.json", "--compare", "earlier.json"]);
        let outcome = run(&mut bench);
        assert!(outcome.survivors.is_empty(), "{outcome}");
        Compared { folder, outcome }
    }

    fn report_file(&self) -> PathBuf {
        self.folder.path().join("now.json")
    }

    /// The text below the tables of the run.
    fn comparison(&self) -> &str {
        let begin = "Compared with the earlier report; a ratio above 1 is slower\n";
        self.outcome.stdout.split_once(begin).unwrap_or_else(|| panic!("{}", self.outcome)).1
    }
}

fn with_tolerance(percent: f64) -> String {
    format!("{OPTIONS} --tolerance {percent}")
}

#[test]
fn outputs_in_place_are_measured_said_everywhere_and_not_compared_with_outputs_beside() {
    let folder = tempfile::tempdir().unwrap();
    let (json, markdown) = (folder.path().join("report.json"), folder.path().join("report.md"));
    let options = "--num-tokens 3 --hidden-dim 64 --dtypes float16 --residual sharded --trials 2 --in-place";
    let outcome = run(bench(options).arg("--json").arg(&json).arg("--output-file").arg(&markdown));
    outcome.assert_success();
    let report = Report::read(&json);
    assert!(report.settings.in_place);
    assert!(outcome.stdout.lines().next().unwrap().ends_with(" to warm up, in place"), "{outcome}");
    assert!(fs::read_to_string(markdown).unwrap().contains("**Outputs:** in place, of fused variants"));
    for configuration in &report.configurations {
        let mut notes = configuration.notes.iter();
        assert!(notes.any(|note| note.starts_with("in place: ")), "{:?}", configuration.notes);
        let fused = configuration.rows.iter().filter(|row| row.variant.starts_with("fused_"));
        assert_eq!(fused.count(), 3);
    }
    let outcome = run(bench(&options.replace(" --in-place", "")).arg("--compare").arg(&json));
    outcome.assert_failure(
        2,
        "--compare: the earlier report is of another configuration (outputs in place; this run: outputs beside inputs): \
         use one measured the same way",
    );
}

#[test]
fn every_row_is_shown_with_both_times_and_their_ratio() {
    let compared = Compared::run(&with_tolerance(FAR), &earlier());
    compared.outcome.assert_success();
    let before: Report = serde_json::from_value(earlier()).unwrap();
    let now = Report::read(&compared.report_file());
    let mut lines = compared.comparison().lines();
    let mut next = || lines.next().expect("another line");
    for (before, now) in before.configurations.iter().zip(&now.configurations) {
        assert_eq!((next(), next()), ("", now.title().as_str()));
        let words = |line: &'_ str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(words(next()), ["Operation", "earlier", "now", "ratio"]);
        assert_eq!(words(next()), ["µs", "µs"]);
        assert!(next().chars().all(|c| c == '-'));
        for (before, now) in before.rows.iter().zip(&now.rows) {
            let (then, current) = (before.verified().figures.median_us, now.verified().figures.median_us);
            let ratio = current / then;
            assert_eq!(
                words(next()),
                [now.variant.clone(), format!("{then:.2}"), format!("{current:.2}"), format!("{ratio:.3}")]
            );
        }
    }
    assert_eq!((next(), next()), ("", "0 of 10 rows lost more than 1000000%"));
    assert_eq!(lines.next(), None);
}

#[test]
fn rows_that_lost_more_than_the_tolerance_are_named_and_fail_the_run() {
    let mut earlier = earlier();
    scale(&mut earlier, 0, ONESHOT, 1.0 / FAR);
    scale(&mut earlier, 1, CUSTOM, 1.0 / FAR);
    // More than any noise, less than what these rows lost.
    let compared = Compared::run(&with_tolerance(100_000.0), &earlier);
    assert_eq!(
        (compared.outcome.code, compared.outcome.stderr.as_str()),
        (Some(1), ""),
        "{}",
        compared.outcome
    );
    let lines: Vec<&str> = compared
        .comparison()
        .lines()
        .filter(|line| line.contains("SLOWER") || line.contains("lost"))
        .collect();
    let [first, second, verdict] = lines[..] else { panic!("{lines:?}") };
    for (line, variant, tokens) in [(first, ONESHOT, 2), (second, CUSTOM, 3)] {
        let row = format!("{variant} (num_tokens={tokens}, dtype=bfloat16, with residual, quant=none)");
        assert!(line.starts_with(&format!("SLOWER: {row} is ")), "{line}");
        assert!(line.ends_with(" times as slow as before"), "{line}");
    }
    assert_eq!(verdict, "2 of 10 rows lost more than 100000%");
    // The run itself is complete, and so are its files.
    assert_eq!(Report::read(&compared.report_file()).configurations.len(), 2);
}

#[test]
fn a_loss_within_the_tolerance_is_none() {
    let mut earlier = earlier();
    scale(&mut earlier, 0, ONESHOT, 1.0 / FAR);
    // A million times is a hundred million percent; noise adds to it.
    let compared = Compared::run(&with_tolerance(1e12), &earlier);
    compared.outcome.assert_success();
    assert!(
        compared.comparison().ends_with("0 of 10 rows lost more than 1000000000000%\n"),
        "{}",
        compared.outcome
    );
}

#[test]
fn rows_that_got_faster_are_no_loss() {
    let mut earlier = earlier();
    for configuration in [0, 1] {
        for row in earlier["configurations"][configuration]["rows"].as_array().unwrap().clone() {
            scale(&mut earlier, configuration, row["variant"].as_str().unwrap(), FAR);
        }
    }
    let compared = Compared::run(&with_tolerance(0.1), &earlier);
    compared.outcome.assert_success();
    assert!(compared.comparison().ends_with("0 of 10 rows lost more than 0.1%\n"), "{}", compared.outcome);
}

#[test]
fn rows_without_a_counterpart_are_named_and_cost_nothing() {
    let mut earlier = earlier();
    earlier["configurations"].as_array_mut().unwrap().pop();
    earlier["configurations"][0]["rows"].as_array_mut().unwrap().retain(|row| row["variant"] != ONESHOT);
    let compared = Compared::run(&with_tolerance(FAR), &earlier);
    compared.outcome.assert_success();
    let lines: Vec<&str> =
        compared.comparison().lines().filter(|line| line.starts_with("not compared: ")).collect();
    let expected = [
        format!(
            "not compared: {ONESHOT} (num_tokens=2, dtype=bfloat16, with residual, quant=none): not in the earlier report"
        ),
        "not compared: num_tokens=3, dtype=bfloat16, with residual, quant=none: not in the earlier report"
            .to_owned(),
    ];
    assert_eq!(lines, expected);
    assert!(compared.comparison().ends_with("0 of 4 rows lost more than 1000000%\n"), "{}", compared.outcome);
}

/// A run that replaces the report that it is compared with, which is `older`, or may not.
fn replaced(options: &str, older: &Value) -> (Outcome, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("report.json"), older.to_string()).unwrap();
    let mut bench = bench(options);
    bench.args(["--json", "report.json", "--compare", "./report.json"]).current_dir(folder.path());
    (run(&mut bench), folder)
}

#[test]
fn a_report_replaces_the_earlier_one_only_if_it_lost_nothing() {
    let mut older = earlier();
    older["created"] = "2020-02-02T02:02:02Z".into();
    let (outcome, folder) = replaced(&with_tolerance(FAR), &older);
    outcome.assert_success();
    assert_ne!(Report::read(&folder.path().join("report.json")).created, "2020-02-02T02:02:02Z");
    assert_eq!(files(folder.path()), ["report.json"]);

    scale(&mut older, 0, ONESHOT, 1.0 / FAR);
    let (outcome, folder) = replaced(&with_tolerance(100_000.0), &older);
    outcome.assert_failure(1, "the earlier report stays as it is, and this one is in 'report.json.new'");
    assert_eq!(fs::read_to_string(folder.path().join("report.json")).unwrap(), older.to_string());
    let fresh = Report::read(&folder.path().join("report.json.new"));
    assert_ne!(fresh.created, "2020-02-02T02:02:02Z");
}

#[test]
fn a_report_of_another_machine_is_compared_with_a_word_on_it() {
    let mut older = earlier();
    let cores = older["machine"]["cores"].as_u64().unwrap();
    older["machine"]["cores"] = (cores + 1).into();
    let compared = Compared::run(&with_tolerance(FAR), &older);
    compared.outcome.assert_success();
    let note = format!(
        "note: the earlier report is of another machine: {} cores then, {cores} cores now\n",
        cores + 1
    );
    assert!(compared.comparison().starts_with(&note), "{}", compared.outcome);
}

#[test]
fn a_pipe_without_another_end_is_given_up_by_the_deadline() {
    let folder = tempfile::tempdir().unwrap();
    assert!(Command::new("mkfifo").arg(folder.path().join("pipe")).status().unwrap().success());
    for option in ["--compare", "--from"] {
        let mut bench = command(&["bench", option, "pipe", "--deadline", "0.5"]);
        let outcome = run(bench.current_dir(folder.path()));
        outcome.assert_failure(2, &format!("{option}: cannot use 'pipe': nobody wrote to it for 0.5 s"));
    }
    // Nor does one that nobody reads hold up a run: the ranks that wait for the file do not give up first.
    let mut bench = bench(&format!("{OPTIONS} --deadline 12 --json pipe"));
    let outcome = run(bench.current_dir(folder.path()));
    outcome.assert_failure(1, "cannot write 'pipe': nobody reads from it for 6 s");
}

/// The program must refuse the comparison before anything runs, with this line.
#[track_caller]
fn refused(options: &str, earlier: &Value, line: &str) {
    let Compared { folder, outcome } = Compared::run(options, earlier);
    outcome.assert_failure(2, &format!("--compare: {line}: use one measured the same way"));
    assert_eq!(outcome.stdout, "");
    assert_eq!(files(folder.path()), ["earlier.json"]);
}

fn files(folder: &Path) -> Vec<String> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_report_of_another_configuration_is_refused_before_anything_runs() {
    let other = |then: &str, now: &str| {
        format!("the earlier report is of another configuration ({then}; this run: {now})")
    };
    let report = earlier();
    refused(&format!("{OPTIONS} --nproc-per-node 3"), &report, &other("2 ranks", "3 ranks"));
    refused(&OPTIONS.replace("64", "128"), &report, &other("hidden size 64", "hidden size 128"));
    refused(&format!("{OPTIONS} --no-residual"), &report, &other("with residual", "no residual"));
    let nothing = "the earlier report has none of this run's tokens, dtypes and quantization modes";
    refused(&format!("{OPTIONS} --dtypes float32"), &report, nothing);
    refused(&OPTIONS.replace("none", "fp8"), &report, nothing);
    refused(&OPTIONS.replace("2 3", "4"), &report, nothing);
    let mut elsewhere = earlier();
    elsewhere["backend"] = "cuda".into();
    refused(OPTIONS, &elsewhere, &other("backend cuda", "backend cpu"));
}

#[test]
fn an_earlier_report_may_come_through_a_pipe() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("earlier");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let text = earlier().to_string();
    // A second reader would wait for a writer that never comes.
    let (named, written) = (pipe.clone(), text.clone());
    let writer = thread::spawn(move || fs::write(named, written));
    let outcome = run(bench(OPTIONS).arg("--compare").arg(&pipe).args(["--tolerance", "100000000"]));
    outcome.assert_success();
    assert!(outcome.stdout.contains("0 of 10 rows lost more than"), "{outcome}");
    writer.join().unwrap().unwrap();
}
