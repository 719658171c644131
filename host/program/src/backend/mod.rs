//! What a benchmark asks of a backend: tensors, the steps that variants are made of, and their time.
//!
//! A [`Problem`](problem::Problem) is one configuration; its tensors have fixed roles ([`Tensor`](problem::Tensor)). A variant is a sequence of
//! [`Step`](steps::Step)s on them, the same on every backend. Every rank holds one [`Collective`](collective::Collective) and makes the same calls.

pub mod collective;
pub mod cpu;
pub mod cuda;
pub mod error;
pub mod guards;
pub mod links;
pub mod problem;
pub mod steps;
