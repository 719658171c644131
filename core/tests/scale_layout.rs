//! The layouts of scale factors: against a transcription of their definition, and as properties.

use fused_collective_core::quant::{Quantization, ScaleLayout};
use proptest::prelude::*;

const LAYOUTS: [ScaleLayout; 2] = [ScaleLayout::Linear, ScaleLayout::Swizzled128x4];

/// The padded matrix viewed as `[rows / 128][4][32][cols / 4][4]` and permuted to
/// `[rows / 128][cols / 4][32][4][4]`, as PyTorch and FlashInfer write it: row and column in memory order.
fn swizzled_by_definition(rows_padded: u64, cols_padded: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..rows_padded / 128).flat_map(move |row_tile| {
        (0..cols_padded / 4).flat_map(move |col_tile| {
            (0..32).flat_map(move |row_in_quarter| {
                (0..4).flat_map(move |quarter| {
                    (0..4).map(move |col_in_tile| {
                        (row_tile * 128 + quarter * 32 + row_in_quarter, col_tile * 4 + col_in_tile)
                    })
                })
            })
        })
    })
}

#[test]
fn swizzled_is_the_permutation_that_defines_it() {
    let layout = ScaleLayout::Swizzled128x4;
    for (rows, cols) in [(1, 1), (1, 4), (127, 3), (128, 4), (129, 5), (300, 90), (512, 16)] {
        let (rows_padded, cols_padded) = (layout.rows_padded(rows), layout.cols_padded(cols));
        let mut places = 0;
        for (place, (row, col)) in (0..).zip(swizzled_by_definition(rows_padded, cols_padded)) {
            assert_eq!(layout.offset(row, col, cols), place, "row {row}, column {col} of {rows} x {cols}");
            places += 1;
        }
        assert_eq!(layout.bytes(rows, cols), Some(places));
    }
}

#[test]
fn swizzled_pads_rows_to_128_and_columns_to_4() {
    let layout = ScaleLayout::Swizzled128x4;
    assert_eq!([0, 1, 128, 129].map(|rows| layout.rows_padded(rows)), [0, 128, 128, 256]);
    assert_eq!([0, 1, 4, 5].map(|cols| layout.cols_padded(cols)), [0, 4, 4, 8]);
}

#[test]
fn linear_is_row_major_without_padding() {
    let layout = ScaleLayout::Linear;
    assert_eq!((layout.rows_padded(7), layout.cols_padded(3), layout.bytes(7, 3)), (7, 3, Some(21)));
    assert_eq!(layout.offset(2, 1, 3), 7);
}

proptest! {
    #[test]
    fn no_overlap_and_no_gap(rows in 0u64..400, cols in 0u64..70) {
        for layout in LAYOUTS {
            let bytes = layout.bytes(rows, cols).unwrap();
            let mut taken = vec![false; bytes as usize];
            for row in 0..layout.rows_padded(rows) {
                for col in 0..layout.cols_padded(cols) {
                    let place = &mut taken[layout.offset(row, col, cols) as usize];
                    prop_assert!(!*place, "{layout:?}: row {row}, column {col} lies on another");
                    *place = true;
                }
            }
            prop_assert!(taken.iter().all(|&taken| taken), "{layout:?} has gaps");
        }
    }

    #[test]
    fn sizes_are_exact_or_refused(rows: u64, cols: u64, shift in 0u32..64) {
        // Shifted so that products of every size come up, those near 2^64 among them.
        let (rows, cols) = (rows >> shift, cols >> (63 - shift));
        for (layout, row_multiple, col_multiple) in [(LAYOUTS[0], 1, 1), (LAYOUTS[1], 128, 4)] {
            let padded = |n: u64, multiple: u128| u128::from(n).div_ceil(multiple) * multiple;
            let exact = padded(rows, row_multiple) * padded(cols, col_multiple);
            let bytes = layout.bytes(rows, cols);
            prop_assert_eq!(bytes, u64::try_from(exact).ok());
            if let Some(bytes) = bytes && bytes > 0 {
                let last = layout.offset(layout.rows_padded(rows) - 1, layout.cols_padded(cols) - 1, cols);
                prop_assert_eq!(last, bytes - 1, "the last place is the last byte");
            }
        }
    }

    #[test]
    fn padding_rows_are_zeroed_and_nothing_else(rows in 0u64..300, cols in 0u64..12) {
        for layout in LAYOUTS {
            let mut scales = vec![0xaa; layout.bytes(rows, cols).unwrap() as usize];
            layout.zero_padding_rows(rows, cols, &mut scales);
            for row in 0..layout.rows_padded(rows) {
                for col in 0..layout.cols_padded(cols) {
                    let expected = if row < rows { 0xaa } else { 0 };
                    prop_assert_eq!(scales[layout.offset(row, col, cols) as usize], expected);
                }
            }
        }
    }
}

#[test]
fn a_size_one_byte_over_64_bits_is_refused() {
    assert_eq!(ScaleLayout::Linear.bytes(1 << 32, 1 << 32), None);
    assert_eq!(ScaleLayout::Linear.bytes(u64::MAX, 1), Some(u64::MAX));
    for (rows, cols) in [(u64::MAX, 1), (1, u64::MAX), (u64::MAX - 126, 4), (1 << 62, 4)] {
        assert_eq!(ScaleLayout::Swizzled128x4.bytes(rows, cols), None, "{rows} x {cols}");
    }
}

#[test]
fn quantizations_say_how_many_bytes_they_write() {
    let swizzled = ScaleLayout::Swizzled128x4;
    let linear = ScaleLayout::Linear;
    // quantization, hidden size, bytes of a row of values, columns of scales, bytes of scales of 5 tokens
    let cases = [
        (Quantization::None, 96, 0, 0, 0),
        (Quantization::Fp8Static, 96, 96, 0, 0),
        (Quantization::Fp8PerToken, 96, 96, 1, 20),
        (Quantization::Fp8PerGroup { group: 128, layout: linear }, 384, 384, 3, 15),
        (Quantization::Fp8PerGroup { group: 64, layout: swizzled }, 384, 384, 6, 1024),
        (Quantization::NvFp4 { layout: linear }, 48, 24, 3, 15),
        (Quantization::NvFp4 { layout: swizzled }, 48, 24, 3, 512),
        (Quantization::MxFp8 { layout: swizzled }, 2880, 2880, 90, 11_776),
        (Quantization::MxFp4 { layout: linear }, 2880, 1440, 90, 450),
    ];
    for (quantization, hidden, value_bytes, cols, scale_bytes) in cases {
        assert!(quantization.supports(hidden), "{quantization:?}");
        assert_eq!(quantization.value_bytes_per_row(hidden), value_bytes, "{quantization:?}");
        assert_eq!(quantization.scale_cols(hidden), cols, "{quantization:?}");
        assert_eq!(quantization.scale_bytes(5, hidden), Some(scale_bytes), "{quantization:?}");
    }
    assert_eq!(Quantization::Fp8PerToken.scale_bytes(u64::MAX, 16), None);
    assert!(!Quantization::NvFp4 { layout: linear }.supports(40));
    assert!(!Quantization::Fp8PerGroup { group: 48, layout: linear }.supports(96));
    assert_eq!(Quantization::Fp8PerGroup { group: 0, layout: linear }.scale_cols(96), 0);
}
