//! The answer to a query, which launches nothing.

use fused_collective_core::plan::Algorithm;

/// The plan of an operation, without a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Query {
    /// The collective that the operation would use.
    pub algorithm: Algorithm,
    /// Launches that it would take: parts of the operation that fit one slot of the workspace.
    pub rounds: u64,
}
