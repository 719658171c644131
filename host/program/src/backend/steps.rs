//! The steps of variants, the same on every backend.

use fused_collective_core::fusion::Mode;

/// One operation that a framework would launch. *Sum* is `Reduced`, or `ResidualOut` if there is no residual.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The whole operation: `Input`, `Residual` and `Gamma` to `ResidualOut` and `NormOut`, or to `ResidualOut`, `QuantOut` and
    /// `ScaleOut`.
    Fused(Mode),
    /// The whole operation with a sharded residual: `ResidualShard` and `ResidualShardOut` in place of `Residual` and
    /// `ResidualOut`.
    FusedSharded,
    /// `Input` to sum, by this project's own all-reduce.
    AllReduce(Mode),
    /// `Input` to sum, by NCCL's.
    NcclAllReduce,
    /// `Input` to sum, by NCCL's, both in a symmetric window. The steps after it find the sum there.
    NcclSymmetricAllReduce,
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
