//! Rows of special numbers: NaN, infinities, subnormal numbers, zeros of either sign, the largest numbers.
//!
//! Tests put these rows among ordinary ones, to show that a special value affects its own row only and stops no rank.

use crate::dtype::{DType, Element};

/// A kind of row. Elements that a kind does not mention are small whole numbers, so that sums of them are exact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// No special element.
    Ordinary,
    /// One element of rank 0 is NaN.
    Nan,
    /// Every element of rank 0 is the NaN of all bits, and so every word [the sentinel](crate::lamport::SENTINEL).
    Sentinel,
    /// One element of rank 0 is infinite.
    Infinity,
    /// One element is infinite, with opposite signs on ranks 0 and 1: their sum is NaN.
    OppositeInfinities,
    /// Every element is a small multiple of the smallest positive number.
    Subnormal,
    /// Every element is `-0.0`.
    NegativeZero,
    /// Every element is `+0.0`.
    Zero,
    /// Every element is the largest finite number, on every rank: sums overflow.
    Largest,
    /// One element is the largest finite number, with opposite signs on ranks 0 and 1, which cancel.
    Cancelling,
    /// One element of rank 0 is half the largest number, whose square overflows.
    OneHuge,
}

impl Special {
    /// Every kind.
    pub const ALL: [Special; 11] = [
        Special::Ordinary,
        Special::Nan,
        Special::Sentinel,
        Special::Infinity,
        Special::OppositeInfinities,
        Special::Subnormal,
        Special::NegativeZero,
        Special::Zero,
        Special::Largest,
        Special::Cancelling,
        Special::OneHuge,
    ];

    /// The kind of token `token` in a tensor of special rows: even tokens are ordinary, odd ones have the other kinds
    /// in turn.
    pub fn of_token(token: u64) -> Special {
        let kinds = Self::ALL.len() as u64 - 1;
        if token.is_multiple_of(2) { Special::Ordinary } else { Self::ALL[1 + (token / 2 % kinds) as usize] }
    }

    /// Fills `row`, the input of rank `rank` for token `token`, with this kind. Rows of different tokens differ.
    pub fn fill<E: Element>(self, rank: u32, token: u64, row: &mut [E]) {
        let (smallest, largest) = extremes(E::DTYPE);
        let place = row.len() / 3;
        for (index, element) in row.iter_mut().enumerate() {
            let mixed =
                (index as u64).wrapping_mul(7) ^ token.wrapping_mul(5) ^ u64::from(rank).wrapping_mul(3);
            let whole = (mixed % 9) as f32 - 4.0;
            if self == Special::Sentinel && rank == 0 {
                *element = E::from_bits(u32::MAX);
                continue;
            }
            let here = index == place;
            let sign = match rank {
                0 => 1.0,
                1 => -1.0,
                _ => 0.0,
            };
            *element = E::from_f32(match self {
                Special::Nan if here && rank == 0 => f32::NAN,
                Special::Infinity if here && rank == 0 => f32::INFINITY,
                Special::OppositeInfinities if here && rank < 2 => sign * f32::INFINITY,
                Special::Subnormal => whole * smallest,
                Special::NegativeZero => -0.0,
                Special::Zero => 0.0,
                Special::Largest => largest,
                Special::Cancelling if here => sign * largest,
                Special::OneHuge if here && rank == 0 => largest / 2.0,
                _ => whole,
            });
        }
    }
}

/// The smallest positive number and the largest finite one.
fn extremes(dtype: DType) -> (f32, f32) {
    match dtype {
        DType::F32 => (f32::from_bits(1), f32::MAX),
        DType::F16 => (1.0 / (1 << 24) as f32, 65_504.0),
        DType::Bf16 => (f32::from_bits(1 << 16), f32::from_bits(0x7f7f_0000)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::{bf16, f16};

    fn row<E: Element>(kind: Special, rank: u32) -> [f32; 16] {
        let mut row = [E::from_f32(0.0); 16];
        kind.fill(rank, 3, &mut row);
        row.map(Element::to_f32)
    }

    fn kinds_are_what_they_say<E: Element>() {
        assert!(row::<E>(Special::Nan, 0).iter().any(|x| x.is_nan()));
        assert!(row::<E>(Special::Sentinel, 0).iter().all(|x| x.is_nan()));
        assert!(row::<E>(Special::Infinity, 0).contains(&f32::INFINITY));
        assert!(row::<E>(Special::OppositeInfinities, 1).contains(&f32::NEG_INFINITY));
        // Half of the smallest number rounds to zero: there is none between.
        let subnormal = row::<E>(Special::Subnormal, 0).into_iter().find(|x| x.abs() > 0.0);
        assert!(subnormal.is_some_and(|x| x.abs() < 1e-6));
        assert!(row::<E>(Special::NegativeZero, 0).iter().all(|x| x.to_bits() == 1 << 31));
        assert!(row::<E>(Special::Zero, 0).iter().all(|x| x.to_bits() == 0));
        let largest = row::<E>(Special::Largest, 0)[0];
        assert!(largest.is_finite() && E::from_f64(f64::from(largest) * 1.01).to_f32().is_infinite());
        assert!(row::<E>(Special::OneHuge, 0).contains(&(largest / 2.0)));
        assert!(row::<E>(Special::Cancelling, 1).contains(&-largest));
    }

    #[test]
    fn kinds_are_what_they_say_in_every_type() {
        kinds_are_what_they_say::<f32>();
        kinds_are_what_they_say::<f16>();
        kinds_are_what_they_say::<bf16>();
    }
}
