//! A digest of the specification's bits, to be computed wherever `core` builds.
//!
//! [`digest`] makes rows from a seed and folds all that `core` computes of them into one number: the sum, the norm, the
//! codes and scales of every quantization in every layout, and the dequantized elements. Processors that compute the
//! same bits give [`DIGEST`]. A NaN is folded as a NaN, since its sign and payload are not specified.
//!
//! The rows take less than 64 KiB of stack, and nothing else: a microcontroller has that.

#![no_std]
#![forbid(unsafe_code)]

mod cases;
mod fold;
mod rows;

use fused_collective_core::dtype::{bf16, f16};

use cases::fold_layouts;
use fold::Fold;
use rows::fold_rows;

/// The result of [`digest`] on every processor. A change of it is a change of the specification, or of the rows here.
pub const DIGEST: u64 = 0xe6c7_d6c8_aa1f_078e;

/// The digest of all rows, in each element type, and of the layouts of scales.
pub fn digest() -> u64 {
    let mut fold = Fold::default();
    fold_rows::<f32>(&mut fold);
    fold_rows::<f16>(&mut fold);
    fold_rows::<bf16>(&mut fold);
    fold_layouts(&mut fold);
    fold.value()
}
