//! An operation's epilogue, as kernels take it.

use fused_collective_core::{
    fusion::Norm,
    launch::{Fp8Static, NvFp4, Plain, RmsNorm, Unquantized},
    quant::{Quantization, ScaleLayout},
};

use super::{
    kernels::Parameters,
    tensors::{Tensors, address},
};
use crate::error::Error;

/// The parameters of the epilogue of RMSNorm, if there is a `norm`, and `quantization`, on rows of `hidden` elements.
///
/// # Errors
/// There are no kernels for the quantization.
pub fn epilogue(
    norm: Option<Norm>,
    quantization: Quantization,
    hidden: u64,
    tensors: &Tensors,
) -> Result<Parameters, Error> {
    let mut parameters = Parameters::default();
    match norm {
        // SAFETY: the launch structs have no padding, which `core` asserts.
        None => unsafe { parameters.push(&Plain { quantizer: Unquantized }) },
        Some(norm) => {
            let head = RmsNorm {
                gamma: address(tensors.gamma),
                norm_out: address(tensors.norm_out),
                inverse_hidden: 1.0 / hidden as f32,
                epsilon: norm.epsilon,
                weight_bias: norm.weight_bias,
                reserved: 0,
                quantizer: Unquantized,
            };
            // SAFETY: as above.
            unsafe { parameters.push(&head) };
        }
    }
    // The quantizer is the last field of either.
    match quantization {
        Quantization::None => {}
        Quantization::Fp8Static => {
            let quantizer = Fp8Static { values: address(tensors.quant_out), scale: address(tensors.scale) };
            // SAFETY: as above.
            unsafe { parameters.push(&quantizer) };
        }
        Quantization::NvFp4 { layout } => {
            let quantizer = NvFp4 {
                values: address(tensors.quant_out),
                scales: address(tensors.scale_out),
                global_scale: address(tensors.scale),
                swizzled: u32::from(layout == ScaleLayout::Swizzled128x4),
                reserved: 0,
            };
            // SAFETY: as above.
            unsafe { parameters.push(&quantizer) };
        }
        _ => return Err(Error::Unsupported("this quantization")),
    }
    Ok(parameters)
}
