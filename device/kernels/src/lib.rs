#![doc = include_str!("../README.md")]
//!
//! # Sizes
//! An archive has a frame for each processor and set of kernels, with the modules of all element types in it: these are
//! alike. To get one module out, one frame is decompressed, 1 to 5 MB in a few hundredths of a second, and nothing is kept.
//! The kernels for all processors take 7.7 MB; those for `sm_90` are 37 MB, PTX and machine code, in 1.8.
#![forbid(unsafe_code)]

mod archive;
mod names;
mod pack;

pub use archive::{Archive, Error, Module};
pub use pack::{DICTIONARY, Kind, Member, pack};
