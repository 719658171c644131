//! Sizes that both implementations have in common.

/// Threads of a warp.
pub const WARP: u32 = 32;

/// Floats of a block's [`Shared`](super::Shared) memory.
pub const SHARED_FLOATS: u32 = 1040;

/// Counters of a block's [`Shared`](super::Shared) memory.
pub const COUNTERS: u32 = 2;
