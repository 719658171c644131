//! What the program asks of a backend.

use fused_collective::group::rendezvous::Group;
use fused_collective_core::plan::Limits;

use super::{
    error::Error,
    links::Links,
    problem::{Problem, Tensor},
    steps::{AllReduce, Conversion, Step},
};

/// A trial is made of as many operations as take about this long, so that a clock's tick and a barrier's end
/// do not show in it.
const TRIAL_US: f64 = 500.0;
/// The most operations of a trial.
pub(crate) const MAX_OPERATIONS: u32 = 200;

/// Copies of a problem's tensors that operations take turns on so that none finds its own in a cache of `cache_bytes`;
/// no more than a trial has operations, since the cache is flushed in between.
pub fn copies(problem: &Problem, cache_bytes: u64, operations: u32) -> u32 {
    // Every variant reads its input and writes an output of that size, or half of it.
    let bytes = problem.activation_bytes().saturating_mul(2).max(1);
    let enough = cache_bytes.saturating_mul(2).div_ceil(bytes).saturating_add(1);
    enough.min(u64::from(operations.max(1))) as u32
}

/// What an [audit](Collective::audit) writes over outputs that it has read: NaN in every element type.
pub(crate) const AUDITED: u8 = 0xff;

/// One rank's end of a backend.
pub trait Collective {
    /// Makes the tensors of `problem`, with unspecified contents, in place of those of an earlier one.
    ///
    /// # Errors
    /// They do not fit in memory.
    fn prepare(&mut self, problem: &Problem) -> Result<(), Error>;

    /// Puts the problem and its tensors aside under the number that was selected last (0 at first), and takes up those
    /// that were put aside under `slot`; none, if there are none. Backends that hold one problem have slot 0 alone.
    ///
    /// # Errors
    /// There is no such slot.
    fn select(&mut self, slot: usize) -> Result<(), Error> {
        match slot {
            0 => Ok(()),
            _ => Err(Error::Memory(format!("there is no slot {slot}: this backend holds one problem"))),
        }
    }

    /// What ends the group's operations from another thread. A backend without that does nothing.
    fn aborter(&self) -> Box<dyn Fn() + Send> {
        Box::new(|| {})
    }

    /// Sets the bytes of `tensor`, from its start.
    ///
    /// # Errors
    /// `bytes` is longer than the tensor.
    fn write(&mut self, tensor: Tensor, offset: u64, bytes: &[u8]) -> Result<(), Error>;

    /// The bytes of `tensor`.
    ///
    /// # Errors
    /// The backend's.
    fn read(&mut self, tensor: Tensor) -> Result<Vec<u8>, Error>;

    /// Runs `steps` once. Returns when they are complete on this rank.
    ///
    /// # Errors
    /// A step that cannot run, or a peer that did not take part.
    fn run(&mut self, steps: &[Step]) -> Result<(), Error>;

    /// Waits for all ranks, runs `steps` `operations` times back to back, and returns how long it took on this
    /// rank, in microseconds for each time.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    fn time(&mut self, steps: &[Step], operations: u32) -> Result<f64, Error>;

    /// Microseconds that copying `bytes` bytes within memory takes while every rank does the same.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    fn copy_time(&mut self, bytes: u64) -> Result<f64, Error>;

    /// What measures the links between the ranks of `group`, which is the backend's. All ranks call this.
    ///
    /// # Errors
    /// The backend measures none, or there is not enough memory; a rank was lost.
    fn links<'b>(&'b mut self, group: &'b Group) -> Result<Box<dyn Links + 'b>, Error> {
        let _ = group;
        Err(Error::Memory("this backend does not measure links".to_owned()))
    }

    /// Looks for writes outside of the tensors while no rank of the group runs an operation: in the guards before and
    /// after each of them, and in the workspace, whose slots hold no data between operations. What was written, for
    /// a reader; `None` if nothing was.
    ///
    /// Of a workspace that takes long to read, only the ends of slots are looked at, unless `thorough`.
    ///
    /// # Errors
    /// The backend's.
    fn find_stray_write(&mut self, thorough: bool) -> Result<Option<String>, Error>;

    /// Runs `steps` so many `times`, each time followed by something that depends on them: it reads `outputs` as early
    /// as it may, holds them to what they are when this is called, and writes over them. What it found, for a reader;
    /// `None` if they were always finished and the same. Leaves a result of `steps` in `outputs`.
    ///
    /// On a backend without a stream the reader is this thread.
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
                // Peers run all of it, so this rank does too.
                if found.is_none() && self.read(*tensor)? != *bytes {
                    found = Some(format!("{tensor:?} was not what it should be after run {time}"));
                }
            }
        }
        Ok(found)
    }

    /// The codes of `count` numbers, a multiple of 4, whose bits count up from `first`: as the backend converts them.
    /// `None` if it does as `core` does, by the same code.
    ///
    /// # Errors
    /// The backend's.
    fn convert(&mut self, to: Conversion, first: u32, count: u32) -> Result<Option<Vec<u8>>, Error> {
        let _ = (to, first, count);
        Ok(None)
    }

    /// Lets go of what this rank has of other ranks' memory, so that they may free it. All ranks call this when
    /// nothing runs any more; no other call follows.
    ///
    /// # Errors
    /// A rank was lost, or the backend's.
    fn leave(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// The all-reduces that the separate operations are measured with. The same on every rank.
    fn all_reduces(&self) -> Vec<AllReduce> {
        vec![AllReduce::of_both_modes("allreduce")]
    }

    /// Operations of a trial of steps of which one operation took `microseconds`.
    fn operations_per_trial(&self, microseconds: f64) -> u32 {
        (TRIAL_US / microseconds).clamp(1.0, f64::from(MAX_OPERATIONS)) as u32
    }

    /// From the next [`prepare`](Self::prepare) on, whether operations of a trial find their tensors in main memory, and
    /// in no cache: they take turns on so many copies of them that what one left in the cache is gone when its turn comes
    /// again, and the cache is flushed before each trial. Not so unless asked for.
    fn set_cold(&mut self, cold: bool);

    /// Bytes of the last cache before main memory.
    fn cache_bytes(&self) -> u64;

    /// What fused operations are planned with. The same on every rank.
    fn limits(&self) -> &Limits;

    /// The rank's GPUs by name, in rank order; none if they are not what is measured.
    fn gpus(&self) -> Vec<String> {
        Vec::new()
    }

    /// What a reader should know of the backend, a sentence each.
    fn notes(&self) -> &[String] {
        &[]
    }
}
