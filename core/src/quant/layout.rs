//! Memory layouts of scale factors: the place of each scale, and the padding between and after them.

use core::ops::Range;

/// Rows of a tile.
const TILE_ROWS: u64 = 128;
/// Columns of a tile.
const TILE_COLS: u64 = 4;
/// Bytes of a tile.
pub(super) const TILE_BYTES: u64 = TILE_ROWS * TILE_COLS;

/// Memory layout of scale factors, one byte each.
///
/// A tensor of `rows` rows with `cols` blocks in each has one scale for row `r` and column `c`. In the formulas below
/// `/` is integer division and `%` its remainder.
///
/// # `Linear`
/// Row-major, without padding:
/// ```text
/// bytes  = rows * cols
/// offset = r * cols + c
/// ```
///
/// # `Swizzled128x4`
/// The layout that cuBLAS and CUTLASS document for block-scaled matrix products on Blackwell. Rows are padded to a
/// multiple of 128 and columns to a multiple of 4. Tiles of 128 rows by 4 columns take 512 bytes each and lie in
/// row-major order:
/// ```text
/// row_tiles = ceil(rows / 128)
/// col_tiles = ceil(cols / 4)
/// bytes     = 512 * row_tiles * col_tiles
/// tile      = r / 128 * col_tiles + c / 4
/// offset    = 512 * tile + r % 32 * 16 + r % 128 / 32 * 4 + c % 4
/// ```
/// Each 16 bytes of a tile therefore hold 4 columns of the rows `i`, `i + 32`, `i + 64` and `i + 96`. As
/// PyTorch writes it: the padded scales, viewed as `[row_tiles, 4, 32, col_tiles, 4]` and permuted to
/// `[row_tiles, col_tiles, 32, 4, 4]`. Scales of padding rows and columns are 0.
///
/// ```
/// use fused_collective_core::quant::ScaleLayout;
///
/// let (rows, cols) = (130, 6);
/// assert_eq!(ScaleLayout::Linear.bytes(rows, cols), Some(130 * 6));
/// assert_eq!(ScaleLayout::Linear.offset(129, 5, cols), 129 * 6 + 5);
/// let swizzled = ScaleLayout::Swizzled128x4;
/// assert_eq!(swizzled.bytes(rows, cols), Some(512 * 2 * 2));
/// assert_eq!(swizzled.offset(33, 5, cols), 512 + 16 + 4 + 1);
/// assert_eq!(swizzled.offset(129, 5, cols), 512 * 3 + 16 + 1);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleLayout {
    /// Row-major, `[tokens, hidden / block]`.
    Linear,
    /// Tiles of 128 rows by 4 columns, as the matrix instructions of Blackwell GPUs read them.
    Swizzled128x4,
}

impl ScaleLayout {
    /// Rows, padding included. Saturates at `u64::MAX`, where [`bytes`](Self::bytes) is `None`.
    pub const fn rows_padded(self, rows: u64) -> u64 {
        match self {
            ScaleLayout::Linear => rows,
            ScaleLayout::Swizzled128x4 => rows.div_ceil(TILE_ROWS).saturating_mul(TILE_ROWS),
        }
    }

    /// Columns, padding included. Saturates at `u64::MAX`, where [`bytes`](Self::bytes) is `None`.
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

    /// Byte offset of the scale of row `row` and column `col`.
    ///
    /// `row` must be less than `rows_padded` and `col` less than `cols_padded`, of a shape that has
    /// [`bytes`](Self::bytes): both may be padding.
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

    /// The padding columns of every row.
    pub const fn padding_cols(self, cols: u64) -> Range<u64> {
        cols..self.cols_padded(cols)
    }

    /// The padding rows, of which every column is padding.
    pub const fn padding_rows(self, rows: u64) -> Range<u64> {
        rows..self.rows_padded(rows)
    }

    /// Zeroes the scales of the [padding rows](Self::padding_rows), in every column, and writes no other byte.
    ///
    /// The padding columns of a row in use are zeroed by [`quantize_row`](super::quantize_row), with that row. Offsets
    /// past the end of `scales` are skipped.
    pub fn zero_padding_rows(self, rows: u64, cols: u64, scales: &mut [u8]) {
        if self == ScaleLayout::Linear || rows.is_multiple_of(TILE_ROWS) {
            return;
        }
        // Only the last row of tiles has padding rows. A tile is 32 lines of 16 bytes. A line has four bytes for each
        // of the rows `line`, `line + 32`, `line + 64` and `line + 96`, so its padding is at its end.
        let Ok(start) = usize::try_from(self.offset(rows / TILE_ROWS * TILE_ROWS, 0, cols)) else { return };
        let used = (rows % TILE_ROWS) as usize;
        let mut keep = [[0; 16]; (TILE_BYTES / 16) as usize];
        for (line, keep) in keep.iter_mut().enumerate() {
            keep[..4 * used.saturating_sub(line).div_ceil(32)].fill(u8::MAX);
        }
        // This loop is vectorized: thousands of small fills took longer than quantizing a row.
        let tiles = scales.get_mut(start..).unwrap_or_default().chunks_mut(TILE_BYTES as usize);
        for (_, tile) in (0..cols.div_ceil(TILE_COLS)).zip(tiles) {
            for (scale, keep) in tile.iter_mut().zip(keep.as_flattened()) {
                *scale &= keep;
            }
        }
    }
}

/// Offset of the four scales of row `row` in their tile.
#[inline(always)]
pub(super) const fn offset_in_tile(row: u64) -> u64 {
    row % 32 * 16 + row % TILE_ROWS / 32 * 4
}
