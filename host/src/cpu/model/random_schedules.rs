//! shuttle: random schedules of more ranks and of longer, mixed sequences than can be enumerated.
//!
//! `MODEL_SCHEDULES` says how many schedules each test tries; half are uniformly random, half are PCT's ("A Randomized
//! Scheduler with Probabilistic Guarantees of Finding Bugs", Burckhardt et al., 2010). A failure prints the schedule,
//! which `shuttle::replay` takes.

use std::{env, sync::atomic::Ordering};

use shuttle::{
    Config, FailurePersistence, MaxSteps, Runner,
    rand::{Rng, thread_rng},
    scheduler::{PctScheduler, RandomScheduler, Scheduler},
    sync::atomic::AtomicU64,
    thread,
};

use super::*;

struct Shuttle;

/// Shuttle's atomics are sequentially consistent, so every order is asked for as that: it warns of others.
impl Word for AtomicU64 {
    fn load(&self, _: Ordering) -> u64 {
        self.load(Ordering::SeqCst)
    }

    fn store(&self, value: u64, _: Ordering) {
        self.store(value, Ordering::SeqCst);
    }
}

impl Checker for Shuttle {
    type Atomic = AtomicU64;

    fn atomic(value: u64) -> AtomicU64 {
        AtomicU64::new(value)
    }

    fn fence(_: Ordering) {}

    fn yield_now() {
        thread::yield_now();
    }

    fn run_all(first: impl FnOnce(), others: Vec<Box<dyn FnOnce() + Send>>) {
        let others: Vec<_> = others.into_iter().map(thread::spawn).collect();
        first();
        for other in others {
            other.join().expect("panics end the model");
        }
    }
}

/// Schedules that each test tries.
fn schedules() -> usize {
    let default = 400;
    env::var("MODEL_SCHEDULES")
        .map_or(default, |number| number.parse().expect("MODEL_SCHEDULES is a number of schedules"))
}

/// Tries schedules of `model`.
fn check(persistence: FailurePersistence, model: impl Fn() + Clone + Send + Sync + 'static) {
    fn run(
        persistence: FailurePersistence,
        scheduler: impl Scheduler + 'static,
        model: impl Fn() + Send + Sync + 'static,
    ) {
        let mut config = Config::new();
        config.stack_size = 256 << 10;
        config.failure_persistence = persistence;
        // A sequence takes some thousands.
        config.max_steps = MaxSteps::FailAfter(200_000);
        Runner::new(scheduler, config).run(model);
    }
    let half = schedules() / 2;
    run(persistence.clone(), RandomScheduler::new_from_seed(1, half), model.clone());
    run(persistence, PctScheduler::new_from_seed(2, 3, half), model);
}

/// A sequence of operations of random modes, token counts, rounds and row lengths.
fn random_operations(count: usize) -> Vec<Fused> {
    let mut random = thread_rng();
    let operation = |_| {
        let tokens = random.gen_range(1..=7);
        Fused {
            algorithm: if random.gen_bool(0.5) { Algorithm::OneShot } else { Algorithm::TwoShot },
            tokens,
            tokens_per_round: random.gen_range(1..=4).min(tokens),
            // The exchange looks at eight words at a time, and then at one.
            row_words: [1, 2, 9][random.gen_range(0..3)],
        }
    };
    (0..count).map(operation).collect()
}

fn mixed(persistence: FailurePersistence, rules: Rules, ranks: u32, operations: usize) {
    check(persistence, move || {
        let operations = random_operations(operations);
        let words = |operation: &Fused| {
            let (tokens, ranks) = (operation.tokens_per_round as usize, ranks as usize);
            let rows = match operation.algorithm {
                Algorithm::OneShot => tokens * ranks,
                _ => tokens.next_multiple_of(ranks) + tokens,
            };
            rows * operation.row_words
        };
        let slot_words = operations.iter().map(words).max().unwrap_or_default();
        group::<Shuttle>(ranks, slot_words, rules, move |rank, exchange| {
            run_fused(exchange, ranks, rank, &operations);
        });
    });
}

#[test]
fn mixed_operations_of_two_ranks_are_right() {
    mixed(FailurePersistence::Print, Rules::REAL, 2, 8);
}

#[test]
fn mixed_operations_of_three_ranks_are_right() {
    mixed(FailurePersistence::Print, Rules::REAL, 3, 6);
}

#[test]
fn mixed_operations_of_four_ranks_are_right() {
    mixed(FailurePersistence::Print, Rules::REAL, 4, 5);
}

#[test]
fn words_sent_ahead_by_four_ranks_arrive_in_their_operation() {
    let words = Words { ranks: 4, operations: 8, rows: 2, ahead: Ahead::WhenReceived };
    check(FailurePersistence::Print, move || {
        group::<Shuttle>(4, words.slot_words(), Rules::REAL, move |rank, exchange| words.run(exchange, rank));
    });
}

#[test]
fn without_refills_mixed_operations_fail() {
    let rules = Rules { refill: Refill::Never, ..Rules::REAL };
    assert_fails(|| mixed(FailurePersistence::None, rules, 3, 6));
}

#[test]
fn with_two_slots_mixed_operations_fail() {
    assert_fails(|| mixed(FailurePersistence::None, Rules { slots: 2, ..Rules::REAL }, 2, 8));
}

#[test]
fn with_one_slot_mixed_operations_fail() {
    assert_fails(|| mixed(FailurePersistence::None, Rules { slots: 1, ..Rules::REAL }, 4, 5));
}
