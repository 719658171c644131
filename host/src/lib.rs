//! Fused all-reduce + residual + RMSNorm + quantization across the ranks of one host, as a library and a program.
//!
//! # Embedding
//! A rank holds a [`cpu::Communicator`] and calls [`all_reduce`](cpu::Communicator::all_reduce) with an
//! [`Operation`](fused_collective_core::fusion::Operation) and slices. Ranks may be processes (started by
//! [`launch`], or by `torchrun` and its like, and met through [`rendezvous`]) or threads, as here:
//!
//! ```
//! use std::{os::fd::AsFd, thread, time::Duration};
//!
//! use fused_collective::cpu::{self, Communicator, Inputs, Outputs, Watch};
//! use fused_collective_core::{
//!     dtype::{DType, bf16},
//!     fusion::{Mode, Norm, Operation, Residual},
//!     norm::Gamma,
//!     quant::Quantization,
//! };
//!
//! const RANKS: u32 = 2;
//! let operation = Operation {
//!     dtype: DType::Bf16,
//!     tokens: 4,
//!     hidden: 64,
//!     residual: Residual::Replicated,
//!     norm: Some(Norm::default()),
//!     quantization: Quantization::Fp8Static,
//!     keep_norm: false,
//!     mode: Mode::Auto,
//! };
//! let layout = cpu::layout(RANKS, operation.row_bytes())?;
//! let memory = cpu::create_shared_memory(&layout)?;
//!
//! thread::scope(|scope| {
//!     let ranks = [0, 1].map(|rank| {
//!         let memory = memory.as_fd();
//!         scope.spawn(move || -> Result<(), cpu::Error> {
//!             let deadline = Duration::from_secs(10);
//!             let mut communicator = Communicator::join(memory, layout, rank, deadline, Watch::nobody())?;
//!
//!             let input = vec![bf16::from_f32(1.0 + rank as f32); 4 * 64];
//!             let residual = vec![bf16::from_f32(0.5); 4 * 64];
//!             let gamma = vec![bf16::ONE; 64];
//!             let mut residual_out = vec![bf16::ZERO; 4 * 64];
//!             let mut quant_out = vec![0; 4 * 64];
//!             let inputs = Inputs {
//!                 input: &input,
//!                 residual: Some(&residual),
//!                 gamma: Gamma::Element(&gamma),
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
//!     });
//!     ranks.into_iter().try_for_each(|rank| rank.join().unwrap())
//! })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # The program
//! [`program`] is a thin shell: [`cli`] makes [`settings`], [`launch`] starts ranks, [`mod@bench`] measures variants on
//! a [`collective`] backend and has [`peers`] measure theirs, [`mod@report`] shows them; [`mod@links`] measures what the
//! backend's links can do at best; [`mod@verify`] runs the matrix that shows a backend right, [`mod@soak`] and
//! [`mod@faults`] find what its cases cannot.

pub mod bench;
mod board;
mod bounded;
pub mod cli;
pub mod collective;
pub mod cpu;
pub mod cuda;
pub mod failure;
pub mod faults;
#[cfg(test)]
mod fuzz;
pub mod launch;
pub mod links;
pub mod peers;
pub mod program;
pub mod rank_env;
pub mod rendezvous;
pub mod report;
pub mod settings;
mod shared_memory;
pub mod soak;
pub mod verify;
