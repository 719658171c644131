//! loom: every schedule, up to a number of preemptions, and every value that a load may return, for two ranks.
//!
//! `LOOM_MAX_PREEMPTIONS=3` and more search further, for minutes and more. (With three ranks two that wait can keep
//! loom busy for ever: `random_schedules` has larger groups.)

use std::sync::atomic::Ordering;

use fused_collective_core::workspace::Header;
use loom::{model::Builder, sync::atomic::AtomicU64, thread};

use super::*;

struct Loom;

impl Word for AtomicU64 {
    fn load(&self, order: Ordering) -> u64 {
        self.load(order)
    }

    fn store(&self, value: u64, order: Ordering) {
        self.store(value, order);
    }
}

impl Checker for Loom {
    type Atomic = AtomicU64;

    fn atomic(value: u64) -> AtomicU64 {
        AtomicU64::new(value)
    }

    fn fence(order: Ordering) {
        loom::sync::atomic::fence(order);
    }

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

/// Tries every schedule of `model` with at most `preemptions` preemptions, or as many as `LOOM_MAX_PREEMPTIONS` says. A
/// thread that waits lets the other one run, and that does not count; nor is it limited what a load may return.
fn check(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound.get_or_insert(preemptions);
    // Enough for every sequence here: one that exceeds it waits for what never comes.
    builder.max_branches = 2_000;
    builder.check(model);
}

/// Rows that are sent one in each operation, or, sent ahead, two: the next operation's when the first has come.
fn words(rules: Rules, operations: u64, ahead: Ahead) {
    let (rows, preemptions) = if matches!(ahead, Ahead::Never) { (1, 2) } else { (2, 1) };
    let words = Words { ranks: 2, operations, rows, ahead };
    check(preemptions, move || {
        group::<Loom>(2, words.slot_words(), rules, move |rank, exchange| words.run(exchange, rank));
    });
}

fn fused(preemptions: usize, rules: Rules, slot_words: usize, operations: &[Fused]) {
    let operations = operations.to_vec();
    check(preemptions, move || {
        let operations = operations.clone();
        group::<Loom>(2, slot_words, rules, move |rank, exchange| {
            run_fused(exchange, 2, rank, &operations);
        });
    });
}

#[test]
fn words_arrive_in_their_operation() {
    words(Rules::REAL, 4, Ahead::Never);
}

#[test]
fn one_shot_is_right() {
    fused(2, Rules::REAL, 2, &[one_shot(1); 4]);
}

#[test]
fn two_shot_is_right() {
    fused(2, Rules::REAL, 3, &[two_shot(1, 1); 4]);
}

/// In rounds: owners send ahead.
#[test]
fn two_shot_in_rounds_is_right() {
    fused(1, Rules::REAL, 4, &[two_shot(8, 2)]);
}

#[test]
fn modes_may_alternate() {
    fused(1, Rules::REAL, 4, &[one_shot(1), two_shot(2, 2), one_shot(1), two_shot(1, 1), one_shot(1)]);
}

#[test]
fn without_a_release_a_word_is_lost() {
    let rules = Rules { release: false, ..Rules::REAL };
    assert_fails(|| words(rules, 4, Ahead::Never));
    assert_fails(|| fused(2, rules, 2, &[one_shot(1); 4]));
}

#[test]
fn without_an_acquire_a_word_is_lost() {
    let rules = Rules { acquire: false, ..Rules::REAL };
    assert_fails(|| words(rules, 4, Ahead::Never));
    assert_fails(|| fused(2, rules, 2, &[one_shot(1); 4]));
}

#[test]
fn without_refills_old_words_are_read() {
    let rules = Rules { refill: Refill::Never, ..Rules::REAL };
    assert_fails(|| words(rules, 4, Ahead::Never));
    assert_fails(|| fused(2, rules, 2, &[one_shot(1); 4]));
}

/// One word is read in each operation.
#[test]
fn a_refill_may_be_late_by_one_operation_and_not_by_two() {
    let late = |by| words(Rules { refill: Refill::Late(by), ..Rules::REAL }, 4, Ahead::Never);
    late(1);
    assert_fails(|| late(2));
}

#[test]
fn two_slots_do_unless_ranks_send_ahead() {
    let rules = Rules { slots: 2, ..Rules::REAL };
    words(rules, 4, Ahead::Never);
    assert_fails(|| words(rules, 4, Ahead::WhenReceived));
    // Rank 1 owns nothing of the second round, so rank 0 may end that while rank 1 is still in the first.
    assert_fails(|| fused(1, rules, 6, &[two_shot(3, 2), one_shot(3)]));
}

#[test]
fn one_slot_does_not_do() {
    let rules = Rules { slots: 1, ..Rules::REAL };
    assert_fails(|| words(rules, 3, Ahead::Never));
    assert_fails(|| fused(2, rules, 2, &[one_shot(1); 3]));
}

#[test]
fn sending_ahead_before_anything_was_received_fails() {
    assert_fails(|| words(Rules::REAL, 4, Ahead::AtOnce));
}

/// Joins a group of two and sends a word; what a rank says of itself before its slots are filled is `early`.
fn join(early: bool) {
    check(2, move || {
        let regions = Regions::<Loom>::new(2, 2);
        let start = |rank: u32| {
            let regions = Arc::clone(&regions);
            move || {
                let exchange = || {
                    let pending = RefCell::default();
                    let end = End { regions: Arc::clone(&regions), rank, rules: Rules::REAL, pending };
                    Exchange::new(end, patience(rank))
                };
                let header = |rank| Header { world_size: 2, rank, slot_bytes: regions.layout.slot_bytes() };
                let mut joined = exchange();
                joined.publish_header(header(rank));
                if early {
                    joined = exchange();
                }
                let words = joined.wait_for_header(1 - rank).expect("a wait without a deadline");
                header(1 - rank).check(words).expect("the peer's header");
                let mut word = [0; 8];
                joined.send(0, 1 - rank, 0, &7u64.to_ne_bytes());
                joined.receive(1 - rank, What::Input(0), 0, &mut word).expect("a wait without a deadline");
                assert_eq!(u64::from_ne_bytes(word), 7, "a word is wrong");
            }
        };
        Loom::run_all(start(0), vec![Box::new(start(1))]);
        regions.assert_empty();
    });
}

#[test]
fn ranks_join_with_their_slots_filled() {
    join(false);
    assert_fails(|| join(true));
}
