//! The layouts of scale factors: against transcriptions of their definitions, and as properties.

use fused_collective_core::quant::{GroupScale, Quantization, ScaleLayout, ScaleTensor};
use proptest::prelude::*;

/// Every layout with scales of every size that it takes.
fn tensors(rows: u64, cols: u64) -> impl Iterator<Item = ScaleTensor> {
    [1, 4].into_iter().flat_map(move |size| {
        let takes = ScaleLayout::ALL.into_iter().filter(move |layout| layout.takes(size));
        takes.map(move |layout| ScaleTensor { layout, rows, cols, size })
    })
}

fn tensor(layout: ScaleLayout, rows: u64, cols: u64) -> ScaleTensor {
    ScaleTensor { layout, rows, cols, size: 1 }
}

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
    for (rows, cols) in [(1, 1), (1, 4), (127, 3), (128, 4), (129, 5), (300, 90), (512, 16)] {
        let tensor = tensor(ScaleLayout::Swizzled128x4, rows, cols);
        let mut places = 0;
        let by_definition = swizzled_by_definition(tensor.rows_padded(), tensor.cols_padded());
        for (place, (row, col)) in (0..).zip(by_definition) {
            assert_eq!(tensor.offset(row, col), place, "row {row}, column {col} of {rows} x {cols}");
            places += 1;
        }
        assert_eq!(tensor.bytes(), Some(places));
    }
}

/// Tiles of 8 rows and 4 columns after each other, each row-major.
#[test]
fn small_tiles_are_row_major_in_the_tile_and_among_tiles() {
    let tensor = tensor(ScaleLayout::Swizzled8x4, 19, 6);
    let mut place = 0;
    for (row_tile, col_tile) in (0..3).flat_map(|row| [(row, 0), (row, 1)]) {
        for (row, col) in (0..8).flat_map(|row| (0..4).map(move |col| (row, col))) {
            assert_eq!(tensor.offset(row_tile * 8 + row, col_tile * 4 + col), place);
            place += 1;
        }
    }
    assert_eq!(tensor.bytes(), Some(place));
}

/// DeepGEMM's layouts as it makes them: the scales padded to a multiple of 4 columns (UE8M0), viewed as words, transposed,
/// each column of words padded to a multiple of 16 bytes.
#[test]
fn deep_gemm_reads_columns_of_words_aligned_to_16_bytes() {
    for (rows, column) in [(1, 4), (4, 4), (5, 8), (131, 132)] {
        for cols in [1, 4, 6, 57] {
            let packed = tensor(ScaleLayout::DeepGemm, rows, cols);
            let wide = ScaleTensor { size: 4, ..packed };
            for (row, col) in (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col))) {
                assert_eq!(packed.offset(row, col), (col / 4 * column + row) * 4 + col % 4);
                assert_eq!(wide.offset(row, col), (col * column + row) * 4);
            }
            assert_eq!(packed.bytes(), Some(cols.div_ceil(4) * column * 4));
            assert_eq!(wide.bytes(), Some(cols * column * 4));
        }
    }
}

#[test]
fn rows_and_columns_are_padded_to_tiles() {
    let padded = |layout, rows, cols| {
        let tensor = tensor(layout, rows, cols);
        (tensor.rows_padded(), tensor.cols_padded())
    };
    let rows = [0, 1, 128, 129];
    assert_eq!(rows.map(|rows| padded(ScaleLayout::Swizzled128x4, rows, 5).0), [0, 128, 128, 256]);
    assert_eq!(rows.map(|rows| padded(ScaleLayout::Swizzled8x4, rows, 5).0), [0, 8, 128, 136]);
    assert_eq!(rows.map(|rows| padded(ScaleLayout::DeepGemm, rows, 5).0), [0, 4, 128, 132]);
    for layout in [ScaleLayout::Swizzled128x4, ScaleLayout::Swizzled8x4, ScaleLayout::DeepGemm] {
        assert_eq!([0, 1, 4, 5].map(|cols| padded(layout, 1, cols).1), [0, 4, 4, 8]);
    }
    assert_eq!(ScaleTensor { size: 4, ..tensor(ScaleLayout::DeepGemm, 1, 5) }.cols_padded(), 5);
}

#[test]
fn linear_and_column_major_have_no_padding() {
    for (layout, offset) in [(ScaleLayout::Linear, 7), (ScaleLayout::ColumnMajor, 9)] {
        let tensor = tensor(layout, 7, 3);
        assert_eq!((tensor.rows_padded(), tensor.cols_padded(), tensor.bytes()), (7, 3, Some(21)));
        assert_eq!(tensor.offset(2, 1), offset);
        assert_eq!(ScaleTensor { size: 4, ..tensor }.offset(2, 1), 4 * offset);
    }
}

#[test]
fn only_scales_of_a_byte_are_swizzled() {
    assert!(ScaleLayout::ALL.iter().all(|layout| layout.takes(1)));
    let takes = ScaleLayout::ALL.map(|layout| layout.takes(4));
    assert_eq!(takes, [true, true, true, false, false]);
    let layout = ScaleLayout::Swizzled8x4;
    assert!(!Quantization::Fp8PerGroup { group: 128, scales: GroupScale::F32, layout }.supports(128));
}

proptest! {
    #[test]
    fn no_overlap_and_no_gap(rows in 0u64..400, cols in 0u64..70) {
        for tensor in tensors(rows, cols) {
            let mut taken = vec![false; tensor.bytes().unwrap() as usize];
            for row in 0..tensor.rows_padded() {
                for col in 0..tensor.cols_padded() {
                    let place = tensor.offset(row, col);
                    prop_assert_eq!(tensor.strides().offset(row, col as u32), place);
                    for byte in 0..tensor.size {
                        let place = &mut taken[(place + byte) as usize];
                        prop_assert!(!*place, "{tensor:?}: row {row}, column {col} lies on another");
                        *place = true;
                    }
                }
            }
            prop_assert!(taken.iter().all(|&taken| taken), "{tensor:?} has gaps");
        }
    }

    #[test]
    fn sizes_are_exact_or_refused(rows: u64, cols: u64, shift in 0u32..64) {
        // Shifted so that products of every size come up, those near 2^64 among them.
        for tensor in tensors(rows >> shift, cols >> (63 - shift)) {
            let in_word = u128::from(4 / tensor.size);
            let [row_multiple, col_multiple] = match tensor.layout {
                ScaleLayout::Linear | ScaleLayout::ColumnMajor => [1, 1],
                ScaleLayout::DeepGemm => [4, in_word],
                ScaleLayout::Swizzled128x4 => [128, 4],
                ScaleLayout::Swizzled8x4 => [8, 4],
            };
            let padded = |n: u64, multiple: u128| u128::from(n).div_ceil(multiple) * multiple;
            let scales = padded(tensor.rows, row_multiple) * padded(tensor.cols, col_multiple);
            let bytes = tensor.bytes();
            prop_assert_eq!(bytes, u64::try_from(scales * u128::from(tensor.size)).ok());
            if let Some(bytes) = bytes && bytes > 0 {
                let last = tensor.offset(tensor.rows_padded() - 1, tensor.cols_padded() - 1);
                prop_assert_eq!(last, bytes - tensor.size, "the last place is the last scale");
            }
        }
    }

    #[test]
    fn padding_rows_are_zeroed_and_nothing_else(rows in 0u64..300, cols in 0u64..12) {
        for tensor in tensors(rows, cols) {
            let mut scales = vec![0xaa; tensor.bytes().unwrap() as usize];
            tensor.zero_padding_rows(&mut scales);
            for row in 0..tensor.rows_padded() {
                for col in 0..tensor.cols_padded() {
                    let expected = match (row < rows, tensor.size) {
                        (false, _) => 0,
                        (true, 1) => 0xaa,
                        (true, _) => 0xaaaa_aaaa,
                    };
                    prop_assert_eq!(tensor.get(&scales, row, col), Some(expected));
                }
            }
        }
    }
}

#[test]
fn a_size_one_byte_over_64_bits_is_refused() {
    assert_eq!(tensor(ScaleLayout::Linear, 1 << 32, 1 << 32).bytes(), None);
    assert_eq!(tensor(ScaleLayout::Linear, u64::MAX, 1).bytes(), Some(u64::MAX));
    assert_eq!(ScaleTensor { size: 4, ..tensor(ScaleLayout::Linear, 1 << 62, 1) }.bytes(), None);
    for (rows, cols) in [(u64::MAX, 1), (1, u64::MAX), (u64::MAX - 126, 4), (1 << 62, 4)] {
        assert_eq!(tensor(ScaleLayout::Swizzled128x4, rows, cols).bytes(), None, "{rows} x {cols}");
    }
}

#[test]
fn quantizations_say_how_many_bytes_they_write() {
    let swizzled = ScaleLayout::Swizzled128x4;
    let linear = ScaleLayout::Linear;
    let group = |group, scales, layout| Quantization::Fp8PerGroup { group, scales, layout };
    // quantization, hidden size, bytes of a row of values, columns of scales, bytes of scales of 5 tokens
    let cases = [
        (Quantization::None, 96, 0, 0, 0),
        (Quantization::Fp8Static, 96, 96, 0, 0),
        (Quantization::Fp8PerToken, 96, 96, 1, 20),
        (group(128, GroupScale::Ue8m0, linear), 384, 384, 3, 15),
        (group(128, GroupScale::F32, linear), 384, 384, 3, 60),
        (group(128, GroupScale::F32, ScaleLayout::DeepGemm), 384, 384, 3, 96),
        (group(128, GroupScale::Ue8m0, ScaleLayout::DeepGemm), 384, 384, 3, 32),
        (group(64, GroupScale::Ue8m0, swizzled), 384, 384, 6, 1024),
        (Quantization::NvFp4 { layout: linear }, 48, 24, 3, 15),
        (Quantization::NvFp4 { layout: swizzled }, 48, 24, 3, 512),
        (Quantization::NvFp4 { layout: ScaleLayout::Swizzled8x4 }, 48, 24, 3, 32),
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
    assert!(!group(48, GroupScale::Ue8m0, linear).supports(96));
    assert_eq!(group(0, GroupScale::Ue8m0, linear).scale_cols(96), 0);
}
