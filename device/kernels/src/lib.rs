#![doc = include_str!("../README.md")]
//!
//! # Sizes
//! An archive has a frame for each processor and set of kernels, with the modules of all element types in it: these are
//! alike. To get one module out, one frame is decompressed, 1 to 13 MB in a few hundredths of a second, and nothing is kept.
//! The kernels for `sm_90`, PTX and machine code, are 51 MB in 4.3.
#![forbid(unsafe_code)]

mod archive;
mod names;
mod pack;

pub use archive::{Archive, Error, Module};
pub use pack::{DICTIONARY, Kind, Member, pack};
