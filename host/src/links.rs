//! What the links between ranks can do, measured: how long a word takes, and how many bytes a second they carry.
//!
//! A fused operation moves its rows over the links as these exercises do, by the same stores, loads and waits, and has
//! everything else to do besides. So the rate at which all ranks push at once is what an operation's bandwidth is
//! judged against.
//!
//! Each rank runs [`run`] with its end of the group and of the backend. In an exercise only the ranks that it names
//! do anything; the others wait for them. It is timed in trials of about a millisecond, and its figures are believed only
//! once everything that was sent in the last trial was found where it belongs.

use std::{ops::Range, time::Duration};

use fused_collective_bench::links::pattern;
use fused_collective_core::pack::Pack;
use serde::{Deserialize, Serialize};

use crate::{
    bench::{Error, slowest, verify::gather_verdicts},
    collective::{self, Collective},
    rendezvous::Group,
    report::{links::push_gb_s, progress::Progress},
    settings::BackendChoice,
};

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

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// How long a word takes from one rank to another.
    Word,
    /// One rank stores into another's memory, and nothing else happens.
    Push,
    /// The same while the other polls what is stored.
    PolledPush,
    /// One rank loads from another's memory.
    Pull,
    /// Every rank stores into every other's memory at the same time.
    PushAll,
    /// Every rank copies within its own memory at the same time.
    Copy,
}

impl Measure {
    /// Its name for a reader.
    pub fn name(self) -> &'static str {
        match self {
            Measure::Word => "word",
            Measure::Push => "push",
            Measure::PolledPush => "polled push",
            Measure::Pull => "pull",
            Measure::PushAll => "every rank pushes to all others",
            Measure::Copy => "every rank copies in its memory",
        }
    }

    /// Whether it is of a pair of ranks.
    pub fn is_of_pairs(self) -> bool {
        !matches!(self, Measure::PushAll | Measure::Copy)
    }
}

/// Something to be done and timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exercise {
    /// A word goes from rank `from` to rank `to` and back; half of that is its time.
    Word {
        /// The rank that sends first, and has the time.
        from: u32,
        /// The rank that answers.
        to: u32,
    },
    /// Rank `from` fills its place in rank `to`'s memory.
    Push {
        /// The rank that stores.
        from: u32,
        /// The rank whose memory it is.
        to: u32,
        /// Whether that rank polls what is stored.
        polled: bool,
    },
    /// Rank `to` reads what rank `from` has in its memory.
    Pull {
        /// The rank whose memory it is.
        from: u32,
        /// The rank that loads.
        to: u32,
    },
    /// Every rank fills its place in every other's memory.
    PushAll {
        /// Blocks of each rank's grid, on GPUs.
        blocks: Option<u32>,
    },
}

impl Exercise {
    /// The exercise that measures `measure` between two ranks, if it is one of pairs.
    fn of_pair(measure: Measure, from: u32, to: u32) -> Option<Exercise> {
        Some(match measure {
            Measure::Word => Exercise::Word { from, to },
            Measure::Push => Exercise::Push { from, to, polled: false },
            Measure::PolledPush => Exercise::Push { from, to, polled: true },
            Measure::Pull => Exercise::Pull { from, to },
            Measure::PushAll | Measure::Copy => return None,
        })
    }

    /// The ranks whose places in rank `rank`'s memory it fills.
    fn sources(self, rank: u32, world_size: u32) -> Vec<u32> {
        match self {
            Exercise::Push { from, to, .. } | Exercise::Pull { from, to } if to == rank => vec![from],
            Exercise::PushAll { .. } => (0..world_size).filter(|&source| source != rank).collect(),
            _ => Vec::new(),
        }
    }

    /// Bytes that leave the busiest rank each time, with places of `place_bytes`; 0 if it is not about bytes.
    fn bytes(self, place_bytes: u64, world_size: u32) -> u64 {
        match self {
            Exercise::Word { .. } => 0,
            Exercise::Push { .. } | Exercise::Pull { .. } => place_bytes,
            Exercise::PushAll { .. } => place_bytes * u64::from(world_size - 1),
        }
    }
}

/// One rank's end of what measures the links of a group: memory that all its ranks reach, apart from the workspace.
///
/// All ranks call the same methods with the same arguments in the same order, but for [`received`](Self::received).
pub trait Links {
    /// What can be measured here, and how it is.
    fn methods(&self) -> Vec<(Measure, &'static str)>;

    /// Bytes that a rank sends to another each time.
    fn place_bytes(&self) -> u64;

    /// Bytes that a [copy](Measure::Copy) should be of.
    fn copy_bytes(&self) -> u64;

    /// The numbers of blocks that [`Exercise::PushAll`] is worth trying with: `None` alone where there are no blocks.
    ///
    /// # Errors
    /// The backend's.
    fn grids(&mut self) -> Result<Vec<Option<u32>>, collective::Error>;

    /// Does `exercise` so many `times`, one after the other; all ranks that it needs begin together. Microseconds for
    /// each time, by this rank's clock; 0 on a rank that does nothing or only answers.
    ///
    /// # Errors
    /// A rank that did not do its part in time; the backend's.
    fn time(&mut self, exercise: Exercise, times: u32) -> Result<f64, collective::Error>;

    /// Holds what the last exercise wrote into rank `source`'s place in this rank's memory to what it should have
    /// written. What is wrong, for a reader; `None` if nothing is.
    ///
    /// # Errors
    /// The backend's.
    fn received(&mut self, source: u32) -> Result<Option<String>, collective::Error>;

    /// Lets go of what this rank has of other ranks' memory, so that they may free it. No other call follows.
    ///
    /// # Errors
    /// A rank was lost.
    fn leave(&mut self) -> Result<(), collective::Error>;
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

/// What is wrong with packs `range` of rank `source`'s place, which should hold the pattern of run `run`, for a
/// reader; `None` if nothing is. `found` is their bytes.
pub(crate) fn find_wrong(found: &[u8], range: Range<u32>, source: u32, run: u32) -> Option<String> {
    let (packs, _) = found.as_chunks::<{ Pack::BYTES as usize }>();
    let wrong = packs.len() != range.len();
    let at = range.zip(packs).find(|&(index, pack)| {
        let Pack(words) = pattern(source, run, index);
        bytemuck::bytes_of(&words) != pack
    });
    match at {
        Some((index, pack)) => {
            let byte = u64::from(index) * Pack::BYTES;
            Some(format!("byte {byte} and on of what rank {source} sent is not what it sent: {pack:02x?}"))
        }
        None => wrong.then(|| format!("of what rank {source} sent there are {} packs", packs.len())),
    }
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

    #[test]
    fn an_exercise_is_checked_where_its_bytes_arrive() {
        let push = Exercise::Push { from: 2, to: 0, polled: true };
        let all = Exercise::PushAll { blocks: None };
        let of = |exercise: Exercise| [0, 1, 2].map(|rank| exercise.sources(rank, 3));
        assert_eq!(of(push), [vec![2], vec![], vec![]]);
        assert_eq!(of(Exercise::Pull { from: 1, to: 2 }), [vec![], vec![], vec![1]]);
        assert_eq!(of(all), [vec![1, 2], vec![0, 2], vec![0, 1]]);
        assert!(of(Exercise::Word { from: 0, to: 1 }).iter().all(Vec::is_empty));
        assert_eq!([push, all].map(|exercise| exercise.bytes(64, 3)), [64, 128]);
    }

    #[test]
    fn a_pack_that_is_wrong_late_or_missing_is_found() {
        let sent = |run| -> Vec<u8> {
            (5..9).flat_map(|index| bytemuck::bytes_of(&pattern(1, run, index).0).to_vec()).collect()
        };
        assert_eq!(find_wrong(&sent(3), 5..9, 1, 3), None);
        let mut late = sent(3);
        late[32..48].copy_from_slice(&sent(2)[32..48]);
        let wrong = find_wrong(&late, 5..9, 1, 3).unwrap();
        assert!(wrong.starts_with("byte 112 and on of what rank 1 sent is not what it sent: ["), "{wrong}");
        let mut flipped = sent(3);
        flipped[63] ^= 1;
        assert!(find_wrong(&flipped, 5..9, 1, 3).is_some_and(|wrong| wrong.starts_with("byte 128 ")));
        assert!(find_wrong(&sent(3)[..48], 5..9, 1, 3).is_some());
    }
}
