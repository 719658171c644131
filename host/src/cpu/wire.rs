//! Rows in the formats that `fused_collective_core::wire` specifies.
//!
//! The loops are portable, over rows of `f32`; each is a pass that [rows](super::rows) describes.

use fused_collective_core::{fusion::Rounding, wire::WireFormat};
use pulp::{Simd, WithSimd};

use super::{rows::Plain, sum::Operand};

/// Encodes `row` as it is sent. `wide` holds a row.
pub(super) struct EncodeRow<'a, E> {
    pub(super) format: WireFormat,
    pub(super) row: &'a [E],
    pub(super) wide: &'a mut [f32],
    pub(super) sent: &'a mut [u8],
}

impl<E: Plain> WithSimd for EncodeRow<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let EncodeRow { format, row, wide, sent } = self;
        wide.iter_mut().zip(row).for_each(|(wide, value)| *wide = value.to_f32());
        format.encode(wide, sent);
    }
}

/// Encodes `sum` as it is sent, and replaces it by what is received.
pub(super) struct EncodeSum<'a> {
    pub(super) format: WireFormat,
    pub(super) sum: &'a mut [f32],
    pub(super) sent: &'a mut [u8],
}

impl WithSimd for EncodeSum<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let EncodeSum { format, sum, sent } = self;
        format.encode(sum, sent);
        sum.fill(0.0);
        format.add(sent, sum);
    }
}

/// `sum += sent`.
pub(super) struct AddSent<'a> {
    pub(super) format: WireFormat,
    pub(super) sent: &'a [u8],
    pub(super) sum: &'a mut [f32],
}

impl WithSimd for AddSent<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        self.format.add(self.sent, self.sum);
    }
}

/// `out = round(sum + bias + residual)`, in `f32` in that order. Leaves `sum` as it is before it is rounded. All have the
/// same length.
pub(super) struct RoundSum<'a, E> {
    pub(super) sum: &'a mut [f32],
    pub(super) bias: Option<&'a [E]>,
    /// In place, it is what `out` holds.
    pub(super) residual: Option<Operand<&'a [E]>>,
    pub(super) rounding: Rounding,
    pub(super) out: &'a mut [E],
}

impl<E: Plain> WithSimd for RoundSum<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let RoundSum { sum, bias, residual, rounding, out } = self;
        if let Some(bias) = bias {
            add(sum, bias);
        }
        if let Some(residual) = residual {
            if rounding == Rounding::AfterAllReduce {
                sum.iter_mut().for_each(|sum| *sum = E::from_f32(*sum).to_f32());
            }
            match residual {
                Operand::Apart(residual) => add(sum, residual),
                Operand::InPlace => add(sum, out),
            }
        }
        out.iter_mut().zip(sum).for_each(|(out, sum)| *out = E::from_f32(*sum));
    }
}

#[inline(always)]
fn add<E: Plain>(sum: &mut [f32], addend: &[E]) {
    sum.iter_mut().zip(addend).for_each(|(sum, addend)| *sum += addend.to_f32());
}
