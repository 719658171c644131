//! The kernel of an operation, and the launch of each of its rounds.

use fused_collective_core::{
    fusion::Operation,
    kernels::{Kernel, Module},
    launch::Shape,
    plan::{Algorithm, Plan},
};

use super::super::kernels::{Launch, LaunchLimits, Versions};
use crate::error::Error;

/// The error of rows that have no [`Shape`].
pub const TOO_MANY_TOKENS: Error = Error::Unsupported("rounds of 2^31 tokens or more");

/// The kernel of an operation that was planned as `algorithm`, and the module that has it for rows in registers.
///
/// # Errors
/// There is none.
pub(super) fn kernel(
    operation: &Operation,
    algorithm: Algorithm,
    world_size: u32,
) -> Result<(Module, &'static Kernel), Error> {
    let (set, kernel) =
        Kernel::of(operation, algorithm, world_size).ok_or(Error::Unsupported("this operation"))?;
    Ok((Module { dtype: operation.dtype, set }, kernel))
}

/// The packs of a row.
///
/// # Errors
/// Rows of a plan that has none.
pub(super) fn row_packs(plan: &Plan) -> Result<u32, Error> {
    Ok(Shape::of_rows(0, plan.row_bytes).ok_or(TOO_MANY_TOKENS)?.row_packs)
}

/// Adds to `launches` how each round of `plan` is launched with one of `versions`.
///
/// # Errors
/// No version takes such rows.
pub(super) fn choose(
    plan: &Plan,
    limits: LaunchLimits,
    versions: &mut Versions,
    launches: &mut Vec<Launch>,
) -> Result<(), Error> {
    launches.clear();
    for round in plan.rounds() {
        let Shape { row_packs, .. } = Shape::of_round(plan, &round, 0).ok_or(TOO_MANY_TOKENS)?;
        launches.push(limits.for_rows(versions, plan.cluster, row_packs, round.rows.tokens)?);
    }
    Ok(())
}
