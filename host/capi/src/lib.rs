//! The C ABI of `fused-collective`. `include/fused_collective.h` is made from these sources, and a test compares it.
//!
//! Rules that hold throughout:
//! - no panic crosses: it becomes [`FC_STATUS_PANIC`](types::fc_status::Panic);
//! - a null pointer, a struct of no known size and a number that names no value are errors, and nothing was sent;
//! - a struct grows at its end only, a new field means by 0 that it is not there, and no number of an enum changes.

mod arguments;
mod bootstrap;
pub mod communicator;
mod failure;
pub mod types;
mod values;

pub use failure::{fc_error_peer, fc_error_rank, fc_error_text};
