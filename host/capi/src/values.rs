//! The library's values of C's numbers: every enum of the ABI in one table.

use std::time::Duration;

use fused_collective::{
    core::{
        dtype::DType,
        fusion::{Experts, Mode, Norm, Operation, PartialSums, Residual, Rounding, WeightType},
        plan::Algorithm,
        quant::{GroupScale, Quantization, ScaleLayout},
        wire::WireFormat,
    },
    cuda::KernelSource,
    raw::{Device, Options, Tensor, TensorType, Tensors},
};

use crate::{
    arguments::text,
    failure::Failure,
    types::{
        FC_DEVICE_BY_RANK, fc_algorithm, fc_backend, fc_group_scale, fc_mode, fc_norm, fc_operation,
        fc_options, fc_partial_sums, fc_quantization, fc_residual, fc_rounding, fc_scale_layout, fc_tensor,
        fc_tensors, fc_type, fc_wire,
    },
};

/// A number of C's, its name in messages, and its value.
type Table<T> = &'static [(u32, &'static str, T)];

/// Rows of a [`Table`]: `fc_mode { Auto => Mode::Auto }`.
macro_rules! table {
    ($name:ident { $($variant:ident => $value:expr),* $(,)? }) => {
        &[$(($name::$variant as u32, stringify!($variant), $value)),*]
    };
}

const BACKENDS: Table<fc_backend> = table!(fc_backend { Cpu => fc_backend::Cpu, Cuda => fc_backend::Cuda });
const DTYPES: Table<DType> = table!(fc_type { F32 => DType::F32, F16 => DType::F16, Bf16 => DType::Bf16 });
const TENSORS: Table<Option<TensorType>> = table!(fc_type {
    None => None,
    F32 => Some(TensorType::Element(DType::F32)),
    F16 => Some(TensorType::Element(DType::F16)),
    Bf16 => Some(TensorType::Element(DType::Bf16)),
    Bytes => Some(TensorType::Code),
    I32 => Some(TensorType::Index),
});
const WEIGHTS: Table<Option<DType>> = table!(fc_type {
    None => None,
    F32 => Some(DType::F32),
    F16 => Some(DType::F16),
    Bf16 => Some(DType::Bf16),
});
const RESIDUALS: Table<Residual> = table!(fc_residual {
    None => Residual::None,
    Replicated => Residual::Replicated,
    Sharded => Residual::Sharded,
});
const NORMS: Table<bool> = table!(fc_norm { None => false, Rms => true });
const GROUP_SCALES: Table<GroupScale> =
    table!(fc_group_scale { Ue8m0 => GroupScale::Ue8m0, F32 => GroupScale::F32 });
const LAYOUTS: Table<ScaleLayout> = table!(fc_scale_layout {
    Linear => ScaleLayout::Linear,
    ColumnMajor => ScaleLayout::ColumnMajor,
    DeepGemm => ScaleLayout::DeepGemm,
    Swizzled128x4 => ScaleLayout::Swizzled128x4,
    Swizzled8x4 => ScaleLayout::Swizzled8x4,
});
const ROUNDINGS: Table<Rounding> =
    table!(fc_rounding { Once => Rounding::Once, AfterAllReduce => Rounding::AfterAllReduce });
const MODES: Table<Mode> =
    table!(fc_mode { Auto => Mode::Auto, OneShot => Mode::OneShot, TwoShot => Mode::TwoShot });
const PARTIAL_SUMS: Table<PartialSums> = table!(fc_partial_sums {
    F32 => PartialSums::F32,
    Element => PartialSums::Element,
});
const WIRES: Table<Option<WireFormat>> = table!(fc_wire {
    Exact => None,
    Int8 => Some(WireFormat::Int8),
    Int4 => Some(WireFormat::Int4),
});
const SWITCHES: Table<bool> = &[(0, "no", false), (1, "yes", true)];

/// Makes a quantization of its group's size, its groups' scales and its scales' layout.
type MakeQuantization = fn(u32, GroupScale, ScaleLayout) -> Quantization;
const QUANTIZATIONS: Table<MakeQuantization> = table!(fc_quantization {
    None => |_, _, _| Quantization::None,
    Fp8Static => |_, _, _| Quantization::Fp8Static,
    Fp8PerToken => |_, _, _| Quantization::Fp8PerToken,
    Fp8PerGroup => |group, scales, layout| Quantization::Fp8PerGroup { group, scales, layout },
    Nvfp4 => |_, _, layout| Quantization::NvFp4 { layout },
    Mxfp8 => |_, _, layout| Quantization::MxFp8 { layout },
    Mxfp4 => |_, _, layout| Quantization::MxFp4 { layout },
});

/// The value of `number`.
fn value<T: Copy>(field: &str, number: u32, table: Table<T>) -> Result<T, Failure> {
    table.iter().find(|(known, ..)| *known == number).map(|(.., value)| *value).ok_or_else(|| {
        let known: Vec<_> = table.iter().map(|(number, name, _)| format!("{number} ({name})")).collect();
        Failure::Argument(format!("{field} is {number}, which is not valid: use {}", known.join(", ")))
    })
}

/// The operation that C describes. Its sizes are not checked yet.
pub(crate) fn operation(given: &fc_operation) -> Result<Operation, Failure> {
    let dtype = value("dtype", given.dtype, DTYPES)?;
    let weights = |field: &str, given: u32| match value(field, given, WEIGHTS)? {
        None => Ok(WeightType::Element),
        Some(weights) if weights == dtype => Ok(WeightType::Element),
        Some(DType::F32) => Ok(WeightType::F32),
        Some(weights) => Err(Failure::Argument(format!(
            "{field} is {weights}, which is not valid: use {dtype} or float32"
        ))),
    };
    let norm = Norm {
        epsilon: given.epsilon,
        weight_bias: given.weight_bias,
        gamma: weights("gamma", given.gamma)?,
    };
    let post_norm = Norm {
        epsilon: given.post_epsilon,
        weight_bias: given.post_weight_bias,
        gamma: weights("post_gamma", given.post_gamma)?,
    };
    let experts = Experts {
        top_k: given.top_k,
        scales: weights("expert_scales", given.expert_scales)?,
        shared: value("shared_expert", given.shared_expert, SWITCHES)?,
    };
    let scales = value("group_scale", given.group_scale, GROUP_SCALES)?;
    let layout = value("scale_layout", given.scale_layout, LAYOUTS)?;
    let quantization = value("quantization", given.quantization, QUANTIZATIONS)?;
    Ok(Operation {
        dtype,
        tokens: given.tokens,
        hidden: given.hidden,
        residual: value("residual", given.residual, RESIDUALS)?,
        bias: value("bias", given.bias, SWITCHES)?,
        post_norm: value("post_norm", given.post_norm, NORMS)?.then_some(post_norm),
        experts: (given.top_k > 0).then_some(experts),
        wire: value("wire", given.wire, WIRES)?,
        partial_sums: value("partial_sums", given.partial_sums, PARTIAL_SUMS)?,
        norm: value("norm", given.norm, NORMS)?.then_some(norm),
        quantization: quantization(given.group, scales, layout),
        keep_norm: value("keep_norm", given.keep_norm, SWITCHES)?,
        rounding: value("rounding", given.rounding, ROUNDINGS)?,
        mode: value("mode", given.mode, MODES)?,
    })
}

/// The tensors at C's addresses.
pub(crate) fn tensors(given: &fc_tensors) -> Result<Tensors, Failure> {
    let tensor = |name: &str, given: &fc_tensor| {
        let element = value(&format!("the type of {name}"), given.r#type, TENSORS)?;
        if given.reserved != 0 {
            return Err(Failure::Argument(format!("reserved of {name} is {}: use 0", given.reserved)));
        }
        let address = given.data.expose_provenance() as u64;
        Ok(element.map(|element| Tensor { address, length: given.length, element }))
    };
    let needed = |name: &str, given: &fc_tensor| {
        let missing = || Failure::Argument(format!("{name} is missing: every operation has one"));
        tensor(name, given)?.ok_or_else(missing)
    };
    Ok(Tensors {
        input: tensor("input", &given.input)?,
        residual: tensor("residual", &given.residual)?,
        bias: tensor("bias", &given.bias)?,
        post_gamma: tensor("post_gamma", &given.post_gamma)?,
        expert_rows: tensor("expert_rows", &given.expert_rows)?,
        expert_index: tensor("expert_index", &given.expert_index)?,
        expert_scales: tensor("expert_scales", &given.expert_scales)?,
        gamma: tensor("gamma", &given.gamma)?,
        scale: tensor("scale", &given.scale)?,
        residual_out: needed("residual_out", &given.residual_out)?,
        norm_out: tensor("norm_out", &given.norm_out)?,
        quant_out: tensor("quant_out", &given.quant_out)?,
        scale_out: tensor("scale_out", &given.scale_out)?,
    })
}

/// The settings that C gives.
///
/// # Safety
/// `kernels` is null or a text.
pub(crate) unsafe fn options(given: &fc_options) -> Result<Options, Failure> {
    let device = match (value("backend", given.backend, BACKENDS)?, given.device) {
        (fc_backend::Cpu, _) => Device::Cpu,
        (fc_backend::Cuda, FC_DEVICE_BY_RANK) => Device::CudaByRank,
        (fc_backend::Cuda, device) => Device::Cuda(u32::try_from(device).map_err(|_| {
            Failure::Argument(format!(
                "device {device} is not valid: use the ordinal of a GPU, or FC_DEVICE_BY_RANK ({FC_DEVICE_BY_RANK})"
            ))
        })?),
    };
    if given.deadline_ms == 0 {
        return Err(Failure::Argument("deadline_ms is 0, which is not valid: use 1 or more".to_owned()));
    }
    // SAFETY: as this function's caller vouches for.
    let folder = unsafe { text(given.kernels, "kernels")? };
    Ok(Options {
        device,
        max_row_bytes: given.max_row_bytes,
        max_tokens: given.max_tokens,
        deadline: Duration::from_millis(given.deadline_ms),
        oversubscribe: value("oversubscribe", given.oversubscribe, SWITCHES)?,
        check_scales: value("check_scales", given.check_scales, SWITCHES)?,
        kernels: folder.map_or(KernelSource::Embedded, |folder| KernelSource::Folder(folder.into())),
    })
}

/// The number of an algorithm.
pub(crate) fn algorithm(algorithm: Algorithm) -> u32 {
    let number = match algorithm {
        Algorithm::OneShot => fc_algorithm::OneShot,
        Algorithm::TwoShot => fc_algorithm::TwoShot,
        Algorithm::ShardedTwoShot => fc_algorithm::ShardedTwoShot,
        Algorithm::Hierarchical => fc_algorithm::Hierarchical,
        Algorithm::ShardedHierarchical => fc_algorithm::ShardedHierarchical,
    };
    number as u32
}
