//! Quantizations and layouts, by number, and the places that layouts give.

use fused_collective_core::quant::{GroupScale, Quantization, ScaleLayout, ScaleTensor};

use crate::fold::Fold;

/// The number of [`quantization`]s.
pub(crate) const QUANTIZATIONS: u32 = 41;

/// Every quantization in every layout.
pub(crate) fn quantization(number: u32) -> Quantization {
    let layout = ScaleLayout::ALL[number as usize % 5];
    let group = |group| Quantization::Fp8PerGroup { group, scales: GroupScale::Ue8m0, layout };
    match number / 5 {
        0 => Quantization::NvFp4 { layout },
        1 => Quantization::MxFp8 { layout },
        2 => Quantization::MxFp4 { layout },
        3 => group(32),
        4 => group(64),
        5 => group(128),
        // Of these, the two last are in no layout of `f32` scales.
        6 if layout.takes(4) => Quantization::Fp8PerGroup { group: 128, scales: GroupScale::F32, layout },
        6 if layout == ScaleLayout::Swizzled128x4 => Quantization::Fp8Static,
        6 => Quantization::Fp8PerToken,
        7 if layout.takes(4) => Quantization::Fp8PerGroup { group: 64, scales: GroupScale::F32, layout },
        7 if layout == ScaleLayout::Swizzled128x4 => {
            Quantization::Fp8PerGroup { group: 32, scales: GroupScale::F32, layout: ScaleLayout::Linear }
        }
        7 => Quantization::Fp8PerGroup { group: 32, scales: GroupScale::F32, layout: ScaleLayout::DeepGemm },
        _ => Quantization::None,
    }
}

/// Folds the places of scales: of rows and columns that fill tiles, and that do not.
pub(crate) fn fold_layouts(fold: &mut Fold) {
    for layout in ScaleLayout::ALL {
        let of = |rows, cols, size| ScaleTensor { layout, rows, cols, size };
        for cols in [1, 4, 7] {
            for rows in [1, 127, 128, 259] {
                fold.word(of(rows, cols, 1).bytes().unwrap_or(u64::MAX));
            }
            for row in 0..259 {
                for col in 0..cols {
                    fold.word(of(259, cols, 1).offset(row, col));
                    if layout.takes(4) {
                        fold.word(of(259, cols, 4).offset(row, col));
                    }
                }
            }
        }
        fold.word(of(u64::MAX, 4, 1).bytes().unwrap_or(u64::MAX));
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
