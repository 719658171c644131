//! What a kernel is launched with: [`fused_collective_core::launch`], which says the launch rules as well.

pub use fused_collective_core::launch::*;
