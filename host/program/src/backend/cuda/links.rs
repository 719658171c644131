//! Measuring the links between GPUs, with the kernels that push, poll and wait as the collectives do.
//!
//! Each rank has memory that its peers open as they do the workspace's, and that is apart from it: the workspace's slots
//! must hold the sentinel between operations. Times are the device's: of a push or a pull between two events, after one
//! that hides the launch; of a word by the clock that the kernel reads.

use cust::{
    event::{Event, EventFlags},
    stream::{Stream, StreamFlags},
};
use fused_collective_bench::{
    launch::{Meet, Ping, Pull, Push},
    links::{PLACES_OFFSET, WARM_UP_TRIPS, region_bytes},
    table::{PROBES, Probe},
};
use fused_collective_core::{pack::Pack, workspace::Header};

use fused_collective::{
    cuda::{
        Communicator,
        driver::Handle,
        kernels::{Kernels, Launch, Parameters},
        memory::DeviceMemory,
        workspace::Regions,
    },
    group::rendezvous::Group,
};

use crate::backend::{
    error::Error,
    links::{self, Exercise, Measure, find_wrong},
};

use super::cust_driver::failed;

/// Larger than the rows of most operations, and than what a link holds under way many times over.
const PLACE_BYTES: u64 = 32 << 20;
/// More than any GPU's cache holds.
const COPY_BYTES: u64 = 256 << 20;
/// Threads of a block of a push or a pull, a pack each: a row of usual length.
const THREADS: u32 = 1024;
/// Blocks of the smallest grid that all ranks push with: what an operation of few tokens has.
const FEW_BLOCKS: u32 = 16;
/// Bytes that are looked at at a time.
const READ_AT_ONCE: u64 = 8 << 20;

const METHODS: [(Measure, &str); 5] = [
    (
        Measure::Word,
        "half the time that 16 bytes take to the other GPU and back, each polled in the GPU's own memory",
    ),
    (
        Measure::Push,
        "stores of 16 bytes into the other GPU's memory, two blocks of 1024 threads on a multiprocessor",
    ),
    (Measure::Pull, "loads of 16 bytes from the other GPU's memory, by as many threads"),
    (
        Measure::PushAll,
        "every rank pushes to all others at the same time, 16 KiB to each in turn: bytes out of the slowest rank",
    ),
    (
        Measure::Copy,
        "every rank copies 256 MiB within its GPU's memory: bytes read and bytes written, the slowest rank",
    ),
];

/// One rank's end.
#[derive(Debug)]
pub(super) struct CudaLinks<'a> {
    group: &'a Group,
    regions: Regions,
    /// The nanoseconds of a [`Ping`].
    clock: DeviceMemory,
    /// The largest count of any flag so far, the same on every rank.
    count: u32,
    /// Counts what was timed.
    run: u32,
    events: [Event; 2],
    stream: Stream,
    probes: &'a mut Kernels,
    communicator: &'a mut Communicator,
}

impl<'a> CudaLinks<'a> {
    /// Makes this rank's memory and opens the others'. All ranks of `group` call this.
    ///
    /// # Errors
    /// It does not fit into the GPU's memory, or two ranks cannot share it; the kernels are missing.
    pub(super) fn share(
        group: &'a Group,
        communicator: &'a mut Communicator,
        probes: &'a mut Kernels,
    ) -> Result<Self, Error> {
        let world_size = group.world_size();
        probes.load(PROBES)?;
        let context = communicator.gpu().context().clone();
        let header = |rank| Header { world_size, rank, slot_bytes: PLACE_BYTES };
        let bytes = region_bytes(world_size, PLACE_BYTES).unwrap_or(u64::MAX);
        let regions = Regions::share(group, &context, "the memory to measure links with", bytes, 0, header)?;
        let event = || Event::new(EventFlags::DEFAULT).map_err(failed("make an event"));
        Ok(CudaLinks {
            group,
            regions,
            clock: DeviceMemory::holding(&context, &[0; size_of::<u64>()])?,
            count: 0,
            run: 0,
            events: [event()?, event()?],
            stream: Stream::new(StreamFlags::DEFAULT, None).map_err(failed("make a stream"))?,
            probes,
            communicator,
        })
    }

    fn handle(&self) -> Handle {
        self.stream.as_inner().cast()
    }

    /// How a kernel is launched in `blocks` blocks, or as many as are resident at once.
    fn prepare(&mut self, probe: Probe, threads: u32, blocks: u32) -> Result<Launch, Error> {
        let limits = self.probes.limits();
        Ok(limits.for_elements(self.probes.function(probe.entry())?, threads, blocks.into())?)
    }

    /// Enqueues a kernel.
    ///
    /// # Safety
    /// `parameters` is the struct that the kernel takes. `settle` comes before anything that it names is freed.
    unsafe fn enqueue<P: Copy>(&mut self, launch: Launch, parameters: &P) -> Result<(), Error> {
        let stream = self.handle();
        // SAFETY: the struct has no padding, which its crate asserts.
        let parameters = unsafe { Parameters::of(parameters) };
        // SAFETY: the kernel takes these parameters, as this function's caller says; the stream is of the communicator's
        // context, which the engine has made current.
        Ok(unsafe { self.probes.launch(launch, &parameters, stream) }?)
    }

    fn record(&self, event: usize) -> Result<(), Error> {
        Ok(self.events[event].record(&self.stream).map_err(failed("record an event"))?)
    }

    /// Waits for all that was enqueued, and checks its waits.
    fn settle(&mut self) -> Result<(), Error> {
        let stream = self.handle();
        // SAFETY: a stream of the communicator's context.
        Ok(unsafe { self.communicator.synchronize(stream) }?)
    }

    /// Enqueues a kernel twice, the first time with one pass to hide the launch, and waits for it. Microseconds that
    /// the second took for each of its passes.
    ///
    /// # Safety
    /// As [`enqueue`](Self::enqueue).
    unsafe fn time_passes<P: Copy>(
        &mut self,
        launch: Launch,
        once: &P,
        timed: &P,
        passes: u32,
    ) -> Result<f64, Error> {
        // SAFETY: the caller vouches for the parameters.
        unsafe { self.enqueue(launch, once)? };
        self.record(0)?;
        // SAFETY: as above.
        unsafe { self.enqueue(launch, timed)? };
        self.record(1)?;
        self.settle()?;
        let [begin, end] = &self.events;
        let milliseconds = end.elapsed_time_f32(begin).map_err(failed("read the time"))?;
        Ok(f64::from(milliseconds) * 1e3 / f64::from(passes))
    }

    fn word(&mut self, peer: u32, leads: bool, count: u32, times: u32) -> Result<f64, Error> {
        let launch = self.prepare(Probe::LinksPing, 32, 1)?;
        let parameters = Ping {
            group: self.communicator.launch_group(self.regions.addresses()),
            nanoseconds: self.clock.address(),
            peer,
            leads: leads.into(),
            count,
            trips: times + WARM_UP_TRIPS,
        };
        // SAFETY: the entry point takes these parameters; the peer gives the same count, and it is settled at once.
        unsafe { self.enqueue(launch, &parameters)? };
        self.settle()?;
        let mut nanoseconds = [0; size_of::<u64>()];
        self.clock.read(0, &mut nanoseconds)?;
        let microseconds = u64::from_ne_bytes(nanoseconds) as f64 / 1e3;
        Ok(if leads { microseconds / f64::from(times) / 2.0 } else { 0.0 })
    }

    /// The parameters of a push to `targets` ranks, the first at distance `first`.
    fn pushes(&self, first: u32, targets: u32, passes: u32) -> Push {
        Push {
            group: self.communicator.launch_group(self.regions.addresses()),
            place_bytes: PLACE_BYTES,
            packs: (PLACE_BYTES / Pack::BYTES) as u32,
            first,
            targets,
            run: self.run,
            passes,
            reserved: 0,
        }
    }

    fn push(&mut self, first: u32, targets: u32, blocks: u32, times: u32) -> Result<f64, Error> {
        let launch = self.prepare(Probe::LinksPush, THREADS, blocks)?;
        let (once, timed) = (self.pushes(first, targets, 1), self.pushes(first, targets, times));
        // SAFETY: the entry point takes these parameters; every rank has a place in every rank's memory, and reads it
        // only after a barrier.
        unsafe { self.time_passes(launch, &once, &timed, times) }
    }

    fn pull(&mut self, source: u32, times: u32) -> Result<f64, Error> {
        let blocks = self.all_blocks();
        let launch = self.prepare(Probe::LinksPull, THREADS, blocks)?;
        let pulls = |passes| Pull {
            group: self.communicator.launch_group(self.regions.addresses()),
            place_bytes: PLACE_BYTES,
            packs: (PLACE_BYTES / Pack::BYTES) as u32,
            source,
            passes,
            reserved: 0,
        };
        let (once, timed) = (pulls(1), pulls(times));
        // SAFETY: the entry point takes these parameters; the source wrote before the last barrier, and nobody writes
        // until the next.
        unsafe { self.time_passes(launch, &once, &timed, times) }
    }

    /// Fills this rank's own place in its own memory, for others to read.
    fn fill(&mut self) -> Result<(), Error> {
        let blocks = self.all_blocks();
        let launch = self.prepare(Probe::LinksPush, THREADS, blocks)?;
        let parameters = self.pushes(0, 1, 1);
        // SAFETY: as in `push`.
        unsafe { self.enqueue(launch, &parameters)? };
        self.settle()
    }

    /// All ranks push at the same time, from a meeting of their GPUs on.
    fn push_all(&mut self, blocks: u32, times: u32) -> Result<f64, Error> {
        let launch = self.prepare(Probe::LinksMeet, 32, 1)?;
        let parameters = Meet {
            group: self.communicator.launch_group(self.regions.addresses()),
            count: self.count,
            reserved: 0,
        };
        // SAFETY: the entry point takes these parameters, and every rank gives the same count.
        unsafe { self.enqueue(launch, &parameters)? };
        self.push(1, self.group.world_size() - 1, blocks, times)
    }

    /// Two blocks on every multiprocessor.
    fn all_blocks(&self) -> u32 {
        2 * self.communicator.gpu().units
    }

    fn timed(&mut self, exercise: Exercise, times: u32) -> Result<f64, Error> {
        self.communicator.check()?;
        let (rank, world_size) = (self.group.rank(), self.group.world_size());
        self.run += 1;
        let first_count = self.count + 1;
        self.count += match exercise {
            Exercise::Word { .. } => times + WARM_UP_TRIPS,
            _ => 1,
        };
        match exercise {
            Exercise::Word { from, to } if from == rank => self.word(to, true, first_count, times),
            Exercise::Word { from, to } if to == rank => self.word(from, false, first_count, times),
            Exercise::Reach { from, to } | Exercise::Push { from, to, .. } if from == rank => {
                let distance = (to + world_size - from) % world_size;
                self.push(distance, 1, self.all_blocks(), times)
            }
            Exercise::Pull { from, to } => {
                if from == rank {
                    self.fill()?;
                }
                self.group.barrier()?;
                if to == rank { self.pull(from, times) } else { Ok(0.0) }
            }
            Exercise::PushAll { blocks } => self.push_all(blocks.unwrap_or(FEW_BLOCKS), times),
            _ => Ok(0.0),
        }
    }
}

impl links::Links for CudaLinks<'_> {
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
        let units = self.communicator.gpu().units;
        let mut grids = Vec::new();
        for blocks in [FEW_BLOCKS, units, 2 * units] {
            grids.push(Some(self.prepare(Probe::LinksPush, THREADS, blocks)?.blocks()));
        }
        grids.dedup();
        Ok(grids)
    }

    fn time(&mut self, exercise: Exercise, times: u32) -> Result<f64, Error> {
        self.timed(exercise, times)
    }

    fn received(&mut self, source: u32) -> Result<Option<String>, Error> {
        let place = PLACES_OFFSET + u64::from(source) * PLACE_BYTES;
        let mut bytes = vec![0; READ_AT_ONCE as usize];
        for start in (0..PLACE_BYTES).step_by(READ_AT_ONCE as usize) {
            self.regions.own().read(place + start, &mut bytes)?;
            let packs = (start / Pack::BYTES) as u32..((start + READ_AT_ONCE) / Pack::BYTES) as u32;
            let wrong = find_wrong(&bytes, packs, source, self.run);
            if wrong.is_some() {
                return Ok(wrong);
            }
        }
        Ok(None)
    }

    fn leave(&mut self) -> Result<(), Error> {
        self.regions.close_peers();
        Ok(self.group.barrier()?)
    }
}
