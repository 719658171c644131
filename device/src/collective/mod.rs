//! The collectives, each with an epilogue: one-shot, two-shot, two-shot with a sharded residual, and those across hosts.
//!
//! Arrival is seen in the data itself, by [`lamport`](fused_collective_core::lamport)'s rules. What a kernel does:
//! 1. reads what is constant (gamma, scales), which may be had before the kernels ahead have ended;
//! 2. waits for them, and makes this rank's addend where a [prologue](crate::prologue) does;
//! 3. reads its block's [`Epoch`] and its first input together, and lets the next kernel start;
//! 4. pushes to its peers, then advances the epochs;
//! 5. waits for what the peers push, and completes its rows.
//!
//! # Order and scope
//! - *Pushed data* is written and polled word by word, relaxed, at system scope. Each word says by itself whether it
//!   has arrived, so no order between words is needed, and no fence.
//! - *A slot is refilled* with the sentinel by the thread that has read it, at once. Between operations a rank's
//!   slots hold nothing but the sentinel and what peers already sent for the next, so a slot needs no record of
//!   what used it last: any sequence of modes, shapes and element types is the same to it. The refill is coherent
//!   with the poll before it (same thread, same words), and a peer writes those words again three operations later.
//!   By then it has seen data that this rank sent in a later kernel than the refill, and the boundary between
//!   kernels on either side (the end of a grid, or `griddepcontrol.wait`) makes that chain a release and an acquire.
//! - *Inputs, residuals and outputs* are weak accesses: written by kernels before or after in the stream, and each
//!   element touched by one thread.
//! - *Epochs*: every block reads one of its own, relaxed, and writes it, relaxed, after a barrier that all its threads
//!   reach when they have used what they read. The epochs that no block of this grid has are written by the blocks in
//!   shares, and read by nobody. So all epochs are the same when a grid ends, grids of any size can follow each other,
//!   and no block asks another how far it is. The next kernel reads after its dependent-launch wait. A wait that fails
//!   reads the operation's number again, and knows by its slot whether it has been advanced.
//! - *Poison* is a word that any thread may set once, and that all read as they begin: a kernel that starts on a
//!   poisoned rank pushes nothing, or it could run ahead of peers that are late and write over what they have not
//!   read.
//!
//! # Programmatic dependent launch
//! `launch_dependents` promises nothing about memory. The next kernel may be resident early, and compute addresses; its own
//! `griddepcontrol.wait` returns when this grid has completed and all it wrote is visible, so it can never see
//! unfinished outputs. Every thread here waits before it lets the next kernel start, so when a kernel starts, the
//! one before the last has completed: the order of a stream holds along the chain. And a grid starts only once
//! every block of the one before is running, so it takes no place that a block it depends on needs.
//!
//! A dependent that never waits must not follow: it would see unfinished outputs. NCCL's kernels over symmetric windows are such,
//! from 2.28.0 on and before 2.30.7.
//!
//! # Waits
//! A rank waits for peers' data only, never for their blocks. In which order a block pushes and waits, and why ranks cannot
//! wait in a circle, each collective says for itself: `one_shot`, `two_shot`, for a sharded residual `turns`, and `hosts`.
//! Waits are bounded: see the `wait` module.
//!
//! # Protocols of one's own
//! [`Begun`], [`Waiter`], [`region`], [`peer`] and [`deal`] are what the collectives are made of, and what a kernel of
//! another protocol needs to keep their rules about poison, deadlines and the host's word.
//!
//! [`Epoch`]: crate::launch::Epoch

mod begun;
mod hosts;
mod one_shot;
mod partials;
mod ranks;
mod sharded;
mod sum;
mod turns;
mod two_shot;
mod wait;

pub use begun::Begun;
pub use hosts::{host_sum, sharded_hosts, two_shot_hosts};
pub use one_shot::one_shot;
pub use ranks::{deal, peer, region};
pub use sharded::sharded;
pub use two_shot::two_shot;
pub use wait::{Awaited, Waiter};
