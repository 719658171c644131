//! Launches that follow each other as programmatic dependents.

use std::{boxed::Box, sync::Arc, thread::scope, vec::Vec};

use super::{
    flight::{End, Flight, InStream, mix},
    grid::{Launch, launch_in},
};

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
