//! Two ranks that are threads reduce four tokens over shared memory: sum, residual, RMSNorm, FP8.
//!
//! ```sh
//! cargo run --release -p fused-collective --example cpu_threads
//! ```

use std::{thread, time::Duration};

use fused_collective::{
    Error,
    core::{
        dtype::{DType, bf16},
        fusion::{Mode, Norm, Operation, PartialSums, Residual, Rounding},
        norm::Weights,
        quant::{Quantization, dequantize},
    },
    cpu::{Communicator, Inputs, Operand, Options, Outputs},
    group::{Bootstrap as _, Thread, threads},
};

const TOKENS: usize = 4;
const HIDDEN: usize = 64;
const SCALE: f32 = 1.0 / 64.0;
const DEADLINE: Duration = Duration::from_secs(10);

/// One rank's work: what an engine does at the end of a layer.
fn rank(bootstrap: &Thread) -> Result<Vec<u8>, Error> {
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
    // Once for each group, for rows of up to so many bytes.
    let options = Options { max_row_bytes: operation.row_bytes(), deadline: DEADLINE };
    let mut communicator = Communicator::join(bootstrap, options)?;

    let number = bootstrap.rank() as f32;
    let input: Vec<bf16> =
        (0..TOKENS * HIDDEN).map(|at| bf16::from_f32(number + (at % 7) as f32 - 3.0)).collect();
    let residual = vec![bf16::from_f32(0.5); TOKENS * HIDDEN];
    let gamma = vec![bf16::ONE; HIDDEN];
    let mut residual_out = vec![bf16::ZERO; TOKENS * HIDDEN];
    let mut quant_out = vec![0; TOKENS * HIDDEN];

    // As often as there are layers. Every rank calls the same.
    communicator.all_reduce(
        &operation,
        Inputs {
            input: Operand::Apart(&input[..]),
            residual: Some(Operand::Apart(&residual[..])),
            bias: None,
            post_gamma: None,
            experts: None,
            gamma: Weights::Element(&gamma),
            scale: SCALE,
        },
        Outputs {
            residual_out: &mut residual_out,
            norm_out: &mut [],
            quant_out: &mut quant_out,
            scale_out: &mut [],
        },
    )?;
    Ok(quant_out)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let codes = thread::scope(|scope| {
        let ranks: Vec<_> =
            threads(2, DEADLINE).into_iter().map(|bootstrap| scope.spawn(move || rank(&bootstrap))).collect();
        ranks.into_iter().map(|rank| rank.join().expect("no rank panics")).collect::<Result<Vec<_>, _>>()
    })?;
    assert_eq!(codes[0], codes[1], "all ranks have the same bits");

    let mut norm = vec![0f32; TOKENS * HIDDEN];
    let shape = [TOKENS as u64, HIDDEN as u64];
    dequantize(Quantization::Fp8Static, shape, &codes[0], &[], SCALE, &mut norm)?;
    let mean_square = norm[..HIDDEN].iter().map(|value| value * value).sum::<f32>() / HIDDEN as f32;
    assert!((mean_square - 1.0).abs() < 0.05, "a norm has mean square 1, this one {mean_square}");
    println!("token 0, decoded: {:.3?} ... (mean square {mean_square:.3})", &norm[..7]);
    Ok(())
}
