//! Quantizations and layouts, by number, and the places that layouts give.

use fused_collective_core::quant::{Quantization, ScaleLayout};

use crate::fold::Fold;

/// The number of [`quantization`]s.
pub(crate) const QUANTIZATIONS: u32 = 15;

/// Every quantization in every layout.
pub(crate) fn quantization(number: u32) -> Quantization {
    let layout = if number.is_multiple_of(2) { ScaleLayout::Linear } else { ScaleLayout::Swizzled128x4 };
    match number {
        0 | 1 => Quantization::NvFp4 { layout },
        2 | 3 => Quantization::MxFp8 { layout },
        4 | 5 => Quantization::MxFp4 { layout },
        6 | 7 => Quantization::Fp8PerGroup { group: 32, layout },
        8 | 9 => Quantization::Fp8PerGroup { group: 64, layout },
        10 | 11 => Quantization::Fp8PerGroup { group: 128, layout },
        12 => Quantization::Fp8Static,
        13 => Quantization::Fp8PerToken,
        _ => Quantization::None,
    }
}

/// Folds the places of scales: of rows and columns that fill tiles, and that do not.
pub(crate) fn fold_layouts(fold: &mut Fold) {
    for layout in [ScaleLayout::Linear, ScaleLayout::Swizzled128x4] {
        for cols in [1, 4, 7] {
            for rows in [1, 127, 128, 259] {
                fold.word(layout.bytes(rows, cols).unwrap_or(u64::MAX));
            }
            for row in 0..259 {
                for col in 0..cols {
                    fold.word(layout.offset(row, col, cols));
                }
            }
        }
        fold.word(layout.bytes(u64::MAX, 4).unwrap_or(u64::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quantizations_are_all_different_and_one_is_none() {
        for number in 0..QUANTIZATIONS {
            assert!((0..number).all(|other| quantization(other) != quantization(number)), "{number}");
        }
        assert_eq!(quantization(QUANTIZATIONS - 1), Quantization::None);
    }
}
