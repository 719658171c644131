//! Memory layouts of scale factors: the place of each scale, and the padding between and after them.

use core::{fmt, ops::Range};

/// Rows of a tile of [`ScaleLayout::Swizzled128x4`].
const TILE_ROWS: u64 = 128;
/// Columns of a tile.
const TILE_COLS: u64 = 4;
/// Rows of a tile of [`ScaleLayout::Swizzled8x4`].
const SMALL_TILE_ROWS: u64 = 8;
/// Bytes of a word of [`ScaleLayout::DeepGemm`].
const WORD: u64 = 4;
/// Words at whose multiples a column of [`ScaleLayout::DeepGemm`] starts: 16 bytes, as tensor copies need.
const COLUMN_WORDS: u64 = 4;

/// Memory layout of scale factors.
///
/// A tensor of `rows` rows with `cols` blocks in each has one scale of `size` bytes for row `r` and column `c`. In the
/// formulas below `/` is integer division and `%` its remainder. Scales of padding rows and columns are 0.
///
/// # `Linear`
/// Row-major, without padding:
/// ```text
/// bytes  = rows * cols * size
/// offset = (r * cols + c) * size
/// ```
///
/// # `ColumnMajor`
/// The transposed matrix, without padding, as vLLM's `per_token_group_quant_fp8` writes it with `column_major_scales`:
/// ```text
/// bytes  = rows * cols * size
/// offset = (c * rows + r) * size
/// ```
///
/// # `DeepGemm`
/// The layout that DeepGEMM's kernels read (`get_mn_major_tma_aligned_tensor` for `f32` scales, and
/// `get_mn_major_tma_aligned_packed_ue8m0_tensor`): a column-major matrix of words of 4 bytes, each an `f32` scale or four
/// UE8M0 scales of adjacent columns. Every column of words starts at a multiple of 16 bytes:
/// ```text
/// in_word = 4 / size
/// bytes   = 4 * ceil(rows / 4) * 4 * ceil(cols / in_word)
/// offset  = 4 * (c / in_word * ceil(rows / 4) * 4 + r) + c % in_word * size
/// ```
///
/// # `Swizzled128x4`
/// The layout that cuBLAS and CUTLASS document for block-scaled matrix products on Blackwell, of scales of one byte. Rows
/// are padded to a multiple of 128 and columns to a multiple of 4. Tiles of 128 rows by 4 columns take 512 bytes each and
/// lie in row-major order:
/// ```text
/// row_tiles = ceil(rows / 128)
/// col_tiles = ceil(cols / 4)
/// bytes     = 512 * row_tiles * col_tiles
/// tile      = r / 128 * col_tiles + c / 4
/// offset    = 512 * tile + r % 32 * 16 + r % 128 / 32 * 4 + c % 4
/// ```
/// Each 16 bytes of a tile therefore hold 4 columns of the rows `i`, `i + 32`, `i + 64` and `i + 96`. As
/// PyTorch writes it: the padded scales, viewed as `[row_tiles, 4, 32, col_tiles, 4]` and permuted to
/// `[row_tiles, col_tiles, 32, 4, 4]`.
///
/// # `Swizzled8x4`
/// Tiles of 8 rows by 4 columns, row-major in the tile and among tiles, as FlashInfer's `SWIZZLED_8x4` for products of few
/// rows. Scales have one byte:
/// ```text
/// bytes  = 32 * ceil(rows / 8) * ceil(cols / 4)
/// offset = 32 * (r / 8 * ceil(cols / 4) + c / 4) + r % 8 * 4 + c % 4
/// ```
///
/// ```
/// use fused_collective_core::quant::{ScaleLayout, ScaleTensor};
///
/// let of = |layout| ScaleTensor { layout, rows: 130, cols: 6, size: 1 };
/// let linear = of(ScaleLayout::Linear);
/// assert_eq!((linear.bytes(), linear.offset(129, 5)), (Some(130 * 6), 129 * 6 + 5));
/// let swizzled = of(ScaleLayout::Swizzled128x4);
/// assert_eq!(swizzled.bytes(), Some(512 * 2 * 2));
/// assert_eq!([(33, 5), (129, 5)].map(|(row, col)| swizzled.offset(row, col)), [512 + 16 + 4 + 1, 512 * 3 + 16 + 1]);
/// let packed = of(ScaleLayout::DeepGemm);
/// assert_eq!((packed.bytes(), packed.offset(129, 5)), (Some(4 * 132 * 2), 4 * (132 + 129) + 1));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleLayout {
    /// Row-major, `[tokens, hidden / block]`.
    Linear,
    /// Column-major: `[hidden / block, tokens]`.
    ColumnMajor,
    /// Column-major words, aligned, as DeepGEMM reads them.
    DeepGemm,
    /// Tiles of 128 rows by 4 columns, as the matrix instructions of Blackwell GPUs read them.
    Swizzled128x4,
    /// Tiles of 8 rows by 4 columns.
    Swizzled8x4,
}

impl ScaleLayout {
    /// Every layout.
    pub const ALL: [ScaleLayout; 5] = [
        ScaleLayout::Linear,
        ScaleLayout::ColumnMajor,
        ScaleLayout::DeepGemm,
        ScaleLayout::Swizzled128x4,
        ScaleLayout::Swizzled8x4,
    ];

    /// True if scales of `size` bytes, 1 or 4, can lie in this layout.
    pub const fn takes(self, size: u64) -> bool {
        size == 1 || !matches!(self, ScaleLayout::Swizzled128x4 | ScaleLayout::Swizzled8x4)
    }

    /// The layout's number in launch parameters and in calls: its index in [`ALL`](Self::ALL).
    pub const fn code(self) -> u32 {
        self as u32
    }
}

impl fmt::Display for ScaleLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ScaleLayout::Linear => "linear",
            ScaleLayout::ColumnMajor => "column-major",
            ScaleLayout::DeepGemm => "DeepGEMM",
            ScaleLayout::Swizzled128x4 => "swizzled 128x4",
            ScaleLayout::Swizzled8x4 => "swizzled 8x4",
        })
    }
}

/// The scales of a quantized tensor: their layout, number and size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ScaleTensor {
    /// The layout.
    pub layout: ScaleLayout,
    /// Rows: the tokens.
    pub rows: u64,
    /// Scales of a row.
    pub cols: u64,
    /// Bytes of a scale: 1, or 4 for an `f32`, which is little-endian.
    pub size: u64,
}

impl ScaleTensor {
    /// Rows, padding included. Saturates at `u64::MAX`, where [`bytes`](Self::bytes) is `None`.
    pub const fn rows_padded(self) -> u64 {
        let multiple = match self.layout {
            ScaleLayout::Linear | ScaleLayout::ColumnMajor => return self.rows,
            ScaleLayout::DeepGemm => COLUMN_WORDS,
            ScaleLayout::Swizzled128x4 => TILE_ROWS,
            ScaleLayout::Swizzled8x4 => SMALL_TILE_ROWS,
        };
        self.rows.div_ceil(multiple).saturating_mul(multiple)
    }

    /// Columns, padding included. Saturates at `u64::MAX`, where [`bytes`](Self::bytes) is `None`.
    pub const fn cols_padded(self) -> u64 {
        let multiple = match self.layout {
            ScaleLayout::Linear | ScaleLayout::ColumnMajor => return self.cols,
            ScaleLayout::DeepGemm => WORD / self.size,
            ScaleLayout::Swizzled128x4 | ScaleLayout::Swizzled8x4 => TILE_COLS,
        };
        self.cols.div_ceil(multiple).saturating_mul(multiple)
    }

    /// Bytes, padding included; `None` past 64 bits.
    pub const fn bytes(self) -> Option<u64> {
        match self.rows_padded().checked_mul(self.cols_padded()) {
            Some(scales) => scales.checked_mul(self.size),
            None => None,
        }
    }

    /// Byte offset of the scale of row `row` and column `col`.
    ///
    /// `row` must be less than `rows_padded` and `col` less than `cols_padded`, of a tensor that has
    /// [`bytes`](Self::bytes): both may be padding.
    #[inline(always)]
    pub const fn offset(self, row: u64, col: u64) -> u64 {
        let ScaleTensor { layout, rows, cols, size } = self;
        match layout {
            ScaleLayout::Linear => (row * cols + col) * size,
            ScaleLayout::ColumnMajor => (col * rows + row) * size,
            ScaleLayout::DeepGemm => {
                let in_word = WORD / size;
                let column = rows.div_ceil(COLUMN_WORDS) * COLUMN_WORDS;
                (col / in_word * column + row) * WORD + col % in_word * size
            }
            ScaleLayout::Swizzled128x4 => {
                let tile = row / TILE_ROWS * cols.div_ceil(TILE_COLS) + col / TILE_COLS;
                tile * (TILE_ROWS * TILE_COLS) + row % 32 * 16 + row % TILE_ROWS / 32 * 4 + col % TILE_COLS
            }
            ScaleLayout::Swizzled8x4 => {
                let tile = row / SMALL_TILE_ROWS * cols.div_ceil(TILE_COLS) + col / TILE_COLS;
                (tile * SMALL_TILE_ROWS + row % SMALL_TILE_ROWS) * TILE_COLS + col % TILE_COLS
            }
        }
    }

    /// The layout as distances, for a processor that places one scale at a time.
    #[inline(always)]
    pub const fn strides(self) -> ScaleStrides {
        let tile_rows_log2 = match self.layout {
            ScaleLayout::Linear | ScaleLayout::ColumnMajor => 0,
            ScaleLayout::DeepGemm => COLUMN_WORDS.ilog2(),
            ScaleLayout::Swizzled128x4 => TILE_ROWS.ilog2(),
            ScaleLayout::Swizzled8x4 => SMALL_TILE_ROWS.ilog2(),
        };
        ScaleStrides {
            tile: self.offset(1 << tile_rows_log2, 0),
            col: self.offset(0, 1),
            four_cols: self.offset(0, 4),
            tile_rows_log2,
            size: self.size as u32,
        }
    }

    /// The scale of row `row` and column `col`, as the little-endian number of its bytes; `None` past the end of `scales`.
    pub fn get(self, scales: &[u8], row: u64, col: u64) -> Option<u32> {
        let start = usize::try_from(self.offset(row, col)).ok()?;
        let bytes = scales.get(start..start.checked_add(self.size as usize)?)?;
        Some(bytes.iter().rev().fold(0, |number, &byte| number << 8 | u32::from(byte)))
    }

    /// The padding columns of every row.
    pub const fn padding_cols(self) -> Range<u64> {
        self.cols..self.cols_padded()
    }

    /// The padding rows, of which every column is padding.
    pub const fn padding_rows(self) -> Range<u64> {
        self.rows..self.rows_padded()
    }

    /// Zeroes the scales of the [padding rows](Self::padding_rows), in every column, and writes no other byte.
    ///
    /// The padding columns of a row in use are zeroed by [`quantize_row`](super::quantize_row), with that row. Offsets
    /// past the end of `scales` are skipped.
    pub fn zero_padding_rows(self, scales: &mut [u8]) {
        if self.layout == ScaleLayout::Swizzled128x4 {
            return self.zero_large_padding_rows(scales);
        }
        for row in self.padding_rows() {
            for col in 0..self.cols_padded() {
                let start = usize::try_from(self.offset(row, col)).unwrap_or(usize::MAX);
                let end = start.saturating_add(self.size as usize);
                scales.get_mut(start..end).unwrap_or_default().fill(0);
            }
        }
    }

    /// [`zero_padding_rows`](Self::zero_padding_rows) of tiles of 128 rows.
    fn zero_large_padding_rows(self, scales: &mut [u8]) {
        let rows = self.rows;
        if rows.is_multiple_of(TILE_ROWS) {
            return;
        }
        // Only the last row of tiles has padding rows. A tile is 32 lines of 16 bytes. A line has four bytes for each
        // of the rows `line`, `line + 32`, `line + 64` and `line + 96`, so its padding is at its end.
        let Ok(start) = usize::try_from(self.offset(rows / TILE_ROWS * TILE_ROWS, 0)) else { return };
        let used = (rows % TILE_ROWS) as usize;
        const TILE_BYTES: usize = (TILE_ROWS * TILE_COLS) as usize;
        let mut keep = [[0; 16]; TILE_BYTES / 16];
        for (line, keep) in keep.iter_mut().enumerate() {
            keep[..4 * used.saturating_sub(line).div_ceil(32)].fill(u8::MAX);
        }
        // This loop is vectorized: thousands of small fills took longer than quantizing a row.
        let tiles = scales.get_mut(start..).unwrap_or_default().chunks_mut(TILE_BYTES);
        for (_, tile) in (0..self.cols.div_ceil(TILE_COLS)).zip(tiles) {
            for (scale, keep) in tile.iter_mut().zip(keep.as_flattened()) {
                *scale &= keep;
            }
        }
    }
}

/// A [`ScaleTensor`] as distances in bytes. In every layout four columns from a multiple of four on are equally far apart.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScaleStrides {
    /// From a tile of rows to the next.
    pub tile: u64,
    /// From a column that is no last one of four to the next.
    pub col: u64,
    /// From four columns to the next four.
    pub four_cols: u64,
    /// The logarithm of the rows of a tile, to which rows are padded: 0, 2, 3 or 7.
    pub tile_rows_log2: u32,
    /// Of a scale: 1 or 4.
    pub size: u32,
}

impl ScaleStrides {
    /// As [`ScaleTensor::offset`].
    #[inline(always)]
    pub const fn offset(self, row: u64, col: u32) -> u64 {
        let in_tile = row as u32 & ((1 << self.tile_rows_log2) - 1);
        let in_tile = if self.tile_rows_log2 == TILE_ROWS.ilog2() {
            in_tile % 32 * 16 + in_tile / 32 * 4
        } else {
            in_tile * 4
        };
        (row >> self.tile_rows_log2) * self.tile
            + in_tile as u64
            + (col / 4) as u64 * self.four_cols
            + (col % 4) as u64 * self.col
    }

    /// True if columns are padded to a multiple of 4, which are then adjacent.
    #[inline(always)]
    pub const fn pads_cols(self) -> bool {
        self.tile_rows_log2 != 0 && self.size == 1
    }
}
