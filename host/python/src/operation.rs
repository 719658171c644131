//! The description of an operation, by Python's names.

use fused_collective::core::{
    dtype::DType,
    fusion::{self, Experts, Mode, Norm, PartialSums, Residual, Rounding, WeightType},
    quant::{GroupScale, Quantization, ScaleLayout},
    wire::WireFormat,
};
use pyo3::prelude::*;

use crate::failure::invalid;

/// Python's names of values.
type Names<T> = &'static [(&'static str, T)];

const DTYPES: Names<DType> = &[("float32", DType::F32), ("float16", DType::F16), ("bfloat16", DType::Bf16)];
const RESIDUALS: Names<Residual> =
    &[("none", Residual::None), ("replicated", Residual::Replicated), ("sharded", Residual::Sharded)];
const ROUNDINGS: Names<Rounding> =
    &[("once", Rounding::Once), ("after_all_reduce", Rounding::AfterAllReduce)];
const MODES: Names<Mode> = &[("auto", Mode::Auto), ("one_shot", Mode::OneShot), ("two_shot", Mode::TwoShot)];
const WIRES: Names<WireFormat> = &[("int8", WireFormat::Int8), ("int4", WireFormat::Int4)];
const PARTIAL_SUMS: Names<PartialSums> = &[("float32", PartialSums::F32), ("element", PartialSums::Element)];
const LAYOUTS: Names<ScaleLayout> = &[
    ("linear", ScaleLayout::Linear),
    ("column_major", ScaleLayout::ColumnMajor),
    ("deep_gemm", ScaleLayout::DeepGemm),
    ("swizzled_128x4", ScaleLayout::Swizzled128x4),
    ("swizzled_8x4", ScaleLayout::Swizzled8x4),
];
const GROUP_SCALES: Names<GroupScale> = &[("ue8m0", GroupScale::Ue8m0), ("float32", GroupScale::F32)];

/// Makes a quantization of its group's size, its groups' scales and its scales' layout.
type MakeQuantization = fn(u32, GroupScale, ScaleLayout) -> Quantization;
const QUANTIZATIONS: Names<MakeQuantization> = &[
    ("none", |_, _, _| Quantization::None),
    ("fp8", |_, _, _| Quantization::Fp8Static),
    ("fp8_per_token", |_, _, _| Quantization::Fp8PerToken),
    ("fp8_per_group", |group, scales, layout| Quantization::Fp8PerGroup { group, scales, layout }),
    ("nvfp4", |_, _, layout| Quantization::NvFp4 { layout }),
    ("mxfp8", |_, _, layout| Quantization::MxFp8 { layout }),
    ("mxfp4", |_, _, layout| Quantization::MxFp4 { layout }),
];

fn value<T: Copy>(py: Python<'_>, what: &str, name: &str, names: Names<T>) -> PyResult<T> {
    names.iter().find(|(known, _)| *known == name).map(|(_, value)| *value).ok_or_else(|| {
        let known: Vec<_> = names.iter().map(|(known, _)| *known).collect();
        invalid(py, &format!("{what} {name:?} is not valid: use {}", known.join(", ")))
    })
}

/// One fused operation, without its tensors. It is checked when it is made.
#[pyclass(frozen, module = "fused_collective._native")]
pub(crate) struct Operation {
    pub(crate) operation: fusion::Operation,
}

#[pymethods]
impl Operation {
    #[new]
    #[pyo3(signature = (
        dtype, tokens, hidden, *, residual = "none", bias = false, norm = false, epsilon = 1e-6, weight_bias = 0.0, gamma = None,
        post_norm = false, post_epsilon = 1e-6, post_weight_bias = 0.0, post_gamma = None,
        top_k = 0, expert_scales = None, shared_expert = false,
        quantization = "none", layout = "linear", group = 128, group_scale = "ue8m0", keep_norm = false,
        rounding = "once", mode = "auto", wire = None, partial_sums = "float32"
    ))]
    #[expect(clippy::too_many_arguments, reason = "keywords of Python's, one for each field")]
    fn new(
        py: Python<'_>,
        dtype: &str,
        tokens: u64,
        hidden: u64,
        residual: &str,
        bias: bool,
        norm: bool,
        epsilon: f32,
        weight_bias: f32,
        gamma: Option<&str>,
        post_norm: bool,
        post_epsilon: f32,
        post_weight_bias: f32,
        post_gamma: Option<&str>,
        top_k: u32,
        expert_scales: Option<&str>,
        shared_expert: bool,
        quantization: &str,
        layout: &str,
        group: u32,
        group_scale: &str,
        keep_norm: bool,
        rounding: &str,
        mode: &str,
        wire: Option<&str>,
        partial_sums: &str,
    ) -> PyResult<Operation> {
        let dtype = value(py, "dtype", dtype, DTYPES)?;
        let weights = |given: Option<&str>| match given {
            Some(name) if value(py, "the weight's dtype", name, DTYPES)? != dtype => {
                if name != "float32" {
                    let text = format!("a weight of {name} is not valid here: use {dtype} or float32");
                    return Err(invalid(py, &text));
                }
                Ok(WeightType::F32)
            }
            _ => Ok(WeightType::Element),
        };
        let post_gamma = weights(post_gamma)?;
        let post_norm = post_norm.then_some(Norm {
            epsilon: post_epsilon,
            weight_bias: post_weight_bias,
            gamma: post_gamma,
        });
        let experts = Experts { top_k, scales: weights(expert_scales)?, shared: shared_expert };
        let make = value(py, "quantization", quantization, QUANTIZATIONS)?;
        let scales = value(py, "scales of groups", group_scale, GROUP_SCALES)?;
        let operation = fusion::Operation {
            dtype,
            tokens,
            hidden,
            residual: value(py, "residual", residual, RESIDUALS)?,
            bias,
            post_norm,
            experts: expert_scales.is_some().then_some(experts),
            norm: norm.then_some(Norm { epsilon, weight_bias, gamma: weights(gamma)? }),
            quantization: make(group, scales, value(py, "layout", layout, LAYOUTS)?),
            keep_norm,
            rounding: value(py, "rounding", rounding, ROUNDINGS)?,
            wire: wire.map(|wire| value(py, "wire", wire, WIRES)).transpose()?,
            partial_sums: value(py, "the type of partial sums", partial_sums, PARTIAL_SUMS)?,
            mode: value(py, "mode", mode, MODES)?,
        };
        operation.validate().map_err(|error| invalid(py, &error.to_string()))?;
        Ok(Operation { operation })
    }

    /// True if `norm_out` is written.
    #[getter]
    fn writes_norm(&self) -> bool {
        self.operation.writes_norm()
    }

    /// True if the caller gives a scale.
    #[getter]
    fn reads_scale(&self) -> bool {
        self.operation.quantization.reads_scale()
    }

    /// Bytes of a token's codes.
    #[getter]
    fn quant_row_bytes(&self) -> u64 {
        self.operation.quantization.value_bytes_per_row(self.operation.hidden)
    }

    /// Bytes of all scales, padding included.
    #[getter]
    fn scale_bytes(&self) -> u64 {
        let fusion::Operation { quantization, tokens, hidden, .. } = self.operation;
        quantization.scale_bytes(tokens, hidden).unwrap_or(u64::MAX)
    }

    fn __repr__(&self) -> String {
        format!("{:?}", self.operation)
    }
}
