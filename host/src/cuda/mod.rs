//! The CUDA backend: one GPU a rank, on one host or on several with NCCL between them.
//!
//! [`Communicator`] is one rank's end of a group. It enqueues fused operations on a caller's stream, from raw device
//! pointers, so it serves any program that uses the CUDA driver, whatever it is written with.
//!
//! | floor | for | items |
//! | --- | --- | --- |
//! | communicator | operations | [`Communicator`], [`Tensors`], [`CustomKernel`] |
//! | checked parts | kernels and memory of one's own, NCCL | [`device`], [`memory`], [`kernels`], [`workspace`], [`nccl`] |
//! | raw driver | everything else | [`driver`] |
//!
//! What must hold:
//! - nothing here is needed to build or to start: driver and kernels are looked for when first used, and a missing one is
//!   an error;
//! - a call leaves the thread's current context as it was;
//! - ranks find out at set-up whether they can share memory, and an error names the pair that cannot;
//! - no wait is unbounded: not on the device, not on the host.

mod communicator;
pub mod device;
pub mod driver;
mod dynamic_library;
pub mod epilogue;
pub mod kernels;
pub mod memory;
pub mod nccl;
mod tensors;
pub mod workspace;

pub use communicator::{
    Captured, Communicator, MAX_DEADLINE, Options,
    custom::{CustomKernel, CustomOperation},
    external::ExternalWork,
    launches::TOO_MANY_TOKENS,
};
pub use device::{can_access, check_group, count};
pub use kernels::{FOLDER_VARIABLE, KernelSource, MAX_RANKS};
pub use tensors::{DeviceTensor, TensorType, Tensors};
pub use workspace::slot_bytes;
