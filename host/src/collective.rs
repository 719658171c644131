//! What a benchmark asks of a backend: tensors, the steps that variants are made of, and their time.
//!
//! A [`Problem`] is one configuration; its tensors have fixed roles ([`Tensor`]). A variant is a sequence of
//! [`Step`]s on them, the same on every backend. Every rank holds one [`Collective`] and makes the same calls.

use std::{
    fmt,
    ops::{BitOr, BitXor},
};

use fused_collective_core::{
    dtype::DType,
    fusion::{Mode, Norm, Operation, Residual},
    plan::Limits,
    quant::Quantization,
};

use crate::{cpu, cuda, failure::Failure, links::Links, rendezvous::Group};

/// One configuration: what is computed, whatever the steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Problem {
    /// Element type of activations and gamma.
    pub dtype: DType,
    /// Rows.
    pub tokens: u64,
    /// Elements of a row.
    pub hidden: u64,
    /// Whether a residual is added.
    pub residual: bool,
    /// Whether there is a sharded one as well, with the same rows, for [`Step::FusedSharded`].
    pub sharded: bool,
    /// RMSNorm's parameters.
    pub norm: Norm,
    /// What the norm is quantized to.
    pub quantization: Quantization,
    /// The per-tensor or global scale, where the quantization reads one.
    pub scale: f32,
}

impl Problem {
    /// The fused operation that solves it.
    pub fn operation(&self, mode: Mode) -> Operation {
        Operation {
            dtype: self.dtype,
            tokens: self.tokens,
            hidden: self.hidden,
            residual: Residual::replicated(self.residual),
            norm: Some(self.norm),
            quantization: self.quantization,
            keep_norm: false,
            mode,
        }
    }

    /// The fused operation that solves it with the residual sharded.
    pub fn sharded_operation(&self) -> Operation {
        Operation { residual: Residual::Sharded, ..self.operation(Mode::TwoShot) }
    }

    /// The all-reduce alone.
    pub fn all_reduce(&self, mode: Mode) -> Operation {
        Operation {
            residual: Residual::None,
            norm: None,
            quantization: Quantization::None,
            ..self.operation(mode)
        }
    }

    /// Bytes of one row of elements.
    pub fn row_bytes(&self) -> u64 {
        self.hidden * self.dtype.bytes()
    }

    /// Bytes of one activation, which must not be more than 64 bits count.
    pub fn activation_bytes(&self) -> u64 {
        self.tokens * self.row_bytes()
    }

    /// Bytes of `tensor`, 0 if the problem has no use for it; `None` past 64 bits.
    pub fn bytes(&self, tensor: Tensor) -> Option<u64> {
        let elements = self.tokens.checked_mul(self.hidden)?;
        let activation = elements.checked_mul(self.dtype.bytes());
        let quantized = self.quantization != Quantization::None;
        match tensor {
            Tensor::Input | Tensor::Residual | Tensor::ResidualOut | Tensor::NormOut => activation,
            // Rows of every rank: which of them are one's own depends on the rank.
            Tensor::ResidualShard | Tensor::ResidualShardOut if self.sharded => activation,
            Tensor::ResidualShard | Tensor::ResidualShardOut => Some(0),
            Tensor::Reduced if self.residual => activation,
            Tensor::Reduced => Some(0),
            Tensor::Gamma => Some(self.hidden * self.dtype.bytes()),
            Tensor::QuantOut if quantized => {
                self.tokens.checked_mul(self.quantization.value_bytes_per_row(self.hidden))
            }
            Tensor::ScaleOut if quantized => self.quantization.scale_bytes(self.tokens, self.hidden),
            Tensor::QuantOut | Tensor::ScaleOut => Some(0),
            Tensor::WideA | Tensor::WideB => elements.checked_mul(4),
            Tensor::PerToken => self.tokens.checked_mul(4),
        }
    }

    /// Bytes of all tensors on one rank; `None` past 64 bits.
    pub fn total_bytes(&self) -> Option<u64> {
        self.bytes_of(&Tensor::ALL)
    }

    /// Bytes of `tensors` on one rank; `None` past 64 bits.
    pub fn bytes_of(&self, tensors: &[Tensor]) -> Option<u64> {
        tensors.iter().try_fold(0u64, |total, &tensor| total.checked_add(self.bytes(tensor)?))
    }
}

/// Bytes of the guards before and after each tensor.
pub(crate) const GUARD_BYTES: usize = 4096;
/// What guards are full of: NaN in every element type, so that a read past a tensor's end shows in the results.
pub(crate) const GUARD: u8 = 0xff;

/// Where the guards `before` and `after` a tensor were written, if they were.
pub(crate) fn stray_write(before: &[u8], after: &[u8]) -> Option<String> {
    if let Some(at) = before.iter().rposition(|&byte| byte != GUARD) {
        return Some(format!("{} bytes before its start", before.len() - at));
    }
    first_other(after, GUARD).map(|at| format!("{at} bytes past its end"))
}

/// The index of the first of `items` that is not `value`.
pub(crate) fn first_other<T>(items: &[T], value: T) -> Option<usize>
where
    T: Copy + Default + PartialEq + BitXor<Output = T> + BitOr<Output = T>,
{
    // A loop that ends at the first would look at one at a time.
    const CHUNK: usize = 4096;
    let differs = |chunk: &[T]| chunk.iter().fold(T::default(), |bits, &item| bits | (item ^ value));
    let chunk = items.chunks(CHUNK).position(|chunk| differs(chunk) != T::default())?;
    let first = chunk * CHUNK;
    items[first..].iter().position(|&item| item != value).map(|at| first + at)
}

/// The role of a tensor. Activations are `[tokens, hidden]`, row-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tensor {
    /// This rank's addend.
    Input,
    /// The residual, the same on every rank. It is there in a problem without a residual too, full of NaN, so that
    /// whoever reads it all the same is found out.
    Residual,
    /// This rank's rows of a sharded residual, and room for the others'.
    ResidualShard,
    /// RMSNorm's weight, `[hidden]`.
    Gamma,
    /// The all-reduced input of the separate operations, where a residual is still to be added.
    Reduced,
    /// The sum, plus the residual.
    ResidualOut,
    /// This rank's rows of it, and room for the others', where the residual is sharded.
    ResidualShardOut,
    /// The norm, if it is not quantized on the way.
    NormOut,
    /// The quantized norm.
    QuantOut,
    /// Its scales.
    ScaleOut,
    /// An `f32` activation between eager steps.
    WideA,
    /// Another one.
    WideB,
    /// `[tokens]` `f32`: the reciprocal root mean squares between eager steps.
    PerToken,
}

impl Tensor {
    /// Every role.
    pub const ALL: [Tensor; 13] = [
        Tensor::Input,
        Tensor::Residual,
        Tensor::ResidualShard,
        Tensor::Gamma,
        Tensor::Reduced,
        Tensor::ResidualOut,
        Tensor::ResidualShardOut,
        Tensor::NormOut,
        Tensor::QuantOut,
        Tensor::ScaleOut,
        Tensor::WideA,
        Tensor::WideB,
        Tensor::PerToken,
    ];

    /// The roles that hold results.
    pub const OUTPUTS: [Tensor; 5] =
        [Tensor::ResidualOut, Tensor::ResidualShardOut, Tensor::NormOut, Tensor::QuantOut, Tensor::ScaleOut];
}

/// One operation that a framework would launch. *Sum* is `Reduced`, or `ResidualOut` if there is no residual.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Everything: `Input`, `Residual`, `Gamma` to `ResidualOut` and `NormOut` or `QuantOut` and `ScaleOut`.
    Fused(Mode),
    /// The same with a sharded residual: `ResidualShard` and `ResidualShardOut` in place of `Residual` and `ResidualOut`.
    FusedSharded,
    /// `Input` to sum, by this project's own all-reduce.
    AllReduce(Mode),
    /// `Input` to sum, by NCCL's.
    NcclAllReduce,
    /// One pass: sum and `Residual` to `ResidualOut` and `NormOut`.
    AddRmsNorm,
    /// One pass: sum and `Residual` to `ResidualOut`, and `QuantOut` and `ScaleOut`.
    AddRmsNormQuantize,
    /// One pass: `NormOut` to `QuantOut` and `ScaleOut`.
    Quantize,
    /// A primitive elementwise operation.
    Eager(Eager),
}

/// The primitive operations that an eager framework launches, each a pass through memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Eager {
    /// `ResidualOut = Reduced + Residual`.
    AddResidual,
    /// `WideA = f32(ResidualOut)`.
    WidenResidual,
    /// `WideB = WideA * WideA`.
    Square,
    /// `PerToken = rsqrt(mean(WideB) + epsilon)`, the mean over each row.
    MeanRsqrt,
    /// `WideA = WideA * PerToken`.
    ScaleRows,
    /// `WideA = WideA * (weight_bias + Gamma)`.
    Weight,
    /// `NormOut = round(WideA)`.
    RoundNorm,
    /// `WideA = f32(NormOut)`.
    WidenNorm,
    /// `WideA = WideA * (1 / scale)`.
    Rescale,
    /// `WideA = clamp(WideA, -448, 448)`.
    Clamp,
    /// `QuantOut = E4M3(WideA)`.
    RoundFp8,
}

/// The steps of RMSNorm as an eager framework runs them, from the sum to `NormOut`.
pub fn eager_rms_norm(residual: bool) -> Vec<Step> {
    let add = residual.then_some(Eager::AddResidual);
    let rest = [
        Eager::WidenResidual,
        Eager::Square,
        Eager::MeanRsqrt,
        Eager::ScaleRows,
        Eager::Weight,
        Eager::RoundNorm,
    ];
    add.into_iter().chain(rest).map(Step::Eager).collect()
}

/// The steps of static FP8 quantization as an eager framework runs them, from `NormOut` to `QuantOut`.
pub fn eager_fp8() -> Vec<Step> {
    [Eager::WidenNorm, Eager::Rescale, Eager::Clamp, Eager::RoundFp8].map(Step::Eager).to_vec()
}

/// A format of fewer bits that `f32` is converted to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conversion {
    /// [`e4m3`](fused_collective_core::quant::e4m3): a byte for each number.
    E4M3,
    /// [`e2m1`](fused_collective_core::quant::e2m1): half a byte for each number, the first in the low half.
    E2M1,
}

impl Conversion {
    /// All of them.
    pub const ALL: [Conversion; 2] = [Conversion::E4M3, Conversion::E2M1];

    /// The format's name.
    pub const fn name(self) -> &'static str {
        match self {
            Conversion::E4M3 => "e4m3",
            Conversion::E2M1 => "e2m1",
        }
    }

    /// Codes that share a byte.
    pub const fn codes_per_byte(self) -> u32 {
        match self {
            Conversion::E4M3 => 1,
            Conversion::E2M1 => 2,
        }
    }
}

/// Why a backend could not do what was asked.
#[derive(Clone, Debug)]
pub enum Error {
    /// The group's collective failed, on the CPU backend.
    Cpu(cpu::Error),
    /// The same, on the CUDA backend.
    Cuda(cuda::Error),
    /// A step cannot run on this problem.
    Step {
        /// The step.
        step: Step,
        /// Why not.
        why: &'static str,
    },
    /// The problem's tensors do not fit.
    Memory(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Cpu(error) => error.fmt(f),
            Error::Cuda(error) => error.fmt(f),
            Error::Step { step, why } => write!(f, "{step:?} cannot run: {why}"),
            Error::Memory(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for Error {}

impl Error {
    /// How an operation of the group failed while it ran, if it did.
    pub fn failure(&self) -> Option<&Failure> {
        match self {
            Error::Cpu(cpu::Error::Failed(failure)) | Error::Cuda(cuda::Error::Failed(failure)) => {
                Some(failure)
            }
            _ => None,
        }
    }

    /// Whether it says that an earlier operation failed, and nothing was tried.
    pub fn is_poisoned(&self) -> bool {
        matches!(self, Error::Cpu(cpu::Error::Poisoned(_)) | Error::Cuda(cuda::Error::Poisoned(_)))
    }
}

impl From<cpu::Error> for Error {
    fn from(error: cpu::Error) -> Self {
        Error::Cpu(error)
    }
}

impl From<cuda::Error> for Error {
    fn from(error: cuda::Error) -> Self {
        Error::Cuda(error)
    }
}

/// An all-reduce that the separate operations can use.
#[derive(Clone, Debug, PartialEq)]
pub struct AllReduce {
    /// Its part of variants' names: `allreduce`, `custom_allreduce`.
    pub name: &'static str,
    /// The ways to run it, with their names for a reader; the fastest is used.
    pub ways: Vec<(&'static str, Step)>,
}

impl AllReduce {
    /// This project's own, which runs in either mode.
    pub fn of_both_modes(name: &'static str) -> Self {
        let ways =
            vec![("one-shot", Step::AllReduce(Mode::OneShot)), ("two-shot", Step::AllReduce(Mode::TwoShot))];
        AllReduce { name, ways }
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_others_is_found_wherever_it_is() {
        assert_eq!(first_other::<u8>(&[], 1), None);
        for length in [1, 4095, 4096, 4097, 9000] {
            let mut items = vec![7u32; length];
            assert_eq!(first_other(&items, 7), None);
            items[length - 1] = 0;
            assert_eq!(first_other(&items, 7), Some(length - 1));
            items[length / 2] = 8;
            assert_eq!(first_other(&items, 7), Some(length / 2));
        }
    }

    #[test]
    fn a_stray_write_is_told_of_by_its_distance() {
        let guard = [GUARD; 8];
        let written = |at: usize| {
            let mut bytes = guard;
            bytes[at] = 0;
            bytes
        };
        assert_eq!(stray_write(&guard, &guard), None);
        assert_eq!(stray_write(&written(7), &written(0)).as_deref(), Some("1 bytes before its start"));
        assert_eq!(stray_write(&guard, &written(3)).as_deref(), Some("3 bytes past its end"));
    }
}
