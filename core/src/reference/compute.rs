//! The outputs of one token, computed in `f64`.

use crate::{
    dtype::Element,
    fusion::Operation,
    norm::Gamma,
    quant::{self, RowError},
};

/// Roundings to the element type before the norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// Once, after the residual was added: the fused operation.
    Once,
    /// Twice, after the all-reduce and after the residual was added: separate operations.
    AfterAllReduce,
}

/// The inputs of one token of an operation.
#[derive(Clone, Copy, Debug)]
pub struct Token<'a, E> {
    /// Row of the token in the input of each rank, in rank order, `[hidden]` each.
    pub inputs: &'a [&'a [E]],
    /// Row of the token in the residual, `[hidden]`; `None` without a residual.
    pub residual: Option<&'a [E]>,
    /// The weight of RMSNorm, `[hidden]`; not read without a norm.
    pub gamma: Gamma<'a, E>,
    /// The per-tensor or global scale; not read by the other quantizations.
    pub scale: f32,
    /// Index of the token, which is its row in the tensor of scales.
    pub index: u64,
}

impl<E: Element> Token<'_, E> {
    pub(super) fn sum(&self, index: usize) -> f64 {
        self.inputs.iter().map(|row| f64::from(row[index].to_f32())).sum()
    }

    pub(super) fn residual(&self, index: usize) -> f64 {
        self.residual.map_or(0.0, |row| f64::from(row[index].to_f32()))
    }

    pub(super) fn weight(&self, index: usize, weight_bias: f32) -> f64 {
        f64::from(weight_bias) + f64::from(self.gamma.get(index))
    }
}

/// Computes the right outputs of one token.
///
/// `residual_out` and `norm` are `[hidden]`. `norm` is written, and read by the quantization, only if the operation
/// has a norm. `values` receives the codes of the token. `scales` are those of the whole tensor, as in
/// [`quant::quantize_row`].
///
/// # Errors
/// Those of [`quant::quantize_row`].
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
pub(super) fn inverse_rms<E: Element>(row: &[E], epsilon: f32) -> f64 {
    1.0 / libm::sqrt(sum_of_squares(row) / row.len() as f64 + f64::from(epsilon))
}

pub(super) fn sum_of_squares<E: Element>(row: &[E]) -> f64 {
    row.iter().map(|value| f64::from(value.to_f32())).map(|value| value * value).sum()
}
