//! The description of one fused operation: shape, types, fused steps, outputs.
//!
//! An operation adds up the inputs of all ranks and adds a residual. It may normalize the sum (RMSNorm) and quantize
//! the norm. An input may be made of rows of experts, and the sum may have a norm of its own before the residual is
//! added. An [`Operation`] names these parts and no memory, backend or group. [`Operation::validate`] holds all rules
//! that need no group; a [`Plan`](crate::plan::Plan) applies the limits of one.

use core::fmt;

use crate::{
    HIDDEN_MULTIPLE, MAX_HIDDEN,
    dtype::DType,
    quant::{Quantization, ScaleLayout},
    tokens::owned_tokens,
    wire::WireFormat,
};

/// The collective by which ranks exchange data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// One-shot or two-shot, as the [plan](crate::plan) expects to be faster.
    Auto,
    /// Every rank sends its input to every other rank and sums all inputs: one hop, for few tokens.
    OneShot,
    /// Every token has an owner, which sums the token and sends the result to all ranks: two hops, for many tokens.
    TwoShot,
}

/// The type of weights: RMSNorm's, or the scales of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightType {
    /// The operation's element type.
    Element,
    /// `f32`, for every element type.
    F32,
}

impl WeightType {
    /// The type of weights in an operation on elements of type `element`.
    pub const fn dtype(self, element: DType) -> DType {
        match self {
            WeightType::Element => element,
            WeightType::F32 => DType::F32,
        }
    }

    /// True if such weights are wider than elements of type `element`.
    pub fn is_wider(self, element: DType) -> bool {
        self.dtype(element) != element
    }
}

/// The parameters of RMSNorm: `x * rsqrt(mean(x^2) + epsilon) * (weight_bias + gamma)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// Addend of the mean square; finite and not negative.
    pub epsilon: f32,
    /// Addend of gamma, finite: 0 in the usual form, 1 in Gemma's.
    pub weight_bias: f32,
    /// The type of gamma in memory.
    pub gamma: WeightType,
}

/// The largest [`Experts::top_k`].
pub const MAX_TOP_K: u32 = 64;

/// The last step of a mixture of experts: each rank combines rows of its own experts to its addend.
///
/// The addend of a token is `round(0 + scale_0 * row_0 + ... + shared)`, in `f32`, in the order of the token's experts.
/// Each product and its addition are one fused multiply-add. `row_k` is the row of `expert_rows` that `expert_index` names,
/// and `shared` the row of `input`. An index less than 0 names no row: that expert is on another rank, and left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Experts {
    /// Experts of a token: 1 to [`MAX_TOP_K`].
    pub top_k: u32,
    /// The type of the scales in memory.
    pub scales: WeightType,
    /// True to add the row of `input`, the output of a shared expert.
    pub shared: bool,
}

impl Default for Norm {
    fn default() -> Self {
        Norm { epsilon: 1e-6, weight_bias: 0.0, gamma: WeightType::Element }
    }
}

/// Presence and distribution of the residual.
///
/// A *sharded* residual lies with the [owners](crate::plan::owner) of the tokens, as between the reduce-scatter and the
/// all-gather of sequence parallelism. Token `t` of an operation is row `t / world_size` of rank `t % world_size`, and
/// no other rank reads or writes this row. Each rank thus stores, reads and writes one row in `world_size`. In the
/// second hop an owner sends the norm, or its quantization in half or a quarter of the bytes, in place of the sum. The
/// next operation takes `residual_out` as its residual without a copy.
///
/// Every rank still gets all rows of the norm or its quantization, with the bits that a replicated residual gives.
///
/// In a group of several hosts each host holds all rows, and `world_size` is the ranks of a host: token `t` is row
/// `t / world_size` of the rank with place `t % world_size` on each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Residual {
    /// No residual is added.
    None,
    /// Every rank holds the same whole residual.
    Replicated,
    /// The owner of a token holds the row of the token.
    Sharded,
}

impl Residual {
    /// A replicated residual if `present`, else none.
    pub const fn replicated(present: bool) -> Self {
        if present { Residual::Replicated } else { Residual::None }
    }

    /// True if a residual is added.
    pub const fn is_some(self) -> bool {
        !matches!(self, Residual::None)
    }
}

/// Roundings of the sum to the element type.
///
/// An all-reduce that is an operation of its own stores its sum in the element type, and the residual is added to that.
/// The fused operation need not. The two differ in the last bit of about a fifth of all bf16 elements between 2 ranks, and
/// of a quarter between 4. A model that was tuned or compared with separate operations may want their bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// Once, after the residual was added: the more exact result.
    #[default]
    Once,
    /// Twice, after the all-reduce and after the residual was added: the bits of separate operations. Without a residual,
    /// this is `Once`.
    ///
    /// A sum with a norm of its own is rounded in any case. Then this rounds that norm before the residual is added.
    AfterAllReduce,
}

/// The type in which the sum of a host's ranks crosses to other hosts.
///
/// Each host sums its own ranks in `f32`. The hosts' sums are then added, in `f32` too. In the element type a partial sum of
/// 16 bits is half the bytes, and the result has one more rounding for each host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PartialSums {
    /// `f32`, for every element type: the more exact result.
    #[default]
    F32,
    /// The operation's element type, rounded once.
    Element,
}

impl PartialSums {
    /// The type of partial sums in an operation on elements of type `element`.
    pub const fn dtype(self, element: DType) -> DType {
        match self {
            PartialSums::F32 => DType::F32,
            PartialSums::Element => element,
        }
    }
}

/// One fused operation, the same on every rank of the group.
///
/// | tensor | shape | present |
/// | --- | --- | --- |
/// | `input` | `[tokens, hidden]` elements | the addend of this rank; with `experts` the shared expert's, if `shared` |
/// | `expert_rows` | `[expert rows, hidden]` elements | if `experts`: any number of rows |
/// | `expert_index` | `[tokens, top_k]` `i32` | if `experts`: a row of `expert_rows`, or less than 0 |
/// | `expert_scales` | `[tokens, top_k]` elements or `f32` | if `experts` |
/// | `residual` | `[rows, hidden]` elements | if `residual` |
/// | `bias` | `[hidden]` elements | if `bias` |
/// | `post_gamma` | `[hidden]` elements or `f32` | if `post_norm` |
/// | `gamma` | `[hidden]` elements or `f32` | if `norm` |
/// | `residual_out` | `[rows, hidden]` elements | always: the sum, plus the bias and the residual |
/// | `norm_out` | `[tokens, hidden]` elements | if `norm`, and `keep_norm` or no quantization |
/// | `quant_out`, `scale_out` | see [`Quantization`] | if `quantization` |
///
/// `rows` is `tokens`, or with a [sharded](Residual::Sharded) residual the number of tokens that this rank owns:
/// [`residual_rows`](Operation::residual_rows).
///
/// ```
/// use fused_collective_core::{
///     dtype::DType,
///     fusion::{Mode, Norm, Operation, OperationError, PartialSums, Residual, Rounding},
///     quant::{Quantization, ScaleLayout},
/// };
///
/// let operation = Operation {
///     dtype: DType::Bf16,
///     tokens: 16,
///     hidden: 4096,
///     residual: Residual::Replicated,
///     norm: Some(Norm::default()),
///     quantization: Quantization::NvFp4 { layout: ScaleLayout::Swizzled128x4 },
///     keep_norm: false,
///     rounding: Rounding::Once,
///     bias: false,
///     post_norm: None,
///     experts: None,
///     wire: None,
///     partial_sums: PartialSums::F32,
///     mode: Mode::Auto,
/// };
/// assert_eq!(operation.validate(), Ok(()));
/// assert_eq!(operation.activation_bytes(), 16 * 4096 * 2);
/// let too_narrow = Operation { hidden: 100, ..operation };
/// assert_eq!(too_narrow.validate(), Err(OperationError::Hidden(100)));
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Operation {
    /// Element type of all activations.
    pub dtype: DType,
    /// Number of rows; an operation of 0 tokens does nothing.
    pub tokens: u64,
    /// Elements of a row: a multiple of [`HIDDEN_MULTIPLE`], at most [`MAX_HIDDEN`].
    pub hidden: u64,
    /// Presence and distribution of the residual.
    pub residual: Residual,
    /// RMSNorm; `None` for an all-reduce (and residual add) alone.
    pub norm: Option<Norm>,
    /// Quantization of the norm.
    pub quantization: Quantization,
    /// True to write the norm beside its quantization.
    pub keep_norm: bool,
    /// Roundings of the sum.
    pub rounding: Rounding,
    /// True to add a bias to the sum of all ranks, before it is rounded and the residual is added: a linear layer's, which
    /// every rank has whole.
    pub bias: bool,
    /// RMSNorm of the sum, before the residual is added, as in Gemma 2 and 3. It needs `norm`.
    pub post_norm: Option<Norm>,
    /// The last step of a mixture of experts, which makes this rank's addend.
    pub experts: Option<Experts>,
    /// The format in which addends and sums cross the links; `None` for the element type, which loses nothing. All ranks
    /// still have the same bits, since a rank's own addend goes through the format too. One-shot and two-shot differ: in
    /// two-shot, unless the residual is sharded, the sum goes through the format as well. Neither the residual nor a norm
    /// does.
    pub wire: Option<WireFormat>,
    /// The type of the sums that cross between hosts. Nothing reads it in a group of one host.
    pub partial_sums: PartialSums,
    /// The collective.
    pub mode: Mode,
}

/// A rule that a description of an operation breaks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum OperationError {
    /// The hidden size is 0, no multiple of [`HIDDEN_MULTIPLE`], or above [`MAX_HIDDEN`].
    Hidden(u64),
    /// The hidden size is not a whole number of quantization blocks.
    Block {
        /// The hidden size.
        hidden: u64,
        /// Elements of a block, which share a scale.
        block: u64,
    },
    /// Per-group FP8 has no groups of this many elements.
    Group(u32),
    /// The layout is for scales of one byte, and these are `f32`.
    Layout(ScaleLayout),
    /// Epsilon is negative, infinite or NaN.
    Epsilon(f32),
    /// The weight bias is infinite or NaN.
    WeightBias(f32),
    /// A quantization without a norm to quantize.
    QuantizationWithoutNorm,
    /// A norm of the sum without a norm after it.
    PostNormWithoutNorm,
    /// A token has no experts, or more than [`MAX_TOP_K`].
    TopK(u32),
    /// The residual is sharded, which this operation does not allow; the text completes "a sharded residual ...".
    Sharded(&'static str),
    /// The tensors of the operation may be more bytes than 64 bits count.
    TooLarge {
        /// Number of rows.
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
            OperationError::Layout(layout) => {
                write!(f, "scales of float32 have no {layout} layout: use linear, column-major or DeepGEMM")
            }
            OperationError::Epsilon(epsilon) => {
                write!(f, "epsilon {epsilon} is not valid: use a finite number that is not negative")
            }
            OperationError::WeightBias(bias) => {
                write!(f, "weight bias {bias} is not valid: use a finite number")
            }
            OperationError::QuantizationWithoutNorm => f.write_str(
                "a quantization needs a norm to quantize: add a norm or leave out the quantization",
            ),
            OperationError::PostNormWithoutNorm => f.write_str(
                "a post-norm needs a norm after it: add a norm, or without a residual give the post-norm as the norm",
            ),
            OperationError::TopK(top_k) => {
                write!(f, "{top_k} experts for each token are not supported: use 1 to {MAX_TOP_K}")
            }
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
    /// Checks all rules that need no group.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn validate(&self) -> Result<(), OperationError> {
        let hidden = self.hidden;
        if hidden == 0 || !hidden.is_multiple_of(HIDDEN_MULTIPLE) || hidden > MAX_HIDDEN {
            return Err(OperationError::Hidden(hidden));
        }
        for norm in [self.norm, self.post_norm].into_iter().flatten() {
            if !(norm.epsilon.is_finite() && norm.epsilon >= 0.0) {
                return Err(OperationError::Epsilon(norm.epsilon));
            }
            if !norm.weight_bias.is_finite() {
                return Err(OperationError::WeightBias(norm.weight_bias));
            }
        }
        if self.norm.is_none() && self.quantization != Quantization::None {
            return Err(OperationError::QuantizationWithoutNorm);
        }
        if self.norm.is_none() && self.post_norm.is_some() {
            return Err(OperationError::PostNormWithoutNorm);
        }
        let top_k = self.experts.map(|experts| experts.top_k);
        if let Some(top_k) = top_k.filter(|top_k| !(1..=MAX_TOP_K).contains(top_k)) {
            return Err(OperationError::TopK(top_k));
        }
        if let Quantization::Fp8PerGroup { group, layout, .. } = self.quantization {
            if !self.quantization.has_group() {
                return Err(OperationError::Group(group));
            }
            if !self.quantization.has_layout() {
                return Err(OperationError::Layout(layout));
            }
        }
        if let Some(block) = self.quantization.block()
            && !hidden.is_multiple_of(block)
        {
            return Err(OperationError::Block { hidden, block });
        }
        if self.residual == Residual::Sharded {
            self.validate_sharded().map_err(OperationError::Sharded)?;
        }
        // Eight bytes an element leave room for every sum of sizes that a plan or a workspace computes for a rank.
        let too_large = OperationError::TooLarge { tokens: self.tokens, hidden };
        let row_bytes = hidden.max(u64::from(top_k.unwrap_or(0))) * 8;
        self.tokens.checked_mul(row_bytes).ok_or(too_large)?;
        Ok(())
    }

    fn validate_sharded(&self) -> Result<(), &'static str> {
        if self.norm.is_none() {
            return Err("needs a norm, which is the result that all ranks get");
        }
        if self.mode == Mode::OneShot {
            return Err("needs owners of tokens, which one-shot does not have: use two-shot");
        }
        if self.keep_norm && self.quantization != Quantization::None {
            return Err("leaves the norm or its quantization on all ranks, not both: do not keep the norm");
        }
        Ok(())
    }

    /// True if `input` is read.
    pub fn reads_input(&self) -> bool {
        self.experts.is_none_or(|experts| experts.shared)
    }

    /// Number of rows of the residual and of `residual_out` on rank `rank` of `world_size`. In a group of several hosts,
    /// these are the rank's place on its host and the ranks of a host.
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

    /// Bytes of a row as it crosses the links, in the first hop and in the second.
    pub const fn sent_bytes(&self) -> [u64; 2] {
        let addend = match self.wire {
            Some(format) => format.row_bytes(self.hidden),
            None => self.row_bytes(),
        };
        [addend, if matches!(self.residual, Residual::Sharded) { self.row_bytes() } else { addend }]
    }

    /// Bytes of a row of partial sums, as it crosses between hosts.
    pub const fn partial_row_bytes(&self) -> u64 {
        self.hidden * self.partial_sums.dtype(self.dtype).bytes()
    }

    /// Bytes of one activation, `[tokens, hidden]`. The operation must be [valid](Self::validate).
    pub const fn activation_bytes(&self) -> u64 {
        self.tokens * self.row_bytes()
    }

    /// True if `norm_out` is written.
    pub fn writes_norm(&self) -> bool {
        self.norm.is_some() && (self.keep_norm || self.quantization == Quantization::None)
    }
}
