//! The steps of variants, the same on every backend.

use fused_collective_core::fusion::{Mode, Operation};

use super::problem::{Problem, Tensor};
use crate::wire::Wire;

/// One operation that a framework would launch. *Sum* is `Reduced`, or `ResidualOut` if there is no residual.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The whole operation: `Input`, `Residual`, `Gamma` and the tensors of its pattern to `ResidualOut` and `NormOut`,
    /// or to `ResidualOut`, `QuantOut` and `ScaleOut`.
    Fused(Fused),
    /// One pass: experts' rows and `Input` to `Combined`.
    CombineExperts,
    /// Addend to sum, by this project's own all-reduce. The addend is `Input`, or `Combined` of experts.
    AllReduce(Mode),
    /// Addend to sum, by NCCL's.
    NcclAllReduce,
    /// Addend to sum, by NCCL's, both in a symmetric window. The other steps find addend and sum there.
    NcclSymmetricAllReduce,
    /// One pass: sum to its norm, in place.
    PostNorm,
    /// One pass: sum, its norm if there is one, and `Residual` to `ResidualOut`, and to `NormOut` or `QuantOut` and `ScaleOut`.
    AfterAllReduce,
    /// One pass: sum and `Residual` to `ResidualOut` and `NormOut`.
    AddRmsNorm,
    /// One pass: sum and `Residual` to `ResidualOut`, and `QuantOut` and `ScaleOut`.
    AddRmsNormQuantize,
    /// One pass: `NormOut` to `QuantOut` and `ScaleOut`.
    Quantize,
    /// A primitive elementwise operation.
    Eager(Eager),
}

impl Step {
    /// True if NCCL sums the addends of all ranks.
    pub const fn is_nccl(&self) -> bool {
        matches!(self, Step::NcclAllReduce | Step::NcclSymmetricAllReduce)
    }

    /// The fused operation, all rows at once, with outputs of their own.
    pub const fn fused(mode: Mode) -> Step {
        Step::Fused(Fused { mode, sharded: false, in_place: false, wire: Wire::Exact, rows: None })
    }

    /// The same with a sharded residual.
    pub const fn fused_sharded() -> Step {
        Step::Fused(Fused {
            mode: Mode::TwoShot,
            sharded: true,
            in_place: false,
            wire: Wire::Exact,
            rows: None,
        })
    }

    /// This step with rows in the format `wire` between ranks, if it is a fused operation.
    pub const fn sent_as(self, wire: Wire) -> Step {
        match self {
            Step::Fused(call) => Step::Fused(Fused { wire, ..call }),
            step => step,
        }
    }
}

/// One call of the fused operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fused {
    /// The mode; two-shot with a sharded residual.
    pub mode: Mode,
    /// True with a sharded residual: `ResidualShard` and `ResidualShardOut` in place of `Residual` and `ResidualOut`.
    pub sharded: bool,
    /// True if the norm replaces `Input` and the sum replaces the residual. Codes and scales have a size of their own, and
    /// stay beside; so does a sum without a residual.
    pub in_place: bool,
    /// The format of rows between ranks.
    pub wire: Wire,
    /// The rows of the call, if not all. Their scales lie at the start of `ScaleOut`, as those of a tensor of their own. With a
    /// sharded residual the first is a multiple of the number of ranks.
    pub rows: Option<Rows>,
}

/// Consecutive rows of a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    /// Rows before these.
    pub first: u64,
    /// The number of rows.
    pub count: u64,
}

impl Fused {
    /// The rows of the call.
    pub fn rows_of(&self, problem: &Problem) -> Rows {
        self.rows.unwrap_or(Rows { first: 0, count: problem.tokens })
    }

    /// The operation that the call runs.
    pub fn operation(&self, problem: &Problem) -> Operation {
        let whole = if self.sharded { problem.sharded_operation() } else { problem.operation(self.mode) };
        Operation { tokens: self.rows_of(problem).count, wire: self.wire.format(), ..whole }
    }

    /// The residual that it reads, if the problem has one.
    pub fn residual(&self) -> Tensor {
        if self.sharded { Tensor::ResidualShard } else { Tensor::Residual }
    }

    /// The tensor that gets the sum.
    pub fn sum(&self, problem: &Problem) -> Tensor {
        match self.sharded {
            _ if self.in_place && problem.residual => self.residual(),
            true => Tensor::ResidualShardOut,
            false => Tensor::ResidualOut,
        }
    }

    /// The tensor that gets the norm, if the operation writes it.
    pub fn norm(&self) -> Tensor {
        if self.in_place { Tensor::Input } else { Tensor::NormOut }
    }
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

/// A narrow format to which `f32` is converted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conversion {
    /// [`e4m3`](fused_collective_core::quant::e4m3): a byte for each number.
    E4M3,
    /// [`e2m1`](fused_collective_core::quant::e2m1): half a byte for each number, the first in the low half.
    E2M1,
}

impl Conversion {
    /// Every format.
    pub const ALL: [Conversion; 2] = [Conversion::E4M3, Conversion::E2M1];

    /// The format's name.
    pub const fn name(self) -> &'static str {
        match self {
            Conversion::E4M3 => "e4m3",
            Conversion::E2M1 => "e2m1",
        }
    }

    /// Codes in a byte.
    pub const fn codes_per_byte(self) -> u32 {
        match self {
            Conversion::E4M3 => 1,
            Conversion::E2M1 => 2,
        }
    }
}

/// An all-reduce that the separate operations can use.
#[derive(Clone, Debug, PartialEq)]
pub struct AllReduce {
    /// The name within variants' names: `allreduce`, `symm_allreduce` or `custom_allreduce`.
    pub name: &'static str,
    /// The ways to run it, with names for a reader. The fastest is used.
    pub ways: Vec<(&'static str, Step)>,
}

impl AllReduce {
    /// This project's own all-reduce, which runs in either mode.
    pub fn of_both_modes(name: &'static str) -> Self {
        let ways =
            vec![("one-shot", Step::AllReduce(Mode::OneShot)), ("two-shot", Step::AllReduce(Mode::TwoShot))];
        AllReduce { name, ways }
    }
}
