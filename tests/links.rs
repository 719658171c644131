//! `fused-collective links` on real rank processes.
//!
//! The JSON schema is written a second time, which finds a field that is renamed, added or left out by mistake. Wrong bytes
//! come from a backend that reports them.

use std::{
    collections::HashSet,
    fs,
    process::{Command, id},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
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
        links::{Exercise, Links, Measure},
        problem::{Problem, Tensor},
        steps::Step,
    },
    commands::{
        bench::{
            self,
            report::{data, json},
        },
        links::{
            report::Report as LinksReport,
            run::{Broken, run as measure_links},
        },
    },
    job::options::JobOptions,
    measurement::Kind,
    peers::Peers,
    quant_mode::QuantMode,
    report::{machine::Machine as OwnMachine, progress::Progress},
};
use fused_collective_core::plan::Limits;
use fused_collective_tests::{LIMIT, Running, command, forward, report::Machine, run};
use rustix::process::Signal;
use serde::Deserialize;

fn links(options: &str) -> Command {
    let mut command = command(&["links", "--backend", "cpu"]);
    command.args(options.split_whitespace());
    if !options.contains("--deadline") {
        command.args(["--deadline", "60"]);
    }
    command
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Report {
    schema: String,
    version: String,
    created: String,
    command: Vec<String>,
    machine: Machine,
    backend: String,
    world_size: u32,
    settings: Settings,
    notes: Vec<String>,
    methods: Vec<Method>,
    place_bytes: u64,
    pairs: Vec<Pair>,
    together: Vec<Together>,
    push_gb_s: Option<f64>,
    copy: Copy,
    verdict: Verdict,
}

#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Verdict {
    passed: bool,
    pairs: u32,
    broken: Vec<serde_json::Value>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    deadline_seconds: f64,
    backend: String,
    oversubscribe: bool,
    nproc_per_node: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Method {
    measure: String,
    unit: String,
    how: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pair {
    measure: String,
    from: u32,
    to: u32,
    outcome: Outcome,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Together {
    blocks: Option<u32>,
    outcome: Outcome,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Copy {
    bytes: u64,
    time_us: f64,
    gb_s: f64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Outcome {
    status: String,
    median: f64,
    min: f64,
    max: f64,
    times_us: Vec<f64>,
}

impl Outcome {
    /// Checks the figures against the times.
    #[track_caller]
    fn check(&self, unit: &str, bytes: u64) {
        assert_eq!(self.status, "verified");
        let mut times = self.times_us.clone();
        times.sort_by(f64::total_cmp);
        assert!(times.len() % 2 == 1 && times[0] > 0.0, "{times:?}");
        let (first, middle, last) = (times[0], times[times.len() / 2], times[times.len() - 1]);
        let near = |figure: f64, expected: f64| assert!((figure / expected - 1.0).abs() < 1e-9, "{self:?}");
        if unit == "us" {
            near(self.min, first);
            near(self.median, middle);
            near(self.max, last);
        } else {
            let rate = |time: f64| bytes as f64 / (time * 1e-6) / 1e9;
            near(self.max, rate(first));
            near(self.median, rate(middle));
            near(self.min, rate(last));
        }
    }
}

#[test]
fn the_links_of_two_and_of_three_ranks_are_measured_each_way() {
    for ranks in [2, 3] {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("links.json");
        let outcome = run(links(&format!("--nproc-per-node {ranks}")).arg("--json").arg(&file));
        outcome.assert_success();
        let Report {
            schema,
            version,
            created,
            command,
            machine,
            backend,
            world_size,
            settings,
            notes,
            methods,
            place_bytes,
            pairs,
            together,
            push_gb_s,
            copy,
            verdict,
        } = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();

        assert_eq!((schema.as_str(), backend.as_str(), world_size), ("links-1", "cpu", ranks));
        assert_eq!((version.as_str(), created.len()), (env!("CARGO_PKG_VERSION"), 20));
        assert_eq!(command[..3], ["links", "--backend", "cpu"]);
        assert!(machine.cores > 0 && machine.rank_cpus.len() == ranks as usize);
        // Where there is a CPU for each, they have them.
        let alone = machine.rank_cpus.iter().collect::<HashSet<_>>().len() == ranks as usize;
        assert_eq!(alone, !notes.iter().any(|note| note.starts_with("MORE RANKS THAN CPUS")), "{notes:?}");
        assert_eq!((settings.backend.as_str(), settings.deadline_seconds), ("cpu", 60.0));
        assert_eq!((settings.oversubscribe, settings.nproc_per_node), (false, Some(ranks)));

        let names: Vec<&str> = methods.iter().map(|method| method.measure.as_str()).collect();
        assert_eq!(names, ["word", "push", "polled_push", "pull", "push_all", "copy"]);
        assert!(methods.iter().all(|method| !method.how.is_empty()));
        let mut measured = pairs.iter();
        for method in &methods[..4] {
            assert_eq!(method.unit, if method.measure == "word" { "us" } else { "gb_s" });
            for from in 0..ranks {
                for to in (0..ranks).filter(|&to| to != from) {
                    let pair = measured.next().unwrap();
                    assert_eq!((&pair.measure, pair.from, pair.to), (&method.measure, from, to));
                    pair.outcome.check(&method.unit, place_bytes);
                    let name = method.measure.replace('_', " ");
                    assert!(outcome.stdout.contains(&format!("\n{from} to {to} ")), "{name}: {outcome}");
                    assert!(outcome.stdout.contains(&format!("\n{name}, ")), "{outcome}");
                }
            }
        }
        assert!(measured.next().is_none());
        let [all] = &together[..] else { panic!("{together:?}") };
        all.outcome.check("gb_s", place_bytes * u64::from(ranks - 1));
        assert_eq!((all.blocks, push_gb_s), (None, Some(all.outcome.median)));
        assert!((copy.gb_s / (2e-3 * copy.bytes as f64 / copy.time_us) - 1.0).abs() < 1e-9, "{copy:?}");
        let pairs = ranks * (ranks - 1);
        assert_eq!(verdict, Verdict { passed: true, pairs, broken: Vec::new() });
        let lines = format!(
            "all-to-all put bandwidth: {:.1} GB/s out of every rank\n\
             verdict: passed: each of the {pairs} pairs of ranks received what was sent, every time\n",
            all.outcome.median
        );
        assert!(outcome.stdout.ends_with(&lines), "{outcome}");
    }
}

/// A run of four ranks that has just begun. It takes a while on a few processors.
fn begun(deadline: u64) -> (Running, Instant) {
    let running = Running::start(&mut links(&format!("--nproc-per-node 4 --deadline {deadline}")));
    running.wait_for_stdout("cpu backend, 4 ranks", LIMIT);
    (running, Instant::now())
}

#[test]
fn a_killed_rank_ends_the_measurement_at_once() {
    for rank in [0, 3] {
        let (running, lost) = begun(60);
        running.signal(running.wait_for_rank(rank, LIMIT), Signal::KILL);
        let outcome = running.wait(LIMIT);
        assert!(lost.elapsed() < Duration::from_secs(20), "{outcome}");
        outcome.assert_failure(1, &format!("rank {rank} was killed by signal 9 (SIGKILL)"));
    }
}

#[test]
fn a_stopped_rank_ends_the_measurement_after_the_deadline() {
    let (running, lost) = begun(3);
    running.signal(running.wait_for_rank(2, LIMIT), Signal::STOP);
    let outcome = running.wait(LIMIT);
    assert!(lost.elapsed() < Duration::from_secs(30), "{outcome}");
    assert_eq!(outcome.code, Some(1), "{outcome}");
    assert!(outcome.stderr.contains("rank 2") && outcome.stderr.lines().count() == 1, "{outcome}");
    assert!(outcome.survivors.is_empty(), "{outcome}");
}

#[test]
fn a_file_that_cannot_be_written_is_found_before_anything_runs() {
    let outcome = run(links("").args(["--json", "/nonexistent/links.json"]));
    outcome.assert_failure(
        2,
        "--json: cannot write '/nonexistent/links.json': directory '/nonexistent' does not exist",
    );
    assert_eq!(outcome.stdout, "");
}

/// The hidden size of the benchmark.
const HIDDEN: u64 = 48;

/// The CPU backend that claims to have GPUs. Its links on rank 1 report wrong bytes of `harmed`. If that is an
/// [`Exercise::Reach`], the sender stores nothing instead.
struct Faulty {
    engine: Engine,
    harmed: Exercise,
}

impl Collective for Faulty {
    forward!(engine: prepare write fill digest read run time copy_time find_stray_write set_cold limits cache_bytes);

    fn links<'b>(&'b mut self, group: &'b Group) -> Result<Box<dyn Links + 'b>, Error> {
        let rank = group.rank();
        let inner = self.engine.links(group)?;
        Ok(Box::new(FaultyLinks { inner, harmed: self.harmed, last: None, rank }))
    }

    fn gpus(&self) -> Vec<String> {
        vec!["a GPU".to_owned(); 2]
    }
}

struct FaultyLinks<'a> {
    inner: Box<dyn Links + 'a>,
    harmed: Exercise,
    last: Option<Exercise>,
    rank: u32,
}

impl Links for FaultyLinks<'_> {
    fn methods(&self) -> Vec<(Measure, &'static str)> {
        self.inner.methods()
    }

    fn place_bytes(&self) -> u64 {
        self.inner.place_bytes()
    }

    fn copy_bytes(&self) -> u64 {
        1 << 20
    }

    fn grids(&mut self) -> Result<Vec<Option<u32>>, Error> {
        self.inner.grids()
    }

    fn time(&mut self, exercise: Exercise, times: u32) -> Result<f64, Error> {
        self.last = Some(exercise);
        let is_dropped = matches!(self.harmed, Exercise::Reach { from, .. } if from == self.rank);
        // In an exercise of other ranks this one stores nothing.
        let others = Exercise::Reach { from: u32::MAX, to: u32::MAX };
        self.inner.time(if is_dropped && exercise == self.harmed { others } else { exercise }, times)
    }

    fn received(&mut self, source: u32) -> Result<Option<String>, Error> {
        let reports = self.rank == 1 && !matches!(self.harmed, Exercise::Reach { .. });
        let wrong = reports && self.last == Some(self.harmed);
        let found = self.inner.received(source)?;
        Ok(if wrong { Some(format!("what rank {source} sent is wrong")) } else { found })
    }

    fn leave(&mut self) -> Result<(), Error> {
        self.inner.leave()
    }
}

/// The results of `work` on ranks, which are threads, with a faulty backend.
fn on_ranks<T: Send, const RANKS: usize>(
    harmed: Exercise,
    work: impl Fn(&Group, &mut Faulty) -> T + Sync,
) -> [T; RANKS] {
    const DEADLINE: Duration = Duration::from_secs(60);
    static GROUPS: AtomicU32 = AtomicU32::new(0);
    let key = format!("faulty links {} {}", id(), GROUPS.fetch_add(1, Ordering::Relaxed));
    let max_row_bytes = 4 * HIDDEN;
    let world_size = RANKS as u32;
    let rank = |rank: usize| {
        let rank = rank as u32;
        let membership = Membership { rank, world_size, key: &key, config: b"", deadline: DEADLINE };
        let group = Group::join(&membership).unwrap();
        let communicator =
            Communicator::join(&group, cpu::Options { max_row_bytes, deadline: DEADLINE }).unwrap();
        let mut backend = Faulty { engine: Engine::new(communicator), harmed };
        let result = work(&group, &mut backend);
        group.farewell().unwrap();
        result
    };
    thread::scope(|scope| {
        let rank = &rank;
        let ranks: [_; RANKS] = std::array::from_fn(|number| scope.spawn(move || rank(number)));
        ranks.map(|rank| rank.join().unwrap())
    })
}

#[test]
fn a_pair_whose_stores_are_dropped_is_named_and_waited_for_by_nobody() {
    let dropped = Exercise::Reach { from: 2, to: 1 };
    let began = Instant::now();
    let all: [_; 3] =
        on_ranks(dropped, |group, backend| measure_links(group, backend, &Progress::hidden()).unwrap());
    assert!(all.iter().all(|measured| *measured == all[0]), "all ranks have the same verdict");
    let [measured, ..] = all;
    // Half a deadline.
    assert!(began.elapsed() < Duration::from_secs(30));
    let [Broken { from: 2, to: 1, reason }] = &measured.broken[..] else { panic!("{:?}", measured.broken) };
    assert!(reason.contains("the bytes from rank 2 are wrong from byte 0 on"), "{reason}");

    let options = JobOptions::default();
    let report = LinksReport::new(Vec::new(), "cpu", 3, &options, OwnMachine::here(), Vec::new(), &measured);
    assert_eq!(report.verdict.status(), 1);
    let line = format!(
        "verdict: FAILED: 1 of 6 pairs of ranks did not receive what was sent, and nothing was measured: rank 2 to rank 1 \
         ({reason})\n"
    );
    assert_eq!(report.render(100), line);
    let json: serde_json::Value = serde_json::from_str(&report.to_json().unwrap()).unwrap();
    assert_eq!(json["verdict"]["broken"][0]["from"], 2);
}

#[test]
fn what_arrives_wrong_has_no_figure_on_any_rank() {
    let harmed = Exercise::Push { from: 0, to: 1, polled: true };
    let [first, second] =
        on_ranks(harmed, |group, backend| measure_links(group, backend, &Progress::hidden()).unwrap());
    assert_eq!(first, second, "all ranks have the same figures");
    assert_eq!(first.pairs.len(), 8);
    for (measure, timed) in &first.pairs {
        let expected = (timed.exercise == harmed).then_some("rank 1: what rank 0 sent is wrong");
        assert_eq!(timed.times_us.as_ref().err().map(String::as_str), expected, "{measure:?}");
    }
    assert!(first.together.iter().all(|timed| timed.times_us.is_ok()));
    let broken = Broken { from: 0, to: 1, reason: "what rank 0 sent is wrong".to_owned() };
    assert_eq!(first.broken, [broken]);
}

#[test]
fn a_benchmark_on_gpus_compares_the_fused_operation_with_the_put_bandwidth() {
    let settings = bench::settings::Settings {
        num_tokens: vec![8, 2],
        hidden_dim: HIDDEN,
        quant_modes: vec![QuantMode::None],
        warmup: 0,
        trials: 3,
        ..bench::settings::Settings::default()
    };
    let bench = |harmed, oversubscribe| {
        let job = JobOptions { oversubscribe, ..JobOptions::default() };
        let settings = bench::settings::Settings { job, ..settings.clone() };
        let [report, _] = on_ranks(harmed, |group, backend| {
            let mut report = data::Report::new(Vec::new(), "cuda", 2, settings.clone());
            let mut peers = Peers::default();
            bench::run::run(&settings, group, backend, &mut peers, &Progress::hidden(), |measured| {
                report.push_gb_s = measured.put_gb_s;
                report.push(measured.case, measured.notes, measured.variants);
            })
            .unwrap();
            report
        });
        report
    };
    let said = |report: &data::Report| -> Vec<Option<String>> {
        let about_links = |note: &&String| note.contains("all-to-all put bandwidth");
        report.configurations.iter().map(|one| one.notes.iter().find(about_links).cloned()).collect()
    };
    let none = Exercise::Word { from: 0, to: 1 };
    let report = bench(none, false);
    let rate = report.push_gb_s.unwrap();
    let fused = report.configurations[0].rows.iter().filter(|row| row.kind == Kind::Fused);
    let bandwidth = fused.map(|row| row.figures().unwrap().bus_bandwidth_gb_s).fold(0.0, f64::max);
    let expected = format!(
        "the all-to-all put bandwidth is {rate:.1} GB/s: the fastest fused variant's bus bandwidth, \
         {bandwidth:.1} GB/s, is {:.0}% of it",
        bandwidth / rate * 100.0
    );
    // In the configuration with the most tokens.
    assert_eq!(said(&report), [Some(expected), None]);
    assert_eq!(json::parse(&json::to_string(&report).unwrap()).unwrap(), report);

    // Not if bytes arrived wrong, nor without links.
    let wrong = "the all-to-all put bandwidth is not known: rank 1: what rank 0 sent is wrong".to_owned();
    let all = Exercise::PushAll { blocks: None };
    for (report, expected) in [(bench(all, false), Some(wrong)), (bench(none, true), None)] {
        assert_eq!((report.push_gb_s, said(&report)), (None, vec![expected, None]));
        assert!(!json::to_string(&report).unwrap().contains("push_gb_s"));
    }
}
