//! The calls that ranks of a group must agree on: the same calls, in the same order, with the same parameters.
//!
//! A rank publishes each [`Call`] as [words](Call::to_words) that its peers can read, with a [`Chain`]: a digest of
//! this call and of all calls before it. Ranks with equal chains after the same number of calls have made the same
//! calls all along. A comparison may therefore skip calls and still detect every difference.
//!
//! Properties that may differ between ranks are no part of a call: addresses, launch geometry, contents of tensors. A
//! scale is part of a call if the caller gives it as a number; a scale in a tensor is content.

use core::fmt;

use crate::{
    dtype::DType,
    fusion::{Experts, Mode, Norm, Operation, PartialSums, Residual, Rounding, WeightType},
    plan::Algorithm,
    quant::{GroupScale, Quantization, ScaleLayout},
    wire::WireFormat,
};

/// Number of words of a call.
pub const CALL_WORDS: usize = 7;

/// One call of a rank to its group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Call {
    /// A fused operation.
    Operation {
        /// The operation, with the mode of its plan.
        operation: Operation,
        /// The per-tensor or global scale, if the quantization reads one and the caller gives it as a number.
        scale: Option<f32>,
        /// A digest of the kernel, where it is the caller's own; 0 for this project's.
        kernel: u64,
    },
    /// A barrier.
    Barrier,
    /// A launch of operations that were captured earlier, as in a CUDA graph.
    Replay {
        /// The [chain](Chain::digest) of the captured calls.
        captured: u64,
        /// Number of captured calls.
        calls: u64,
    },
}

const OPERATION: u64 = 1;
const BARRIER: u64 = 2;
const REPLAY: u64 = 3;

/// First bits of the fields in the first word of an operation.
const DTYPE_SHIFT: u32 = 8;
const WIRE_SHIFT: u32 = 12;
const QUANTIZATION_SHIFT: u32 = 16;
const GROUP_SHIFT: u32 = 24;
const LAYOUT_SHIFT: u32 = 36;
const FLAGS_SHIFT: u32 = 40;
const TOP_K_SHIFT: u32 = 56;

/// The flags of an operation.
const RESIDUAL: u64 = 1;
const NORM: u64 = 2;
const KEEP_NORM: u64 = 4;
const F32_GAMMA: u64 = 8;
const SCALE: u64 = 16;
const TWO_SHOT: u64 = 32;
const SHARDED: u64 = 64;
const ROUNDS_SUM: u64 = 128;
const F32_SCALES: u64 = 256;
const BIAS: u64 = 512;
const POST_NORM: u64 = 1024;
const F32_POST_GAMMA: u64 = 2048;
const F32_EXPERT_SCALES: u64 = 4096;
const SHARED_EXPERT: u64 = 8192;
const ELEMENT_PARTIALS: u64 = 16384;
const ALL_FLAGS: u64 = 32767;

impl Call {
    /// The call of `operation` with a plan of `algorithm`. What nothing reads is dropped: `scale` if the quantization does
    /// not read it, the rounding of the sum without a residual, and the type of partial sums in a group of one host.
    pub fn operation(operation: &Operation, algorithm: Algorithm, scale: Option<f32>) -> Call {
        let mode = match algorithm {
            Algorithm::OneShot => Mode::OneShot,
            Algorithm::TwoShot
            | Algorithm::ShardedTwoShot
            | Algorithm::Hierarchical
            | Algorithm::ShardedHierarchical => Mode::TwoShot,
        };
        let partial_sums =
            if algorithm.spans_hosts() { operation.partial_sums } else { PartialSums::default() };
        let rounding = if operation.residual.is_some() { operation.rounding } else { Rounding::Once };
        let operation = Operation { mode, rounding, partial_sums, ..*operation };
        Call::Operation {
            operation,
            scale: scale.filter(|_| operation.quantization.reads_scale()),
            kernel: 0,
        }
    }

    /// The call of `operation`, which was planned as `algorithm`, with a kernel of the caller's that has this digest.
    pub fn custom(operation: &Operation, algorithm: Algorithm, kernel: u64) -> Call {
        match Call::operation(operation, algorithm, None) {
            Call::Operation { operation, scale, .. } => Call::Operation { operation, scale, kernel },
            call => call,
        }
    }

    /// Encodes the call. Different calls have different words.
    pub fn to_words(&self) -> [u64; CALL_WORDS] {
        match self {
            Call::Operation { operation, scale, kernel } => {
                let Operation {
                    dtype,
                    tokens,
                    hidden,
                    residual,
                    norm,
                    quantization,
                    keep_norm,
                    rounding,
                    bias,
                    post_norm,
                    experts,
                    wire,
                    partial_sums,
                    mode,
                } = *operation;
                let (kind, group) = quantization_code(quantization);
                let layout = quantization.scale_layout().map_or(0, ScaleLayout::code);
                let has_f32_scales =
                    matches!(quantization, Quantization::Fp8PerGroup { scales: GroupScale::F32, .. });
                let flags = flag(residual.is_some(), RESIDUAL)
                    | flag(residual == Residual::Sharded, SHARDED)
                    | flag(norm.is_some(), NORM)
                    | flag(keep_norm, KEEP_NORM)
                    | flag(norm.is_some_and(|norm| norm.gamma == WeightType::F32), F32_GAMMA)
                    | flag(post_norm.is_some(), POST_NORM)
                    | flag(post_norm.is_some_and(|norm| norm.gamma == WeightType::F32), F32_POST_GAMMA)
                    | flag(
                        experts.is_some_and(|experts| experts.scales == WeightType::F32),
                        F32_EXPERT_SCALES,
                    )
                    | flag(experts.is_some_and(|experts| experts.shared), SHARED_EXPERT)
                    | flag(has_f32_scales, F32_SCALES)
                    | flag(scale.is_some(), SCALE)
                    | flag(mode == Mode::TwoShot, TWO_SHOT)
                    | flag(bias, BIAS)
                    | flag(partial_sums == PartialSums::Element, ELEMENT_PARTIALS)
                    | flag(rounding == Rounding::AfterAllReduce, ROUNDS_SUM);
                let head = OPERATION
                    | dtype_code(dtype) << DTYPE_SHIFT
                    | u64::from(wire.map_or(0, WireFormat::bits)) << WIRE_SHIFT
                    | kind << QUANTIZATION_SHIFT
                    | u64::from(group & 0xfff) << GROUP_SHIFT
                    | u64::from(layout) << LAYOUT_SHIFT
                    | flags << FLAGS_SHIFT
                    | u64::from(experts.map_or(0, |experts| experts.top_k)) << TOP_K_SHIFT;
                let scale = u64::from(scale.map_or(0, f32::to_bits));
                [head, tokens, hidden, norm_numbers(norm), scale, *kernel, norm_numbers(post_norm)]
            }
            Call::Barrier => [BARRIER, 0, 0, 0, 0, 0, 0],
            Call::Replay { captured, calls } => [REPLAY, *captured, *calls, 0, 0, 0, 0],
        }
    }

    /// Decodes a call; `None` if the words, which may come from another process, are not those of a call.
    pub fn from_words(words: &[u64; CALL_WORDS]) -> Option<Call> {
        let &[head, tokens, hidden, numbers, scale, kernel, post_numbers] = words;
        let call = match head & 0xff {
            OPERATION => {
                let field = |shift: u32, bits: u32| head >> shift & ((1 << bits) - 1);
                let flags = field(FLAGS_SHIFT, TOP_K_SHIFT - FLAGS_SHIFT);
                let is = |flag| flags & flag != 0;
                let layout = *ScaleLayout::ALL.get(field(LAYOUT_SHIFT, 4) as usize)?;
                let scales = if is(F32_SCALES) { GroupScale::F32 } else { GroupScale::Ue8m0 };
                let weights = |flag| if is(flag) { WeightType::F32 } else { WeightType::Element };
                let norm = |numbers: u64, gamma| Norm {
                    epsilon: f32::from_bits(numbers as u32),
                    weight_bias: f32::from_bits((numbers >> 32) as u32),
                    gamma: weights(gamma),
                };
                let top_k = (head >> TOP_K_SHIFT) as u32;
                let experts =
                    Experts { top_k, scales: weights(F32_EXPERT_SCALES), shared: is(SHARED_EXPERT) };
                let operation = Operation {
                    dtype: *DType::ALL.iter().find(|dtype| dtype_code(**dtype) == field(DTYPE_SHIFT, 4))?,
                    tokens,
                    hidden,
                    residual: if is(SHARDED) {
                        Residual::Sharded
                    } else {
                        Residual::replicated(is(RESIDUAL))
                    },
                    norm: is(NORM).then(|| norm(numbers, F32_GAMMA)),
                    quantization: quantization(
                        field(QUANTIZATION_SHIFT, 8),
                        field(GROUP_SHIFT, 12) as u32,
                        scales,
                        layout,
                    )?,
                    keep_norm: is(KEEP_NORM),
                    rounding: if is(ROUNDS_SUM) { Rounding::AfterAllReduce } else { Rounding::Once },
                    bias: is(BIAS),
                    post_norm: is(POST_NORM).then(|| norm(post_numbers, F32_POST_GAMMA)),
                    experts: (top_k > 0).then_some(experts),
                    wire: match field(WIRE_SHIFT, 4) {
                        0 => None,
                        bits => Some(*WireFormat::ALL.iter().find(|wire| u64::from(wire.bits()) == bits)?),
                    },
                    partial_sums: if is(ELEMENT_PARTIALS) { PartialSums::Element } else { PartialSums::F32 },
                    mode: if is(TWO_SHOT) { Mode::TwoShot } else { Mode::OneShot },
                };
                if flags & !ALL_FLAGS != 0 {
                    return None;
                }
                Call::Operation {
                    operation,
                    scale: is(SCALE).then_some(f32::from_bits(scale as u32)),
                    kernel,
                }
            }
            BARRIER => Call::Barrier,
            REPLAY => Call::Replay { captured: tokens, calls: hidden },
            _ => return None,
        };
        // Words with bits that no field explains are not a call.
        (call.to_words() == *words).then_some(call)
    }
}

/// The numbers of a norm as a word; 0 without one.
fn norm_numbers(norm: Option<Norm>) -> u64 {
    let (epsilon, weight_bias) = norm.map_or((0.0, 0.0), |norm| (norm.epsilon, norm.weight_bias));
    u64::from(epsilon.to_bits()) | u64::from(weight_bias.to_bits()) << 32
}

fn flag(is: bool, flag: u64) -> u64 {
    if is { flag } else { 0 }
}

fn dtype_code(dtype: DType) -> u64 {
    match dtype {
        DType::F32 => 1,
        DType::F16 => 2,
        DType::Bf16 => 3,
    }
}

/// The number of a quantization, and its group size if that is a choice.
fn quantization_code(quantization: Quantization) -> (u64, u32) {
    match quantization {
        Quantization::None => (0, 0),
        Quantization::Fp8Static => (1, 0),
        Quantization::Fp8PerToken => (2, 0),
        Quantization::Fp8PerGroup { group, .. } => (3, group),
        Quantization::NvFp4 { .. } => (4, 0),
        Quantization::MxFp8 { .. } => (5, 0),
        Quantization::MxFp4 { .. } => (6, 0),
    }
}

fn quantization(code: u64, group: u32, scales: GroupScale, layout: ScaleLayout) -> Option<Quantization> {
    Some(match code {
        0 => Quantization::None,
        1 => Quantization::Fp8Static,
        2 => Quantization::Fp8PerToken,
        3 => Quantization::Fp8PerGroup { group, scales, layout },
        4 => Quantization::NvFp4 { layout },
        5 => Quantization::MxFp8 { layout },
        6 => Quantization::MxFp4 { layout },
        _ => return None,
    })
}

/// Describes a call for messages: `two-shot, 17 tokens of 4096 bfloat16, residual, norm (epsilon 1e-6), fp8`.
impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Call::Operation { operation, scale, kernel } => {
                let Operation {
                    dtype,
                    tokens,
                    hidden,
                    residual,
                    norm,
                    quantization,
                    keep_norm,
                    rounding,
                    bias,
                    post_norm,
                    experts,
                    wire,
                    partial_sums,
                    mode,
                } = operation;
                let mode = if *mode == Mode::TwoShot { "two-shot" } else { "one-shot" };
                write!(f, "{mode}, {tokens} tokens of {hidden} {dtype}")?;
                if let Some(wire) = wire {
                    write!(f, " sent as {wire}")?;
                }
                if *partial_sums == PartialSums::Element {
                    f.write_str(", partial sums in the element type")?;
                }
                if *kernel != 0 {
                    write!(f, ", kernel {kernel:016x}")?;
                }
                if let Some(Experts { top_k, scales, shared }) = experts {
                    write!(f, ", top {top_k} experts")?;
                    f.write_str(if *scales == WeightType::F32 { " with float32 scales" } else { "" })?;
                    f.write_str(if *shared { " and a shared one" } else { "" })?;
                }
                if *bias {
                    f.write_str(", bias")?;
                }
                if let Some(norm) = post_norm {
                    write_norm(f, "post-norm", norm)?;
                }
                match residual {
                    Residual::None => {}
                    Residual::Replicated => f.write_str(", residual")?,
                    Residual::Sharded => f.write_str(", sharded residual")?,
                }
                if *rounding == Rounding::AfterAllReduce {
                    f.write_str(", sum rounded")?;
                }
                if let Some(norm) = norm {
                    write_norm(f, "norm", norm)?;
                }
                match quantization {
                    Quantization::None => Ok(()),
                    Quantization::Fp8Static => f.write_str(", fp8"),
                    Quantization::Fp8PerToken => f.write_str(", fp8 per token"),
                    Quantization::Fp8PerGroup { group, scales, .. } => {
                        write!(f, ", fp8 per group of {group}")?;
                        if *scales == GroupScale::F32 { f.write_str(", float32") } else { Ok(()) }
                    }
                    Quantization::NvFp4 { .. } => f.write_str(", nvfp4"),
                    Quantization::MxFp8 { .. } => f.write_str(", mxfp8"),
                    Quantization::MxFp4 { .. } => f.write_str(", mxfp4"),
                }?;
                if let Some(layout) = quantization.scale_layout() {
                    write!(f, ", {layout} scales")?;
                }
                if let Some(scale) = scale {
                    write!(f, ", scale {scale:e}")?;
                }
                if *keep_norm { f.write_str(", norm kept") } else { Ok(()) }
            }
            Call::Barrier => f.write_str("a barrier"),
            // The digest distinguishes graphs with the same number of operations.
            Call::Replay { captured, calls } => {
                write!(f, "a replay of {calls} captured operations, digest {captured:016x}")
            }
        }
    }
}

fn write_norm(f: &mut fmt::Formatter<'_>, name: &str, norm: &Norm) -> fmt::Result {
    let Norm { epsilon, weight_bias, gamma } = norm;
    write!(f, ", {name} (epsilon {epsilon:e}")?;
    if *weight_bias != 0.0 {
        write!(f, ", weight bias {weight_bias}")?;
    }
    f.write_str(if *gamma == WeightType::F32 { ", float32 gamma)" } else { ")" })
}

/// A digest of a sequence of calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    digest: u64,
}

impl Chain {
    /// The chain of this sequence with `call` appended.
    #[must_use]
    pub fn then(self, call: &Call) -> Chain {
        Chain { digest: call.to_words().iter().fold(self.digest, |digest, word| mix(digest ^ word)) }
    }

    /// The digest. Two different sequences have equal digests with a probability of 2^-64.
    pub const fn digest(self) -> u64 {
        self.digest
    }
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): a bijection in which every output bit depends on every
/// input bit.
const fn mix(number: u64) -> u64 {
    let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}
