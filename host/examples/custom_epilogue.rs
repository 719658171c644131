//! Two ranks that are threads, each with a GPU, launch a kernel of the caller's: this project's two-shot all-reduce and
//! residual add, fused with GELU. The kernel is `device/examples/custom-epilogue`.
//!
//! ```sh
//! cargo xtask ptx
//! cargo run --release -p fused-collective --example custom_epilogue -- target/ptx-examples/sm_90/custom_epilogue.ptx
//! ```

use std::{env, error::Error, fs, thread, time::Duration};

use cudarc::driver::{CudaContext, CudaSlice, DevicePtr as _, DevicePtrMut as _};
use fused_collective::{
    core::{
        dtype::{DType, bf16},
        fusion::{Mode, Operation, PartialSums, Residual, Rounding},
        kernels::{Family, Version},
        quant::Quantization,
    },
    cuda::{Communicator, CustomOperation, DeviceTensor, KernelSource, Options, TensorType, slot_bytes},
    group::{Bootstrap as _, Thread, threads},
};

const TOKENS: usize = 40;
const HIDDEN: usize = 4096;
const RANKS: u32 = 2;
const DEADLINE: Duration = Duration::from_secs(30);

/// Element `at` of rank `rank`'s input.
fn addend(rank: u32, at: usize) -> bf16 {
    bf16::from_f32((at % 13) as f32 / 8.0 - 0.75 + rank as f32 / 4.0)
}

fn tensor(address: u64) -> DeviceTensor {
    DeviceTensor { address, length: (TOKENS * HIDDEN) as u64, element: TensorType::Element(DType::Bf16) }
}

fn rank(bootstrap: &Thread, image: &[u8]) -> Result<f32, Box<dyn Error + Send + Sync>> {
    let ordinal = bootstrap.rank();
    let context = CudaContext::new(ordinal as usize)?;
    let stream = context.new_stream()?;
    let shape = Operation {
        dtype: DType::Bf16,
        tokens: TOKENS as u64,
        hidden: HIDDEN as u64,
        residual: Residual::Replicated,
        norm: None,
        quantization: Quantization::None,
        keep_norm: false,
        rounding: Rounding::Once,
        bias: false,
        post_norm: None,
        experts: None,
        wire: None,
        partial_sums: PartialSums::F32,
        mode: Mode::TwoShot,
    };
    let options = Options {
        // Room for half of the tokens: the operation takes two rounds, as a large one does.
        slot_bytes: slot_bytes(RANKS, &shape) / 2,
        deadline: DEADLINE,
        oversubscribe: false,
        check_scales: false,
        kernels: KernelSource::Embedded,
    };
    let mut communicator = Communicator::join(bootstrap, ordinal, &options)?;
    let mut kernel = communicator.load_kernel(image, "all_reduce_gelu", Family::TwoShot, Version::P1)?;

    let elements = TOKENS * HIDDEN;
    let input: Vec<u16> = (0..elements).map(|at| addend(ordinal, at).to_bits()).collect();
    let input = stream.clone_htod(&input)?;
    let residual = stream.clone_htod(&vec![bf16::from_f32(0.125).to_bits(); elements])?;
    let mut residual_out: CudaSlice<u16> = stream.alloc_zeros(elements)?;
    let mut gelu_out: CudaSlice<u16> = stream.alloc_zeros(elements)?;
    {
        let (input, _input) = input.device_ptr(&stream);
        let (residual, _residual) = residual.device_ptr(&stream);
        let (residual_out, _residual_out) = residual_out.device_ptr_mut(&stream);
        let (gelu_out, _gelu_out) = gelu_out.device_ptr_mut(&stream);
        let operation = CustomOperation {
            dtype: DType::Bf16,
            tokens: TOKENS as u64,
            hidden: HIDDEN as u64,
            input: tensor(input),
            residual: Some(tensor(residual)),
            residual_out: tensor(residual_out),
        };
        // The kernel's `Gelu` is one address.
        let epilogue = gelu_out.to_ne_bytes();
        let handle = stream.cu_stream().cast();
        // SAFETY: the tensors have these lengths and outlive the wait below, and the kernel takes this epilogue.
        unsafe {
            communicator.enqueue_kernel(&mut kernel, &operation, &epilogue, handle)?;
            communicator.synchronize(handle)?;
        }
    }
    let found = stream.clone_dtoh(&gelu_out)?;
    communicator.leave(bootstrap)?;

    let mut largest = 0f32;
    for (at, bits) in found.into_iter().enumerate() {
        let sum = (0..RANKS).map(|rank| addend(rank, at).to_f32()).sum::<f32>() + 0.125;
        let x = bf16::from_f32(sum).to_f32();
        let expected = x / (1.0 + (-1.702 * x).exp());
        largest = largest.max((bf16::from_bits(bits).to_f32() - expected).abs());
    }
    Ok(largest)
}

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let path = env::args().nth(1).ok_or("give the file of the kernel, PTX or machine code")?;
    let image = fs::read(&path).map_err(|error| format!("{path}: {error}"))?;
    let errors = thread::scope(|scope| {
        let image = &image[..];
        let ranks: Vec<_> = threads(RANKS, DEADLINE)
            .into_iter()
            .map(|bootstrap| scope.spawn(move || rank(&bootstrap, image)))
            .collect();
        ranks.into_iter().map(|rank| rank.join().expect("no rank panics")).collect::<Result<Vec<_>, _>>()
    })?;
    let largest = errors.into_iter().fold(0.0, f32::max);
    // Values are below 4, of which bfloat16 has eight bits.
    if largest > 1.0 / 64.0 {
        return Err(format!("the largest error of GELU is {largest}").into());
    }
    println!("all-reduce, residual and GELU of {TOKENS} tokens on {RANKS} GPUs, largest error {largest:.4}");
    Ok(())
}
