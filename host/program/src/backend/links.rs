//! The exercises that measure links: the latency of a word, and the bandwidth of stores and loads.
//!
//! A fused operation moves its rows by the same stores, loads and waits as these exercises, and does more besides. So the
//! all-to-all put bandwidth is the limit for its bus bandwidth.

use std::ops::Range;

use fused_collective_bench::links::pattern;
use fused_collective_core::pack::Pack;
use serde::{Deserialize, Serialize};

use super::error::Error;

/// A measure of links.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// The latency of a word from one rank to another.
    Word,
    /// One rank stores into another's memory, while all others are idle.
    Push,
    /// Like [`Push`](Measure::Push), while the other rank polls the stored words.
    PolledPush,
    /// One rank loads from another's memory.
    Pull,
    /// Every rank stores into every other's memory at the same time.
    PushAll,
    /// Every rank copies within its own memory at the same time.
    Copy,
}

impl Measure {
    /// The name for a reader.
    pub fn name(self) -> &'static str {
        match self {
            Measure::Word => "word",
            Measure::Push => "push",
            Measure::PolledPush => "polled push",
            Measure::Pull => "pull",
            Measure::PushAll => "all-to-all put",
            Measure::Copy => "copy in each rank's own memory",
        }
    }

    /// True if it is about a pair of ranks.
    pub fn is_of_pairs(self) -> bool {
        !matches!(self, Measure::PushAll | Measure::Copy)
    }
}

/// An exercise to be timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exercise {
    /// A word goes from rank `from` to rank `to` and back. Its latency is half of that time.
    Word {
        /// The rank that sends first, and measures the time.
        from: u32,
        /// The rank that answers.
        to: u32,
    },
    /// Rank `from` fills its place in rank `to`'s memory.
    Push {
        /// The rank that stores.
        from: u32,
        /// The rank with the memory.
        to: u32,
        /// True if that rank polls the stored words.
        polled: bool,
    },
    /// Rank `to` reads from rank `from`'s memory.
    Pull {
        /// The rank with the memory.
        from: u32,
        /// The rank that loads.
        to: u32,
    },
    /// Rank `from` fills its place in rank `to`'s memory, and no rank waits for another: bytes that do not arrive cost no
    /// deadline. It is not timed.
    Reach {
        /// The rank that stores.
        from: u32,
        /// The rank with the memory.
        to: u32,
    },
    /// Every rank fills its place in every other's memory.
    PushAll {
        /// Blocks of each rank's grid; `None` if the backend has no blocks.
        blocks: Option<u32>,
    },
}

impl Exercise {
    /// The exercise for `measure` between two ranks; `None` if the measure is about all ranks.
    pub(crate) fn of_pair(measure: Measure, from: u32, to: u32) -> Option<Exercise> {
        Some(match measure {
            Measure::Word => Exercise::Word { from, to },
            Measure::Push => Exercise::Push { from, to, polled: false },
            Measure::PolledPush => Exercise::Push { from, to, polled: true },
            Measure::Pull => Exercise::Pull { from, to },
            Measure::PushAll | Measure::Copy => return None,
        })
    }

    /// The ranks whose places in rank `rank`'s memory the exercise fills.
    pub(crate) fn sources(self, rank: u32, world_size: u32) -> Vec<u32> {
        match self {
            Exercise::Reach { from, to } | Exercise::Push { from, to, .. } | Exercise::Pull { from, to }
                if to == rank =>
            {
                vec![from]
            }
            Exercise::PushAll { .. } => (0..world_size).filter(|&source| source != rank).collect(),
            _ => Vec::new(),
        }
    }

    /// Bytes that leave the busiest rank each time, for places of `place_bytes`; 0 for a latency.
    pub(crate) fn bytes(self, place_bytes: u64, world_size: u32) -> u64 {
        match self {
            Exercise::Word { .. } => 0,
            Exercise::Reach { .. } | Exercise::Push { .. } | Exercise::Pull { .. } => place_bytes,
            Exercise::PushAll { .. } => place_bytes * u64::from(world_size - 1),
        }
    }
}

/// One rank of the exercises of a group, which use memory of their own that all its ranks map.
///
/// All ranks call the same methods with the same arguments in the same order, except [`received`](Self::received).
pub trait Links {
    /// The measures of this backend, each with its method in words.
    fn methods(&self) -> Vec<(Measure, &'static str)>;

    /// Bytes that a rank sends to another each time.
    fn place_bytes(&self) -> u64;

    /// Bytes of a [copy](Measure::Copy).
    fn copy_bytes(&self) -> u64;

    /// The grids to try for [`Exercise::PushAll`], in blocks. Only `None` if the backend has no blocks.
    ///
    /// # Errors
    /// The backend failed.
    fn grids(&mut self) -> Result<Vec<Option<u32>>, Error>;

    /// Repeats `exercise` `times` times. All active ranks begin together. Returns the microseconds of one time by this rank's
    /// clock, or 0 on a rank that is idle or only answers.
    ///
    /// # Errors
    /// A rank did not do its part in time, or the backend failed.
    fn time(&mut self, exercise: Exercise, times: u32) -> Result<f64, Error>;

    /// Checks the bytes that the last exercise wrote into rank `source`'s place in this rank's memory. Returns a description
    /// of the first wrong ones.
    ///
    /// # Errors
    /// The backend failed.
    fn received(&mut self, source: u32) -> Result<Option<String>, Error>;

    /// Unmaps the other ranks' memory, so that they may free it. No other call follows.
    ///
    /// # Errors
    /// A rank was lost.
    fn leave(&mut self) -> Result<(), Error>;
}

/// Describes the first wrong pack in `found`, the bytes of packs `range` of rank `source`'s place. They should hold the
/// pattern of run `run`.
pub(crate) fn find_wrong(found: &[u8], range: Range<u32>, source: u32, run: u32) -> Option<String> {
    let (packs, _) = found.as_chunks::<{ Pack::BYTES as usize }>();
    let expected = range.len();
    let at = range.zip(packs).find(|&(index, pack)| {
        let Pack(words) = pattern(source, run, index);
        bytemuck::bytes_of(&words) != pack
    });
    match at {
        Some((index, pack)) => {
            let byte = u64::from(index) * Pack::BYTES;
            Some(format!("the bytes from rank {source} are wrong from byte {byte} on: {pack:02x?}"))
        }
        None => (packs.len() != expected)
            .then(|| format!("rank {source}'s place has {} packs, not {expected}", packs.len())),
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
        assert_eq!(of(Exercise::Reach { from: 0, to: 1 }), [vec![], vec![0], vec![]]);
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
        assert!(wrong.starts_with("the bytes from rank 1 are wrong from byte 112 on: ["), "{wrong}");
        let mut flipped = sent(3);
        flipped[63] ^= 1;
        assert!(
            find_wrong(&flipped, 5..9, 1, 3).is_some_and(|wrong| wrong.contains("wrong from byte 128 on"))
        );
        assert!(find_wrong(&sent(3)[..48], 5..9, 1, 3).is_some());
    }
}
