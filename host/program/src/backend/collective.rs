//! The interface of a backend.

use fused_collective::group::rendezvous::Group;
use fused_collective_core::plan::Limits;

use super::{
    error::Error,
    links::Links,
    problem::{Problem, Tensor},
    steps::{AllReduce, Conversion, Step},
};

/// The aimed duration of a trial. It is long compared with a tick of the clock and with the end of a barrier.
const TRIAL_US: f64 = 500.0;
/// The most operations of a trial.
pub(crate) const MAX_OPERATIONS: u32 = 200;

/// The number of copies of a problem's tensors on which operations take turns, so that none finds its tensors in a cache of
/// `cache_bytes`. At most `operations`, as the cache is flushed between trials.
pub fn copies(problem: &Problem, cache_bytes: u64, operations: u32) -> u32 {
    // Every variant reads its input, and writes an output of the same or half the size.
    let bytes = problem.activation_bytes().saturating_mul(2).max(1);
    let enough = cache_bytes.saturating_mul(2).div_ceil(bytes).saturating_add(1);
    enough.min(u64::from(operations.max(1))) as u32
}

/// The byte with which an [audit](Collective::audit) poisons outputs. It makes NaN in every element type.
pub(crate) const AUDITED: u8 = 0xff;

/// One rank of a backend.
pub trait Collective {
    /// Makes the tensors of `problem`, with unspecified contents. They replace those of the current problem.
    ///
    /// # Errors
    /// They do not fit in memory.
    fn prepare(&mut self, problem: &Problem) -> Result<(), Error>;

    /// Saves the current problem in the current slot and restores the one in `slot`, or none if that is empty. The first
    /// slot is 0. A backend that holds one problem has slot 0 only.
    ///
    /// # Errors
    /// There is no such slot.
    fn select(&mut self, slot: usize) -> Result<(), Error> {
        match slot {
            0 => Ok(()),
            _ => Err(Error::Memory(format!("there is no slot {slot}: this backend holds one problem"))),
        }
    }

    /// A function that ends the group's operations from another thread. By default it does nothing.
    fn aborter(&self) -> Box<dyn Fn() + Send> {
        Box::new(|| {})
    }

    /// Writes `bytes` into `tensor` at `offset`.
    ///
    /// # Errors
    /// They end past the end of the tensor.
    fn write(&mut self, tensor: Tensor, offset: u64, bytes: &[u8]) -> Result<(), Error>;

    /// Fills `tensor`, if the problem has it, with `byte`.
    ///
    /// # Errors
    /// The backend failed.
    fn fill(&mut self, tensor: Tensor, byte: u8) -> Result<(), Error>;

    /// A [digest](fused_collective_bench::digest) of the bytes of `tensor`, which other bytes very likely have not.
    ///
    /// # Errors
    /// The backend failed.
    fn digest(&mut self, tensor: Tensor) -> Result<u64, Error>;

    /// The bytes of `tensor`.
    ///
    /// # Errors
    /// The backend failed.
    fn read(&mut self, tensor: Tensor) -> Result<Vec<u8>, Error>;

    /// Runs `steps` once. Returns when they are complete on this rank.
    ///
    /// # Errors
    /// A step cannot run, or a peer did not take part.
    fn run(&mut self, steps: &[Step]) -> Result<(), Error>;

    /// Waits for all ranks, and runs `steps` `operations` times back to back. Returns the microseconds of one time on this
    /// rank.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    fn time(&mut self, steps: &[Step], operations: u32) -> Result<f64, Error>;

    /// The microseconds of a copy of `bytes` bytes within memory, while every rank makes one.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    fn copy_time(&mut self, bytes: u64) -> Result<f64, Error>;

    /// The exercises that measure the links between the ranks of `group`, which is the backend's. All ranks call this.
    ///
    /// # Errors
    /// The backend measures no links, memory is short, or a rank was lost.
    fn links<'b>(&'b mut self, group: &'b Group) -> Result<Box<dyn Links + 'b>, Error> {
        let _ = group;
        Err(Error::Memory("this backend does not measure links".to_owned()))
    }

    /// Searches for writes outside the tensors, while all ranks of the group are idle. It reads the guards around each
    /// tensor, and the slots of the workspace, which are empty between operations. Returns a description of the first such
    /// write.
    ///
    /// If the workspace takes long to read, only the ends of slots are read, unless `thorough`.
    ///
    /// # Errors
    /// The backend failed.
    fn find_stray_write(&mut self, thorough: bool) -> Result<Option<String>, Error>;

    /// Runs `steps` `times` times. After each run a dependent reads `outputs` as early as it may, compares them with their
    /// contents at the call, then poisons them. Returns a description of the first difference. Leaves a result of `steps` in
    /// `outputs`.
    ///
    /// On GPUs the dependent is a kernel. On a backend without streams it is this thread.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    fn audit(&mut self, steps: &[Step], outputs: &[Tensor], times: u64) -> Result<Option<String>, Error> {
        let mut expected = Vec::new();
        for &tensor in outputs {
            expected.push((tensor, self.read(tensor)?));
        }
        let mut found = None;
        for time in 0..times {
            for (tensor, bytes) in &expected {
                self.write(*tensor, 0, &vec![AUDITED; bytes.len()])?;
            }
            self.run(steps)?;
            for (tensor, bytes) in &expected {
                // The peers make all runs, so this rank does, too.
                if found.is_none() && self.read(*tensor)? != *bytes {
                    found = Some(format!("{tensor:?} was wrong after run {time}"));
                }
            }
        }
        Ok(found)
    }

    /// The backend's codes of `count` numbers, whose bits count up from `first`. `count` is a multiple of 4. `None` if the
    /// backend uses `core`'s conversions.
    ///
    /// # Errors
    /// The backend failed.
    fn convert(&mut self, to: Conversion, first: u32, count: u32) -> Result<Option<Vec<u8>>, Error> {
        let _ = (to, first, count);
        Ok(None)
    }

    /// Unmaps the other ranks' memory, so that they may free it. All ranks call this last, when all operations have ended.
    ///
    /// # Errors
    /// A rank was lost, or the backend failed.
    fn leave(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// The all-reduces of the separate operations. The same on every rank.
    fn all_reduces(&self) -> Vec<AllReduce> {
        vec![AllReduce::of_both_modes("allreduce")]
    }

    /// The number of operations in a trial, if one operation takes `microseconds`.
    fn operations_per_trial(&self, microseconds: f64) -> u32 {
        (TRIAL_US / microseconds).clamp(1.0, f64::from(MAX_OPERATIONS)) as u32
    }

    /// The times that [`time`](Self::time) runs its steps on the tensors that [`read`](Self::read) reads, for as many
    /// `operations`: not once for each if copies take turns, or if a part of the trial is not timed.
    fn runs_on_each(&self, operations: u32) -> u32 {
        operations
    }

    /// Sets the cache state of trials from the next [`prepare`](Self::prepare) on. If `cold`, operations find their tensors
    /// in main memory and in no cache: they take turns on enough copies of the tensors, and the cache is flushed before each
    /// trial. The default is warm.
    fn set_cold(&mut self, cold: bool);

    /// Bytes of the last cache before main memory.
    fn cache_bytes(&self) -> u64;

    /// The limits for the plans of fused operations. The same on every rank.
    fn limits(&self) -> &Limits;

    /// The names of the ranks' GPUs, in rank order; empty if the ranks run on processors.
    fn gpus(&self) -> Vec<String> {
        Vec::new()
    }

    /// The CPUs that each rank may run on while it is timed, in rank order, as `0` or `0-3,8`; empty if that is not known, or
    /// if the ranks run on GPUs.
    fn cpus(&self) -> Vec<String> {
        Vec::new()
    }

    /// Notes on the backend for a reader, a sentence each.
    fn notes(&self) -> &[String] {
        &[]
    }
}
