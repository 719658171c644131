//! Groups of ranks: how they meet, how they tell each other of calls, of losses and of giving up.
//!
//! A communicator is made over a [`Bootstrap`]: a rank, a size, an all-gather of bytes and a barrier. [`rendezvous`] is
//! the built-in one for processes of one host, [`threads`] the one for threads of one process; a user's own may run over
//! torch.distributed, MPI or a key-value store, and needs no socket of this crate.
//!
//! A bootstrap may bring a [`Monitor`], which notices lost ranks at once. Without one (`threads` has none) a wait for a
//! rank that is gone ends at the deadline.

mod abort;
mod bootstrap;
pub(crate) mod calls;
pub mod failure;
mod loss;
pub mod rendezvous;
pub mod shared_memory;
mod threads;

pub use abort::Aborter;
pub use bootstrap::{Bootstrap, BootstrapError, Monitor};
pub use loss::{How, Lost};
pub use threads::{Thread, threads};
