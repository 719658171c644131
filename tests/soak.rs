//! `fused-collective soak` on real rank processes, and on a backend with rare faults.
//!
//! That backend is the CPU's, with one bit changed after one of its operations, or an error in place of one.

use std::{
    process::{Command, id},
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
        problem::{Problem, Tensor},
        steps::Step,
    },
    commands::soak::{
        groups::{group_seed, run_groups},
        run::{self, Tally},
        settings::Settings,
    },
    job::{options::JobOptions, ranks},
};
use fused_collective_core::plan::Limits;
use fused_collective_tests::{LIMIT, Running, command, forward, run};
use rustix::process::Signal;

fn soak(options: &str) -> Command {
    let mut command = command(&["soak", "--backend", "cpu", "--deadline", "60"]);
    command.args(options.split_whitespace());
    command
}

/// The last line's numbers: operations, problems, turns in place, calls of some rows, repetitions, seconds, results.
fn numbers(stdout: &str) -> Vec<u64> {
    numbers_of(stdout.lines().last().unwrap_or_default())
}

fn numbers_of(line: &str) -> Vec<u64> {
    assert!(line.ends_with(" results compared, 0 FAILED"), "{line}");
    line.split_whitespace().filter_map(|word| word.parse().ok()).take(7).collect()
}

/// For 10 s each where `FUSED_COLLECTIVE_LONG_TESTS` is set: half a minute, on no more than two processors in CI.
#[test]
fn random_operations_of_two_three_and_four_ranks_are_right() {
    let is_long = std::env::var_os("FUSED_COLLECTIVE_LONG_TESTS").is_some();
    let (amount, operations, seconds) =
        if is_long { ("--minutes 0.1667", 400, 9) } else { ("--operations 400", 400, 0) };
    for (ranks, seed) in [(2, 3), (3, 1), (4, 2)] {
        let outcome = run(&mut soak(&format!("{amount} --nproc-per-node {ranks} --seed {seed}")));
        outcome.assert_success();
        let heading = format!("cpu backend, {ranks} ranks, seed {seed}");
        assert_eq!(outcome.stdout.lines().next(), Some(heading.as_str()));
        let [done, problems, in_place, chunks, repetitions, took, results] = numbers(&outcome.stdout)[..]
        else {
            panic!("{outcome}")
        };
        assert!(done >= operations && took >= seconds, "{outcome}");
        assert!(problems >= 6 && repetitions > 4 && results > 40, "{outcome}");
        assert!(in_place > 4 && chunks > 8, "{outcome}");
    }
}

/// Like [`numbers_of`], without the time.
fn counts(line: &str) -> Vec<u64> {
    let mut numbers = numbers_of(line);
    numbers.remove(5);
    numbers
}

/// The work of two ranks that soak alone.
fn soaked(seed: u64) -> Vec<u64> {
    let outcome = run(&mut soak(&format!("--operations 400 --seed {seed}")));
    outcome.assert_success();
    counts(outcome.stdout.lines().last().unwrap_or_default())
}

#[test]
fn the_same_seed_gives_the_same_operations_and_another_one_others() {
    assert_eq!(soaked(7), soaked(7));
    assert_ne!(soaked(7), soaked(8));
}

#[test]
fn groups_soak_at_the_same_time_and_each_does_what_its_seed_does_alone() {
    let outcome = run(&mut soak("--operations 400 --seed 7 --nproc-per-node 2 --groups 2"));
    outcome.assert_success();
    let other = group_seed(7, 1);
    let lines: Vec<&str> = outcome.stdout.lines().collect();
    let [heading, first, second, total] = lines[..] else { panic!("{outcome}") };
    assert_eq!(heading, format!("cpu backend, 2 groups of 2 ranks, seeds 7, {other}"));
    let group = |line: &str, number| {
        counts(line.strip_prefix(&format!("group {number}: ")).unwrap_or_else(|| panic!("{outcome}")))
    };
    let groups = [group(first, 0), group(second, 1)];
    assert_eq!(groups, [soaked(7), soaked(other)]);
    assert_ne!(groups[0], groups[1]);
    let sums: Vec<u64> = groups[0].iter().zip(&groups[1]).map(|(first, second)| first + second).collect();
    assert_eq!(counts(total), sums);
}

#[test]
fn a_rank_that_is_killed_in_one_group_ends_the_soak_of_all() {
    let running = Running::start(&mut soak("--minutes 60 --nproc-per-node 2 --groups 2"));
    running.wait_for_stdout("2 groups of 2 ranks", LIMIT);
    running.signal(running.wait_for_rank(3, LIMIT), Signal::KILL);
    running.wait(LIMIT).assert_failure(1, "rank 3 was killed by signal 9 (SIGKILL)");
}

#[test]
fn a_soak_of_a_time_ends_with_it() {
    let outcome = run(&mut soak("--minutes 0.02"));
    outcome.assert_success();
    assert!(numbers(&outcome.stdout)[5] >= 1, "{outcome}");
}

#[test]
fn bad_options_are_refused_in_one_line() {
    let refused = [
        ("--minutes 0", "--minutes: '0' is not a number of minutes: use a number above 0 and up to 525600"),
        ("--operations 0", "--operations: '0' is not a number of operations: use whole numbers from 1"),
        ("--operations 5 --minutes 5", "--minutes and --operations: give one of them"),
    ];
    for (options, line) in refused {
        run(&mut soak(options)).assert_failure(2, line);
    }
}

/// The fault of a backend from its 100th run on.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// Changes a bit of a result.
    WrongBit(Tensor),
    /// Fails.
    Error,
}

/// The CPU backend, with a fault on one rank.
struct Faulty {
    engine: Engine,
    fault: Option<Fault>,
    runs: u32,
}

impl Faulty {
    fn harm(&mut self) -> Result<(), Error> {
        self.runs += 1;
        match self.fault.filter(|_| self.runs >= 100) {
            None => Ok(()),
            Some(Fault::Error) => Err(Error::Memory("a 100th run".to_owned())),
            Some(Fault::WrongBit(tensor)) => {
                let mut bytes = self.engine.read(tensor)?;
                if let Some(last) = bytes.last_mut() {
                    *last ^= 1;
                }
                self.engine.write(tensor, 0, &bytes)
            }
        }
    }
}

impl Collective for Faulty {
    forward!(engine: select prepare write fill digest read copy_time find_stray_write set_cold limits cache_bytes);

    fn run(&mut self, steps: &[Step]) -> Result<(), Error> {
        self.engine.run(steps).and_then(|()| self.harm())
    }

    fn time(&mut self, steps: &[Step], operations: u32) -> Result<f64, Error> {
        let time = self.engine.time(steps, operations)?;
        self.harm().map(|()| time)
    }
}

const DEADLINE: Duration = Duration::from_secs(60);

/// The tallies and lines of two ranks, which are threads, in a soak with one wrong bit in `tensor` on rank 1.
fn soak_with_a_wrong_bit_in(tensor: Tensor) -> Vec<(Tally, Vec<String>)> {
    let settings = Settings { operations: Some(20_000), ..Settings::default() };
    let ranks = |world: &Group| {
        let mut backend = join(world, (world.rank() == 1).then_some(Fault::WrongBit(tensor)));
        let mut lines = Vec::new();
        let tally = run::run(&settings, world, &mut backend, |line| lines.push(line.to_owned())).unwrap();
        (tally, lines)
    };
    on_ranks(2, &format!("faulty soak {tensor:?}"), ranks)
}

/// The result of a soak of groups on a rank, and the lines that it got.
type Said = (Result<Vec<Tally>, ranks::Error>, Vec<String>);

/// The results of two groups of two ranks, in a soak that a fault on rank 1 of group 1 ends early.
fn soak_groups_with(fault: Fault) -> Vec<Said> {
    let job = JobOptions { groups: 2, ..JobOptions::default() };
    let settings = Settings { minutes: 1.0, job, ..Settings::default() };
    let began = Instant::now();
    let ranks = |world: &Group| {
        let number = world.rank() / 2;
        let group = world.split(Some(number)).unwrap().unwrap();
        let mut backend = join(&group, (world.rank() == 3).then_some(fault));
        let mut lines = Vec::new();
        let tell = |line: &str| lines.push(line.to_owned());
        let tallies = run_groups(&settings, world, number, &group, &mut backend, tell);
        if let Err(error) = &tallies {
            world.abort(&error.to_string());
        }
        (tallies, lines)
    };
    let said = on_ranks(4, &format!("faulty groups {fault:?}"), ranks);
    let took = began.elapsed();
    assert!(took < Duration::from_secs(60), "the soak went on for {took:?}");
    said
}

/// The CPU backend of `group`, on this rank.
fn join(group: &Group, fault: Option<Fault>) -> Faulty {
    let row_bytes = run::largest_problems().iter().map(Problem::row_bytes).max().unwrap();
    let options = cpu::Options { max_row_bytes: row_bytes, deadline: DEADLINE };
    let communicator = Communicator::join(group, options).unwrap();
    Faulty { engine: Engine::new(communicator), fault, runs: 0 }
}

/// The results of `work` on `world_size` ranks, which are threads.
fn on_ranks<T: Send>(world_size: u32, key: &str, work: impl Fn(&Group) -> T + Sync) -> Vec<T> {
    let key = format!("{key} {}", id());
    let rank = |rank| {
        let membership = Membership { rank, world_size, key: &key, config: b"", deadline: DEADLINE };
        let world = Group::join(&membership).unwrap();
        let given = work(&world);
        // A group that has lost a rank has no farewell.
        let _ = world.farewell();
        given
    };
    thread::scope(|scope| {
        let rank = &rank;
        let ranks: Vec<_> = (0..world_size).map(|number| scope.spawn(move || rank(number))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn a_wrong_bit_on_one_rank_ends_the_soak_on_all_and_is_named() {
    for tensor in [Tensor::ResidualOut, Tensor::QuantOut] {
        for (tally, lines) in soak_with_a_wrong_bit_in(tensor) {
            assert_eq!((tally.failed, lines.len()), (1, 1), "{lines:?}");
            assert!(tally.operations < 20_000);
            let line = &lines[0];
            assert!(line.starts_with("FAILED seed 0, round ") && line.contains("rank 1: "), "{line}");
            assert!(line.contains(&format!("{tensor:?}")) || line.contains("other bits"), "{line}");
        }
    }
}

#[test]
fn a_wrong_bit_in_one_group_ends_the_soak_of_all_and_is_named() {
    let start = format!("FAILED group 1, seed {}, round ", group_seed(0, 1));
    for (tallies, lines) in soak_groups_with(Fault::WrongBit(Tensor::ResidualOut)) {
        let failed: Vec<u64> = tallies.unwrap().iter().map(|tally| tally.failed).collect();
        assert_eq!((failed, lines.len()), (vec![0, 1], 1), "{lines:?}");
        assert!(lines[0].starts_with(&start) && lines[0].contains("rank 1: "), "{}", lines[0]);
    }
}

#[test]
fn a_failure_in_one_group_ends_the_soak_of_all_and_is_named() {
    let start = format!("group 1, seed {}, round ", group_seed(0, 1));
    for (rank, (tallies, _)) in soak_groups_with(Fault::Error).into_iter().enumerate() {
        let line = tallies.unwrap_err().to_string();
        match rank {
            3 => assert!(line.starts_with(&start) && line.ends_with("a 100th run"), "{line}"),
            _ => assert!(line.starts_with(&format!("rank 3 gave up: {start}")), "rank {rank}: {line}"),
        }
    }
}
