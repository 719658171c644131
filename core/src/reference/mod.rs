//! The operation in `f64`, slow and obvious: what the [specification](crate::specification) in `f32` is judged by, and every
//! implementation that is not held to its bits.
//!
//! [`check_token`] judges outputs of `f32` arithmetic, where rounding may move a value across a rounding boundary. Each
//! output must therefore lie between two roundings: of the exact value lowered, and raised, by the allowed error of `f32`
//! arithmetic. Each stage is judged from the *observed* result of the stage before, since the operation defines each stage
//! as reading that result.
//!
//! # Allowed errors
//! With `u = 2^-24`, half the spacing of `f32`:
//! - a sum of `n` addends is within `n * u` of the sum of their magnitudes, in any order. A host's sum that is rounded to the
//!   element type lies between two roundings, as above;
//! - a norm is within `(8 + sqrt(hidden)) * u` of itself. A few roundings of the product and of the reciprocal
//!   square root (2 or 3 for an approximate one) are part of this. The rest is half the error of partial sums of
//!   squares whose roundings add up as a random walk over the row;
//! - quantization has no allowed error: it is exact in `f32`, so equal norms give equal codes.

mod check;
mod special;

pub use check::check_token;
pub use special::Special;
