//! Soaks of several disjoint groups at the same time.
//!
//! Groups run free of each other, as far apart as their operations take them. What they have in common, that one of
//! them found something wrong or that all are done, goes over the group of all ranks, on a thread of its own: a rank
//! that takes long in its group, or is done before others, is late for nobody.

use std::{
    collections::BTreeMap,
    panic::resume_unwind,
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    thread::{self, ScopedJoinHandle},
    time::{Duration, Instant},
};

use fastrand::Rng;
use serde::{Deserialize, Serialize};

use super::run::{Sequence, Settings, Tally, run_sequence};
use fused_collective::group::rendezvous::Group;

use crate::{backend::collective::Collective, job::ranks::Error};

/// Between two exchanges of all ranks, unless there is news.
const BEAT: Duration = Duration::from_millis(100);
/// How long a rank that is told of a loss in its group waits for all ranks to be told more.
const FIRST_HAND: Duration = Duration::from_secs(1);

/// The seed of a group's sequence: `seed` itself for the first, which a soak of one group has as well.
pub fn group_seed(seed: u64, number: u32) -> u64 {
    (0..number).fold(seed, |seed, _| Rng::with_seed(seed).u64(..))
}

/// What happened in this rank's group.
enum News {
    Line(String),
    Ended(Tally),
}

/// What a rank tells all others.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Word {
    /// The number of its group.
    number: u32,
    /// What the user should see. Of a group, its rank 0 says it.
    lines: Vec<String>,
    /// What its group has done, when it is.
    ended: Option<Tally>,
}

/// Runs a soak in each of several groups of `world`, of which this rank's is `group`, with this `number`; each has a
/// [seed of its own](group_seed). What they did, by number, is the same on every rank. `tell` gets lines as
/// [`run`](super::run)'s does, on each rank those of all groups, with the group's number; ranks in them are counted
/// within the group. A group that finds a wrong result ends the soak for all.
///
/// # Errors
/// A group or the backend failed; the error has the group's number, its seed and the turn.
pub fn run_groups(
    settings: &Settings,
    world: &Group,
    number: u32,
    group: &Group,
    backend: &mut dyn Collective,
    tell: impl FnMut(&str) + Send,
) -> Result<Vec<Tally>, Error> {
    let sequence = Sequence { group: Some(number), seed: group_seed(settings.seed, number) };
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        // Gone with this closure, however it ends, and so is the thread.
        let (news, heard) = channel();
        let exchange = scope.spawn(|| {
            let tallies = exchange(world, number, heard, &stop, tell);
            if tallies.is_err() {
                // No operation of this group should outlive the job.
                group.abort("another group has failed");
            }
            tallies
        });
        let tell = |line: &str| {
            if group.rank() == 0 {
                // A thread that has ended has a reason, which is this function's result.
                let _ = news.send(News::Line(line.to_owned()));
            }
        };
        let done = run_sequence(settings, sequence, group, backend, &stop, tell);
        let joined =
            |exchange: ScopedJoinHandle<'_, _>| exchange.join().unwrap_or_else(|panic| resume_unwind(panic));
        match done {
            Ok(tally) => {
                let _ = news.send(News::Ended(tally));
                joined(exchange)
            }
            Err(error) => {
                wait_for_first_hand(world, group);
                drop(news);
                // What all ranks were told knows ranks by their numbers among all.
                joined(exchange)?;
                if let Some(lost) = world.lost() {
                    return Err(Error::Group(lost.into()));
                }
                Err(match error {
                    Error::Group(error) => Error::Failed(format!("{sequence}: {error}")),
                    error => error,
                })
            }
        }
    })
}

/// Exchanges what is new until all groups are done. `stop` is set when one of them has failed.
fn exchange(
    world: &Group,
    number: u32,
    news: Receiver<News>,
    stop: &AtomicBool,
    mut tell: impl FnMut(&str),
) -> Result<Vec<Tally>, Error> {
    let mut own = Word { number, ..Word::default() };
    loop {
        match news.recv_timeout(BEAT) {
            Ok(News::Line(line)) => own.lines.push(line),
            Ok(News::Ended(tally)) => own.ended = Some(tally),
            Err(RecvTimeoutError::Timeout) => {}
            // This rank has failed, and is about to tell all why.
            Err(RecvTimeoutError::Disconnected) => return Ok(Vec::new()),
        }
        let bytes = serde_json::to_vec(&own).map_err(|error| Error::Failed(error.to_string()))?;
        own.lines.clear();
        let mut ended = BTreeMap::new();
        let mut all_ended = true;
        for (rank, bytes) in world.all_gather(&bytes)?.iter().enumerate() {
            let word: Word = serde_json::from_slice(bytes)
                .map_err(|error| Error::Failed(format!("rank {rank} sent what cannot be read: {error}")))?;
            for line in word.lines {
                tell(&line);
            }
            match word.ended {
                // The same from every rank of a group.
                Some(tally) => drop(ended.insert(word.number, tally)),
                None => all_ended = false,
            }
        }
        if ended.values().any(|tally: &Tally| tally.failed > 0) {
            stop.store(true, Ordering::Relaxed);
        }
        if all_ended {
            return Ok(ended.into_values().collect());
        }
    }
}

/// If a rank was lost to `group`, all ranks will learn of it or from it: that is worth more than what this one knows.
fn wait_for_first_hand(world: &Group, group: &Group) {
    let until = Instant::now() + FIRST_HAND;
    while group.lost().is_some() && world.lost().is_none() && Instant::now() < until {
        thread::sleep(Duration::from_millis(1));
    }
}
