//! The CUDA backend: one process a GPU, all on one host.
//!
//! [`Communicator`] is one rank's end of a group. It enqueues fused operations on a caller's stream, from raw device
//! pointers, so it serves any program that uses the CUDA driver, whatever it is written with. [`Engine`] is the
//! benchmark's side: tensors, and the separate operations besides.
//!
//! What must hold:
//! - nothing here is needed to build or to start: the driver (`driver`), the kernels (`kernels`) and NCCL are
//!   looked for when first used, and a missing one is an error that says what to do;
//! - ranks find out at set-up whether they can share memory, and an error names the pair that cannot;
//! - no wait is unbounded: not on the device, not on the host.
//!
//! A program outside this workspace that depends on this crate builds like `cust`: `CUDA_LIBRARY_PATH` must name a
//! CUDA toolkit, or this crate's folder `cuda-link`, which stands in for one.

mod abort;
mod communicator;
mod device;
mod driver;
mod engine;
mod epilogue;
mod error;
mod free_memory;
mod graph;
mod kernels;
mod links;
mod memory;
mod nccl;
mod tensors;
mod together;
mod workspace;

use serde::{Serialize, de::DeserializeOwned};

use crate::rendezvous::Group;

pub use abort::Aborter;
pub use communicator::{Captured, Communicator, MAX_DEADLINE, Options};
pub use device::{check_peers, count};
pub use engine::Engine;
pub use error::Error;
pub use free_memory::FreeMemory;
pub use kernels::{FOLDER_VARIABLE, MAX_RANKS};
pub use nccl::check as check_nccl;
pub use tensors::{DeviceTensor, TensorType, Tensors};
pub use workspace::slot_bytes;

/// Gives every rank what every rank contributes, by rank.
fn gather<T: Serialize + DeserializeOwned>(group: &Group, own: &T) -> Result<Vec<T>, Error> {
    let unreadable = |error: serde_json::Error| {
        Error::Group(format!("what a rank contributed to the set-up cannot be read: {error}"))
    };
    let bytes = serde_json::to_vec(own).map_err(unreadable)?;
    group.all_gather(&bytes)?.iter().map(|bytes| serde_json::from_slice(bytes).map_err(unreadable)).collect()
}
