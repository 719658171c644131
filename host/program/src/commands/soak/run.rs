//! Random operations for a given time, every result checked. They find errors that a matrix of cases cannot.
//!
//! A soak holds several problems, of random element types, shapes and quantizations, and solves them in random turns. A
//! turn is one operation, several in changing modes, one that is cut into calls of some rows each, or repetitions of a captured
//! sequence. Any of them may end in place. Before a turn each rank pauses for a random time of its own, so that ranks arrive
//! in every order. From time to time another problem replaces one.
//!
//! The first results of a problem are checked against the [reference](fused_collective_core::reference). Every later
//! result must have the same bits, in outputs that were poisoned before, with no byte written beside them. Problems have
//! different inputs, so data left over from an earlier operation shows.
//!
//! Everything but the pauses follows from the seed, and is the same on every rank.

use std::{
    fmt::{self, Write as _},
    iter::Sum,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use fastrand::Rng;
use fused_collective::group::rendezvous::Group;
use fused_collective_core::{
    dtype::DType,
    fusion::{Mode, Norm, PartialSums},
    quant::Quantization,
};
use serde::{Deserialize, Serialize};

use super::settings::Settings;
use crate::{
    backend::{
        collective::Collective,
        problem::{Problem, Tensor},
        steps::{Fused, Rows, Step},
    },
    check::{
        chunks,
        inputs::Numbers,
        outputs::{Outputs, Saved, poison_outputs},
        variants::{that_span, variants},
        verify::{verify, verify_timed, write_inputs},
    },
    job::ranks::{Error, gather_verdicts, hosts},
    pattern::Pattern,
    quant_mode::QuantMode,
    wire::Wire,
};

/// Problems that a soak holds.
const PROBLEMS: usize = 6;
/// The most elements of a problem. The reference is slow, and small operations give more turns.
const MAX_ELEMENTS: u64 = 1 << 16;
/// Hidden sizes: less than a warp, no power of two, several rounds on the CPU, and usual ones.
const HIDDEN: [u64; 10] = [16, 48, 64, 208, 1024, 2880, 4096, 7168, 8192, 16_384];
/// Turns between two verdicts of all ranks.
const TURNS: usize = 24;
/// Time between two lines of progress.
const TELL_EVERY: Duration = Duration::from_secs(60);

/// The largest problems of a soak, for which a backend reserves memory.
pub fn largest_problems() -> Vec<Problem> {
    HIDDEN
        .into_iter()
        .map(|hidden| Problem {
            dtype: DType::F32,
            tokens: (MAX_ELEMENTS / hidden).max(1),
            hidden,
            residual: true,
            sharded: false,
            norm: Norm::default(),
            // Of all, it has the most tensors.
            pattern: Pattern::Moe,
            quantization: Quantization::None,
            scale: 1.0,
            partial_sums: PartialSums::F32,
        })
        .collect()
}

/// The work of a soak.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Operations, including those of replays.
    pub operations: u64,
    /// Results that were compared bit for bit.
    pub results: u64,
    /// Problems, each checked against the reference in every mode.
    pub problems: u64,
    /// Turns whose outputs replaced their inputs.
    pub in_place: u64,
    /// Calls of some of a problem's rows.
    pub chunks: u64,
    /// Repetitions of a sequence; on GPUs, launches of captured graphs.
    pub repetitions: u64,
    /// Wrong results.
    pub failed: u64,
}

impl Sum for Tally {
    fn sum<I: Iterator<Item = Tally>>(tallies: I) -> Self {
        tallies.fold(Tally::default(), |total, tally| Tally {
            operations: total.operations + tally.operations,
            results: total.results + tally.results,
            problems: total.problems + tally.problems,
            in_place: total.in_place + tally.in_place,
            chunks: total.chunks + tally.chunks,
            repetitions: total.repetitions + tally.repetitions,
            failed: total.failed + tally.failed,
        })
    }
}

/// The name of a group's sequence of operations, for messages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sequence {
    /// The group's number, if there are several.
    pub(crate) group: Option<u32>,
    pub(crate) seed: u64,
}

impl fmt::Display for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(group) = self.group {
            write!(f, "group {group}, ")?;
        }
        write!(f, "seed {}", self.seed)
    }
}

/// A problem of the soak, with its right results.
struct Workload {
    problem: Problem,
    /// The format of rows between ranks.
    wire: Wire,
    seed: u64,
    /// The verified outputs; of a sum that went through a format of fewer bits, the second.
    expected: [Option<Outputs>; 2],
    /// The verified outputs with a sharded residual, if the problem has one.
    sharded: Option<Outputs>,
    /// The inputs, to be put back after they were overwritten.
    inputs: Saved,
    /// The sequence that is repeated, and the times. It stays the same, so that on GPUs one graph is launched each time.
    repeated: (Vec<Step>, u32),
    /// The verified outputs of the repetitions, if each reads what the one before it wrote.
    repeated_in_place: Option<Outputs>,
}

impl Workload {
    /// The steps of a turn, of which the last makes the outputs.
    fn steps<'a>(&'a self, turn: &'a Turn) -> &'a [Step] {
        match turn {
            Turn::Run(steps) | Turn::Chunks(steps) => steps,
            Turn::Repeat => &self.repeated.0,
        }
    }
}

/// One turn.
#[derive(Debug)]
enum Turn {
    /// Runs the steps once.
    Run(Vec<Step>),
    /// Runs the steps once, each a call of some rows.
    Chunks(Vec<Step>),
    /// Repeats the sequence of this problem.
    Repeat,
}

/// Runs a soak. `tell` gets a line once a minute, and one for a wrong result, which ends the soak.
///
/// # Errors
/// The group or the backend failed; the error has the seed and the turn.
pub fn run(
    settings: &Settings,
    group: &Group,
    backend: &mut dyn Collective,
    tell: impl FnMut(&str),
) -> Result<Tally, Error> {
    let sequence = Sequence { group: None, seed: settings.seed };
    run_sequence(settings, sequence, group, backend, &AtomicBool::new(false), tell)
}

/// Runs the soak of one group, which ends after a round if `stop` is set.
pub(crate) fn run_sequence(
    settings: &Settings,
    sequence: Sequence,
    group: &Group,
    backend: &mut dyn Collective,
    stop: &AtomicBool,
    mut tell: impl FnMut(&str),
) -> Result<Tally, Error> {
    let began = Instant::now();
    let mut told = began;
    let mut soak = Soak {
        random: Rng::with_seed(sequence.seed),
        // Different on each rank, and from the generator above.
        pauses: Rng::with_seed(sequence.seed.wrapping_add(1 + u64::from(group.rank()))),
        ranks_per_host: hosts(group).ranks_per_host(),
        hosts: hosts(group).count(),
        partial_sums: settings.job.partial_sums(),
        workloads: Vec::new(),
        tally: Tally::default(),
    };
    for round in 0u64.. {
        let at = |what: &str| format!("{sequence}, round {round}, {what}");
        if let Err(why) = soak.renew(group, backend).map_err(|error| located(error, &at("a new problem")))? {
            soak.tally.failed += 1;
            tell(&format!("FAILED {}: {why}", at("a new problem")));
            return Ok(soak.tally);
        }
        let mut verdict = Ok(());
        for turn in 0..TURNS {
            let (index, what) = soak.choose();
            let done = soak.take(backend, index, &what).map_err(|error| {
                located(error, &at(&format!("turn {turn}, {}", soak.describe(index, &what))))
            })?;
            // The turns go on, as on the ranks that found nothing.
            if let (Ok(()), Err(why)) = (&verdict, done) {
                verdict = Err(format!("turn {turn}, {}: {why}", soak.describe(index, &what)));
            }
        }
        // All ranks are idle until they have their verdicts.
        group.barrier()?;
        if let (Ok(()), Some(stray)) = (&verdict, backend.find_stray_write(false)?) {
            verdict = Err(format!("a stray write: {stray}"));
        }
        if let Err(why) = gather_verdicts(group, verdict)? {
            soak.tally.failed += 1;
            tell(&format!("FAILED {}", at(&why)));
            return Ok(soak.tally);
        }
        if told.elapsed() >= TELL_EVERY {
            told = Instant::now();
            tell(&format!(
                "{sequence}: {} operations after {:.0} s",
                soak.tally.operations,
                began.elapsed().as_secs_f64()
            ));
        }
        let done = match settings.operations {
            _ if stop.load(Ordering::Relaxed) => true,
            Some(operations) => soak.tally.operations >= operations,
            None => began.elapsed().as_secs_f64() >= settings.minutes * 60.0,
        };
        // Clocks differ, and so do the times at which ranks learn to stop, so rank 0 decides.
        let own = (group.rank() == 0).then_some([u8::from(done)]);
        if group.broadcast(own.as_ref().map(<[u8; 1]>::as_slice))? != [0] {
            break;
        }
    }
    Ok(soak.tally)
}

/// Adds the place to a backend's error. The group's errors are about ranks, and need none.
fn located(error: Error, at: &str) -> Error {
    match error {
        Error::Collective(error) => Error::Failed(format!("{at}: {error}")),
        error => error,
    }
}

struct Soak {
    /// The same on every rank.
    random: Rng,
    pauses: Rng,
    ranks_per_host: u32,
    hosts: u32,
    /// The type in which sums cross between hosts.
    partial_sums: PartialSums,
    workloads: Vec<Workload>,
    tally: Tally,
}

impl Soak {
    /// Makes the first problems, or replaces one later, and verifies their results. Every rank returns the same.
    fn renew(&mut self, group: &Group, backend: &mut dyn Collective) -> Result<Result<(), String>, Error> {
        let first = self.workloads.len()..PROBLEMS;
        let indices: Vec<usize> =
            if first.is_empty() { vec![self.random.usize(..PROBLEMS)] } else { first.collect() };
        for index in indices {
            let (problem, seed) = (self.problem(), self.random.u64(..));
            // Formats of fewer bits do not cross hosts.
            let wires = if self.hosts == 1 { Wire::ALL.len() } else { 1 };
            let wire = Wire::ALL[self.random.usize(..wires)];
            let mut repeated = (self.steps(problem.sharded, wire), self.random.u32(1..=8));
            let in_place = self.random.u8(..4) == 0;
            backend.select(index)?;
            backend.prepare(&problem)?;
            write_inputs(backend, &problem, Numbers::random(seed), group)?;
            let quant_mode = quant_mode(problem.quantization);
            let inputs = [Tensor::Input, Tensor::Residual, Tensor::ResidualShard];
            let inputs = Saved::of(backend, &inputs)?;
            let (mut expected, mut sharded, mut repeated_in_place) =
                ([const { None::<Outputs> }; 2], None, None);
            let all =
                variants(problem.pattern, quant_mode, problem.residual, problem.sharded, true, &[wire], &[]);
            for variant in that_span(self.hosts, all) {
                if let Err(why) = verify(backend, group, &problem, &variant, Numbers::random(seed))? {
                    return Ok(Err(format!("{}: {}: {why}", describe_problem(&problem), variant.name)));
                }
                self.tally.operations += 2;
                let Some(call) = variant.fused() else { continue };
                let found = outputs(backend, &problem, call)?;
                if in_place && repeated.0.last() == Some(&Step::Fused(call)) {
                    let variant = variant.clone().in_place();
                    repeated.0.clone_from(&variant.steps);
                    let (numbers, times) = (Numbers::random(seed), repeated.1);
                    match verify_timed(backend, group, &problem, &variant, times, numbers)? {
                        Ok((_, outputs)) => repeated_in_place = Some(outputs),
                        Err(why) => {
                            let problem = describe_problem(&problem);
                            return Ok(Err(format!("{problem}: {} in place: {why}", variant.name)));
                        }
                    }
                    self.tally.operations += 2 * u64::from(times);
                }
                if variant.sharded {
                    sharded = Some(found);
                } else if expected[bits_of(call)].get_or_insert(found.clone()) != &found {
                    return Ok(Err(format!("{}: modes differ", describe_problem(&problem))));
                }
            }
            self.tally.problems += 1;
            let workload =
                Workload { problem, wire, seed, expected, sharded, inputs, repeated, repeated_in_place };
            if index < self.workloads.len() {
                self.workloads[index] = workload;
            } else {
                self.workloads.push(workload);
            }
        }
        Ok(Ok(()))
    }

    fn problem(&mut self) -> Problem {
        let random = &mut self.random;
        let hidden = HIDDEN[random.usize(..HIDDEN.len())];
        let most = (MAX_ELEMENTS / hidden).max(1);
        // Few tokens half of the time: then operations follow each other fastest.
        let tokens = if random.bool() { random.u64(0..=4.min(most)) } else { random.u64(0..=most) };
        let supports = |mode: &QuantMode| mode.quantization().supports(hidden);
        let modes: Vec<QuantMode> = QuantMode::ALL.into_iter().filter(supports).collect();
        let quant_mode = modes[random.usize(..modes.len())];
        let residual = random.bool();
        let dtype = DType::ALL[random.usize(..DType::ALL.len())];
        let pattern = match random.u8(..8) {
            0 if Pattern::PostNorm.fits(dtype, hidden) => Pattern::PostNorm,
            1 => Pattern::Moe,
            _ => Pattern::AllReduceNorm,
        };
        Problem {
            dtype,
            tokens,
            hidden,
            residual,
            sharded: residual && random.bool(),
            norm: Norm::default(),
            pattern,
            quantization: quant_mode.quantization(),
            scale: quant_mode.scale(),
            partial_sums: self.partial_sums,
        }
    }

    /// One to five collectives, of which the last makes the outputs. If `sharded`, they may use the sharded residual.
    fn steps(&mut self, sharded: bool, wire: Wire) -> Vec<Step> {
        let (random, one_hop) = (&mut self.random, if self.hosts == 1 { Mode::OneShot } else { Mode::Auto });
        let mut fused = || {
            // The plan's mode shows in the bits of a format of fewer bits.
            let either = if wire.is_exact() { Mode::Auto } else { Mode::OneShot };
            let modes = [either, one_hop, Mode::TwoShot].map(Step::fused);
            let all = [modes[0], modes[1], modes[2], Step::fused_sharded()];
            all[random.usize(..if sharded { 4 } else { 3 })].sent_as(wire)
        };
        let last = fused();
        let before: [Step; 4] = std::array::from_fn(|_| fused());
        let mut steps: Vec<Step> = Vec::new();
        for &step in &before[..random.usize(..5)] {
            steps.push(match step {
                Step::Fused(Fused { mode, sharded: false, .. }) if random.u8(..4) == 0 => {
                    Step::AllReduce(mode)
                }
                step => step,
            });
        }
        steps.push(last);
        steps
    }

    fn choose(&mut self) -> (usize, Turn) {
        let index = self.random.usize(..self.workloads.len());
        let Workload { problem, wire, .. } = self.workloads[index];
        let repeat = self.random.u8(..4) == 0;
        if repeat {
            return (index, Turn::Repeat);
        }
        let mut steps = self.steps(problem.sharded, wire);
        let [in_place, chunks] = [(); 2].map(|()| self.random.u8(..4) == 0);
        // Steps that follow would read what one in place has written.
        let Some(Step::Fused(call)) = steps.last_mut() else { return (index, Turn::Run(steps)) };
        call.in_place = in_place;
        if chunks {
            let steps = chunks::cut(&problem, *call, self.ranks_per_host, &mut self.random);
            return (index, Turn::Chunks(steps));
        }
        (index, Turn::Run(steps))
    }

    /// Takes a turn, and compares the outputs with the verified ones.
    fn take(
        &mut self,
        backend: &mut dyn Collective,
        index: usize,
        turn: &Turn,
    ) -> Result<Result<(), String>, Error> {
        self.pause();
        let workload = &self.workloads[index];
        backend.select(index)?;
        poison_outputs(backend)?;
        match turn {
            Turn::Run(steps) => {
                backend.run(steps)?;
                self.tally.operations += steps.len() as u64;
            }
            Turn::Chunks(steps) => {
                chunks::run(backend, &workload.problem, steps)?;
                self.tally.operations += steps.len() as u64;
                self.tally.chunks += steps.len() as u64;
            }
            Turn::Repeat => {
                let (steps, times) = &workload.repeated;
                backend.time(steps, *times)?;
                self.tally.operations += steps.len() as u64 * u64::from(*times);
                self.tally.repetitions += 1;
            }
        }
        self.tally.results += 1;
        let Some(&Step::Fused(call)) = workload.steps(turn).last() else { return Ok(Ok(())) };
        let expected = match turn {
            Turn::Repeat if call.in_place => &workload.repeated_in_place,
            _ if call.sharded => &workload.sharded,
            _ => &workload.expected[bits_of(call)],
        };
        let found = outputs(backend, &workload.problem, call)?;
        if call.in_place {
            self.tally.in_place += 1;
            workload.inputs.restore(backend)?;
        }
        let wrong = expected.as_ref().and_then(|expected| found.first_difference(expected));
        Ok(wrong.map_or(Ok(()), |wrong| Err(format!("{wrong} (inputs of seed {})", workload.seed))))
    }

    /// Pauses this rank for a random time, often none.
    fn pause(&mut self) {
        let most = match self.pauses.u8(..64) {
            0 => 20_000,
            1..16 => 1_000,
            _ => return,
        };
        thread::sleep(Duration::from_micros(self.pauses.u64(..most)));
    }

    fn describe(&self, index: usize, turn: &Turn) -> String {
        let workload = &self.workloads[index];
        let steps = workload.steps(turn);
        let times = if matches!(turn, Turn::Repeat) { workload.repeated.1 } else { 1 };
        let mut text = describe_problem(&workload.problem);
        for step in steps {
            let _ = match step {
                Step::Fused(call) => describe_call(&mut text, call),
                step => write!(text, ", {step:?}"),
            };
        }
        if times > 1 {
            let _ = write!(text, ", {times} times");
        }
        text
    }
}

fn describe_call(text: &mut String, call: &Fused) -> fmt::Result {
    let Fused { mode, sharded, in_place, wire, rows } = call;
    let (sharded, in_place) =
        (if *sharded { " sharded" } else { "" }, if *in_place { " in place" } else { "" });
    write!(text, ", {mode:?}{sharded}{in_place}")?;
    if !wire.is_exact() {
        write!(text, " sent as {wire}")?;
    }
    rows.map_or(Ok(()), |Rows { first, count }| write!(text, " of {count} rows from {first}"))
}

fn describe_problem(problem: &Problem) -> String {
    let residual = if problem.residual { "with residual" } else { "without residual" };
    format!(
        "{} {}, {}, hidden {}, {} tokens, {residual}",
        problem.dtype,
        quant_mode(problem.quantization),
        problem.pattern,
        problem.hidden,
        problem.tokens
    )
}

fn quant_mode(quantization: Quantization) -> QuantMode {
    QuantMode::ALL.into_iter().find(|mode| mode.quantization() == quantization).unwrap_or(QuantMode::None)
}

/// The place of the [expected](Workload::expected) outputs of `call` without a sharded residual.
fn bits_of(call: Fused) -> usize {
    usize::from(!call.wire.is_exact() && call.mode == Mode::TwoShot)
}

/// The outputs that `call` has written.
fn outputs(backend: &mut dyn Collective, problem: &Problem, call: Fused) -> Result<Outputs, Error> {
    let norm = call.operation(problem).writes_norm().then(|| call.norm());
    Outputs::read(backend, call.sum(problem), norm)
}
