//! The scales of blocks in memory: one, a word of several, and the padding, in every layout.

use fused_collective_core::pack::Pack;

use super::PackIndex;
use crate::{
    launch::{Address, BlockScales, Shape},
    simt,
};

/// The logarithm of the rows of a tile of 128 rows, of which 16 bytes have four scales of four rows each.
const LARGE_TILE: u32 = 7;

/// The scales of blocks of `1 << block_packs_log2` packs.
#[derive(Clone, Copy)]
pub(super) struct Blocks<'a> {
    pub(super) scales: &'a BlockScales,
    pub(super) block_packs_log2: u32,
}

impl Blocks<'_> {
    #[inline(always)]
    fn cols(&self, row_packs: u32) -> u32 {
        row_packs >> self.block_packs_log2
    }

    /// `black_box`, so that a scale's address is computed where it is used: registers are few before.
    #[inline(always)]
    fn at(&self, row: u64, col: u32) -> Address {
        let (row, col) = (simt::black_box_u64(row), simt::black_box_u32(col));
        self.scales.address.offset(self.scales.strides.offset(row, col))
    }

    /// True if the block of pack `index` starts with it.
    #[inline(always)]
    pub(super) fn starts(&self, index: PackIndex) -> bool {
        index.pack & ((1 << self.block_packs_log2) - 1) == 0
    }

    /// Stores the scales of `count` blocks, 1, 2 or 4, of which the first starts with pack `index`: an `f32`, or bytes from
    /// the lowest of `scales` on. With the last scale of a row go its padding columns; bytes past the last are 0.
    ///
    /// # Safety
    /// `index` is inside the tensors, and its block a multiple of `count`.
    #[inline(always)]
    pub(super) unsafe fn store(&self, index: PackIndex, count: u32, scales: u32) {
        let strides = &self.scales.strides;
        let (first, cols) = (index.pack >> self.block_packs_log2, self.cols(index.row_packs));
        let mut address = self.at(index.token, first);
        // Four columns from a multiple of four on are a word, aligned, where they are adjacent in rows of whole words.
        let is_word = || strides.col == 1 && (strides.pads_cols() || cols.is_multiple_of(4));
        if strides.size == 4 || count == 4 && is_word() {
            // SAFETY: inside the tensor of scales, padding columns included.
            return unsafe { simt::store_value(address, scales) };
        }
        let (mut col, mut rest) = (first, scales);
        loop {
            // SAFETY: as above. Padding columns follow the last one: they end a group of four.
            unsafe { simt::store_value(address, rest as u8) };
            rest >>= 8;
            col += 1;
            address = address.offset(strides.col);
            let goes_on = if col < cols { col < first + count } else { strides.pads_cols() && col % 4 != 0 };
            if !goes_on {
                return;
            }
        }
    }

    /// Zeroes the scales of the rows that pad the last tile of rows, with the round that has the last token. Thread `thread`
    /// of `threads` does its share.
    ///
    /// # Safety
    /// As [`store`](Self::store).
    #[inline(always)]
    pub(super) unsafe fn fill_padding(&self, shape: &Shape, thread: u32, threads: u32) {
        let log2 = self.scales.strides.tile_rows_log2;
        let is_last = shape.first_token + shape.tokens as u64 == shape.total_tokens;
        let used = shape.total_tokens as u32 & ((1 << log2) - 1);
        if used == 0 || !is_last {
            return;
        }
        // Words of four columns, or of one.
        let cols = self.cols(shape.row_packs);
        let words = if self.scales.strides.size == 4 { cols } else { cols.div_ceil(4) };
        let first_row = shape.total_tokens - used as u64;
        let mut index = thread;
        if log2 == LARGE_TILE {
            // A tile is 32 lines of 16 bytes: four for each of the rows `line`, `line + 32`, `line + 64`, `line + 96`.
            let tiles = self.at(first_row, 0);
            while index < words * 32 {
                let at = tiles.offset(index as u64 * 16);
                let line = index % 32;
                // SAFETY: inside the tensor, and of no row that a thread stores scales of.
                unsafe {
                    if line >= used {
                        simt::store(at, Pack([0; 4]));
                    } else {
                        for quarter in 1..4 {
                            if quarter * 32 + line >= used {
                                simt::store_value(at.offset(quarter as u64 * 4), 0u32);
                            }
                        }
                    }
                }
                index += threads;
            }
            return;
        }
        // Tiles have 4 or 8 rows. Those in use are skipped, so that no division is needed.
        while index < words << log2 {
            let (word, row) = (index >> log2, index & ((1 << log2) - 1));
            let col = if self.scales.strides.size == 4 { word } else { word * 4 };
            if row >= used {
                // SAFETY: as above.
                unsafe { simt::store_value(self.at(first_row + row as u64, col), 0u32) };
            }
            index += threads;
        }
    }
}
