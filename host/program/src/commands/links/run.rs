//! The measurement of links: exercises, timed and checked.
//!
//! Each rank runs [`run`] with its end of the group and of the backend. In an exercise only the ranks that it names
//! do anything; the others wait for them. It is timed in trials of about a millisecond, and its figures are believed only
//! once everything that was sent in the last trial was found where it belongs.

use std::time::Duration;

use fused_collective::group::rendezvous::Group;

use crate::{
    backend::{
        collective::Collective,
        links::{Exercise, Links, Measure},
    },
    job::{
        options::BackendChoice,
        ranks::{Error, gather_verdicts, slowest},
    },
    measurement::median,
    report::progress::Progress,
};
use serde::{Deserialize, Serialize};

/// Everything that the command line says about a measurement of links, but for the files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Longest wait for a peer, in seconds; finite and above 0.
    pub deadline_seconds: f64,
    /// The backend asked for.
    pub backend: BackendChoice,
    /// Whether ranks may share a GPU, which makes times meaningless.
    pub oversubscribe: bool,
    /// Ranks asked for; `None` leaves it to the launcher or to the backend.
    pub nproc_per_node: Option<u32>,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            deadline_seconds: 10.0,
            backend: BackendChoice::Auto,
            oversubscribe: false,
            nproc_per_node: None,
        }
    }
}

impl Settings {
    /// Longest wait for a peer.
    pub fn deadline(&self) -> Duration {
        Duration::from_secs_f64(self.deadline_seconds)
    }
}

/// Trials of an exercise that count. Odd, so that one of them is the median.
const TRIALS: usize = 15;
/// A trial does an exercise as often as takes about this long.
const TRIAL_US: f64 = 1000.0;
/// The most times that a trial does an exercise.
const MAX_TIMES: f64 = 1000.0;

/// What came of an exercise.
#[derive(Clone, Debug, PartialEq)]
pub struct Timed {
    /// The exercise.
    pub exercise: Exercise,
    /// Bytes that leave the busiest rank each time; 0 if it is not about bytes.
    pub bytes: u64,
    /// For each trial the slowest rank's microseconds each time; or why they mean nothing.
    pub times_us: Result<Vec<f64>, String>,
}

/// What was measured of the links of a group. The same on every rank.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// What was measured, and how.
    pub methods: Vec<(Measure, &'static str)>,
    /// Bytes that a rank sent to another each time.
    pub place_bytes: u64,
    /// The measures of pairs in the order of [`methods`](Self::methods), each for all ordered pairs.
    pub pairs: Vec<(Measure, Timed)>,
    /// All ranks at the same time, with every grid.
    pub together: Vec<Timed>,
    /// Bytes of each rank's copy, and the slowest rank's microseconds.
    pub copy: (u64, f64),
}

/// Measures everything that the backend can measure.
///
/// # Errors
/// The group or the backend failed. What arrives wrong is no error but an exercise without times.
pub fn run(group: &Group, backend: &mut dyn Collective, progress: &Progress) -> Result<Measured, Error> {
    let mut links = backend.links(group)?;
    let methods = links.methods();
    let (place_bytes, copy_bytes) = (links.place_bytes(), links.copy_bytes());
    let mut pairs = Vec::new();
    for &(measure, _) in methods.iter().filter(|(measure, _)| measure.is_of_pairs()) {
        for (from, to) in ordered_pairs(group.world_size()) {
            if let Some(exercise) = Exercise::of_pair(measure, from, to) {
                progress.doing(format!("{measure:?}, rank {from} to rank {to}"));
                pairs.push((measure, timed(group, &mut *links, exercise)?));
                progress.step();
            }
        }
    }
    let together = push_all(group, &mut *links, progress)?;
    links.leave()?;
    drop(links);
    let copy_us = slowest(group, &[backend.copy_time(copy_bytes)?])?[0];
    Ok(Measured { methods, place_bytes, pairs, together, copy: (copy_bytes, copy_us) })
}

/// The best rate, in GB/s, at which all ranks of `group` push to all others at the same time; or what was wrong with what
/// arrived, or with the times.
///
/// # Errors
/// The group or the backend failed.
pub fn push_rate(
    group: &Group,
    backend: &mut dyn Collective,
    progress: &Progress,
) -> Result<Result<f64, String>, Error> {
    let mut links = backend.links(group)?;
    let all = push_all(group, &mut *links, progress)?;
    links.leave()?;
    let wrong = all.iter().find_map(|timed| timed.times_us.as_ref().err());
    Ok(match wrong {
        Some(why) => Err(why.clone()),
        None => push_gb_s(&all).ok_or_else(|| "its times are none".to_owned()),
    })
}

/// How many exercises of pairs [`run`] does in a group of `world_size` ranks, at most.
pub fn most_steps(world_size: u32) -> u64 {
    4 * u64::from(world_size) * u64::from(world_size - 1)
}

fn ordered_pairs(world_size: u32) -> impl Iterator<Item = (u32, u32)> {
    (0..world_size)
        .flat_map(move |from| (0..world_size).map(move |to| (from, to)))
        .filter(|(from, to)| from != to)
}

/// All ranks push at the same time, with every grid that is worth trying.
fn push_all(group: &Group, links: &mut dyn Links, progress: &Progress) -> Result<Vec<Timed>, Error> {
    let own = serde_json::to_vec(&links.grids()?).map_err(|error| Error::Failed(error.to_string()))?;
    // Rank 0's, should GPUs differ.
    let grids = group.broadcast((group.rank() == 0).then_some(&own[..]))?;
    let grids: Vec<Option<u32>> = serde_json::from_slice(&grids)
        .map_err(|error| Error::Failed(format!("rank 0's grids cannot be read: {error}")))?;
    let mut all = Vec::new();
    for blocks in grids {
        progress.doing("all ranks push");
        all.push(timed(group, links, Exercise::PushAll { blocks })?);
    }
    Ok(all)
}

/// Times an exercise, and holds what it sent to what arrived.
fn timed(group: &Group, links: &mut dyn Links, exercise: Exercise) -> Result<Timed, Error> {
    let (rank, world_size) = (group.rank(), group.world_size());
    let mut trial = |times| {
        // Nobody is still busy with the trial before.
        group.barrier()?;
        Ok::<f64, Error>(links.time(exercise, times)?)
    };
    // The first sets up what is set up at first use; the second tells how many times make a trial.
    trial(1)?;
    let once = slowest(group, &[trial(1)?])?[0];
    // A clock's step may be longer.
    let times = (TRIAL_US / once.max(1.0)).clamp(1.0, MAX_TIMES) as u32;
    let own = (0..TRIALS).map(|_| trial(times)).collect::<Result<Vec<_>, _>>()?;
    group.barrier()?;
    let mut verdict = Ok(());
    for source in exercise.sources(rank, world_size) {
        if let (Ok(()), Some(wrong)) = (&verdict, links.received(source)?) {
            verdict = Err(wrong);
        }
    }
    let verdict = gather_verdicts(group, verdict)?;
    let times_us = slowest(group, &own)?;
    Ok(Timed {
        exercise,
        bytes: exercise.bytes(links.place_bytes(), world_size),
        times_us: verdict.map(|_| times_us),
    })
}

/// The best rate, in GB/s, at which all ranks pushed at the same time; none if all failed.
pub fn push_gb_s(together: &[Timed]) -> Option<f64> {
    together.iter().filter_map(|timed| Outcome::of(timed).median()).max_by(f64::total_cmp)
}

/// The figures of an exercise, or the reason that there are none.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "status", rename_all = "lowercase")]
pub enum Outcome {
    /// What was sent was found where it belongs.
    Verified {
        /// The median, in the measure's unit.
        median: f64,
        /// The least.
        min: f64,
        /// The largest.
        max: f64,
        /// For each trial the slowest rank's microseconds.
        times_us: Vec<f64>,
    },
    /// It was not, or the times are none.
    Failed {
        /// Why, in a line.
        reason: String,
    },
}

impl Outcome {
    pub(crate) fn of(timed: &Timed) -> Outcome {
        let times_us = match &timed.times_us {
            Ok(times_us) => times_us,
            Err(reason) => return Outcome::Failed { reason: reason.clone() },
        };
        if let Some(time) = times_us.iter().find(|time| !(time.is_finite() && **time > 0.0)) {
            return Outcome::Failed { reason: format!("a trial took {time} µs, which is no time") };
        }
        let figure = |time_us: f64| match timed.exercise {
            Exercise::Word { .. } => time_us,
            _ => gb_s(timed.bytes, time_us),
        };
        let mut figures: Vec<f64> = times_us.iter().map(|&time| figure(time)).collect();
        figures.sort_by(f64::total_cmp);
        match (median(&figures), figures.first(), figures.last()) {
            (Some(median), Some(&min), Some(&max)) => {
                Outcome::Verified { median, min, max, times_us: times_us.clone() }
            }
            _ => Outcome::Failed { reason: "no trial was timed".to_owned() },
        }
    }

    pub(crate) fn median(&self) -> Option<f64> {
        match self {
            Outcome::Verified { median, .. } => Some(*median),
            Outcome::Failed { .. } => None,
        }
    }

    pub(crate) fn reason(&self) -> Option<&str> {
        match self {
            Outcome::Verified { .. } => None,
            Outcome::Failed { reason } => Some(reason),
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
        assert_eq!(most_steps(3), 4 * pairs.len() as u64);
    }
}
