//! The CUDA backend: tensors on the GPU, every step as a kernel, and trials of them as CUDA graphs.

mod contents;
mod cust_driver;
mod engine;
pub mod free_memory;
pub mod gpus;
mod graph;
mod graphs;
mod guarded_memory;
mod links;
mod nccl;
mod steps;
mod together;
mod window_tensors;

pub use engine::Engine;
pub use nccl::check as check_nccl;
