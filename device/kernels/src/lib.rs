#![doc = include_str!("../README.md")]
//!
//! # Sizes
//! An archive has a frame for each processor and set of kernels, with the modules of all element types in it: these are
//! alike. To get one module out, one frame is decompressed, 1 to 13 MB in a few hundredths of a second, and nothing is kept.
//! All kernels, PTX and machine code of four processors, are 100 MB in 6.
#![forbid(unsafe_code)]

mod archive;
mod pack;

pub use archive::{Archive, Error, Module};
pub use pack::{DICTIONARY, Kind, Member, pack};
