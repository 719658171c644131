//! Launches that follow each other as programmatic dependents, and schedules that are disturbed.

use std::{
    boxed::Box,
    cell::Cell,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread::{scope, sleep, yield_now},
    time::Duration,
    vec,
    vec::Vec,
};

use super::{Launch, launch_in};

/// Kernels in one stream, each launched as a programmatic dependent of the one before, as early as a GPU may: once
/// every block of that has called [`launch_dependents`](crate::simt::launch_dependents) or ended. What it does before
/// its [`wait_for_prerequisites`](crate::simt::wait_for_prerequisites) runs beside the kernel before.
#[derive(Default)]
pub struct Stream<'a> {
    launches: Vec<(Launch, Box<dyn Fn() + Send + Sync + 'a>)>,
    seed: Option<u64>,
}

impl<'a> Stream<'a> {
    /// A stream of threads that run as the system schedules them.
    pub fn new() -> Self {
        Stream::default()
    }

    /// A stream whose threads are held up at random, from `seed`: where they start, before they store, push and poll,
    /// at barriers and round dependent launches. In most launches one thread is held up for long.
    pub fn with_delays(seed: u64) -> Self {
        Stream { launches: Vec::new(), seed: Some(seed) }
    }

    /// Adds a launch.
    pub fn launch(&mut self, geometry: Launch, kernel: impl Fn() + Send + Sync + 'a) {
        self.launches.push((geometry, Box::new(kernel)));
    }

    /// Runs all launches and returns when they have ended.
    ///
    /// # Panics
    /// As [`launch`](super::launch).
    pub fn run(self) {
        let mut before: Option<Arc<Flight>> = None;
        scope(|scope| {
            for (index, (geometry, kernel)) in (0..).zip(&self.launches) {
                if let Some(before) = &before {
                    before.wait(|state| state.ended || state.triggered.iter().all(|block| *block));
                }
                let flight = Arc::new(Flight::new(geometry.blocks));
                let place = InStream {
                    flight: Some(Arc::clone(&flight)),
                    before: before.replace(flight),
                    seed: self.seed.map(|seed| mix(seed ^ mix(index))),
                };
                scope.spawn(move || {
                    let _end = End(&place);
                    launch_in(&place, *geometry, kernel);
                });
            }
        });
    }
}

/// A launch that has started.
struct Flight {
    state: Mutex<FlightState>,
    changed: Condvar,
}

struct FlightState {
    /// The blocks that let the next launch start.
    triggered: Vec<bool>,
    ended: bool,
}

impl Flight {
    fn new(blocks: u32) -> Self {
        let state = FlightState { triggered: vec![false; blocks as usize], ended: false };
        Flight { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn change(&self, change: impl FnOnce(&mut FlightState)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    fn wait(&self, until: impl Fn(&FlightState) -> bool) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.changed.wait_while(state, |state| !until(state)).unwrap_or_else(PoisonError::into_inner));
    }
}

/// Where a launch is in a stream; the default is a launch by itself.
#[derive(Clone, Default)]
pub(super) struct InStream {
    flight: Option<Arc<Flight>>,
    before: Option<Arc<Flight>>,
    seed: Option<u64>,
}

impl InStream {
    /// Returns when the launch before has ended.
    pub(super) fn wait(&self) {
        if let Some(before) = &self.before {
            before.wait(|state| state.ended);
        }
    }

    /// Lets the next launch start, as far as block `block` is concerned.
    pub(super) fn trigger(&self, block: u32) {
        if let Some(flight) = &self.flight {
            flight.change(|state| state.triggered[block as usize] = true);
        }
    }

    /// How thread `thread` of block `block` is held up.
    pub(super) fn delays(&self, geometry: Launch, block: u32, thread: u32) -> Option<Delays> {
        let seed = self.seed?;
        let victim = mix(seed) % u64::from(geometry.blocks * geometry.threads);
        let index = block * geometry.threads + thread;
        let stalls = !mix(seed ^ 1).is_multiple_of(4) && victim == u64::from(index);
        Some(Delays {
            random: Cell::new(mix(seed ^ mix(u64::from(index)))),
            passes: Cell::new(0),
            stall: stalls
                .then(|| ((mix(seed ^ 2) % 24) as u32, Duration::from_micros(mix(seed ^ 3) % 10_000))),
        })
    }
}

/// Marks a launch as ended, however it ended: others wait for it.
struct End<'a>(&'a InStream);

impl Drop for End<'_> {
    fn drop(&mut self) {
        if let Some(flight) = &self.0.flight {
            flight.change(|state| state.ended = true);
        }
    }
}

/// When one thread is held up.
pub(super) struct Delays {
    random: Cell<u64>,
    passes: Cell<u32>,
    /// The pass at which it is held up for long, and for how long.
    stall: Option<(u32, Duration)>,
}

impl Delays {
    pub(super) fn pass(&self) {
        let pass = self.passes.replace(self.passes.get().wrapping_add(1));
        if let Some((_, long)) = self.stall.filter(|(at, _)| *at == pass) {
            sleep(long);
        }
        let random = mix(self.random.get());
        self.random.set(random);
        match random % 256 {
            0 => sleep(Duration::from_micros((random >> 8) % 200)),
            1..16 => yield_now(),
            _ => {}
        }
    }
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
fn mix(number: u64) -> u64 {
    let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}
