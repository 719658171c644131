//! An operation's epilogue, as kernels take it.

use fused_collective_core::{
    fusion::Operation,
    kernels::Quantizer,
    launch::{BlockScales, Fp4, Fp8Block, Fp8PerToken, Fp8Static, Plain, RmsNorm, Unquantized},
    pack::Pack,
    quant::ScaleTensor,
};

use super::{
    kernels::Parameters,
    tensors::{Tensors, address},
};

/// The parameters of the epilogue of a valid operation.
pub fn epilogue(operation: &Operation, tensors: &Tensors) -> Parameters {
    let Operation { tokens, hidden, norm, .. } = *operation;
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
                gamma_f32: norm.gamma.is_wider(operation.dtype).into(),
                quantizer: Unquantized,
            };
            // SAFETY: as above.
            unsafe { parameters.push(&head) };
        }
    }
    let values = address(tensors.quant_out);
    let scales =
        |tensor: ScaleTensor| BlockScales { address: address(tensors.scale_out), strides: tensor.strides() };
    // The quantizer is the last field of either.
    match (Quantizer::from(operation.quantization), operation.quantization.scales(tokens, hidden)) {
        (Quantizer::Fp8, _) => {
            // SAFETY: as above; so below.
            unsafe { parameters.push(&Fp8Static { values, scale: address(tensors.scale) }) };
        }
        (Quantizer::Fp8Token, _) => {
            // SAFETY: see above.
            unsafe { parameters.push(&Fp8PerToken { values, scales: address(tensors.scale_out) }) };
        }
        (Quantizer::Fp8Block, Some(tensor)) => {
            let block_bytes = hidden / tensor.cols * operation.dtype.bytes();
            let block_packs_log2 = (block_bytes / Pack::BYTES).ilog2();
            let quantizer = Fp8Block { values, scales: scales(tensor), block_packs_log2, reserved: 0 };
            // SAFETY: see above.
            unsafe { parameters.push(&quantizer) };
        }
        (Quantizer::Fp4, Some(tensor)) => {
            // Null for MXFP4, which has no such tensor.
            let global_scale = address(tensors.scale);
            // SAFETY: see above.
            unsafe { parameters.push(&Fp4 { values, scales: scales(tensor), global_scale }) };
        }
        // Without a quantization there is nothing to be told; blocks have scales.
        (Quantizer::None | Quantizer::Fp8Block | Quantizer::Fp4, _) => {}
    }
    parameters
}
