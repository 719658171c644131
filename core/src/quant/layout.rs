//! Where a scale factor lies in memory.
//!
//! A block-scaled tensor of `rows` rows has one byte for each of `cols` blocks of a row. The swizzled layout is
//! the one that cuBLAS and CUTLASS document for block-scaled matrix products: rows are padded to 128 and
//! columns to 4, and the scales are cut into tiles of 128 x 4, which lie in row-major order. Within a tile's
//! 512 bytes, the scale of row `r` and column `c` is at `r % 32 * 16 + r / 32 * 4 + c`. Padding is 0.

use core::ops::Range;

use super::ScaleLayout;

/// Rows of a tile.
const TILE_ROWS: u64 = 128;
/// Columns of a tile.
const TILE_COLS: u64 = 4;
/// Bytes of a tile.
pub(super) const TILE_BYTES: u64 = TILE_ROWS * TILE_COLS;

impl ScaleLayout {
    /// Rows with padding. At most `u64::MAX`, where [`bytes`](Self::bytes) is `None`.
    pub const fn rows_padded(self, rows: u64) -> u64 {
        match self {
            ScaleLayout::Linear => rows,
            ScaleLayout::Swizzled128x4 => rows.div_ceil(TILE_ROWS).saturating_mul(TILE_ROWS),
        }
    }

    /// Columns with padding. At most `u64::MAX`, where [`bytes`](Self::bytes) is `None`.
    pub const fn cols_padded(self, cols: u64) -> u64 {
        match self {
            ScaleLayout::Linear => cols,
            ScaleLayout::Swizzled128x4 => cols.div_ceil(TILE_COLS).saturating_mul(TILE_COLS),
        }
    }

    /// Bytes of the scales of `rows` rows of `cols` blocks, padding included; `None` past 64 bits.
    pub const fn bytes(self, rows: u64, cols: u64) -> Option<u64> {
        self.rows_padded(rows).checked_mul(self.cols_padded(cols))
    }

    /// Where the scale of row `row` and column `col` is. Both may be padding, but no more: `row` is less than
    /// `rows_padded` and `col` less than `cols_padded` of a shape that has [`bytes`](Self::bytes).
    #[inline(always)]
    pub const fn offset(self, row: u64, col: u64, cols: u64) -> u64 {
        match self {
            ScaleLayout::Linear => row * cols + col,
            ScaleLayout::Swizzled128x4 => {
                let tile = row / TILE_ROWS * cols.div_ceil(TILE_COLS) + col / TILE_COLS;
                tile * TILE_BYTES + offset_in_tile(row) + col % TILE_COLS
            }
        }
    }

    /// The columns of every row that are padding.
    pub const fn padding_cols(self, cols: u64) -> Range<u64> {
        cols..self.cols_padded(cols)
    }

    /// The rows that are padding, all columns of them.
    pub const fn padding_rows(self, rows: u64) -> Range<u64> {
        rows..self.rows_padded(rows)
    }

    /// Zeroes the scales of the [padding rows](Self::padding_rows), their padding columns included, and touches
    /// no other: the padding columns of a row in use are its writer's to zero, as
    /// [`quantize_row`](super::quantize_row) does. Bytes that `scales` is too short for are left out.
    pub fn zero_padding_rows(self, rows: u64, cols: u64, scales: &mut [u8]) {
        if self == ScaleLayout::Linear || rows.is_multiple_of(TILE_ROWS) {
            return;
        }
        // Only the last row of tiles has padding rows. A tile is 32 lines of 16 bytes, four for each of the rows
        // `line`, `line + 32`, `line + 64` and `line + 96`, so what a line has of padding is at its end.
        let Ok(start) = usize::try_from(self.offset(rows / TILE_ROWS * TILE_ROWS, 0, cols)) else { return };
        let used = (rows % TILE_ROWS) as usize;
        let mut keep = [[0; 16]; (TILE_BYTES / 16) as usize];
        for (line, keep) in keep.iter_mut().enumerate() {
            keep[..4 * used.saturating_sub(line).div_ceil(32)].fill(u8::MAX);
        }
        // A loop that is vectorized: thousands of little fills took longer than quantizing a row.
        let tiles = scales.get_mut(start..).unwrap_or_default().chunks_mut(TILE_BYTES as usize);
        for (_, tile) in (0..cols.div_ceil(TILE_COLS)).zip(tiles) {
            for (scale, keep) in tile.iter_mut().zip(keep.as_flattened()) {
                *scale &= keep;
            }
        }
    }
}

/// Where the four scales of row `row` start in their tile.
#[inline(always)]
pub(super) const fn offset_in_tile(row: u64) -> u64 {
    row % 32 * 16 + row % TILE_ROWS / 32 * 4
}
