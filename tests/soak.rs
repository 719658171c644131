//! `fused-collective soak` on real rank processes; and a result that is wrong once in a while is found.
//!
//! The program has no switch that makes a backend wrong, so the test of that soaks a backend that is: the CPU's, with
//! one bit changed after one of its operations.

use std::{
    os::fd::AsFd,
    process::{Command, id},
    thread,
    time::Duration,
};

use fused_collective::{
    collective::{Collective, Error, Problem, Step, Tensor},
    cpu::{self, Communicator, Engine, Watch},
    rendezvous::{Group, Membership},
    soak::{self, Settings, Tally},
};
use fused_collective_tests::{command, run};

fn soak(options: &str) -> Command {
    let mut command = command(&["soak", "--backend", "cpu", "--deadline", "60"]);
    command.args(options.split_whitespace());
    command
}

/// The last line's numbers: operations, problems, repetitions, seconds, results.
fn numbers(stdout: &str) -> Vec<u64> {
    let line = stdout.lines().last().unwrap_or_default();
    assert!(line.ends_with(" results compared, 0 FAILED"), "{stdout}");
    line.split_whitespace().filter_map(|word| word.parse().ok()).take(5).collect()
}

#[test]
fn random_operations_of_three_and_four_ranks_are_right() {
    for (ranks, seed) in [(3, 1), (4, 2)] {
        let outcome = run(&mut soak(&format!("--operations 2500 --nproc-per-node {ranks} --seed {seed}")));
        outcome.assert_success();
        let heading = format!("cpu backend, {ranks} ranks, seed {seed}");
        assert_eq!(outcome.stdout.lines().next(), Some(heading.as_str()));
        let [operations, problems, repetitions, _, results] = numbers(&outcome.stdout)[..] else {
            panic!("{outcome}")
        };
        assert!(operations >= 2500 && problems >= 6 && repetitions > 20 && results > 200, "{outcome}");
    }
}

#[test]
fn the_same_seed_gives_the_same_operations_and_another_one_others() {
    let soaked = |seed| {
        let outcome = run(&mut soak(&format!("--operations 400 --seed {seed}")));
        outcome.assert_success();
        let mut numbers = numbers(&outcome.stdout);
        // The time.
        numbers.remove(3);
        numbers
    };
    assert_eq!(soaked(7), soaked(7));
    assert_ne!(soaked(7), soaked(8));
}

#[test]
fn a_soak_of_a_time_ends_with_it() {
    let outcome = run(&mut soak("--minutes 0.02"));
    outcome.assert_success();
    assert!(numbers(&outcome.stdout)[3] >= 1, "{outcome}");
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

/// The CPU backend, which on rank 1 changes a bit of a result after its 100th run.
struct Faulty {
    engine: Engine,
    tensor: Tensor,
    runs: u32,
    here: bool,
}

impl Faulty {
    fn harm(&mut self) -> Result<(), Error> {
        self.runs += 1;
        if self.here && self.runs >= 100 {
            let mut bytes = self.engine.read(self.tensor)?;
            if let Some(last) = bytes.last_mut() {
                *last ^= 1;
            }
            self.engine.write(self.tensor, 0, &bytes)?;
        }
        Ok(())
    }
}

impl Collective for Faulty {
    fn select(&mut self, slot: usize) -> Result<(), Error> {
        self.engine.select(slot)
    }

    fn prepare(&mut self, problem: &Problem) -> Result<(), Error> {
        self.engine.prepare(problem)
    }

    fn write(&mut self, tensor: Tensor, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.engine.write(tensor, offset, bytes)
    }

    fn read(&mut self, tensor: Tensor) -> Result<Vec<u8>, Error> {
        self.engine.read(tensor)
    }

    fn run(&mut self, steps: &[Step]) -> Result<(), Error> {
        self.engine.run(steps).and_then(|()| self.harm())
    }

    fn time(&mut self, steps: &[Step], operations: u32) -> Result<f64, Error> {
        let time = self.engine.time(steps, operations)?;
        self.harm().map(|()| time)
    }

    fn find_stray_write(&mut self, thorough: bool) -> Result<Option<String>, Error> {
        self.engine.find_stray_write(thorough)
    }

    fn set_cold(&mut self, cold: bool) {
        self.engine.set_cold(cold);
    }

    fn cache_bytes(&self) -> u64 {
        self.engine.cache_bytes()
    }

    fn copy_time(&mut self, bytes: u64) -> Result<f64, Error> {
        self.engine.copy_time(bytes)
    }
}

/// What two ranks, which are threads, say of a soak in which one bit of `tensor` goes wrong on rank 1.
fn soak_with_a_wrong_bit_in(tensor: Tensor) -> Vec<(Tally, Vec<String>)> {
    const DEADLINE: Duration = Duration::from_secs(60);
    let settings = Settings { operations: Some(20_000), ..Settings::default() };
    let key = format!("faulty soak {tensor:?} {}", id());
    let row_bytes = soak::largest_problems().iter().map(Problem::row_bytes).max().unwrap();
    let layout = cpu::layout(2, row_bytes).unwrap();
    let memory = cpu::create_shared_memory(&layout).unwrap();
    let rank = |rank| {
        let membership = Membership { rank, world_size: 2, key: &key, config: b"", deadline: DEADLINE };
        let group = Group::join(&membership).unwrap();
        let communicator =
            Communicator::join(memory.as_fd(), layout, rank, DEADLINE, Watch::nobody()).unwrap();
        let mut backend = Faulty { engine: Engine::new(communicator), tensor, runs: 0, here: rank == 1 };
        let mut lines = Vec::new();
        let tally = soak::run(&settings, &group, &mut backend, |line| lines.push(line.to_owned())).unwrap();
        group.farewell().unwrap();
        (tally, lines)
    };
    thread::scope(|scope| {
        let other = scope.spawn(|| rank(1));
        vec![rank(0), other.join().unwrap()]
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
