//! A launch among others in a stream, and the delays of its threads.

use std::{
    cell::Cell,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread::{sleep, yield_now},
    time::Duration,
    vec,
    vec::Vec,
};

/// A launch that has started.
pub(super) struct Flight {
    state: Mutex<FlightState>,
    changed: Condvar,
}

pub(super) struct FlightState {
    /// The blocks that let the next launch start.
    pub(super) triggered: Vec<bool>,
    pub(super) ended: bool,
}

impl Flight {
    pub(super) fn new(blocks: u32) -> Self {
        let state = FlightState { triggered: vec![false; blocks as usize], ended: false };
        Flight { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn change(&self, change: impl FnOnce(&mut FlightState)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    pub(super) fn wait(&self, until: impl Fn(&FlightState) -> bool) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.changed.wait_while(state, |state| !until(state)).unwrap_or_else(PoisonError::into_inner));
    }
}

/// A launch's place in a stream; the default is a launch by itself.
#[derive(Clone, Default)]
pub(super) struct InStream {
    pub(super) flight: Option<Arc<Flight>>,
    pub(super) before: Option<Arc<Flight>>,
    pub(super) seed: Option<u64>,
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

    /// The delays of the thread of this index in a grid of so many threads.
    pub(super) fn delays(&self, threads: u32, index: u32) -> Option<Delays> {
        let seed = self.seed?;
        let victim = mix(seed) % u64::from(threads);
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
pub(super) struct End<'a>(pub(super) &'a InStream);

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
pub(super) fn mix(number: u64) -> u64 {
    let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}
