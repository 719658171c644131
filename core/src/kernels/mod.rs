//! The table of kernels: their entry points, the modules that hold them, and the largest blocks that each takes.
//!
//! A [`Module`] is a file of PTX, `bf16_w4` for instance: the kernels of one element type and one [`Set`]. A
//! [`Kernel`] is a [`Family`] with an [`Epilogue`], in every [`Version`] an entry point: `two_shot_fp4_p2`. There is
//! a folder of modules for each [`Processor`].
//!
//! Properties of a whole launch that are off the critical path are parameters, not kernels of their own: the norm beside its
//! codes, gamma's type, weight bias and epsilon, the layout of scales, their type and the size of blocks. So an epilogue is a
//! norm or none, times the quantizers.
//!
//! Operations that are [plain](is_plain) have kernels with nothing else in them: at few tokens a kernel takes as long as it is.
//! All others (a bias, a norm of the sum, experts, another rounding, MXFP4) have kernels whose epilogue is a parameter as well,
//! [`AnyEpilogue`](crate::launch::AnyEpilogue). So have plain ones where kernels for each are not worth their bytes: rows that
//! are streamed, wire formats between more than two ranks, and groups of several hosts.
//!
//! Tests hold the table against the compiled kernels, both ways. Kernels that are not the library's own are not in it:
//! their names are those crates' affair, and their [`bounds`] those of the set that they resemble.

mod bounds;
mod processor;
mod table;

pub use bounds::{Bounds, bounds};
pub use processor::Processor;
pub use table::{Addends, Entry, Epilogue, Family, Kernel, Module, Quantizer, Set, Version, is_plain};
