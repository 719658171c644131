//! The whole operation in `f64`, slow and obvious: the oracle of every test and of the benchmark.
//!
//! [`compute_token`] says what the right answer is. [`check_token`] judges an implementation's answer: an
//! implementation works in `f32`, whose rounding may tip a value to the other side of a boundary, so each
//! output must lie between the roundings of the exact value lowered and raised by what `f32` arithmetic may
//! be off. Each stage is judged from the stage before it *as it was observed*, since that is what the
//! numeric contract says the stage reads.
//!
//! # The allowance
//! With `u = 2^-24`, half the spacing of `f32`:
//! - a sum of `n` addends is within `n * u` of the sum of their magnitudes;
//! - a norm is within `(8 + sqrt(hidden)) * u` of itself: a few roundings of the product and of the
//!   reciprocal square root (an approximate one is off by 2 or 3), and half the error that partial sums of the
//!   squares would have if their roundings added up as a random walk over the whole row;
//! - quantization is exact in `f32` and gets none: equal norms give equal codes.

mod check;
mod special;

pub use check::{Mismatch, Observed, Output, check_token};
pub use special::Special;

use crate::{
    dtype::Element,
    fusion::Operation,
    norm::Gamma,
    quant::{self, RowError},
};

/// Where a sequence of operations rounds to the element type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// The fused operation: once, when the residual has been added.
    Once,
    /// Separate operations: the all-reduce's result too, before the residual is added.
    AfterAllReduce,
}

/// What one token of an operation is computed from.
#[derive(Clone, Copy, Debug)]
pub struct Token<'a, E> {
    /// The token's row of each rank's input, in rank order, `[hidden]` each.
    pub inputs: &'a [&'a [E]],
    /// The token's row of the residual, `[hidden]`, if the operation has one.
    pub residual: Option<&'a [E]>,
    /// The weight, `[hidden]`.
    pub gamma: Gamma<'a, E>,
    /// The per-tensor or global scale that the quantization reads, if it does.
    pub scale: f32,
    /// Which token it is: its scales go to this row of the scale tensor.
    pub index: u64,
}

impl<E: Element> Token<'_, E> {
    fn sum(&self, index: usize) -> f64 {
        self.inputs.iter().map(|row| f64::from(row[index].to_f32())).sum()
    }

    fn residual(&self, index: usize) -> f64 {
        self.residual.map_or(0.0, |row| f64::from(row[index].to_f32()))
    }

    fn weight(&self, index: usize, weight_bias: f32) -> f64 {
        f64::from(weight_bias) + f64::from(self.gamma.get(index))
    }
}

/// The right outputs of one token.
///
/// `residual_out` and `norm` are `[hidden]`; `norm` is written, and read by the quantization, only if the
/// operation has a norm. `values` is the token's row and `scales` the whole tensor, as for
/// [`quant::quantize_row`].
///
/// # Errors
/// What [`quant::quantize_row`] refuses.
///
/// # Panics
/// If a row of `token` is shorter than `residual_out`.
pub fn compute_token<E: Element>(
    operation: &Operation,
    rounding: Rounding,
    token: &Token<'_, E>,
    residual_out: &mut [E],
    norm: &mut [E],
    values: &mut [u8],
    scales: &mut [u8],
) -> Result<(), RowError> {
    for (index, out) in residual_out.iter_mut().enumerate() {
        let reduced = match rounding {
            Rounding::Once => token.sum(index),
            Rounding::AfterAllReduce => f64::from(E::from_f64(token.sum(index)).to_f32()),
        };
        *out = E::from_f64(reduced + token.residual(index));
    }
    let Some(parameters) = operation.norm else { return Ok(()) };
    let inverse_rms = inverse_rms(residual_out, parameters.epsilon);
    for (index, (out, value)) in norm.iter_mut().zip(&*residual_out).enumerate() {
        let weight = token.weight(index, parameters.weight_bias);
        *out = E::from_f64(f64::from(value.to_f32()) * inverse_rms * weight);
    }
    quant::quantize_row(
        operation.quantization,
        norm,
        token.index,
        operation.tokens,
        token.scale,
        values,
        scales,
    )
}

/// `1 / sqrt(mean(row^2) + epsilon)`.
fn inverse_rms<E: Element>(row: &[E], epsilon: f32) -> f64 {
    1.0 / libm::sqrt(sum_of_squares(row) / row.len() as f64 + f64::from(epsilon))
}

fn sum_of_squares<E: Element>(row: &[E]) -> f64 {
    row.iter().map(|value| f64::from(value.to_f32())).map(|value| value * value).sum()
}
