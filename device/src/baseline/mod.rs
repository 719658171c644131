//! The kernels that the fused ones are measured against, and the helpers of a benchmark.
//!
//! - [`local()`]: an epilogue on a row that needs no collective: RMSNorm with or without a residual, quantization
//!   alone, and both in one pass, which is what a graph compiler makes of everything after the all-reduce. (The
//!   unfused all-reduce is a collective with an epilogue that stores the sum.)
//! - [`eager`]: the primitive steps of RMSNorm and FP8 quantization, one kernel for each.
//! - [`fill()`]: the sentinel into a workspace, or anything into anything.
//! - [`audit()`]: what the kernel before wrote, read as a programmatic dependent of it.
//! - [`verify`]: conversions, to be compared with the portable ones.

mod audit;
pub mod eager;
mod fill;
mod local;
pub mod verify;

pub use audit::audit;
pub use fill::fill;
pub use local::local;
