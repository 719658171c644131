//! The protocol under model checkers: the code that runs, over a memory that tries schedules.
//!
//! [`Exchange`] and [`fused::run`] are generic over their [`Medium`]. Here it is a few words of a checker's atomics:
//! `every_schedule` has loom's, which tries every order of events and every value that the memory model lets a load
//! return; `random_schedules` has shuttle's, for more ranks and longer sequences than can be enumerated.
//! Lines are moved word by word here, in every order: that a processor moves two words at once is one of them.
//!
//! A checker that finds nothing proves nothing by itself. Each rule of the protocol is therefore also weakened
//! ([`Rules`]), and the checker has to find what goes wrong: by a wrong sum, by a slot that is not empty at the end,
//! or by a wait that nothing ends, which exceeds the checker's limit of steps.

mod every_schedule;
mod random_schedules;

use std::{
    array,
    cell::RefCell,
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    ptr,
    sync::{
        Arc,
        atomic::Ordering::{self, Relaxed},
    },
    time::Duration,
};

use fused_collective_core::{
    fusion::Rounding,
    lamport::SLOTS,
    plan::{Algorithm, Plan},
    workspace::{HEADER_BYTES, Layout, SLOTS_OFFSET},
};
use pulp::Arch;

use super::{
    exchange::{EMPTY, Exchange, Medium, Word},
    fused::{self, Addend, Job, Scratch},
    sum::Operand,
    wait::{Wait, WaitGuard},
};
use crate::group::failure::{Failure, What};

/// A model checker's words and threads.
trait Checker: Send + Sync + 'static {
    /// Its atomic words.
    type Atomic: Word + Send + Sync;

    fn atomic(value: u64) -> Self::Atomic;
    fn fence(order: Ordering);
    /// Lets other threads run.
    fn yield_now();
    /// Runs `first` in this thread and each of `others` in one of its own, and returns when all have ended.
    fn run_all(first: impl FnOnce(), others: Vec<Box<dyn FnOnce() + Send>>);
}

/// The rules of the protocol: those of `core::lamport`, or weaker ones.
#[derive(Clone, Copy, Debug)]
struct Rules {
    /// Slots that take turns.
    slots: u64,
    refill: Refill,
    /// Has a release fence before a row is sent.
    release: bool,
    /// Has an acquire fence after a row is received.
    acquire: bool,
}

/// When a word that was read is emptied.
#[derive(Clone, Copy, Debug)]
enum Refill {
    AtOnce,
    Never,
    /// When this many more words have been read.
    Late(usize),
}

impl Rules {
    /// The protocol's.
    const REAL: Rules = Rules { slots: SLOTS, refill: Refill::AtOnce, release: true, acquire: true };
}

/// The regions of all ranks, with no more words than a model needs.
struct Regions<C: Checker> {
    layout: Layout,
    regions: Vec<Region<C>>,
}

struct Region<C: Checker> {
    header: [C::Atomic; 8],
    slots: [Vec<C::Atomic>; SLOTS as usize],
}

/// One rank's end of the regions.
struct End<C: Checker> {
    regions: Arc<Regions<C>>,
    rank: u32,
    rules: Rules,
    /// Words that are to be refilled late: slot and index.
    pending: RefCell<VecDeque<(usize, usize)>>,
}

impl<C: Checker> Regions<C> {
    fn new(ranks: u32, slot_words: usize) -> Arc<Self> {
        let region = || Region {
            header: array::from_fn(|_| C::atomic(0)),
            // Not yet what a rank makes of it when it joins.
            slots: array::from_fn(|_| (0..slot_words).map(|_| C::atomic(0)).collect()),
        };
        let layout = Layout::new(ranks, 8 * slot_words as u64).expect("a small layout");
        Arc::new(Regions { layout, regions: (0..ranks).map(|_| region()).collect() })
    }

    /// Every word of every slot is empty.
    fn assert_empty(&self) {
        for word in self.regions.iter().flat_map(|region| region.slots.iter().flatten()) {
            assert_eq!(word.load(Relaxed), EMPTY, "a slot is not empty");
        }
    }
}

impl<C: Checker> Medium for End<C> {
    type Word = C::Atomic;

    fn layout(&self) -> &Layout {
        &self.regions.layout
    }

    fn words(&self, rank: u32, offset: u64, bytes: u64) -> &[C::Atomic] {
        let region = &self.regions.regions[rank as usize];
        if offset < HEADER_BYTES {
            return &region.header;
        }
        let slot_bytes = self.regions.layout.slot_bytes();
        let slot = &region.slots[((offset - SLOTS_OFFSET) / slot_bytes) as usize];
        let first = ((offset - SLOTS_OFFSET) % slot_bytes / 8) as usize;
        // A whole slot is what is modelled of it.
        if bytes == slot_bytes { slot } else { &slot[first..first + (bytes / 8) as usize] }
    }

    fn fence(&self, order: Ordering) {
        let fenced = match order {
            Ordering::Release => self.rules.release,
            _ => self.rules.acquire,
        };
        if fenced {
            C::fence(order);
        }
    }

    fn slot(&self, operation: u64) -> u64 {
        operation % self.rules.slots
    }

    fn refill(&self, word: &C::Atomic) {
        match self.rules.refill {
            Refill::AtOnce => word.store(EMPTY, Relaxed),
            Refill::Never => {}
            Refill::Late(by) => {
                let slots = &self.regions.regions[self.rank as usize].slots;
                let place = slots
                    .iter()
                    .enumerate()
                    .find_map(|(slot, words)| Some((slot, words.iter().position(|at| ptr::eq(at, word))?)));
                let mut pending = self.pending.borrow_mut();
                pending.push_back(place.expect("a word of this rank's slots"));
                if pending.len() > by {
                    let (slot, index) = pending.pop_front().expect("more than none");
                    slots[slot][index].store(EMPTY, Relaxed);
                }
            }
        }
    }

    fn pause(&self, _: &mut Wait<'_>) -> Result<(), Box<Failure>> {
        C::yield_now();
        Ok(())
    }
}

/// Waits that nothing but their data ends.
fn patience(rank: u32) -> WaitGuard {
    WaitGuard { rank, deadline: Duration::MAX, monitor: None, log: None }
}

/// Runs `rank` for each rank of a group whose slots have `slot_words` words, all joined, and checks that every slot is
/// empty at the end.
fn group<C: Checker>(
    ranks: u32,
    slot_words: usize,
    rules: Rules,
    rank: impl Fn(u32, &mut Exchange<End<C>>) + Clone + Send + 'static,
) {
    let regions = Regions::<C>::new(ranks, slot_words);
    let start = |index| {
        let end = End { regions: Arc::clone(&regions), rank: index, rules, pending: RefCell::default() };
        let mut exchange = Exchange::new(end, patience(index));
        let rank = rank.clone();
        move || rank(index, &mut exchange)
    };
    let first = start(0);
    let others = (1..ranks).map(|index| Box::new(start(index)) as Box<dyn FnOnce() + Send>).collect();
    C::run_all(first, others);
    if !matches!(rules.refill, Refill::Late(_)) {
        regions.assert_empty();
    }
}

/// One fused operation: rows of `row_words` words of two `f32` each, in rounds.
#[derive(Clone, Copy, Debug)]
struct Fused {
    algorithm: Algorithm,
    tokens: u64,
    tokens_per_round: u64,
    row_words: usize,
}

/// One-shot over one-word rows, in one round.
const fn one_shot(tokens: u64) -> Fused {
    Fused { algorithm: Algorithm::OneShot, tokens, tokens_per_round: tokens, row_words: 1 }
}

/// Two-shot over one-word rows, in rounds of `tokens_per_round`.
const fn two_shot(tokens: u64, tokens_per_round: u64) -> Fused {
    Fused { algorithm: Algorithm::TwoShot, tokens, tokens_per_round, row_words: 1 }
}

/// Runs operations, one after the other, with inputs that no two rows of the sequence share, and checks every sum.
fn run_fused<C: Checker>(exchange: &mut Exchange<End<C>>, ranks: u32, rank: u32, operations: &[Fused]) {
    let mut scratch = Scratch::default();
    for (index, operation) in operations.iter().enumerate() {
        let hidden = operation.row_words * 2;
        let elements = operation.tokens as usize * hidden;
        // Small whole numbers: sums are exact.
        let value = |rank: u32, element: usize| {
            (index * 10_000 + element * 100 + rank as usize * rank as usize + 1) as f32
        };
        let input: Vec<f32> = (0..elements).map(|element| value(rank, element)).collect();
        let mut residual_out = vec![f32::NAN; elements];
        let plan = Plan {
            algorithm: operation.algorithm,
            tokens: operation.tokens,
            tokens_per_round: operation.tokens_per_round,
            world_size: ranks,
            hosts: 1,
            partial_row_bytes: 0,
            row_bytes: operation.row_words as u64 * 8,
            sent_bytes: [operation.row_words as u64 * 8; 2],
            cluster: 1,
        };
        let job = Job {
            rounding: Rounding::Once,
            wire: None,
            bias: None,
            post_norm: None,
            dealt_to: 1,
            addend: Addend { input: Operand::Apart(&input[..]), experts: None },
            residual: None,
            residual_out: &mut residual_out,
            norm_out: &mut [],
            quant_out: &mut [],
            scale_out: &mut [],
            finish: None,
            hidden,
            quant_row_bytes: 0,
        };
        fused::run(exchange, rank, &plan, job, &mut scratch, Arch::Scalar)
            .expect("a wait without a deadline");
        let expected: Vec<f32> =
            (0..elements).map(|element| (0..ranks).map(|rank| value(rank, element)).sum()).collect();
        assert_eq!(residual_out, expected, "operation {index}: a sum is wrong");
    }
}

/// When a rank sends for the next operation.
#[derive(Clone, Copy, Debug)]
enum Ahead {
    /// When it has ended this one.
    Never,
    /// In this one, when it has received something from every peer.
    WhenReceived,
    /// In this one, at its start: against the rules.
    AtOnce,
}

/// The exchange alone: in each operation every rank sends some rows of a word each to every other.
#[derive(Clone, Copy, Debug)]
struct Words {
    ranks: u32,
    operations: u64,
    rows: u64,
    ahead: Ahead,
}

impl Words {
    fn slot_words(self) -> usize {
        (u64::from(self.ranks) * self.rows) as usize
    }

    fn run<C: Checker>(self, exchange: &mut Exchange<End<C>>, rank: u32) {
        let value = |rank: u32, operation: u64, row: u64| 1000 * (operation + 1) + 10 * row + u64::from(rank);
        let offset = |source: u32, row: u64| 8 * (u64::from(source) * self.rows + row);
        let peers = || (0..self.ranks).filter(|&peer| peer != rank);
        let send = |exchange: &Exchange<End<C>>, operation: u64| {
            for (peer, row) in peers().flat_map(|peer| (0..self.rows).map(move |row| (peer, row))) {
                let value = value(rank, operation, row).to_ne_bytes();
                exchange.send(operation, peer, offset(rank, row), &value);
            }
        };
        for operation in 0..self.operations {
            let more = operation + 1 < self.operations;
            if operation == 0 || matches!(self.ahead, Ahead::Never) {
                send(exchange, operation);
            }
            if more && matches!(self.ahead, Ahead::AtOnce) {
                send(exchange, operation + 1);
            }
            for row in 0..self.rows {
                for peer in peers() {
                    let mut word = [0; 8];
                    exchange
                        .receive(peer, What::Input(0), offset(peer, row), &mut word)
                        .expect("a wait without a deadline");
                    let expected = value(peer, operation, row);
                    assert_eq!(u64::from_ne_bytes(word), expected, "operation {operation}: a word is wrong");
                }
                if row == 0 && more && matches!(self.ahead, Ahead::WhenReceived) {
                    send(exchange, operation + 1);
                }
            }
            exchange.advance();
        }
    }
}

/// The signs of a broken protocol: the models' assertions, and the checkers' limits of steps.
const FAILURES: [&str; 5] = [
    "a sum is wrong",
    "a word is wrong",
    "a slot is not empty",
    "exceeded maximum number of branches",
    "exceeded max_steps",
];

/// Holds a checker to finding that the protocol is broken.
#[track_caller]
fn assert_fails(check: impl FnOnce()) {
    let Err(panic) = catch_unwind(AssertUnwindSafe(check)) else {
        panic!("the model passes without the rule");
    };
    let message =
        panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    let message = message.unwrap_or_default();
    assert!(FAILURES.iter().any(|failure| message.contains(failure)), "another failure: {message}");
}
