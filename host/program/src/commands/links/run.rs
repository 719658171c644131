//! The measurement of links: exercises, timed and checked.
//!
//! Every rank calls [`run`]. First every rank sends to every other without a wait: a pair that nothing passes between is then
//! found before a measurement waits for it. In an exercise only the ranks that it names are active; the others wait for
//! them. It is timed in trials of about a millisecond. Its figures count only if every byte of the last trial has arrived.

use fused_collective::group::rendezvous::Group;
use serde::{Deserialize, Serialize};

use crate::{
    backend::{
        collective::Collective,
        links::{Exercise, Links, Measure},
    },
    job::ranks::{Error, gather_verdicts, slowest},
    measurement::{invalid_duration, median},
    report::progress::Progress,
};

/// Trials of an exercise that count. The number is odd, so one of them is the median.
const TRIALS: usize = 15;
/// The aimed duration of a trial, which repeats an exercise.
const TRIAL_US: f64 = 1000.0;
/// The most repetitions of an exercise in a trial.
const MAX_TIMES: f64 = 1000.0;

/// The times of an exercise.
#[derive(Clone, Debug, PartialEq)]
pub struct Timed {
    /// The exercise.
    pub exercise: Exercise,
    /// Bytes that leave the busiest rank each time; 0 for a latency.
    pub bytes: u64,
    /// Microseconds of one repetition on the slowest rank, for each trial; or the reason why they do not count.
    pub times_us: Result<Vec<f64>, String>,
}

/// Bytes that did not arrive as they were sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Broken {
    /// The rank that sent.
    pub from: u32,
    /// The rank that did not receive what was sent.
    pub to: u32,
    /// The difference, in a line.
    pub reason: String,
}

/// The measurements of the links of a group. The same on every rank.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// The measures, each with its method.
    pub methods: Vec<(Measure, &'static str)>,
    /// Bytes that a rank sends to another each time.
    pub place_bytes: u64,
    /// The measures of pairs in the order of [`methods`](Self::methods), each for every ordered pair.
    pub pairs: Vec<(Measure, Timed)>,
    /// Puts of all ranks at the same time, with every grid.
    pub together: Vec<Timed>,
    /// Bytes of each rank's copy, and the microseconds of the slowest rank; `None` if a pair was
    /// [broken](Self::broken) before anything was measured.
    pub copy: Option<(u64, f64)>,
    /// The pairs of ranks between which some bytes did not arrive, each once, with what was seen first.
    pub broken: Vec<Broken>,
}

/// Checks that every rank reaches every other, and then measures everything that the backend can measure. If a pair is broken,
/// nothing is measured.
///
/// # Errors
/// The group or the backend failed. A wrong byte is no error but an exercise without times.
pub fn run(group: &Group, backend: &mut dyn Collective, progress: &Progress) -> Result<Measured, Error> {
    let mut links = backend.links(group)?;
    let mut measured = Measured {
        methods: links.methods(),
        place_bytes: links.place_bytes(),
        pairs: Vec::new(),
        together: Vec::new(),
        copy: None,
        broken: Vec::new(),
    };
    for (from, to) in ordered_pairs(group.world_size()) {
        progress.doing(format!("what rank {from} sends to rank {to}"));
        let exercise = Exercise::Reach { from, to };
        links.time(exercise, 1)?;
        group.barrier()?;
        measured.broken.extend(missing(group, &mut *links, exercise)?);
        progress.step();
    }
    if !measured.broken.is_empty() {
        links.leave()?;
        return Ok(measured);
    }
    let mut broken = Vec::new();
    for &(measure, _) in measured.methods.iter().filter(|(measure, _)| measure.is_of_pairs()) {
        for (from, to) in ordered_pairs(group.world_size()) {
            if let Some(exercise) = Exercise::of_pair(measure, from, to) {
                progress.doing(format!("{}, rank {from} to rank {to}", measure.name()));
                measured.pairs.push((measure, timed(group, &mut *links, exercise, &mut broken)?));
                progress.step();
            }
        }
    }
    measured.together = put_all(group, &mut *links, progress, &mut broken)?;
    let copy_bytes = links.copy_bytes();
    links.leave()?;
    drop(links);
    measured.copy = Some((copy_bytes, slowest(group, &[backend.copy_time(copy_bytes)?])?[0]));
    for found in broken {
        if !measured.broken.iter().any(|known| (known.from, known.to) == (found.from, found.to)) {
            measured.broken.push(found);
        }
    }
    Ok(measured)
}

/// The all-to-all put bandwidth of `group`, in GB/s: the best rate at which every rank stores into the memory of all others
/// at the same time. Or the reason why a measurement of it does not count.
///
/// # Errors
/// The group or the backend failed.
pub fn put_bandwidth(
    group: &Group,
    backend: &mut dyn Collective,
    progress: &Progress,
) -> Result<Result<f64, String>, Error> {
    let mut links = backend.links(group)?;
    let all = put_all(group, &mut *links, progress, &mut Vec::new())?;
    links.leave()?;
    let wrong = all.iter().find_map(|timed| timed.times_us.as_ref().err());
    Ok(match wrong {
        Some(why) => Err(why.clone()),
        None => best_gb_s(&all).ok_or_else(|| "it has no valid times".to_owned()),
    })
}

/// The most exercises of pairs that [`run`] does in a group of `world_size` ranks.
pub fn most_steps(world_size: u32) -> u64 {
    5 * u64::from(world_size) * u64::from(world_size - 1)
}

fn ordered_pairs(world_size: u32) -> impl Iterator<Item = (u32, u32)> {
    (0..world_size)
        .flat_map(move |from| (0..world_size).map(move |to| (from, to)))
        .filter(|(from, to)| from != to)
}

/// Times the puts of all ranks at the same time, with every grid that is worth trying.
fn put_all(
    group: &Group,
    links: &mut dyn Links,
    progress: &Progress,
    broken: &mut Vec<Broken>,
) -> Result<Vec<Timed>, Error> {
    let own = serde_json::to_vec(&links.grids()?).map_err(|error| Error::Failed(error.to_string()))?;
    // The grids of rank 0, as GPUs may differ.
    let grids = group.broadcast((group.rank() == 0).then_some(&own[..]))?;
    let grids: Vec<Option<u32>> = serde_json::from_slice(&grids)
        .map_err(|error| Error::Failed(format!("cannot read the grids of rank 0: {error}")))?;
    let mut all = Vec::new();
    for blocks in grids {
        progress.doing("all ranks put");
        all.push(timed(group, links, Exercise::PushAll { blocks }, broken)?);
    }
    Ok(all)
}

/// Times an exercise, and compares the bytes that arrived with those that were sent. What differs is added to `broken`.
fn timed(
    group: &Group,
    links: &mut dyn Links,
    exercise: Exercise,
    broken: &mut Vec<Broken>,
) -> Result<Timed, Error> {
    let mut trial = |times| {
        // No rank is still busy with the trial before.
        group.barrier()?;
        Ok::<f64, Error>(links.time(exercise, times)?)
    };
    // The first trial does the set-up of first use. The second decides the repetitions of a trial.
    trial(1)?;
    let once = slowest(group, &[trial(1)?])?[0];
    // The time may be shorter than a step of the clock.
    let times = (TRIAL_US / once.max(1.0)).clamp(1.0, MAX_TIMES) as u32;
    let own = (0..TRIALS).map(|_| trial(times)).collect::<Result<Vec<_>, _>>()?;
    group.barrier()?;
    let missing = missing(group, links, exercise)?;
    let times_us = slowest(group, &own)?;
    let times_us = match missing.first() {
        None => Ok(times_us),
        Some(Broken { to, reason, .. }) => Err(format!("rank {to}: {reason}")),
    };
    broken.extend(missing);
    Ok(Timed { exercise, bytes: exercise.bytes(links.place_bytes(), group.world_size()), times_us })
}

/// The bytes of the last exercise that did not arrive on some rank. Every rank returns the same.
fn missing(group: &Group, links: &mut dyn Links, exercise: Exercise) -> Result<Vec<Broken>, Error> {
    let (to, mut own) = (group.rank(), Vec::new());
    for from in exercise.sources(to, group.world_size()) {
        let wrong = links.received(from)?;
        own.extend(wrong.map(|reason| Broken { from, to, reason }));
    }
    Ok(gather_verdicts(group, Ok(own))?.map_err(Error::Failed)?.concat())
}

/// The best rate in GB/s; `None` if all exercises failed.
pub fn best_gb_s(together: &[Timed]) -> Option<f64> {
    together.iter().filter_map(|timed| LinkOutcome::of(timed).median()).max_by(f64::total_cmp)
}

/// The figures of an exercise, or the reason why there are none.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "status", rename_all = "lowercase")]
pub enum LinkOutcome {
    /// Every byte arrived.
    Verified {
        /// The median, in the measure's unit.
        median: f64,
        /// The smallest figure.
        min: f64,
        /// The largest figure.
        max: f64,
        /// Microseconds of the slowest rank, for each trial.
        times_us: Vec<f64>,
    },
    /// A byte was wrong, or the times are not valid.
    Failed {
        /// The reason, in a line.
        reason: String,
    },
}

impl LinkOutcome {
    pub(crate) fn of(timed: &Timed) -> Self {
        let times_us = match &timed.times_us {
            Ok(times_us) => times_us,
            Err(reason) => return LinkOutcome::Failed { reason: reason.clone() },
        };
        if let Some(reason) = invalid_duration(times_us) {
            return LinkOutcome::Failed { reason };
        }
        let figure = |time_us: f64| match timed.exercise {
            Exercise::Word { .. } => time_us,
            _ => gb_s(timed.bytes, time_us),
        };
        let mut figures: Vec<f64> = times_us.iter().map(|&time| figure(time)).collect();
        figures.sort_by(f64::total_cmp);
        match (median(&figures), figures.first(), figures.last()) {
            (Some(median), Some(&min), Some(&max)) => {
                LinkOutcome::Verified { median, min, max, times_us: times_us.clone() }
            }
            _ => LinkOutcome::Failed { reason: "no trial was timed".to_owned() },
        }
    }

    pub(crate) fn median(&self) -> Option<f64> {
        match self {
            LinkOutcome::Verified { median, .. } => Some(*median),
            LinkOutcome::Failed { .. } => None,
        }
    }

    pub(crate) fn reason(&self) -> Option<&str> {
        match self {
            LinkOutcome::Verified { .. } => None,
            LinkOutcome::Failed { reason } => Some(reason),
        }
    }
}

pub(crate) fn gb_s(bytes: u64, time_us: f64) -> f64 {
    bytes as f64 / time_us / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_ordered_pair_is_measured_once() {
        let pairs: Vec<_> = ordered_pairs(3).collect();
        assert_eq!(pairs, [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]);
        assert_eq!(most_steps(3), 5 * pairs.len() as u64);
    }
}
