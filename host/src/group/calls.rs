//! The log by which ranks tell each other of their calls, and of giving up.
//!
//! Each rank has some lines of 64 bytes in memory that all share, and writes no others:
//! - a *fault* word: why the rank has given up, 0 until then;
//! - its last *calls*, a line each: a word that numbers the call and digests all calls up to it
//!   ([`Chain`]), and the call itself, for the message where ranks differ.
//!
//! A rank announces a call before it sends anything for it (release), so whoever has received what it sent (acquire)
//! finds the announcement. That makes a mismatch sure to be seen: before a call returns, its announcement has been
//! compared with that of every peer. It costs each rank one line written and one read from each peer.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{
            AtomicU64,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
};

use fused_collective_core::agreement::{CALL_WORDS, Call, Chain};

use super::{abort::Aborter, shared_memory::SharedMemory};

/// Bytes of a line.
const LINE_BYTES: u64 = 64;

/// The place of the lines: for rank `r` from `first + r * stride`, its fault line and then `calls` lines.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// A multiple of 64.
    pub(crate) first: u64,
    /// A multiple of 64, and at least `(1 + calls) * 64`.
    pub(crate) stride: u64,
    /// Calls that are kept: more than a rank can be ahead of another.
    pub(crate) calls: u64,
}

impl Place {
    /// A log with nothing else in its memory.
    pub(crate) const fn alone(calls: u64) -> Place {
        Place { first: 0, stride: (1 + calls) * LINE_BYTES, calls }
    }

    /// Bytes of the memory of a log that is [alone](Self::alone).
    pub(crate) const fn bytes(&self, world_size: u32) -> u64 {
        self.stride * world_size as u64
    }
}

/// The reason that a rank has given its group up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Another rank did not come within the deadline.
    Late,
    /// Another rank is gone.
    Lost,
    /// It was told to.
    Aborted,
    /// Another rank made another call.
    OutOfStep,
}

/// A rank that has given its group up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GaveUp {
    /// The rank.
    pub rank: u32,
    /// Why.
    pub fault: Fault,
    /// Because of which rank; its own number if of none.
    pub because_of: u32,
}

impl fmt::Display for GaveUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let GaveUp { rank, fault, because_of } = self;
        match fault {
            Fault::Late => {
                write!(f, "rank {rank} gave up: it waited for rank {because_of} past the deadline")
            }
            Fault::Lost => write!(f, "rank {rank} gave up: rank {because_of} was lost"),
            Fault::Aborted => write!(f, "rank {rank} aborted the group"),
            Fault::OutOfStep => write!(f, "rank {rank} gave up: rank {because_of} made another call"),
        }
    }
}

/// Ranks that make different calls.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Disagreement {
    /// The other rank.
    pub rank: u32,
    /// Its call; `None` if it has not made as many calls, or its call cannot be read any more.
    pub theirs: Option<Call>,
    /// This rank's call.
    pub ours: Call,
}

impl fmt::Display for Disagreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Disagreement { rank, theirs, ours } = self;
        match theirs {
            Some(theirs) if theirs == ours => {
                write!(f, "rank {rank} has made other calls before this one ({ours}), or in another order")
            }
            Some(theirs) => write!(f, "rank {rank} called ({theirs}), this rank ({ours})"),
            None => write!(f, "rank {rank} has not made this rank's call ({ours})"),
        }
    }
}

const LATE: u64 = 1;
const LOST: u64 = 2;
const ABORTED: u64 = 3;
const OUT_OF_STEP: u64 = 4;

/// One rank's view of its group's log.
#[derive(Debug)]
pub(crate) struct CallLog {
    lines: Lines,
    /// Calls announced.
    announced: u64,
    chain: Chain,
    /// The last call announced, and the word that says so.
    current: Option<(Call, u64)>,
}

#[derive(Clone, Debug)]
struct Lines {
    memory: Arc<SharedMemory>,
    place: Place,
    rank: u32,
    world_size: u32,
}

impl Lines {
    fn line(&self, rank: u32, line: u64) -> &[AtomicU64] {
        let at = self.place.first + u64::from(rank) * self.place.stride + line * LINE_BYTES;
        self.memory.words(at, LINE_BYTES)
    }

    fn fault_word(&self, rank: u32) -> &AtomicU64 {
        &self.line(rank, 0)[0]
    }

    fn call_line(&self, rank: u32, number: u64) -> &[AtomicU64] {
        self.line(rank, 1 + number % self.place.calls)
    }

    /// The first fault stays.
    fn give_up(&self, fault: Fault, because_of: u32) {
        let code = match fault {
            Fault::Late => LATE,
            Fault::Lost => LOST,
            Fault::Aborted => ABORTED,
            Fault::OutOfStep => OUT_OF_STEP,
        };
        let word = code | u64::from(because_of) << 8;
        // Fails where there is one already.
        let _ = self.fault_word(self.rank).compare_exchange(0, word, Release, Relaxed);
    }

    fn gave_up(&self, rank: u32) -> Option<GaveUp> {
        let word = self.fault_word(rank).load(Acquire);
        let fault = match word & 0xff {
            0 => return None,
            LATE => Fault::Late,
            LOST => Fault::Lost,
            OUT_OF_STEP => Fault::OutOfStep,
            // Whatever else is there is not the mark of a rank that goes on.
            _ => Fault::Aborted,
        };
        Some(GaveUp { rank, fault, because_of: (word >> 8) as u32 })
    }
}

/// The comparison of a peer's announcements with this rank's last one.
enum Standing {
    /// It has not made as many calls.
    Behind,
    /// The same calls.
    Same,
    /// Another call, or others before.
    Other,
    /// It has made so many more that it is not known any more what this one was.
    Ahead,
}

impl CallLog {
    /// `memory` has zeros at `place` when the first rank begins.
    pub(crate) fn new(memory: Arc<SharedMemory>, place: Place, rank: u32, world_size: u32) -> CallLog {
        let lines = Lines { memory, place, rank, world_size };
        CallLog { lines, announced: 0, chain: Chain::default(), current: None }
    }

    /// A call that no other rank takes part in: it is compared with the next one.
    pub(crate) fn pass(&mut self, call: &Call) {
        self.chain = self.chain.then(call);
    }

    /// Tells the others of a call, before anything is sent for it.
    pub(crate) fn announce(&mut self, call: Call) {
        self.chain = self.chain.then(&call);
        self.announced += 1;
        let word = self.chain.digest() & !TAG | self.announced & TAG;
        let [head, words @ ..] = self.lines.call_line(self.lines.rank, self.announced) else { return };
        for (at, word) in words.iter().zip(call.to_words()) {
            at.store(word, Relaxed);
        }
        // Release: who sees this word sees the call.
        head.store(word, Release);
        self.current = Some((call, word));
    }

    /// The chain of all calls so far.
    pub(crate) fn chain(&self) -> Chain {
        self.chain
    }

    /// The last call announced.
    pub(crate) fn call(&self) -> Option<Call> {
        self.current.map(|(call, _)| call)
    }

    fn standing(&self, rank: u32, own: u64) -> Standing {
        let theirs = self.lines.call_line(rank, self.announced)[0].load(Acquire);
        if theirs == own {
            return Standing::Same;
        }
        // Numbers of calls are compared around the turn of their last 16 bits.
        match (theirs as u16).wrapping_sub(own as u16) as i16 {
            0 => Standing::Other,
            1.. => Standing::Ahead,
            _ => Standing::Behind,
        }
    }

    fn peers(&self) -> impl Iterator<Item = u32> + use<> {
        let rank = self.lines.rank;
        (0..self.lines.world_size).filter(move |&peer| peer != rank)
    }

    fn their_call(&self, rank: u32) -> Option<Call> {
        let words = &self.lines.call_line(rank, self.announced)[1..];
        let words: [u64; CALL_WORDS] = std::array::from_fn(|index| words[index].load(Relaxed));
        Call::from_words(&words)
    }

    /// A peer that has announced something else than this rank's last call, if one is known to.
    pub(crate) fn disagreement(&self) -> Option<Disagreement> {
        self.find(|standing| matches!(standing, Standing::Other))
    }

    /// As [`disagreement`](Self::disagreement), when all peers must have announced this rank's last call: data that
    /// they sent for it has come.
    pub(crate) fn disagreement_at_end(&self) -> Option<Disagreement> {
        self.find(|standing| matches!(standing, Standing::Other | Standing::Behind))
    }

    fn find(&self, differs: impl Fn(&Standing) -> bool) -> Option<Disagreement> {
        let (ours, own) = self.current?;
        self.peers().find_map(|rank| {
            let standing = self.standing(rank, own);
            differs(&standing).then(|| Disagreement {
                rank,
                theirs: if matches!(standing, Standing::Other) { self.their_call(rank) } else { None },
                ours,
            })
        })
    }

    /// Tells the others that this rank has given up.
    pub(crate) fn give_up(&self, fault: Fault, because_of: u32) {
        self.lines.give_up(fault, because_of);
    }

    /// True once this rank was told to give up.
    pub(crate) fn is_aborted(&self) -> bool {
        self.lines.gave_up(self.lines.rank).is_some()
    }

    /// A peer that has given up, if there is one.
    pub(crate) fn gave_up(&self) -> Option<GaveUp> {
        self.peers().find_map(|rank| self.lines.gave_up(rank))
    }

    /// Makes a handle for other threads.
    pub(crate) fn aborter(&self) -> Aborter {
        let lines = self.lines.clone();
        Aborter::new(move || lines.give_up(Fault::Aborted, lines.rank))
    }
}

/// The bits of a call's word that number it; the others are its chain's.
const TAG: u64 = 0xffff;

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use fused_collective_core::{
        dtype::DType,
        fusion::{Mode, Norm, Operation, PartialSums, Residual, Rounding},
        plan::Algorithm,
        quant::Quantization,
    };
    use proptest::prelude::*;

    use super::*;
    use crate::fuzz::{FEW, cases};

    const CALLS: u64 = 4;

    fn logs(world_size: u32) -> Vec<CallLog> {
        let place = Place::alone(CALLS);
        let file = SharedMemory::create(place.bytes(world_size)).unwrap();
        let memory = Arc::new(SharedMemory::map(file.as_fd(), place.bytes(world_size)).unwrap());
        (0..world_size).map(|rank| CallLog::new(Arc::clone(&memory), place, rank, world_size)).collect()
    }

    fn call(tokens: u64) -> Call {
        let operation = Operation {
            dtype: DType::F32,
            tokens,
            hidden: 64,
            residual: Residual::None,
            norm: Some(Norm::default()),
            quantization: Quantization::None,
            keep_norm: false,
            rounding: Rounding::Once,
            bias: false,
            post_norm: None,
            experts: None,
            wire: None,
            partial_sums: PartialSums::F32,
            mode: Mode::Auto,
        };
        Call::operation(&operation, Algorithm::OneShot, None)
    }

    fn differs(log: &CallLog) -> Option<(u32, Option<Call>)> {
        log.disagreement_at_end().map(|found| (found.rank, found.theirs))
    }

    #[test]
    fn ranks_that_make_the_same_calls_agree_however_many_there_are() {
        let mut logs = logs(3);
        // Past the turn of the calls' numbers.
        for number in 0..70_000 {
            for log in &mut logs {
                log.announce(call(number % 7));
            }
            assert!(logs.iter().all(|log| log.disagreement_at_end().is_none()), "call {number}");
        }
    }

    #[test]
    fn a_peer_is_behind_until_it_has_announced_and_then_the_same_or_another() {
        let mut logs = logs(2);
        logs[0].announce(call(1));
        assert_eq!(logs[0].disagreement(), None);
        assert_eq!(differs(&logs[0]), Some((1, None)));
        logs[1].announce(call(2));
        let found = logs[0].disagreement().unwrap();
        assert_eq!((found.rank, found.theirs, found.ours), (1, Some(call(2)), call(1)));
        assert_eq!(
            logs[1].disagreement().unwrap().to_string(),
            "rank 0 called (one-shot, 1 tokens of 64 float32, norm (epsilon 1e-6)), this rank (one-shot, 2 tokens of 64 \
             float32, norm (epsilon 1e-6))"
        );
    }

    #[test]
    fn a_call_that_was_passed_shows_in_the_next_one() {
        let mut logs = logs(2);
        logs[0].pass(&call(0));
        logs.iter_mut().for_each(|log| log.announce(call(1)));
        assert_eq!(differs(&logs[0]), Some((1, Some(call(1)))));
        assert!(logs[0].disagreement().unwrap().to_string().contains("other calls before"));
    }

    #[test]
    fn a_peer_that_is_ahead_is_compared_as_long_as_its_call_is_kept() {
        for same in [true, false] {
            let mut logs = logs(2);
            logs[0].announce(call(1));
            logs[1].announce(call(if same { 1 } else { 2 }));
            for _ in 1..CALLS {
                logs[1].announce(call(3));
                assert_eq!(logs[0].disagreement_at_end().is_none(), same);
            }
            logs[1].announce(call(3));
            assert_eq!(logs[0].disagreement_at_end(), None);
        }
    }

    #[test]
    fn the_first_fault_stays_and_everybody_sees_whose_it_is() {
        let logs = logs(3);
        assert!(logs.iter().all(|log| log.gave_up().is_none() && !log.is_aborted()));
        logs[1].give_up(Fault::Late, 2);
        logs[1].aborter().abort();
        let found = GaveUp { rank: 1, fault: Fault::Late, because_of: 2 };
        assert_eq!(
            [logs[0].gave_up(), logs[1].gave_up(), logs[2].gave_up()],
            [Some(found), None, Some(found)]
        );
        assert!(logs[1].is_aborted() && !logs[0].is_aborted());
        logs[2].aborter().abort();
        assert_eq!(logs[1].gave_up().unwrap().fault, Fault::Aborted);
    }

    proptest! {
        #![proptest_config(cases(FEW))]

        /// A peer may write anything into its lines.
        #[test]
        fn any_words_in_a_peers_lines_are_taken_without_a_panic(words: [u64; 8], fault: u64) {
            let mut logs = logs(2);
            logs[0].announce(call(1));
            for (at, word) in logs[0].lines.call_line(1, 1).iter().zip(words) {
                at.store(word, Relaxed);
            }
            logs[0].lines.fault_word(1).store(fault, Relaxed);
            if let Some(found) = logs[0].disagreement_at_end() {
                prop_assert!(found.to_string().contains("rank 1"));
            }
            prop_assert_eq!(logs[0].gave_up().is_some(), fault & 0xff != 0);
        }
    }
}
