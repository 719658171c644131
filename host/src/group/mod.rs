//! Groups of ranks: how they meet, how they tell each other of calls, of losses and of giving up.
//!
//! A communicator is made over a [`Bootstrap`]: a rank, a size, an all-gather of bytes and a barrier. [`rendezvous`] is
//! the built-in one for processes of one host, or of several over TCP, which
//! [`rank_env`] finds in the environment of a launcher, [`threads`] the one for threads of one process; a user's own may run over
//! torch.distributed, MPI or a key-value store, and needs no socket of this crate.
//!
//! A bootstrap may bring a [`Monitor`], which notices lost ranks at once. Without one (`threads` has none) a wait for a
//! rank that is gone ends at the deadline.

mod abort;
mod bootstrap;
pub(crate) mod calls;
pub mod failure;
mod hosts;
mod loss;
pub mod meeting_place;
pub mod rank_env;
pub mod rendezvous;
pub mod shared_memory;
mod slurm_nodes;
mod starting_process;
mod threads;

pub use abort::Aborter;
pub use bootstrap::{Bootstrap, BootstrapError, Monitor};
pub use hosts::Hosts;
pub use loss::{How, Lost};
pub use threads::{Thread, threads};
