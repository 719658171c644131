//! The kernels, over `fused_collective_device`'s functions.
//!
//! - [`eager`]: the primitive steps of RMSNorm and FP8 quantization, one kernel for each. Fused kernels are measured
//!   against them.
//! - [`audit()`]: compares what the kernel before wrote, as a programmatic dependent of it.
//! - [`digest()`]: a digest of memory.
//! - [`convert`]: conversions, to be compared with the portable ones.
//! - [`links`]: stores, loads and waits alone, to measure the links between ranks.

mod audit;
pub mod convert;
mod digest;
pub mod eager;
pub mod links;

pub use audit::audit;
pub use digest::digest;
pub use fused_collective_device::dtype;

/// The fingerprint of these kernels' parameters, in every module that has one of them.
#[cfg(target_arch = "nvptx64")]
#[unsafe(export_name = "fused_collective_bench_layout")]
#[used]
pub static LAYOUT: u32 = crate::launch::LAYOUT;
