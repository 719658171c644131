//! A problem's rows in several calls of the fused operation, which must give the bits of one call of all rows.

use fastrand::Rng;
use fused_collective_core::quant::ScaleTensor;

use crate::{
    backend::{
        collective::Collective,
        problem::{Problem, Tensor},
        steps::{Fused, Rows, Step},
    },
    job::ranks::Error,
};

/// The most calls that a problem is cut into.
const MOST: usize = 8;
/// Bytes of which an address on GPUs is a multiple.
const ALIGNMENT: u64 = 16;

/// Cuts the rows of `call` into calls of random sizes, in order, for a group of `world_size` ranks.
pub(crate) fn cut(problem: &Problem, call: Fused, world_size: u32, random: &mut Rng) -> Vec<Step> {
    let owners = if call.sharded { u64::from(world_size) } else { 1 };
    let row_codes = problem.quantization.value_bytes_per_row(problem.hidden);
    let unit = if row_codes.is_multiple_of(ALIGNMENT) { owners } else { 2 * owners };
    let mut bounds = vec![0, problem.tokens];
    bounds.extend((1..random.usize(1..=MOST)).map(|_| random.u64(0..=problem.tokens) / unit * unit));
    bounds.sort_unstable();
    bounds.dedup();
    let rows = bounds.windows(2).map(|bounds| Rows { first: bounds[0], count: bounds[1] - bounds[0] });
    rows.map(|rows| Step::Fused(Fused { rows: Some(rows), ..call })).collect()
}

/// Runs `steps`, which [`cut`] has made of `problem`, and leaves all outputs where one call of all rows leaves them. All ranks
/// call this.
pub(crate) fn run(backend: &mut dyn Collective, problem: &Problem, steps: &[Step]) -> Result<(), Error> {
    let Some(whole) = problem.scales() else { return Ok(backend.run(steps)?) };
    // The layout of scales depends on the number of rows, so each call's are read and put into their place.
    let mut scales = vec![0; whole.bytes().unwrap_or(0) as usize];
    for step in steps {
        backend.run(&[*step])?;
        if let Step::Fused(Fused { rows: Some(rows), .. }) = step {
            place(&backend.read(Tensor::ScaleOut)?, *rows, whole, &mut scales);
        }
    }
    Ok(backend.write(Tensor::ScaleOut, 0, &scales)?)
}

/// Copies the scales of `rows`, a tensor of their own, into `scales`, those of the `whole` problem.
fn place(own: &[u8], rows: Rows, whole: ScaleTensor, scales: &mut [u8]) {
    let part = ScaleTensor { rows: rows.count, ..whole };
    let size = whole.size as usize;
    for row in 0..rows.count {
        for col in 0..whole.cols_padded() {
            let from = part.offset(row, col) as usize;
            let to = whole.offset(rows.first + row, col) as usize;
            scales[to..to + size].copy_from_slice(&own[from..from + size]);
        }
    }
}

#[cfg(test)]
mod tests {
    use fused_collective_core::{
        dtype::DType,
        fusion::{Mode, Norm, PartialSums},
    };

    use super::*;
    use crate::{pattern::Pattern, quant_mode::QuantMode, wire::Wire};

    fn problem(tokens: u64, quant_mode: QuantMode) -> Problem {
        Problem {
            dtype: DType::F32,
            tokens,
            hidden: 48,
            residual: true,
            sharded: true,
            norm: Norm::default(),
            pattern: Pattern::AllReduceNorm,
            quantization: quant_mode.quantization(),
            scale: quant_mode.scale(),
            partial_sums: PartialSums::F32,
        }
    }

    #[test]
    fn calls_cover_every_row_once_and_start_where_they_may() {
        let mut random = Rng::with_seed(1);
        let mut most = 0;
        for (quant_mode, sharded, unit) in [
            (QuantMode::None, false, 1),
            (QuantMode::None, true, 3),
            (QuantMode::Fp4, false, 2),
            (QuantMode::Fp4, true, 6),
        ] {
            for tokens in [0, 1, 2, 17, 300] {
                let call =
                    Fused { mode: Mode::TwoShot, sharded, in_place: false, wire: Wire::Exact, rows: None };
                let steps = cut(&problem(tokens, quant_mode), call, 3, &mut random);
                let mut next = 0;
                for step in &steps {
                    let &Step::Fused(Fused { rows: Some(rows), .. }) = step else { panic!("{step:?}") };
                    assert!(rows.first == next && rows.count > 0 && rows.first % unit == 0, "{steps:?}");
                    next += rows.count;
                }
                assert_eq!(next, tokens);
                most = most.max(steps.len());
            }
        }
        assert!((3..=MOST).contains(&most), "{most} calls");
    }

    #[test]
    fn scales_of_calls_are_put_where_those_of_one_call_are() {
        for quant_mode in QuantMode::ALL {
            let problem = Problem { hidden: 256, ..problem(150, quant_mode) };
            let Some(whole) = problem.scales() else { continue };
            let value = |row: u64, col: u64, byte: u64| (row * 31 + col * 7 + byte) as u8 | 1;
            let tensor = |first: u64, count: u64| {
                let tensor = ScaleTensor { rows: count, ..whole };
                let mut scales = vec![0; tensor.bytes().unwrap() as usize];
                for row in 0..count {
                    for (col, byte) in (0..whole.cols).flat_map(|col| (0..whole.size).map(move |b| (col, b)))
                    {
                        scales[(tensor.offset(row, col) + byte) as usize] = value(first + row, col, byte);
                    }
                }
                scales
            };
            let mut scales = vec![0; whole.bytes().unwrap() as usize];
            for rows in
                [Rows { first: 0, count: 7 }, Rows { first: 7, count: 130 }, Rows { first: 137, count: 13 }]
            {
                place(&tensor(rows.first, rows.count), rows, whole, &mut scales);
            }
            assert!(scales == tensor(0, 150), "{quant_mode}");
        }
    }
}
