//! The report of a measurement of links, as tables and as JSON.
//!
//! A figure is the median of its trials, each of which is that of the slowest rank. Rates are in GB/s of 10^9 bytes; the
//! latency of a word is in microseconds.

use std::{fmt::Write, time::SystemTime};

use serde::Serialize;

use super::run::{Broken, LinkOutcome, Measured, Timed, best_gb_s, gb_s};
use crate::{
    backend::links::{Exercise, Measure},
    exit,
    job::options::{BackendChoice, JobOptions},
    report::{grid::grid, machine::Machine},
};

/// Version of the JSON schema. Reports of benchmarks have numbers, so none is taken for the other.
pub const SCHEMA: &str = "links-1";

/// One measurement of the links.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: &'static str,
    /// Version of the program.
    pub version: &'static str,
    /// Time of the measurement: RFC 3339, UTC.
    pub created: String,
    /// The program's arguments, without its name.
    pub command: Vec<String>,
    /// The machine of the run.
    pub machine: Machine,
    /// The backend that ran: `cpu` or `cuda`.
    pub backend: String,
    /// Ranks.
    pub world_size: u32,
    /// The settings of the run.
    pub settings: ReportedSettings,
    /// Notes on the backend for a reader, a sentence each.
    pub notes: Vec<String>,
    /// The measures.
    pub methods: Vec<Method>,
    /// Bytes that a rank sends to another each time.
    pub place_bytes: u64,
    /// The measures of pairs of ranks, one after the other, each for every ordered pair.
    pub pairs: Vec<Pair>,
    /// Puts of every rank to all others at the same time.
    pub together: Vec<Together>,
    /// The all-to-all put bandwidth in GB/s, the best of [`together`](Self::together); `None` if all failed. It is the limit
    /// for an operation's bus bandwidth.
    pub push_gb_s: Option<f64>,
    /// Copies of every rank within its own memory; `None` if a pair of ranks was broken before anything was measured.
    pub copy: Option<Copy>,
    /// The answer in short.
    pub verdict: Verdict,
}

/// The answer whether the ranks reach each other.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verdict {
    /// True if every rank received from every other what that one sent, each time, and every measurement is valid.
    pub passed: bool,
    /// The ordered pairs of ranks.
    pub pairs: u32,
    /// Those of which the second rank did not receive what the first one sent.
    pub broken: Vec<Broken>,
}

impl Verdict {
    /// The exit status of a program that gives this verdict.
    pub fn status(&self) -> u8 {
        if self.passed { exit::SUCCESS } else { exit::FAILURE }
    }
}

/// The options of the run. Every field is always there.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ReportedSettings {
    /// Longest wait for another rank, in seconds.
    pub deadline_seconds: f64,
    /// The backend asked for.
    pub backend: BackendChoice,
    /// True if ranks may share a GPU, which makes times meaningless.
    pub oversubscribe: bool,
    /// Ranks asked for.
    pub nproc_per_node: Option<u32>,
}

/// A measure and its method.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Method {
    /// The measure.
    pub measure: Measure,
    /// The unit of its figures.
    pub unit: Unit,
    /// The method, in words.
    pub how: &'static str,
}

/// The unit of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Unit {
    /// Microseconds.
    #[serde(rename = "us")]
    Microseconds,
    /// 10^9 bytes a second.
    #[serde(rename = "gb_s")]
    GigabytesPerSecond,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Unit::Microseconds => "µs",
            Unit::GigabytesPerSecond => "GB/s",
        }
    }
}

/// A measure of two ranks.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Pair {
    /// The measure.
    pub measure: Measure,
    /// The rank that the word or the bytes come from.
    pub from: u32,
    /// The rank that they go to.
    pub to: u32,
    /// The figures.
    pub outcome: LinkOutcome,
}

/// Puts of all ranks at the same time.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Together {
    /// Blocks of each rank's grid; `None` if the backend has no blocks.
    pub blocks: Option<u32>,
    /// The figures of the bytes out of the slowest rank.
    pub outcome: LinkOutcome,
}

/// Copies within a rank's own memory.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Copy {
    /// Bytes of a copy.
    pub bytes: u64,
    /// Microseconds of the slowest rank.
    pub time_us: f64,
    /// Sum of bytes read and bytes written, in GB/s.
    pub gb_s: f64,
}

fn cell(figure: f64, unit: Unit) -> String {
    match unit {
        Unit::Microseconds => format!("{figure:.2}"),
        Unit::GigabytesPerSecond => format!("{figure:.1}"),
    }
}

fn outcome_cell(outcome: &LinkOutcome, unit: Unit) -> String {
    outcome.median().map_or_else(|| "FAILED".to_owned(), |figure| cell(figure, unit))
}

impl Report {
    /// A report of a measurement that has just ended. `command` is the program's arguments without its name.
    pub fn new(
        command: Vec<String>,
        backend: &str,
        world_size: u32,
        options: &JobOptions,
        machine: Machine,
        notes: Vec<String>,
        measured: &Measured,
    ) -> Self {
        let methods = measured.methods.iter().map(|&(measure, how)| {
            let unit = if measure == Measure::Word { Unit::Microseconds } else { Unit::GigabytesPerSecond };
            Method { measure, unit, how }
        });
        let pair = |(measure, timed): &(Measure, Timed)| {
            let (Exercise::Word { from, to } | Exercise::Push { from, to, .. } | Exercise::Pull { from, to }) =
                timed.exercise
            else {
                return None;
            };
            Some(Pair { measure: *measure, from, to, outcome: LinkOutcome::of(timed) })
        };
        let together = |timed: &Timed| match timed.exercise {
            Exercise::PushAll { blocks } => Some(Together { blocks, outcome: LinkOutcome::of(timed) }),
            _ => None,
        };
        let copy = |(bytes, time_us)| Copy { bytes, time_us, gb_s: gb_s(2 * bytes, time_us) };
        let mut report = Report {
            schema: SCHEMA,
            version: env!("CARGO_PKG_VERSION"),
            created: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            command,
            machine,
            backend: backend.to_owned(),
            world_size,
            settings: ReportedSettings {
                deadline_seconds: options.deadline_seconds,
                backend: options.backend,
                oversubscribe: options.oversubscribe,
                nproc_per_node: options.nproc_per_node,
            },
            notes,
            methods: methods.collect(),
            place_bytes: measured.place_bytes,
            pairs: measured.pairs.iter().filter_map(pair).collect(),
            together: measured.together.iter().filter_map(together).collect(),
            push_gb_s: best_gb_s(&measured.together),
            copy: measured.copy.map(copy),
            verdict: Verdict {
                passed: false,
                pairs: world_size * (world_size - 1),
                broken: measured.broken.clone(),
            },
        };
        report.verdict.passed = measured.broken.is_empty() && report.failures().is_empty();
        report
    }

    /// The report as indented JSON, with a newline at the end.
    pub fn to_json(&self) -> serde_json::Result<String> {
        serde_json::to_string_pretty(self).map(|text| text + "\n")
    }

    /// The failures, a line each.
    pub fn failures(&self) -> Vec<String> {
        let pairs = self.pairs.iter().filter_map(|pair| {
            let Pair { measure, from, to, outcome } = pair;
            Some(format!("{}, rank {from} to rank {to}: {}", measure.name(), outcome.reason()?))
        });
        let together = self.together.iter().filter_map(|together| {
            Some(format!("{}: {}", together_name(together.blocks), together.outcome.reason()?))
        });
        pairs.chain(together).collect()
    }

    /// The tables, at most `width` columns wide, followed by the methods and the verdict.
    pub fn render(&self, width: u16) -> String {
        let mut out = String::new();
        if self.copy.is_some() {
            self.render_figures(&mut out, width);
        }
        let _ = writeln!(out, "verdict: {}", self.conclusion());
        out
    }

    /// The verdict as a sentence.
    fn conclusion(&self) -> String {
        let Verdict { passed, pairs, broken } = &self.verdict;
        let named: Vec<String> = broken
            .iter()
            .map(|Broken { from, to, reason }| format!("rank {from} to rank {to} ({reason})"))
            .collect();
        match (&named[..], passed, &self.copy) {
            ([], true, _) => {
                format!("passed: each of the {pairs} pairs of ranks received what was sent, every time")
            }
            ([], false, _) => "FAILED: the bytes arrived, but not every measurement is valid".to_owned(),
            (named, _, copy) => format!(
                "FAILED: {} of {pairs} pairs of ranks did not receive what was sent{}: {}",
                named.len(),
                if copy.is_none() { ", and nothing was measured" } else { "" },
                named.join(", ")
            ),
        }
    }

    fn render_figures(&self, out: &mut String, width: u16) {
        let of_pairs: Vec<&Method> =
            self.methods.iter().filter(|method| method.measure.is_of_pairs()).collect();
        let mut header = vec!["ranks".to_owned()];
        header.extend(
            of_pairs.iter().map(|method| format!("{} {}", method.measure.name(), method.unit.name())),
        );
        let header: Vec<&str> = header.iter().map(String::as_str).collect();
        let mut rows: Vec<Vec<String>> = Vec::new();
        for from in 0..self.world_size {
            for to in (0..self.world_size).filter(|&to| to != from) {
                let mut row = vec![format!("{from} to {to}")];
                row.extend(of_pairs.iter().map(|method| {
                    let is_here =
                        |pair: &&Pair| (pair.measure, pair.from, pair.to) == (method.measure, from, to);
                    let pair = self.pairs.iter().find(is_here);
                    pair.map_or_else(|| "-".to_owned(), |pair| outcome_cell(&pair.outcome, method.unit))
                }));
                rows.push(row);
            }
        }
        let _ = write!(out, "{}\n\n", grid(&header, rows, width));

        let unit = Unit::GigabytesPerSecond;
        let mut rows: Vec<Vec<String>> = Vec::new();
        for Together { blocks, outcome } in &self.together {
            let (min, max) = match outcome {
                LinkOutcome::Verified { min, max, .. } => (cell(*min, unit), cell(*max, unit)),
                LinkOutcome::Failed { .. } => ("-".to_owned(), "-".to_owned()),
            };
            rows.push(vec![together_name(*blocks), outcome_cell(outcome, unit), min, max]);
        }
        let none = || "-".to_owned();
        if let Some(copy) = &self.copy {
            rows.push(vec![Measure::Copy.name().to_owned(), cell(copy.gb_s, unit), none(), none()]);
        }
        let header = ["together", "GB/s", "min", "max"];
        let _ = write!(out, "{}\n\n", grid(&header, rows, width));

        for Method { measure, unit, how } in &self.methods {
            let _ = writeln!(out, "{}, {}: {how}", measure.name(), unit.name());
        }
        let trials = self.pairs.iter().find_map(|pair| match &pair.outcome {
            LinkOutcome::Verified { times_us, .. } => Some(times_us.len()),
            LinkOutcome::Failed { .. } => None,
        });
        let trials = trials.unwrap_or(0);
        let _ = writeln!(
            out,
            "Each figure is the median of {trials} trials; GB are 10^9 bytes. Received bytes were compared with those sent."
        );
        for failure in self.failures() {
            let _ = writeln!(out, "FAILED {failure}");
        }
        if let Some(rate) = self.push_gb_s {
            let _ = writeln!(out, "all-to-all put bandwidth: {rate:.1} GB/s out of every rank");
        }
    }
}

fn together_name(blocks: Option<u32>) -> String {
    let name = Measure::PushAll.name();
    blocks.map_or_else(|| name.to_owned(), |blocks| format!("{name}, {blocks} blocks"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timed(exercise: Exercise, bytes: u64, times_us: Result<&[f64], &str>) -> Timed {
        Timed { exercise, bytes, times_us: times_us.map(<[f64]>::to_vec).map_err(str::to_owned) }
    }

    /// Two ranks with GPUs; one push arrived wrong.
    fn report() -> Report {
        let (push, pull) =
            (|from, to| Exercise::Push { from, to, polled: false }, |from, to| Exercise::Pull { from, to });
        let blocks = |blocks| Exercise::PushAll { blocks: Some(blocks) };
        let word = |from, to| Exercise::Word { from, to };
        let measured = Measured {
            methods: vec![
                (Measure::Word, "there and back"),
                (Measure::Push, "stores"),
                (Measure::Pull, "loads"),
                (Measure::PushAll, "stores of all"),
                (Measure::Copy, "a copy"),
            ],
            place_bytes: 1_000_000,
            pairs: vec![
                (Measure::Word, timed(word(0, 1), 0, Ok(&[0.625, 0.5, 9.0]))),
                (Measure::Word, timed(word(1, 0), 0, Ok(&[0.75, 0.75, 0.75]))),
                (Measure::Push, timed(push(0, 1), 1_000_000, Ok(&[2.5, 2.0, 4.0]))),
                (Measure::Push, timed(push(1, 0), 1_000_000, Err("rank 0: byte 16 is not what it was"))),
                (Measure::Pull, timed(pull(0, 1), 1_000_000, Ok(&[4.0, 4.0, 4.0]))),
                (Measure::Pull, timed(pull(1, 0), 1_000_000, Ok(&[5.0, 0.0, 5.0]))),
            ],
            together: vec![
                timed(blocks(16), 1_000_000, Ok(&[10.0, 10.0, 10.0])),
                timed(blocks(264), 1_000_000, Ok(&[2.5, 2.5, 5.0])),
            ],
            copy: Some((1_000_000, 0.5)),
            broken: vec![Broken { from: 1, to: 0, reason: "byte 16 is not what it was".to_owned() }],
        };
        reported(&measured)
    }

    fn reported(measured: &Measured) -> Report {
        let command = vec!["links".to_owned()];
        Report::new(
            command,
            "cuda",
            2,
            &JobOptions::default(),
            Machine::here(),
            vec!["a note".to_owned()],
            measured,
        )
    }

    /// Two ranks of which nothing was measured yet.
    fn nothing(broken: Vec<Broken>) -> Measured {
        let (pairs, together) = (Vec::new(), Vec::new());
        Measured { methods: Vec::new(), place_bytes: 64, pairs, together, copy: None, broken }
    }

    #[test]
    fn the_form_is_exact() {
        let expected = "\
ranks   word    push    pull
          µs    GB/s    GB/s
----------------------------
0 to 1  0.62   400.0   250.0
1 to 0  0.75  FAILED  FAILED

together                          GB/s    min    max
----------------------------------------------------
all-to-all put, 16 blocks        100.0  100.0  100.0
all-to-all put, 264 blocks       400.0  200.0  400.0
copy in each rank's own memory  4000.0      -      -

word, µs: there and back
push, GB/s: stores
pull, GB/s: loads
all-to-all put, GB/s: stores of all
copy in each rank's own memory, GB/s: a copy
Each figure is the median of 3 trials; GB are 10^9 bytes. Received bytes were compared with those sent.
FAILED push, rank 1 to rank 0: rank 0: byte 16 is not what it was
FAILED pull, rank 1 to rank 0: a trial took 0 µs, not a valid duration
all-to-all put bandwidth: 400.0 GB/s out of every rank
verdict: FAILED: 1 of 2 pairs of ranks did not receive what was sent: rank 1 to rank 0 (byte 16 is not what it was)
";
        assert_eq!(report().render(100), expected);
    }

    #[test]
    fn json_has_every_figure_its_unit_and_how_it_came_about() {
        let report = report();
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["schema"], "links-1");
        let method = serde_json::json!({"measure": "word", "unit": "us", "how": "there and back"});
        assert_eq!(json["methods"][0], method);
        assert_eq!(json["methods"][3]["unit"], "gb_s");
        assert_eq!((&json["push_gb_s"], &json["place_bytes"]), (&400.0.into(), &1_000_000.into()));
        let push = serde_json::json!({"measure": "push", "from": 0, "to": 1, "outcome":
            {"status": "verified", "median": 400.0, "min": 250.0, "max": 500.0, "times_us": [2.5, 2.0, 4.0]}});
        assert_eq!(json["pairs"][2], push);
        let failed = serde_json::json!({"status": "failed", "reason": "rank 0: byte 16 is not what it was"});
        assert_eq!(json["pairs"][3]["outcome"], failed);
        assert_eq!(json["together"][1]["blocks"], 264);
        assert_eq!(json["copy"], serde_json::json!({"bytes": 1_000_000, "time_us": 0.5, "gb_s": 4000.0}));
        assert_eq!(
            json["verdict"],
            serde_json::json!({"passed": false, "pairs": 2, "broken": [
                {"from": 1, "to": 0, "reason": "byte 16 is not what it was"}]})
        );
        assert!(report.to_json().unwrap().ends_with("}\n"));
    }

    #[test]
    fn the_verdict_passes_only_if_every_pair_and_every_measurement_does() {
        let measured = Measured { copy: Some((64, 0.5)), ..nothing(Vec::new()) };
        let report = reported(&measured);
        assert_eq!((report.verdict.passed, report.verdict.status()), (true, 0));
        let line = "verdict: passed: each of the 2 pairs of ranks received what was sent, every time\n";
        assert!(report.render(100).ends_with(line), "{}", report.render(100));

        let word = Exercise::Word { from: 0, to: 1 };
        let pairs = vec![(Measure::Word, timed(word, 0, Ok(&[0.0])))];
        let report = reported(&Measured { pairs, ..measured });
        assert_eq!((report.verdict.passed, report.verdict.status()), (false, 1));
        assert!(
            report.render(100).ends_with("FAILED: the bytes arrived, but not every measurement is valid\n")
        );
    }

    #[test]
    fn a_pair_that_is_broken_from_the_start_is_the_whole_report() {
        let broken = Broken { from: 0, to: 1, reason: "nothing came".to_owned() };
        let report = reported(&nothing(vec![broken]));
        assert_eq!((report.verdict.passed, report.verdict.status()), (false, 1));
        assert_eq!(
            report.render(100),
            "verdict: FAILED: 1 of 2 pairs of ranks did not receive what was sent, and nothing was measured: rank 0 to \
             rank 1 (nothing came)\n"
        );
        assert_eq!(serde_json::to_value(&report).unwrap()["copy"], serde_json::Value::Null);
    }

    #[test]
    fn no_benchmark_takes_it_for_its_own_report() {
        let error = crate::commands::bench::report::json::parse(&report().to_json().unwrap())
            .unwrap_err()
            .to_string();
        assert_eq!(error, "its schema is \"links-1\", this program reads schema 1");
    }

    #[test]
    fn the_put_bandwidth_is_the_best_that_was_verified() {
        let all = |outcomes: &[Result<&[f64], &str>]| {
            let timed =
                outcomes.iter().map(|&times| timed(Exercise::PushAll { blocks: None }, 1_000_000, times));
            best_gb_s(&timed.collect::<Vec<_>>())
        };
        assert_eq!(all(&[Ok(&[10.0]), Err("wrong"), Ok(&[5.0]), Ok(&[20.0])]), Some(200.0));
        assert_eq!(all(&[Err("wrong"), Ok(&[f64::NAN])]), None);
    }
}
