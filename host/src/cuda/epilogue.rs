//! An operation's epilogue, as kernels take it.

use fused_collective_core::{
    fusion::Operation,
    kernels::Quantizer,
    launch::{
        Address, AnyEpilogue, AnyQuantizer, BlockScales, Fp4, Fp8Block, Fp8PerToken, Fp8Static, MxFp4, Plain,
        RmsNorm, Unquantized,
    },
    pack::Pack,
    quant::{ScaleStrides, ScaleTensor},
};

use super::{
    kernels::Parameters,
    tensors::{Tensors, address},
};

/// The parameters of an epilogue: for kernels of it alone, and for those of any.
#[derive(Clone, Debug)]
pub struct Epilogue {
    own: Parameters,
    any: Parameters,
}

impl Epilogue {
    /// The epilogue of a valid operation.
    pub fn of(operation: &Operation, tensors: &Tensors) -> Epilogue {
        let quantizer = quantizer(operation, tensors);
        let norm = norm(operation, tensors, quantizer);
        let AnyQuantizer { values, scales, scale, block_packs_log2, .. } = quantizer;
        let mut own = Parameters::default();
        // SAFETY: the launch structs have no padding, which `core` asserts.
        unsafe {
            if operation.norm.is_some() {
                own.push(&RmsNorm {
                    gamma: norm.gamma,
                    norm_out: norm.norm_out,
                    inverse_hidden: norm.inverse_hidden,
                    epsilon: norm.epsilon,
                    weight_bias: norm.weight_bias,
                    gamma_f32: norm.gamma_f32,
                    quantizer: Unquantized,
                });
            } else {
                own.push(&Plain { quantizer: Unquantized });
            }
            // The quantizer is the last field of either.
            match Quantizer::from(operation.quantization) {
                Quantizer::None => {}
                Quantizer::Fp8 => own.push(&Fp8Static { values, scale }),
                Quantizer::Fp8Token => own.push(&Fp8PerToken { values, scales: scales.address }),
                Quantizer::Fp8Block => own.push(&Fp8Block { values, scales, block_packs_log2, reserved: 0 }),
                Quantizer::Fp4 => own.push(&Fp4 { values, scales, global_scale: scale }),
                Quantizer::MxFp4 => own.push(&MxFp4 { values, scales }),
            }
            Epilogue { own, any: Parameters::of(&AnyEpilogue { norm }) }
        }
    }

    /// The epilogue of a kernel of another crate's, from its parameters' bytes.
    pub fn of_bytes(bytes: &[u8]) -> Epilogue {
        let mut own = Parameters::default();
        own.extend(bytes);
        Epilogue { any: own.clone(), own }
    }

    /// The parameters for a kernel that takes an [`AnyEpilogue`], if it is one of `any`, or this one alone.
    pub fn parameters(&self, any: bool) -> &Parameters {
        if any { &self.any } else { &self.own }
    }
}

/// The norm, with a null gamma if there is none.
fn norm(operation: &Operation, tensors: &Tensors, quantizer: AnyQuantizer) -> RmsNorm<AnyQuantizer> {
    let Operation { hidden, dtype, norm, .. } = *operation;
    let gamma = if norm.is_some() { address(tensors.gamma) } else { Address::NULL };
    let norm = norm.unwrap_or_default();
    RmsNorm {
        gamma,
        norm_out: address(tensors.norm_out),
        inverse_hidden: 1.0 / hidden as f32,
        epsilon: norm.epsilon,
        weight_bias: norm.weight_bias,
        gamma_f32: norm.gamma.is_wider(dtype).into(),
        quantizer,
    }
}

fn quantizer(operation: &Operation, tensors: &Tensors) -> AnyQuantizer {
    let Operation { tokens, hidden, dtype, quantization, .. } = *operation;
    let blocks = quantization.scales(tokens, hidden);
    let block_packs = |tensor: ScaleTensor| hidden / tensor.cols * dtype.bytes() / Pack::BYTES;
    AnyQuantizer {
        values: address(tensors.quant_out),
        scales: BlockScales {
            address: address(tensors.scale_out),
            strides: blocks.map_or(ScaleStrides::default(), ScaleTensor::strides),
        },
        scale: address(tensors.scale),
        kind: Quantizer::from(quantization) as u32,
        // A scale for each token has no block of packs, nor has one for all.
        block_packs_log2: blocks.map_or(0, |tensor| block_packs(tensor).max(1).ilog2()),
    }
}
