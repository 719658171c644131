//! The variants of a problem, their inputs, and the check of their results.

pub(crate) mod chunks;
pub mod inputs;
pub mod variants;
pub mod verify;
