//! The operation in `f64`, slow and obvious: the oracle of every test and of the benchmark.
//!
//! [`compute_token`] computes the right answer. [`check_token`] judges the answer of an implementation, which works in
//! `f32`, where rounding may move a value across a rounding boundary. Each output must therefore lie between two
//! roundings: of the exact value lowered, and raised, by the allowed error of `f32` arithmetic. Each stage is judged
//! from the *observed* result of the stage before, since the operation defines each stage as reading that result.
//!
//! # Allowed errors
//! With `u = 2^-24`, half the spacing of `f32`:
//! - a sum of `n` addends is within `n * u` of the sum of their magnitudes;
//! - a norm is within `(8 + sqrt(hidden)) * u` of itself. A few roundings of the product and of the reciprocal
//!   square root (2 or 3 for an approximate one) are part of this. The rest is half the error of partial sums of
//!   squares whose roundings add up as a random walk over the row;
//! - quantization has no allowed error: it is exact in `f32`, so equal norms give equal codes.
//!
//! ```
//! use fused_collective_core::{
//!     dtype::DType,
//!     fusion::{Mode, Norm, Operation, Residual},
//!     norm::Gamma,
//!     quant::Quantization,
//!     reference::{Observed, Output, Rounding, Token, check_token, compute_token},
//! };
//!
//! let operation = Operation {
//!     dtype: DType::F32,
//!     tokens: 1,
//!     hidden: 16,
//!     residual: Residual::None,
//!     norm: Some(Norm { epsilon: 0.0, ..Norm::default() }),
//!     quantization: Quantization::None,
//!     keep_norm: false,
//!     mode: Mode::OneShot,
//! };
//! let (rank_0, rank_1, ones) = ([1.0f32; 16], [3.0; 16], [1.0; 16]);
//! let token = Token {
//!     inputs: &[&rank_0, &rank_1],
//!     residual: None,
//!     gamma: Gamma::Element(&ones),
//!     scale: 1.0,
//!     index: 0,
//! };
//! let (mut sum, mut norm) = ([0.0; 16], [0.0; 16]);
//! compute_token(&operation, Rounding::Once, &token, &mut sum, &mut norm, &mut [], &mut [])?;
//! assert_eq!((sum, norm), ([4.0; 16], ones));
//!
//! norm[3] = 1.001; // an implementation's mistake
//! let observed = Observed { residual_out: &sum, norm_out: &norm, values: &[], scales: &[] };
//! let mismatch = check_token(&operation, Rounding::Once, &token, &observed).unwrap_err();
//! assert_eq!((mismatch.output, mismatch.index), (Output::Norm, 3));
//! # Ok::<(), fused_collective_core::quant::RowError>(())
//! ```

mod check;
mod compute;
mod special;

pub use check::{Mismatch, Observed, Output, check_token};
pub use compute::{Rounding, Token, compute_token};
pub use special::Special;
