//! The links between ranks that are processes or threads on one host: shared memory.
//!
//! As in the exchange, words travel from the cache of one rank's core to that of another's. Before a rank stores into a
//! place, the place's owner empties it; before a rank loads from a place, the other rank fills it. The exercises use the
//! exchange's instructions, and time nothing else.

use std::{
    os::fd::AsFd,
    sync::atomic::{
        AtomicU64,
        Ordering::{Acquire, Relaxed, Release},
        fence,
    },
    time::{Duration, Instant},
};

use fused_collective::{
    cpu::{
        Communicator, EMPTY, SLOT_BYTES_PER_RANK,
        line::{self, Mover},
        wait::Wait,
    },
    group::{
        failure::{Failure, What},
        rendezvous::Group,
        shared_memory::SharedMemory,
    },
};
use fused_collective_bench::links::{PLACES_OFFSET, WARM_UP_TRIPS, flag_offset, pattern, region_bytes};
use fused_collective_core::pack::Pack;

use super::cores::Pinned;
use crate::backend::{
    error::Error,
    links::{Exercise, Links, Measure, find_wrong},
};

/// Bytes of a rank's rows in a slot of the workspace. They stay in a core's own caches.
const PLACE_BYTES: u64 = SLOT_BYTES_PER_RANK;
/// Bytes that go to one rank before the next rank's turn, a row of usual length.
const ROW_BYTES: u64 = 16 << 10;
/// Bytes of a copy, more than most processors' caches hold.
const COPY_BYTES: u64 = 64 << 20;
const _: () =
    assert!(PLACE_BYTES.is_multiple_of(ROW_BYTES) && ROW_BYTES.is_multiple_of(line::WORDS as u64 * 8));

const METHODS: [(Measure, &str); 6] = [
    (Measure::Word, "half the round trip of a word of 8 bytes to the other rank, in shared memory"),
    (Measure::Push, "stores into memory that the other rank has just emptied, 128 KiB at a time"),
    (Measure::PolledPush, "as push, while the other rank polls line after line"),
    (Measure::Pull, "loads from memory that the other rank has just filled, 128 KiB at a time"),
    (
        Measure::PushAll,
        "every rank stores into the memory of all others at the same time, 16 KiB to each in turn: bytes out of the slowest rank",
    ),
    (
        Measure::Copy,
        "every rank copies 64 MiB in its memory at the same time: bytes read and bytes written, the slowest rank",
    ),
];

/// One rank of the exercises.
pub(super) struct CpuLinks<'a> {
    rank: u32,
    world_size: u32,
    memory: SharedMemory,
    region_bytes: u64,
    /// The signals sent to each rank.
    sent: Vec<u64>,
    /// The signals awaited from each rank.
    awaited: Vec<u64>,
    /// The number of the current exercise.
    run: u32,
    /// The words that this rank sends in this run.
    content: Vec<u64>,
    mover: Mover,
    communicator: &'a mut Communicator,
    /// Keeps this rank on its CPU.
    _pinned: Option<Pinned>,
}

impl<'a> CpuLinks<'a> {
    /// Makes memory that all ranks of `group` share. All ranks call this, each on the CPU to which it is `pinned`, if it is.
    pub(super) fn share(
        group: &Group,
        communicator: &'a mut Communicator,
        pinned: Option<Pinned>,
    ) -> Result<Self, Error> {
        let failed = |what: &dyn std::fmt::Display| {
            Error::Other(format!("cannot share memory to measure links: {what}"))
        };
        let (rank, world_size) = (group.rank(), group.world_size());
        // A few MiB in the largest group.
        let region_bytes = region_bytes(world_size, PLACE_BYTES).unwrap_or(u64::MAX);
        let bytes = region_bytes.saturating_mul(u64::from(world_size));
        let own = match rank {
            0 => Some(SharedMemory::create(bytes).map_err(|error| failed(&error))?),
            _ => None,
        };
        let file = group.share_fd(own.as_ref().map(AsFd::as_fd)).map_err(|error| failed(&error))?;
        let memory = SharedMemory::map(file.as_fd(), bytes).map_err(|error| failed(&error))?;
        Ok(CpuLinks {
            rank,
            world_size,
            memory,
            region_bytes,
            sent: vec![0; world_size as usize],
            awaited: vec![0; world_size as usize],
            run: 0,
            content: Vec::new(),
            mover: Mover::of_this_processor(),
            communicator,
            _pinned: pinned,
        })
    }

    /// The flag of rank `source` in rank `rank`'s memory.
    fn flag(&self, rank: u32, source: u32) -> &AtomicU64 {
        &self.memory.words(u64::from(rank) * self.region_bytes + flag_offset(source), 8)[0]
    }

    /// The place of rank `source` in rank `rank`'s memory.
    fn place(&self, rank: u32, source: u32) -> &[AtomicU64] {
        let first = u64::from(rank) * self.region_bytes + PLACES_OFFSET;
        self.memory.words(first + u64::from(source) * PLACE_BYTES, PLACE_BYTES)
    }

    /// Signals rank `peer`, which then sees everything that this rank has written before.
    fn signal(&mut self, peer: u32) {
        self.sent[peer as usize] += 1;
        self.flag(peer, self.rank).store(self.sent[peer as usize], Release);
    }

    /// Waits for one more signal of rank `peer`.
    fn await_signal(&mut self, peer: u32) -> Result<(), Error> {
        self.awaited[peer as usize] += 1;
        let count = self.awaited[peer as usize];
        let flag = self.flag(self.rank, peer);
        let mut waited = Ok(());
        if flag.load(Acquire) < count {
            let mut wait = self.wait(peer);
            while waited.is_ok() && flag.load(Acquire) < count {
                waited = wait.pause();
            }
        }
        self.succeed(waited)
    }

    fn wait(&self, peer: u32) -> Wait<'_> {
        Wait::new(self.communicator.guard(), peer, What::Flag, u64::from(self.run))
    }

    /// Ends the group's communicator if a wait failed, so that the other ranks learn of it.
    fn succeed(&mut self, waited: Result<(), Box<Failure>>) -> Result<(), Error> {
        Ok(waited.map_err(|failure| self.communicator.fail(failure))?)
    }

    /// Waits until every rank has called this.
    fn meet(&mut self) -> Result<(), Error> {
        let peers = || (0..self.world_size).filter(|&peer| peer != self.rank);
        let peers: Vec<u32> = peers().collect();
        peers.iter().for_each(|&peer| self.signal(peer));
        peers.iter().try_for_each(|&peer| self.await_signal(peer))
    }

    /// Stores whole lines as the exchange does. `words` and `values` have the same length.
    fn store(&self, words: &[AtomicU64], values: &[u64]) {
        fence(Release);
        for (line, values) in words.as_chunks().0.iter().zip(values.as_chunks().0) {
            self.mover.store(line, *values);
        }
    }

    fn empty_place(&self, source: u32) {
        self.place(self.rank, source).iter().for_each(|word| word.store(EMPTY, Relaxed));
    }

    fn word(&mut self, peer: u32, leads: bool, times: u32) -> Result<f64, Error> {
        let mut began = Instant::now();
        for trip in 0..times + WARM_UP_TRIPS {
            if trip == WARM_UP_TRIPS {
                began = Instant::now();
            }
            if leads {
                self.signal(peer);
                self.await_signal(peer)?;
            } else {
                self.await_signal(peer)?;
                self.signal(peer);
            }
        }
        Ok(if leads { microseconds(began.elapsed()) / f64::from(times) / 2.0 } else { 0.0 })
    }

    fn push(&mut self, to: u32, times: u32) -> Result<f64, Error> {
        let mut busy = Duration::ZERO;
        for _ in 0..times {
            self.await_signal(to)?;
            let place = self.place(to, self.rank);
            let began = Instant::now();
            self.store(place, &self.content);
            busy += began.elapsed();
            self.signal(to);
        }
        Ok(microseconds(busy) / f64::from(times))
    }

    fn be_pushed_to(&mut self, from: u32, polls: bool, times: u32) -> Result<f64, Error> {
        for _ in 0..times {
            self.empty_place(from);
            self.signal(from);
            if polls {
                let polled = self.poll(from);
                self.succeed(polled)?;
            }
            self.await_signal(from)?;
        }
        Ok(0.0)
    }

    /// Waits for every line that rank `source` stores here, in order.
    fn poll(&self, source: u32) -> Result<(), Box<Failure>> {
        for line in self.place(self.rank, source).as_chunks().0 {
            let mut wait = None;
            while self.mover.load(line).contains(&EMPTY) {
                wait.get_or_insert_with(|| self.wait(source)).pause()?;
            }
        }
        Ok(())
    }

    fn pull(&mut self, from: u32, times: u32) -> Result<f64, Error> {
        let mut read = vec![0; self.content.len()];
        let mut busy = Duration::ZERO;
        for _ in 0..times {
            self.signal(from);
            self.await_signal(from)?;
            let place = self.place(from, from);
            let began = Instant::now();
            for (values, line) in read.as_chunks_mut().0.iter_mut().zip(place.as_chunks().0) {
                *values = self.mover.load(line);
            }
            busy += began.elapsed();
            std::hint::black_box(&mut read);
        }
        // The check of received bytes looks here.
        self.store(self.place(self.rank, from), &read);
        Ok(microseconds(busy) / f64::from(times))
    }

    fn be_pulled_from(&mut self, by: u32, times: u32) -> Result<f64, Error> {
        for _ in 0..times {
            self.await_signal(by)?;
            // The lines are then in this core's cache only, as just computed ones are.
            self.store(self.place(self.rank, self.rank), &self.content);
            self.signal(by);
        }
        Ok(0.0)
    }

    fn push_all(&mut self, times: u32) -> Result<f64, Error> {
        let rows = self.content.len() / (ROW_BYTES as usize / 8);
        let mut busy = Duration::ZERO;
        for _ in 0..times {
            for source in (0..self.world_size).filter(|&source| source != self.rank) {
                self.empty_place(source);
            }
            self.meet()?;
            let began = Instant::now();
            for row in 0..rows {
                let words = row * ROW_BYTES as usize / 8..(row + 1) * ROW_BYTES as usize / 8;
                for distance in 1..self.world_size {
                    let to = (self.rank + distance) % self.world_size;
                    self.store(&self.place(to, self.rank)[words.clone()], &self.content[words.clone()]);
                }
            }
            busy += began.elapsed();
            self.meet()?;
        }
        Ok(microseconds(busy) / f64::from(times))
    }
}

fn microseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

impl Links for CpuLinks<'_> {
    fn methods(&self) -> Vec<(Measure, &'static str)> {
        METHODS.to_vec()
    }

    fn place_bytes(&self) -> u64 {
        PLACE_BYTES
    }

    fn copy_bytes(&self) -> u64 {
        COPY_BYTES
    }

    fn grids(&mut self) -> Result<Vec<Option<u32>>, Error> {
        Ok(vec![None])
    }

    fn time(&mut self, exercise: Exercise, times: u32) -> Result<f64, Error> {
        self.communicator.check_usable()?;
        self.run += 1;
        let packs = (PLACE_BYTES / Pack::BYTES) as u32;
        self.content.clear();
        for index in 0..packs {
            let Pack([a, b, c, d]) = pattern(self.rank, self.run, index);
            self.content.extend(bytemuck::cast::<[u32; 4], [u64; 2]>([a, b, c, d]));
        }
        match exercise {
            Exercise::Word { from, to } if from == self.rank => self.word(to, true, times),
            Exercise::Word { from, to } if to == self.rank => self.word(from, false, times),
            Exercise::Push { from, to, .. } if from == self.rank => self.push(to, times),
            Exercise::Push { from, to, polled } if to == self.rank => self.be_pushed_to(from, polled, times),
            Exercise::Pull { from, to } if to == self.rank => self.pull(from, times),
            Exercise::Pull { from, to } if from == self.rank => self.be_pulled_from(to, times),
            Exercise::Reach { from, to } if from == self.rank => {
                self.store(self.place(to, self.rank), &self.content);
                Ok(0.0)
            }
            Exercise::PushAll { .. } => self.push_all(times),
            _ => Ok(0.0),
        }
    }

    fn received(&mut self, source: u32) -> Result<Option<String>, Error> {
        let words: Vec<u64> = self.place(self.rank, source).iter().map(|word| word.load(Relaxed)).collect();
        let packs = (PLACE_BYTES / Pack::BYTES) as u32;
        Ok(find_wrong(bytemuck::cast_slice(&words), 0..packs, source, self.run))
    }

    fn leave(&mut self) -> Result<(), Error> {
        // The memory is freed with its last user.
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{process::id, thread};

    use fused_collective::{cpu, group::rendezvous::Membership};

    use super::*;

    /// Runs `rank` on `ranks` threads. No exercise waits past `deadline`.
    fn with_links(test: &str, ranks: u32, deadline: Duration, rank: impl Fn(&Group, CpuLinks<'_>) + Sync) {
        let key = format!("links {test} {}", id());
        let play = |number| {
            let patient = Duration::from_secs(60);
            let membership =
                Membership { rank: number, world_size: ranks, key: &key, config: b"", deadline: patient };
            let group = Group::join(&membership).unwrap();
            let options = cpu::Options { max_row_bytes: 0, deadline };
            let mut communicator = Communicator::join(&group, options).unwrap();
            rank(&group, CpuLinks::share(&group, &mut communicator, None).unwrap());
            group.farewell().unwrap();
        };
        thread::scope(|scope| (0..ranks).for_each(|number| drop(scope.spawn(move || play(number)))));
    }

    #[test]
    fn every_exercise_fills_the_places_it_should_and_a_word_that_is_wrong_is_found() {
        let pairs = [
            Exercise::Push { from: 0, to: 2, polled: false },
            Exercise::Push { from: 2, to: 1, polled: true },
            Exercise::Pull { from: 1, to: 0 },
        ];
        let of_pair = |exercise| match exercise {
            Exercise::Push { from, to, .. } | Exercise::Pull { from, to } => (from, to),
            _ => unreachable!("one of the above"),
        };
        with_links("exercises", 3, Duration::from_secs(60), |group, mut links| {
            let rank = group.rank();
            for exercise in pairs {
                let time = links.time(exercise, 3).unwrap();
                group.barrier().unwrap();
                let (from, to) = of_pair(exercise);
                // The rank that stores or loads measures the time.
                let timed = if matches!(exercise, Exercise::Pull { .. }) { to } else { from };
                assert_eq!(time > 0.0, rank == timed, "{exercise:?}");
                if rank == to {
                    assert_eq!(links.received(from).unwrap(), None, "{exercise:?}");
                    let word = &links.place(rank, from)[100];
                    word.store(word.load(Relaxed) ^ 1, Relaxed);
                    let wrong = links.received(from).unwrap().unwrap();
                    assert!(wrong.contains("wrong from byte 800 on"), "{wrong}");
                }
            }
            assert!(links.time(Exercise::PushAll { blocks: None }, 2).unwrap() > 0.0);
            for source in (0..3).filter(|&source| source != rank) {
                assert_eq!(links.received(source).unwrap(), None);
            }
            group.barrier().unwrap();
            // The bytes of one run are wrong for the next.
            links.run += 1;
            assert!(links.received((rank + 1) % 3).unwrap().is_some());
            let time = links.time(Exercise::Word { from: 1, to: 0 }, 10).unwrap();
            assert_eq!(time > 0.0, rank == 1);
        });
    }

    #[test]
    fn a_rank_that_does_not_take_part_is_named_at_the_deadline() {
        for exercise in [Exercise::Word { from: 0, to: 1 }, Exercise::PushAll { blocks: None }] {
            with_links("deadline", 2, Duration::from_millis(100), |group, mut links| {
                if group.rank() == 0 {
                    let error = links.time(exercise, 1).unwrap_err().to_string();
                    let expected = "waited 0.1 s for rank 1 in a measurement of links: it is stuck, or slower than the deadline";
                    assert_eq!(error, expected);
                    // The rank is not waited for again.
                    assert!(links.time(exercise, 1).unwrap_err().is_poisoned());
                }
                group.barrier().unwrap();
            });
        }
    }
}
