//! Fused all-reduce + residual + RMSNorm + quantization across the ranks of one host.
//!
//! # Embedding
//! A rank holds a communicator ([`cpu::Communicator`] or [`cuda::Communicator`]) and calls it with an
//! [`Operation`](core::fusion::Operation) and tensors. Ranks meet over a [`Bootstrap`](group::Bootstrap): threads of one
//! process, as here; processes by the built-in [`group::rendezvous`]; or the caller's own.
//!
//! ```
//! use std::{thread, time::Duration};
//!
//! use fused_collective::{
//!     Error,
//!     core::{
//!         dtype::{DType, bf16},
//!         fusion::{Mode, Norm, Operation, Residual, Rounding},
//!         norm::Weights,
//!         quant::Quantization,
//!     },
//!     cpu::{Communicator, Inputs, Operand, Options, Outputs},
//!     group::{Bootstrap as _, threads},
//! };
//!
//! let operation = Operation {
//!     dtype: DType::Bf16,
//!     tokens: 4,
//!     hidden: 64,
//!     residual: Residual::Replicated,
//!     norm: Some(Norm::default()),
//!     quantization: Quantization::Fp8Static,
//!     keep_norm: false,
//!     rounding: Rounding::Once,
//!     bias: false,
//!     post_norm: None,
//!     experts: None,
//!     wire: None,
//!     mode: Mode::Auto,
//! };
//! let deadline = Duration::from_secs(10);
//!
//! thread::scope(|scope| {
//!     let ranks: Vec<_> = threads(2, deadline).into_iter().map(|bootstrap| {
//!         scope.spawn(move || -> Result<(), Error> {
//!             let options = Options { max_row_bytes: operation.row_bytes(), deadline };
//!             let mut communicator = Communicator::join(&bootstrap, options)?;
//!
//!             let input = vec![bf16::from_f32(1.0 + bootstrap.rank() as f32); 4 * 64];
//!             let residual = vec![bf16::from_f32(0.5); 4 * 64];
//!             let gamma = vec![bf16::ONE; 64];
//!             let mut residual_out = vec![bf16::ZERO; 4 * 64];
//!             let mut quant_out = vec![0; 4 * 64];
//!             let inputs = Inputs {
//!                 input: Operand::Apart(&input[..]),
//!                 residual: Some(Operand::Apart(&residual[..])),
//!                 bias: None,
//!                 post_gamma: None,
//!                 experts: None,
//!                 gamma: Weights::Element(&gamma),
//!                 scale: 0.125,
//!             };
//!             let outputs = Outputs {
//!                 residual_out: &mut residual_out,
//!                 norm_out: &mut [],
//!                 quant_out: &mut quant_out,
//!                 scale_out: &mut [],
//!             };
//!             communicator.all_reduce(&operation, inputs, outputs)?;
//!
//!             assert_eq!(residual_out[0].to_f32(), 1.0 + 2.0 + 0.5);
//!             // Every element is the root mean square: the norm is 1, and 1 / 0.125 is E4M3's 0x50.
//!             assert_eq!(quant_out, [0x50; 4 * 64]);
//!             Ok(())
//!         })
//!     }).collect();
//!     ranks.into_iter().try_for_each(|rank| rank.join().unwrap())
//! })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#[cfg(not(target_os = "linux"))]
compile_error!("fused-collective runs on Linux only: it shares memory between processes by memfd and /proc");

#[cfg(feature = "cpu")]
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod error;
#[cfg(test)]
mod fuzz;
pub mod group;
mod query;
#[cfg(all(feature = "cpu", feature = "cuda"))]
pub mod raw;

pub use error::{Error, ErrorKind, TensorProblem};
pub use fused_collective_core as core;
pub use query::Query;
