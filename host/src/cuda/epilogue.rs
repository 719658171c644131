//! From an operation to its epilogue's kernel name and parameters.

use fused_collective_core::{
    fusion::Norm,
    launch::{Fp8Static, NvFp4, Plain, RmsNorm, Unquantized},
    quant::{Quantization, ScaleLayout},
};

use super::{
    Error,
    tensors::{Tensors, address},
};

/// The epilogue's part of kernel names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// In kernels with a collective.
    pub(crate) fused: &'static str,
    /// In kernels without.
    pub(crate) local: &'static str,
}

/// What is done with an epilogue's parameters, whose type depends on the operation.
pub(crate) trait WithEpilogue {
    /// Does it.
    fn call<X: Copy>(self, part: Part, epilogue: X) -> Result<(), Error>;
}

/// Calls `with` with the epilogue of RMSNorm, if there is a `norm`, and `quantization`, on rows of `hidden` elements.
///
/// # Errors
/// There are no kernels for the quantization, or `with`'s.
pub(crate) fn with_epilogue(
    norm: Option<Norm>,
    quantization: Quantization,
    hidden: u64,
    tensors: &Tensors,
    with: impl WithEpilogue,
) -> Result<(), Error> {
    match quantization {
        Quantization::None => {
            let part = if norm.is_some() { "norm" } else { "none" };
            finish(norm, hidden, tensors, Part { fused: part, local: part }, Unquantized, with)
        }
        Quantization::Fp8Static => {
            let part = Part { fused: "fp8", local: if norm.is_some() { "norm_fp8" } else { "fp8" } };
            let quantizer = Fp8Static { values: address(tensors.quant_out), scale: address(tensors.scale) };
            finish(norm, hidden, tensors, part, quantizer, with)
        }
        Quantization::NvFp4 { layout } => {
            let part = Part { fused: "nvfp4", local: if norm.is_some() { "norm_nvfp4" } else { "nvfp4" } };
            let quantizer = NvFp4 {
                values: address(tensors.quant_out),
                scales: address(tensors.scale_out),
                global_scale: address(tensors.scale),
                swizzled: u32::from(layout == ScaleLayout::Swizzled128x4),
                reserved: 0,
            };
            finish(norm, hidden, tensors, part, quantizer, with)
        }
        _ => Err(Error::Unsupported("this quantization")),
    }
}

fn finish<Q: Copy>(
    norm: Option<Norm>,
    hidden: u64,
    tensors: &Tensors,
    part: Part,
    quantizer: Q,
    with: impl WithEpilogue,
) -> Result<(), Error> {
    match norm {
        None => with.call(part, Plain { quantizer }),
        Some(norm) => with.call(
            part,
            RmsNorm {
                gamma: address(tensors.gamma),
                norm_out: address(tensors.norm_out),
                inverse_hidden: 1.0 / hidden as f32,
                epsilon: norm.epsilon,
                weight_bias: norm.weight_bias,
                reserved: 0,
                quantizer,
            },
        ),
    }
}
