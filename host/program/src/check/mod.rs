//! The variants of a problem, their inputs, and the check of their results.

pub(crate) mod chunks;
pub mod inputs;
pub(crate) mod judge;
pub(crate) mod outputs;
pub(crate) mod parallel;
pub mod variants;
pub mod verify;
