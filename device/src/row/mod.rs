//! How threads share a row: a team of the blocks of one cluster works on one token at a time.
//!
//! Pack `i` of a row is thread `i % T`'s of the team's `T` threads. A thread holds `P` of its packs at a time; where
//! those are all it has (`RESIDENT`), the row stays in registers from the sum to the last store. A longer row is
//! taken in chunks and read again, by the same thread, once its sum is known.

mod prepared;
mod slice;
mod team;

pub use prepared::Prepared;
pub(crate) use prepared::residual_of_sum;
pub use slice::ThreadSlice;
pub use team::Team;
