//! The exercises that measure links, as each backend does them: how long a word takes, and how many bytes a second links
//! carry.
//!
//! A fused operation moves its rows over the links as these exercises do, by the same stores, loads and waits, and has
//! everything else to do besides. So the rate at which all ranks push at once is what an operation's bandwidth is
//! judged against.

use std::ops::Range;

use fused_collective_bench::links::pattern;
use fused_collective_core::pack::Pack;
use serde::{Deserialize, Serialize};

use super::error::Error;

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
    pub(crate) fn of_pair(measure: Measure, from: u32, to: u32) -> Option<Exercise> {
        Some(match measure {
            Measure::Word => Exercise::Word { from, to },
            Measure::Push => Exercise::Push { from, to, polled: false },
            Measure::PolledPush => Exercise::Push { from, to, polled: true },
            Measure::Pull => Exercise::Pull { from, to },
            Measure::PushAll | Measure::Copy => return None,
        })
    }

    /// The ranks whose places in rank `rank`'s memory it fills.
    pub(crate) fn sources(self, rank: u32, world_size: u32) -> Vec<u32> {
        match self {
            Exercise::Push { from, to, .. } | Exercise::Pull { from, to } if to == rank => vec![from],
            Exercise::PushAll { .. } => (0..world_size).filter(|&source| source != rank).collect(),
            _ => Vec::new(),
        }
    }

    /// Bytes that leave the busiest rank each time, with places of `place_bytes`; 0 if it is not about bytes.
    pub(crate) fn bytes(self, place_bytes: u64, world_size: u32) -> u64 {
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
    fn grids(&mut self) -> Result<Vec<Option<u32>>, Error>;

    /// Does `exercise` so many `times`, one after the other; all ranks that it needs begin together. Microseconds for
    /// each time, by this rank's clock; 0 on a rank that does nothing or only answers.
    ///
    /// # Errors
    /// A rank that did not do its part in time; the backend's.
    fn time(&mut self, exercise: Exercise, times: u32) -> Result<f64, Error>;

    /// Holds what the last exercise wrote into rank `source`'s place in this rank's memory to what it should have
    /// written. What is wrong, for a reader; `None` if nothing is.
    ///
    /// # Errors
    /// The backend's.
    fn received(&mut self, source: u32) -> Result<Option<String>, Error>;

    /// Lets go of what this rank has of other ranks' memory, so that they may free it. No other call follows.
    ///
    /// # Errors
    /// A rank was lost.
    fn leave(&mut self) -> Result<(), Error>;
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
