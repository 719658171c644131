//! From an operation to its epilogue's kernel name and parameters.

use fused_collective_core::{
    fusion::Norm,
    kernels::Epilogue,
    launch::{Fp8Static, NvFp4, Plain, RmsNorm, Unquantized},
    quant::{Quantization, ScaleLayout},
};

use super::{
    Error,
    tensors::{Tensors, address},
};

/// What is done with an epilogue's parameters, whose type depends on the operation.
pub(crate) trait WithEpilogue {
    /// Does it.
    fn call<X: Copy>(self, epilogue: Epilogue, parameters: X) -> Result<(), Error>;
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
    const NO_KERNEL: Error = Error::Unsupported("this quantization");
    let epilogue = Epilogue::of(norm.is_some(), quantization).ok_or(NO_KERNEL)?;
    match quantization {
        Quantization::None => finish(norm, hidden, tensors, epilogue, Unquantized, with),
        Quantization::Fp8Static => {
            let quantizer = Fp8Static { values: address(tensors.quant_out), scale: address(tensors.scale) };
            finish(norm, hidden, tensors, epilogue, quantizer, with)
        }
        Quantization::NvFp4 { layout } => {
            let quantizer = NvFp4 {
                values: address(tensors.quant_out),
                scales: address(tensors.scale_out),
                global_scale: address(tensors.scale),
                swizzled: u32::from(layout == ScaleLayout::Swizzled128x4),
                reserved: 0,
            };
            finish(norm, hidden, tensors, epilogue, quantizer, with)
        }
        _ => Err(NO_KERNEL),
    }
}

fn finish<Q: Copy>(
    norm: Option<Norm>,
    hidden: u64,
    tensors: &Tensors,
    epilogue: Epilogue,
    quantizer: Q,
    with: impl WithEpilogue,
) -> Result<(), Error> {
    match norm {
        None => with.call(epilogue, Plain { quantizer }),
        Some(norm) => with.call(
            epilogue,
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
