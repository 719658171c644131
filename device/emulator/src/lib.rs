//! Runs the PTX that kernels were compiled to, on the host, one instruction after the other.
//!
//! `simt` runs the kernels' source on the host's threads; this runs what the compiler made of it, for every kind of
//! GPU, on a machine without any. Each thread of a grid goes on by itself, some instructions at a time, in a random
//! order: nothing keeps the threads of a warp together but instructions that say so. Stores to global memory are seen by
//! others some time later, each word by itself, and overtake each other, unless a barrier or a release orders them.
//!
//! A run ends with a [`Fault`] where a GPU would do anything at all:
//! - global memory outside the allocations that the run was given, or not aligned
//! - global memory that two threads of the grid access with nothing between them that orders it, of which one stores, and
//!   not both in a way that allows for it (`relaxed`, `release` and atomic accesses do)
//! - shared memory that nobody has written, that threads access with nothing between them that orders it, or that another
//!   block sends and the thread has not waited for
//! - a barrier of the block that its threads do not all reach; a shuffle, or a barrier of the warp, that lanes of its mask
//!   reach at different instructions, or neither reach nor end; a shuffle that reads a lane which has ended
//! - a block that ends while other blocks of its cluster still send to it
//! - global memory that is accessed before `griddepcontrol.wait`, but by loads of what is constant
//! - local memory outside the thread's, or not aligned; a call, which only panics are; a trap
//!
//! # What it is not
//! It knows the instructions that the kernels consist of, and says so of any other. It does not judge
//! - global memory, local memory and registers that nobody has written
//! - what two grids do with the same global memory; they only do it in another order each time
//! - a word that is sent to a block over one that a thread still reads
//!
//! A grid runs by itself: a programmatic dependent that starts before its end would be the next one, afterwards. Loads are
//! executed in order; a barrier makes stores visible to everyone, not to its threads alone; fences do nothing,
//! as nothing here overtakes what the kernels' fence orders. Approximate instructions are as exact as the host computes
//! them. What the assembler makes of the PTX, and how fast it is, only a GPU shows.

mod alu;
mod decode;
mod error;
mod grid;
mod instruction;
mod memory;
mod module;
mod races;
mod shared;
mod stores;

pub use error::ParseError;
pub use grid::{Fault, Geometry, Grid};
pub use instruction::Entry;
pub use memory::Memory;
pub use module::Module;
