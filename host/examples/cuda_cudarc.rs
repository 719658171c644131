//! Two ranks that are threads, each with a GPU, reduce on streams and memory of `cudarc`: sum, residual, RMSNorm, FP8.
//!
//! ```sh
//! cargo run --release -p fused-collective --example cuda_cudarc
//! ```
//! It needs two GPUs that reach each other's memory, and a library that kernels were built into or
//! `FUSED_COLLECTIVE_PTX`.

use std::{error::Error, thread, time::Duration};

use cudarc::driver::{CudaContext, CudaSlice, DevicePtr as _, DevicePtrMut as _};
use fused_collective::{
    core::{
        dtype::{DType, bf16},
        fusion::{Mode, Norm, Operation, PartialSums, Residual, Rounding},
        quant::Quantization,
    },
    cuda::{Communicator, DeviceTensor, KernelSource, Options, TensorType, Tensors, slot_bytes},
    group::{Bootstrap as _, Thread, threads},
};

const TOKENS: usize = 16;
const HIDDEN: usize = 8192;
const RANKS: u32 = 2;
const DEADLINE: Duration = Duration::from_secs(30);
const ELEMENT: TensorType = TensorType::Element(DType::Bf16);

/// A vector of `value` in bfloat16, as its bits.
fn filled(value: f32, length: usize) -> Vec<u16> {
    vec![bf16::from_f32(value).to_bits(); length]
}

fn tensor(address: u64, length: usize, element: TensorType) -> DeviceTensor {
    DeviceTensor { address, length: length as u64, element }
}

fn rank(bootstrap: &Thread) -> Result<Vec<u8>, Box<dyn Error + Send + Sync>> {
    let ordinal = bootstrap.rank();
    let context = CudaContext::new(ordinal as usize)?;
    let stream = context.new_stream()?;

    let operation = Operation {
        dtype: DType::Bf16,
        tokens: TOKENS as u64,
        hidden: HIDDEN as u64,
        residual: Residual::Replicated,
        norm: Some(Norm::default()),
        quantization: Quantization::Fp8Static,
        keep_norm: false,
        rounding: Rounding::Once,
        bias: false,
        post_norm: None,
        experts: None,
        wire: None,
        partial_sums: PartialSums::F32,
        mode: Mode::Auto,
    };
    let options = Options {
        slot_bytes: slot_bytes(RANKS, &operation),
        deadline: DEADLINE,
        oversubscribe: false,
        check_scales: false,
        kernels: KernelSource::Embedded,
    };
    let mut communicator = Communicator::join(bootstrap, ordinal, &options)?;

    let elements = TOKENS * HIDDEN;
    let input = stream.clone_htod(&filled(1.0 + ordinal as f32, elements))?;
    let residual = stream.clone_htod(&filled(0.5, elements))?;
    let gamma = stream.clone_htod(&filled(1.0, HIDDEN))?;
    // The kernels take 16-byte aligned tensors; an allocation is.
    let scale = stream.clone_htod(&[0.125f32])?;
    let mut residual_out: CudaSlice<u16> = stream.alloc_zeros(elements)?;
    let mut codes: CudaSlice<u8> = stream.alloc_zeros(elements)?;
    {
        let (input, _input) = input.device_ptr(&stream);
        let (residual, _residual) = residual.device_ptr(&stream);
        let (gamma, _gamma) = gamma.device_ptr(&stream);
        let (scale, _scale) = scale.device_ptr(&stream);
        let (residual_out, _residual_out) = residual_out.device_ptr_mut(&stream);
        let (codes, _codes) = codes.device_ptr_mut(&stream);
        let tensors = Tensors {
            input: Some(tensor(input, elements, ELEMENT)),
            residual: Some(tensor(residual, elements, ELEMENT)),
            bias: None,
            post_gamma: None,
            expert_rows: None,
            expert_index: None,
            expert_scales: None,
            gamma: Some(tensor(gamma, HIDDEN, ELEMENT)),
            scale: Some(tensor(scale, 1, TensorType::Element(DType::F32))),
            residual_out: tensor(residual_out, elements, ELEMENT),
            norm_out: None,
            quant_out: Some(tensor(codes, elements, TensorType::Code)),
            scale_out: None,
        };
        let handle = stream.cu_stream().cast();
        // SAFETY: the tensors have these lengths and outlive the wait below, the written ones overlap no other, and the
        // stream is of the GPU's primary context, as all of cudarc's are.
        unsafe {
            communicator.enqueue(&operation, &tensors, handle)?;
            // Waits for the stream, and says who waited for whom if a rank was lost.
            communicator.synchronize(handle)?;
        }
    }
    let sum = stream.clone_dtoh(&residual_out)?;
    assert!(sum.iter().all(|&bits| bf16::from_bits(bits).to_f32() == 1.0 + 2.0 + 0.5));
    let codes = stream.clone_dtoh(&codes)?;
    communicator.leave(bootstrap)?;
    Ok(codes)
}

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let codes = thread::scope(|scope| {
        let ranks: Vec<_> = threads(RANKS, DEADLINE)
            .into_iter()
            .map(|bootstrap| scope.spawn(move || rank(&bootstrap)))
            .collect();
        ranks.into_iter().map(|rank| rank.join().expect("no rank panics")).collect::<Result<Vec<_>, _>>()
    })?;
    // Every element is the root mean square: the norm is 1, and 1 / 0.125 is E4M3's 0x50.
    assert!(codes.iter().flatten().all(|&code| code == 0x50));
    println!("{TOKENS} tokens of {HIDDEN} bfloat16 reduced, normalized and quantized on {RANKS} GPUs");
    Ok(())
}
