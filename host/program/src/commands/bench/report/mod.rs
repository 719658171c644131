//! The report of a benchmark, in every form in which it is shown.
//!
//! A [`Report`](data::Report) is plain data, to which [`figures`] adds every derived figure and [`conclusion`] the answer.
//! [`table`], [`markdown`], [`json`], [`plot`] and [`compare`] show it, and compute no figure of their own. Times are microseconds per operation of
//! the slowest rank. A row either was verified and has figures, or failed and has a reason.

mod cells;
pub mod compare;
pub mod conclusion;
pub mod data;
pub mod figures;
pub(crate) mod files;
#[cfg(test)]
pub(crate) mod fixture;
pub mod json;
pub mod markdown;
pub mod plot;
pub mod table;
