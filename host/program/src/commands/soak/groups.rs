//! Soaks of several disjoint groups at the same time.
//!
//! Groups run independently, each at its own pace. A thread of each rank exchanges news with all other ranks: a wrong
//! result, or the end of a soak. So no rank has to wait for a group that is slower than its own.

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
use fused_collective::group::rendezvous::Group;
use serde::{Deserialize, Serialize};

use super::{
    run::{Sequence, Tally, run_sequence},
    settings::Settings,
};
use crate::{backend::collective::Collective, job::ranks::Error};

/// Time between two exchanges of all ranks, unless there is news.
const BEAT: Duration = Duration::from_millis(100);
/// The time that a rank waits for news of all ranks after it has lost a rank of its group.
const FIRST_HAND: Duration = Duration::from_secs(1);

/// The seed of a group's sequence. Group 0 has `seed` itself, like a soak of one group.
pub fn group_seed(seed: u64, number: u32) -> u64 {
    (0..number).fold(seed, |seed, _| Rng::with_seed(seed).u64(..))
}

/// News from this rank's group.
enum News {
    Line(String),
    Ended(Tally),
}

/// The message of a rank to all others.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Word {
    /// The number of its group.
    number: u32,
    /// Lines for the user, from rank 0 of each group.
    lines: Vec<String>,
    /// The work of its group, once the group has ended.
    ended: Option<Tally>,
}

/// Runs a soak in each of several groups of `world`, and returns the tally of each, the same on every rank. This rank is in
/// `group`, which has this `number`. Each group has a [seed of its own](group_seed). A wrong result in one group ends the
/// soak of all.
///
/// On every rank, `tell` gets the lines of all groups, with the groups' numbers. Ranks in them are numbered within the
/// group.
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
        // The sender goes with this closure, however it ends, and the thread ends with the sender.
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
                // If the thread has ended, its error is the result of this function.
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
                // The exchange's error numbers ranks among all ranks.
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

/// Exchanges news until all groups have ended. Sets `stop` when one of them has failed.
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
            // This rank has failed, and is about to tell all ranks the reason.
            Err(RecvTimeoutError::Disconnected) => return Ok(Vec::new()),
        }
        let bytes = serde_json::to_vec(&own).map_err(|error| Error::Failed(error.to_string()))?;
        own.lines.clear();
        let mut ended = BTreeMap::new();
        let mut all_ended = true;
        for (rank, bytes) in world.all_gather(&bytes)?.iter().enumerate() {
            let word: Word = serde_json::from_slice(bytes)
                .map_err(|error| Error::Failed(format!("cannot read the news of rank {rank}: {error}")))?;
            for line in word.lines {
                tell(&line);
            }
            match word.ended {
                // Every rank of a group sends the same.
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

/// Waits until all ranks know that `group` has lost a rank. Their error says more than this rank's.
fn wait_for_first_hand(world: &Group, group: &Group) {
    let until = Instant::now() + FIRST_HAND;
    while group.lost().is_some() && world.lost().is_none() && Instant::now() < until {
        thread::sleep(Duration::from_millis(1));
    }
}
