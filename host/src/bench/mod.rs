//! The benchmark: every variant of every configuration, verified, then timed.
//!
//! Each rank runs [`run`] with its end of the group and of the backend; all of them go through the same
//! steps. A trial runs a variant several times back to back, from a barrier; its time is the slowest rank's.

mod inputs;
mod variants;
mod verify;

use std::fmt;

use fused_collective_core::fusion::Norm;

use crate::{
    collective::{self, AllReduce, Collective, Problem, Step},
    rendezvous::{self, Group},
    report::{Measurement, Trials, progress::Progress},
    settings::{Case, QuantMode, Settings},
};
pub use inputs::{Source, fill_row};
pub use variants::{Variant, variants};

/// Why a benchmark ended early.
#[derive(Debug)]
pub enum Error {
    /// A rank was lost, or could not be reached.
    Group(rendezvous::Error),
    /// An operation could not run.
    Collective(collective::Error),
    /// Something else; the text is for the user.
    Failed(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Group(error) => error.fmt(f),
            Error::Collective(error) => error.fmt(f),
            Error::Failed(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for Error {}

impl From<rendezvous::Error> for Error {
    fn from(error: rendezvous::Error) -> Self {
        Error::Group(error)
    }
}

impl From<collective::Error> for Error {
    fn from(error: collective::Error) -> Self {
        Error::Collective(error)
    }
}

/// Trials that decide how the separate operations run an all-reduce.
const CHOICE_TRIALS: u32 = 5;

/// The problem that a configuration measures.
///
/// Inputs have variance 1 and so has the norm before the weight, whose magnitude is below 1.8. The scales put
/// almost all of it in range: FP8 is scaled to within 448, NVFP4 so that the largest block scale is near 448.
pub fn problem(settings: &Settings, case: Case) -> Problem {
    Problem {
        dtype: case.dtype,
        tokens: case.num_tokens,
        hidden: settings.hidden_dim,
        residual: settings.use_residual,
        norm: Norm::default(),
        quantization: case.quant_mode.quantization(),
        scale: match case.quant_mode {
            QuantMode::None => 1.0,
            QuantMode::Fp8 => 1.0 / 64.0,
            QuantMode::Fp4 => 448.0,
        },
    }
}

/// What one configuration gave.
#[derive(Debug)]
pub struct Measured {
    /// The configuration.
    pub case: Case,
    /// What a reader should know of it.
    pub notes: Vec<String>,
    /// Its variants.
    pub variants: Vec<Measurement>,
}

/// Measures every configuration of `settings` and hands each to `done`; every rank is given the same figures.
///
/// # Errors
/// The group or the backend failed. A variant that is wrong is no error but a measurement that says so.
pub fn run(
    settings: &Settings,
    group: &Group,
    backend: &mut dyn Collective,
    progress: &Progress,
    mut done: impl FnMut(Measured),
) -> Result<(), Error> {
    for case in settings.cases() {
        let problem = problem(settings, case);
        backend.prepare(&problem)?;
        verify::write_inputs(backend, &problem, settings.seed, group.rank())?;
        let mut notes = backend.notes().to_vec();
        let mut all_reduces = Vec::new();
        for all_reduce in backend.all_reduces() {
            let (step, note) = choose_way(group, backend, &all_reduce)?;
            all_reduces.push((all_reduce.name, step));
            notes.extend(note);
        }
        let mut measured = Vec::new();
        for variant in variants(case.quant_mode, settings.use_residual, settings.oneshot, &all_reduces) {
            progress.doing(format!("{} tokens, {}: {}", case.num_tokens, case.quant_mode, variant.name));
            let verdict = verify::verify(backend, group, &problem, &variant, settings.seed)?;
            let result = match verdict {
                Ok(max_error_ulp) => Ok(time(settings, group, backend, &variant.steps, max_error_ulp)?),
                Err(why) => Err(why),
            };
            measured.push(Measurement { variant: variant.name, kind: variant.kind, result });
            progress.step();
        }
        let bytes = problem.activation_bytes();
        let copy = slowest(group, &[backend.copy_time(bytes)?])?[0];
        notes.push(format!(
            "copying the input once takes {copy:.2} µs ({:.2} GB/s read and written): fusing saves at least that, \
             the all-reduced activation's way to memory and back",
            2.0 * bytes as f64 / copy / 1e3
        ));
        done(Measured { case, notes, variants: measured });
    }
    Ok(())
}

/// The variants that [`run`] will measure on a backend with so many all-reduces.
pub fn count(settings: &Settings, all_reduces: usize) -> u64 {
    settings.cases().map(|case| variants::count(case.quant_mode, settings.oneshot, all_reduces) as u64).sum()
}

/// The separate operations deserve the fastest way of an all-reduce: measures those there are.
fn choose_way(
    group: &Group,
    backend: &mut dyn Collective,
    all_reduce: &AllReduce,
) -> Result<(Step, Option<String>), Error> {
    let [(_, first), rest @ ..] = &all_reduce.ways[..] else {
        return Err(Error::Failed(format!("there is no way to run {}", all_reduce.name)));
    };
    if rest.is_empty() {
        return Ok((*first, None));
    }
    let mut best = (f64::INFINITY, *first, "");
    let mut figures = Vec::new();
    for &(name, step) in &all_reduce.ways {
        let mut times = Vec::new();
        for _ in 0..=CHOICE_TRIALS {
            times.push(backend.time(&[step], 1)?);
        }
        // The first one warmed up.
        let time = slowest(group, &times[1..])?.into_iter().fold(f64::INFINITY, f64::min);
        figures.push(format!("{name} {time:.2} µs"));
        if time < best.0 {
            best = (time, step, name);
        }
    }
    let (_, step, name) = best;
    let which = all_reduce.name;
    Ok((step, Some(format!("standard_{which} uses the {name} all-reduce ({})", figures.join(", ")))))
}

/// Times `steps`: warm-up trials, then those that count.
fn time(
    settings: &Settings,
    group: &Group,
    backend: &mut dyn Collective,
    steps: &[Step],
    max_error_ulp: f64,
) -> Result<Trials, Error> {
    let first = slowest(group, &[backend.time(steps, 1)?])?[0];
    let operations_per_trial = backend.operations_per_trial(first);
    for _ in 0..settings.warmup {
        backend.time(steps, operations_per_trial)?;
    }
    let mut times = Vec::new();
    for _ in 0..settings.trials {
        times.push(backend.time(steps, operations_per_trial)?);
    }
    Ok(Trials { max_error_ulp, operations_per_trial, times_us: slowest(group, &times)? })
}

/// For each of this rank's times the largest that any rank has.
fn slowest(group: &Group, times: &[f64]) -> Result<Vec<f64>, Error> {
    let mut slowest = Vec::with_capacity(times.len());
    for times in times.chunks(rendezvous::MAX_MESSAGE / size_of::<f64>()) {
        let mut worst = vec![0.0f64; times.len()];
        for rank in group.all_gather(bytemuck::cast_slice(times))? {
            let theirs: Vec<f64> = bytemuck::allocation::pod_collect_to_vec(&rank);
            if theirs.len() != worst.len() {
                return Err(Error::Failed("ranks ran different numbers of trials".to_owned()));
            }
            for (worst, time) in worst.iter_mut().zip(theirs) {
                *worst = worst.max(time);
            }
        }
        slowest.extend(worst);
    }
    Ok(slowest)
}
