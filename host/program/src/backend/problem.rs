//! A configuration, and the roles of its tensors.

use fused_collective_core::{
    dtype::DType,
    fusion::{Mode, Norm, Operation, PartialSums, Residual, Rounding},
    quant::{Quantization, ScaleTensor},
};

use crate::pattern::Pattern;

/// One configuration: the operation to compute, by any steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Problem {
    /// Element type of activations and gamma.
    pub dtype: DType,
    /// Rows.
    pub tokens: u64,
    /// Elements of a row.
    pub hidden: u64,
    /// True if a residual is added.
    pub residual: bool,
    /// True if there is a sharded residual as well, with the same rows, for
    /// [sharded](super::steps::Fused::sharded) steps.
    pub sharded: bool,
    /// RMSNorm's parameters.
    pub norm: Norm,
    /// The steps before the residual is added.
    pub pattern: Pattern,
    /// The quantization of the norm.
    pub quantization: Quantization,
    /// The per-tensor or global scale, if the quantization reads one.
    pub scale: f32,
    /// The type in which sums cross between hosts.
    pub partial_sums: PartialSums,
}

impl Problem {
    /// The fused operation that solves the problem.
    pub fn operation(&self, mode: Mode) -> Operation {
        Operation {
            dtype: self.dtype,
            tokens: self.tokens,
            hidden: self.hidden,
            residual: Residual::replicated(self.residual),
            norm: Some(self.norm),
            quantization: self.quantization,
            keep_norm: false,
            rounding: Rounding::Once,
            bias: false,
            post_norm: self.pattern.post_norm(),
            experts: self.pattern.experts(),
            wire: None,
            partial_sums: self.partial_sums,
            mode,
        }
    }

    /// The scales of the quantized norm; `None` if it has none.
    pub fn scales(&self) -> Option<ScaleTensor> {
        self.quantization.scales(self.tokens, self.hidden)
    }

    /// The fused operation that solves the problem with a sharded residual.
    pub fn sharded_operation(&self) -> Operation {
        Operation { residual: Residual::Sharded, ..self.operation(Mode::TwoShot) }
    }

    /// The all-reduce alone.
    pub fn all_reduce(&self, mode: Mode) -> Operation {
        Operation {
            residual: Residual::None,
            norm: None,
            post_norm: None,
            experts: None,
            quantization: Quantization::None,
            ..self.operation(mode)
        }
    }

    /// The tensor that separate operations reduce.
    pub fn addend(&self) -> Tensor {
        if self.pattern.experts().is_some() { Tensor::Combined } else { Tensor::Input }
    }

    /// Experts of all tokens, and as many rows of experts; 0 without experts.
    pub fn chosen(&self) -> u64 {
        self.pattern.experts().map_or(0, |experts| self.tokens * u64::from(experts.top_k))
    }

    /// The tensor that the all-reduce of separate operations leaves its sum in.
    pub fn sum(&self) -> Tensor {
        if self.residual { Tensor::Reduced } else { Tensor::ResidualOut }
    }

    /// Bytes of one row of elements.
    pub fn row_bytes(&self) -> u64 {
        self.hidden * self.dtype.bytes()
    }

    /// Bytes of one activation. They must fit in 64 bits.
    pub fn activation_bytes(&self) -> u64 {
        self.tokens * self.row_bytes()
    }

    /// Bytes of `tensor`; 0 if the problem does not use it, `None` past 64 bits.
    pub fn bytes(&self, tensor: Tensor) -> Option<u64> {
        let elements = self.tokens.checked_mul(self.hidden)?;
        let activation = elements.checked_mul(self.dtype.bytes());
        let quantized = self.quantization != Quantization::None;
        match tensor {
            Tensor::Input | Tensor::Residual | Tensor::ResidualOut | Tensor::NormOut => activation,
            // Room for all rows, as the number of a rank's own rows depends on the rank.
            Tensor::ResidualShard | Tensor::ResidualShardOut if self.sharded => activation,
            Tensor::ResidualShard | Tensor::ResidualShardOut => Some(0),
            Tensor::Reduced if self.residual => activation,
            Tensor::Reduced => Some(0),
            Tensor::Combined if self.addend() == Tensor::Combined => activation,
            Tensor::Combined => Some(0),
            Tensor::Gamma => Some(self.row_bytes()),
            Tensor::PostGamma if self.pattern.post_norm().is_some() => Some(self.row_bytes()),
            Tensor::PostGamma => Some(0),
            Tensor::ExpertRows => self.chosen().checked_mul(self.row_bytes()),
            Tensor::ExpertIndex | Tensor::ExpertScales => self.chosen().checked_mul(4),
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

/// The role of a tensor. Activations are `[tokens, hidden]`, row-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tensor {
    /// This rank's addend, or the rows of a shared expert.
    Input,
    /// The residual, the same on every rank. In a problem without a residual it is full of NaN, which shows a read.
    Residual,
    /// This rank's rows of a sharded residual, with room for all rows.
    ResidualShard,
    /// RMSNorm's weight, `[hidden]`.
    Gamma,
    /// The weight of the norm of the sum, `[hidden]`.
    PostGamma,
    /// Rows of this rank's experts, one for each expert of each token.
    ExpertRows,
    /// The row of each expert of each token, or -1, in `i32`.
    ExpertIndex,
    /// The scale of each, in `f32`.
    ExpertScales,
    /// The addend that separate operations make of experts' rows.
    Combined,
    /// The all-reduced input, to which separate operations still add a residual.
    Reduced,
    /// The sum of inputs and residual.
    ResidualOut,
    /// This rank's rows of the sum with a sharded residual, with room for all rows.
    ResidualShardOut,
    /// The norm, unless an operation quantizes it without writing it.
    NormOut,
    /// The quantized norm.
    QuantOut,
    /// The scales of the quantized norm.
    ScaleOut,
    /// An `f32` activation between eager steps.
    WideA,
    /// Another `f32` activation.
    WideB,
    /// `[tokens]` `f32`: mean squares, then reciprocal root mean squares, between eager steps.
    PerToken,
}

impl Tensor {
    /// Every role.
    pub const ALL: [Tensor; 18] = [
        Tensor::Input,
        Tensor::Residual,
        Tensor::ResidualShard,
        Tensor::Gamma,
        Tensor::PostGamma,
        Tensor::ExpertRows,
        Tensor::ExpertIndex,
        Tensor::ExpertScales,
        Tensor::Combined,
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
