//! What one operation is: its shape, its types, what it fuses and what it writes.

use core::fmt;

use crate::{HIDDEN_MULTIPLE, MAX_HIDDEN, dtype::DType, plan::owned_tokens, quant::Quantization};

/// How ranks exchange their data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Whichever the [plan](crate::plan) holds to be faster.
    Auto,
    /// Every rank sends its whole input to every other rank: one hop, for few tokens.
    OneShot,
    /// Every token has an owner that sums it and sends the result to all: two hops, for many tokens.
    TwoShot,
}

/// The type of RMSNorm's weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GammaType {
    /// The operation's element type.
    Element,
    /// `f32`, whatever the element type is.
    F32,
}

/// RMSNorm's parameters: `x * rsqrt(mean(x^2) + epsilon) * (weight_bias + gamma)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// Added to the mean square; finite and not negative.
    pub epsilon: f32,
    /// Added to gamma: 0 in the usual form, 1 in Gemma's.
    pub weight_bias: f32,
    /// The type that gamma is stored in.
    pub gamma: GammaType,
}

impl Default for Norm {
    fn default() -> Self {
        Norm { epsilon: 1e-6, weight_bias: 0.0, gamma: GammaType::Element }
    }
}

/// Whether a residual is added, and which ranks hold it.
///
/// A *sharded* residual lies with the tokens' [owners](crate::plan::owner): token `t` of an operation is row
/// `t / ranks` of rank `t % ranks`, and no other rank reads or writes it. So each rank holds, reads and writes one row
/// of `ranks`, and what owners send to all is no longer the sum but what the operation makes of it: the norm, or its
/// quantization in half or a quarter of the bytes. The next operation takes `residual_out` as its residual, as it is.
///
/// Every rank still gets all rows of the norm or its quantization, with the same values as from a residual that is on
/// every rank; a zero of a norm or a code may be `+0` where it would be `-0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Residual {
    /// None is added.
    None,
    /// Every rank holds all of it, the same.
    Replicated,
    /// A token's owner holds its row.
    Sharded,
}

impl Residual {
    /// A replicated residual, or none.
    pub const fn replicated(is: bool) -> Self {
        if is { Residual::Replicated } else { Residual::None }
    }

    /// Whether there is one.
    pub const fn is_some(self) -> bool {
        !matches!(self, Residual::None)
    }
}

/// One fused operation, the same on every rank of the group.
///
/// | tensor | shape | present |
/// | --- | --- | --- |
/// | `input` | `[tokens, hidden]` elements | always; this rank's addend |
/// | `residual` | `[rows, hidden]` elements | if `residual` |
/// | `gamma` | `[hidden]` | if `norm` |
/// | `residual_out` | `[rows, hidden]` elements | always: the sum, plus the residual |
/// | `norm_out` | `[tokens, hidden]` elements | if `norm`, and `keep_norm` or no quantization |
/// | `quant_out`, `scale_out` | see [`Quantization`] | if `quantization` |
///
/// `rows` is `tokens`, or with a [sharded](Residual::Sharded) residual this rank's share of them:
/// [`residual_rows`](Operation::residual_rows).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Operation {
    /// Element type of all activations.
    pub dtype: DType,
    /// Rows; 0 is an operation that does nothing.
    pub tokens: u64,
    /// Elements of a row: a multiple of [`HIDDEN_MULTIPLE`], at most [`MAX_HIDDEN`].
    pub hidden: u64,
    /// Whether a residual is added, and which ranks hold it.
    pub residual: Residual,
    /// RMSNorm, or none: the all-reduce (and residual add) alone.
    pub norm: Option<Norm>,
    /// What the norm is quantized to.
    pub quantization: Quantization,
    /// Whether the unquantized norm is written beside the quantized one.
    pub keep_norm: bool,
    /// The collective to use.
    pub mode: Mode,
}

/// Why a description is not an operation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum OperationError {
    /// The hidden size is 0, not a multiple of 16, or too large.
    Hidden(u64),
    /// The hidden size is no multiple of the quantization's block.
    Block {
        /// The hidden size.
        hidden: u64,
        /// Elements that share one scale.
        block: u64,
    },
    /// No group of FP8 per-group quantization has this many elements.
    Group(u32),
    /// Epsilon is negative, infinite or NaN.
    Epsilon(f32),
    /// A quantization reads the norm, and there is none.
    QuantizationWithoutNorm,
    /// The residual is sharded, and the operation is none that this works for: why not.
    Sharded(&'static str),
    /// `tokens * hidden` elements are more bytes than 64 bits count.
    TooLarge {
        /// Rows.
        tokens: u64,
        /// Elements of a row.
        hidden: u64,
    },
}

impl fmt::Display for OperationError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            OperationError::Hidden(hidden) => write!(
                f,
                "hidden size {hidden} is not valid: use a multiple of {HIDDEN_MULTIPLE} from {HIDDEN_MULTIPLE} to {MAX_HIDDEN}"
            ),
            OperationError::Block { hidden, block } => {
                write!(
                    f,
                    "hidden size {hidden} does not divide into quantization blocks of {block}: use a multiple of {block}"
                )
            }
            OperationError::Group(group) => {
                write!(f, "groups of {group} elements are not supported: use 32, 64 or 128")
            }
            OperationError::Epsilon(epsilon) => {
                write!(f, "epsilon {epsilon} is not valid: use a finite number that is not negative")
            }
            OperationError::QuantizationWithoutNorm => f.write_str(
                "a quantization without a norm is not an operation: the norm is what is quantized",
            ),
            OperationError::Sharded(why) => write!(f, "a sharded residual {why}"),
            OperationError::TooLarge { tokens, hidden } => {
                write!(
                    f,
                    "{tokens} tokens of hidden size {hidden} are more bytes than 64 bits count: use fewer tokens"
                )
            }
        }
    }
}

impl core::error::Error for OperationError {}

impl Operation {
    /// Checks everything that can be checked without a group.
    pub fn validate(&self) -> Result<(), OperationError> {
        let hidden = self.hidden;
        if hidden == 0 || !hidden.is_multiple_of(HIDDEN_MULTIPLE) || hidden > MAX_HIDDEN {
            return Err(OperationError::Hidden(hidden));
        }
        if let Some(norm) = self.norm {
            if !(norm.epsilon.is_finite() && norm.epsilon >= 0.0) {
                return Err(OperationError::Epsilon(norm.epsilon));
            }
        } else if self.quantization != Quantization::None {
            return Err(OperationError::QuantizationWithoutNorm);
        }
        if let Quantization::Fp8PerGroup { group, .. } = self.quantization
            && !matches!(group, 32 | 64 | 128)
        {
            return Err(OperationError::Group(group));
        }
        if let Some(block) = self.quantization.block()
            && !hidden.is_multiple_of(block)
        {
            return Err(OperationError::Block { hidden, block });
        }
        if self.residual == Residual::Sharded {
            self.validate_sharded().map_err(OperationError::Sharded)?;
        }
        // Eight bytes an element leave room for every sum of sizes that a plan or a workspace makes for a rank.
        let too_large = OperationError::TooLarge { tokens: self.tokens, hidden };
        self.tokens.checked_mul(hidden * 8).ok_or(too_large)?;
        Ok(())
    }

    fn validate_sharded(&self) -> Result<(), &'static str> {
        if self.norm.is_none() {
            return Err("needs a norm: it is what all ranks get");
        }
        if self.mode == Mode::OneShot {
            return Err("is added by tokens' owners, which one-shot has none of: use two-shot");
        }
        let sent = matches!(
            self.quantization,
            Quantization::None | Quantization::Fp8Static | Quantization::NvFp4 { .. }
        );
        if !sent {
            return Err("goes with no quantization, static FP8 or NVFP4");
        }
        if self.keep_norm && self.quantization != Quantization::None {
            return Err("leaves no unquantized norm beside the quantized one: the ranks get one of them");
        }
        Ok(())
    }

    /// Rows of the residual and of `residual_out` on rank `rank` of `world_size`.
    pub const fn residual_rows(&self, rank: u32, world_size: u32) -> u64 {
        match self.residual {
            Residual::Sharded => owned_tokens(self.tokens, rank, world_size),
            Residual::None | Residual::Replicated => self.tokens,
        }
    }

    /// Bytes of one row of elements.
    pub const fn row_bytes(&self) -> u64 {
        self.hidden * self.dtype.bytes()
    }

    /// Bytes of one activation: `tokens` rows. The operation must be [valid](Self::validate).
    pub const fn activation_bytes(&self) -> u64 {
        self.tokens * self.row_bytes()
    }

    /// Whether `norm_out` is written.
    pub fn writes_norm(&self) -> bool {
        self.norm.is_some() && (self.keep_norm || self.quantization == Quantization::None)
    }
}
