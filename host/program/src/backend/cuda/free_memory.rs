//! Whether processes that have ended left GPU memory behind: seen from outside, by what is free on each GPU.

use std::{
    thread,
    time::{Duration, Instant},
};

use cust::device::{Device, DeviceAttribute};
use fused_collective::{
    Error,
    cuda::{count, device::Gpu, memory::free_bytes},
};

use super::cust_driver::{bind_cust, failed};

/// What a GPU may have less than before, in bytes: the driver keeps some of its own. A rank's context alone takes more.
const TOLERANCE: u64 = 64 << 20;
/// Between looks.
const PAUSE: Duration = Duration::from_millis(20);
/// `CU_COMPUTEMODE_DEFAULT`: several processes may use the GPU.
const SHARED: i32 = 0;

/// The free memory of the GPUs that ranks of other processes use.
#[derive(Debug)]
pub struct FreeMemory {
    /// GPUs 0, 1, ..., each with its context, so that what they take is the same at every look.
    gpus: Vec<Gpu>,
    /// What was free when it was last [noted](Self::note), in bytes.
    before: Vec<u64>,
}

impl FreeMemory {
    /// Of the first `gpus` GPUs, or of all if there are fewer. It takes a context on each.
    ///
    /// # Errors
    /// The driver's; a GPU is in a mode in which this process would keep the ranks from using it.
    pub fn watch(gpus: u32) -> Result<Self, Error> {
        bind_cust()?;
        let mut opened = Vec::new();
        for ordinal in 0..count()?.min(gpus) {
            let device = Device::get_device(ordinal).map_err(failed("find the GPU"))?;
            let mode = device.get_attribute(DeviceAttribute::ComputeMode);
            if mode.map_err(failed("ask who may use the GPU"))? != SHARED {
                return Err(Error::Device(format!("GPU {ordinal} is for one process at a time")));
            }
            opened.push(Gpu::open(ordinal)?);
        }
        let mut memory = FreeMemory { gpus: opened, before: Vec::new() };
        memory.before = memory.now()?;
        Ok(memory)
    }

    /// Notes what is free.
    ///
    /// # Errors
    /// The driver's.
    pub fn note(&mut self) -> Result<(), Error> {
        self.before = self.now()?;
        Ok(())
    }

    /// Waits for at most `within` until as much is free as was noted, and says what is missing then.
    ///
    /// # Errors
    /// The driver's.
    pub fn missing(&self, within: Duration) -> Result<Option<String>, Error> {
        let began = Instant::now();
        loop {
            let missing = compare(&self.before, &self.now()?);
            if missing.is_none() || began.elapsed() >= within {
                return Ok(missing);
            }
            thread::sleep(PAUSE);
        }
    }

    fn now(&self) -> Result<Vec<u64>, Error> {
        self.gpus.iter().map(|gpu| free_bytes(gpu.context())).collect()
    }
}

/// The first GPU with less free memory than before, and how much less.
fn compare(before: &[u64], now: &[u64]) -> Option<String> {
    (0..).zip(before.iter().zip(now)).find_map(|(gpu, (before, now)): (u32, _)| {
        let missing = before.saturating_sub(*now);
        (missing > TOLERANCE)
            .then(|| format!("GPU {gpu} has {} MiB less free than before the case", missing >> 20))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_was_not_given_back_is_told_with_its_gpu() {
        let gib = 1u64 << 30;
        assert_eq!(compare(&[gib, gib], &[gib - TOLERANCE, 2 * gib]), None);
        let missing = compare(&[gib, gib], &[gib, gib / 2]);
        assert_eq!(missing.as_deref(), Some("GPU 1 has 512 MiB less free than before the case"));
    }
}
