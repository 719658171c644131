//! The backends of the program: tensors, the steps of variants, and their times.
//!
//! A [`Problem`](problem::Problem) is one configuration. Its tensors have fixed roles, listed in
//! [`Tensor`](problem::Tensor). A variant is a sequence of [`Step`](steps::Step)s on them, the same on every backend. Every
//! rank has one [`Collective`](collective::Collective), and makes the same calls as the others.

pub mod all_reduce_choice;
pub mod collective;
pub mod cpu;
pub mod cuda;
pub mod error;
mod gather;
pub mod guards;
pub mod links;
pub mod problem;
pub mod steps;
