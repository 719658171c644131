//! The quantizers: none, static FP8, NVFP4.

use fused_collective_core::{
    dtype::Element,
    lamport,
    pack::Pack,
    quant::{ScaleLayout, e2m1, scale},
};

use super::{PackIndex, Quantizer};
use crate::{
    convert,
    launch::{Address, Fp8Static, NvFp4, Shape, Unquantized},
    simt::{self, WARP},
};

/// Elements of an NVFP4 block.
const BLOCK: u32 = 16;
/// Rows of a tile of swizzled scales.
const TILE_ROWS: u32 = 128;

impl<E: Element> Quantizer<E> for Unquantized {
    /// The norm itself is sent.
    const WORDS: u32 = 4;
    type Constants = ();

    #[inline(always)]
    unsafe fn store(&self, _index: PackIndex, _values: Pack, _constants: ()) {}

    #[inline(always)]
    fn encode(_index: PackIndex, values: Pack, _constants: ()) -> (Pack, u32) {
        (values, 0)
    }

    #[inline(always)]
    unsafe fn store_words(&self, index: PackIndex, norm_out: Address, words: Pack) {
        // SAFETY: as this function's.
        unsafe { simt::store(index.of(norm_out), words) }
    }
}

impl<E: Element> Quantizer<E> for Fp8Static {
    /// A byte for each element.
    const WORDS: u32 = E::LANES as u32 / 4;
    /// What values are multiplied by.
    type Constants = f32;

    #[inline(always)]
    unsafe fn constants(&self) -> f32 {
        // SAFETY: the scale is one `f32` and constant.
        scale::fp8_multiplier(f32::from_bits(unsafe { simt::load_constant_u32(self.scale) }))
    }

    #[inline(always)]
    unsafe fn store(&self, index: PackIndex, values: Pack, multiplier: f32) {
        // SAFETY: as this function's.
        unsafe { store_e4m3::<E>(self, index, e4m3::<E>(values, multiplier)) }
    }

    #[inline(always)]
    fn encode(_index: PackIndex, values: Pack, multiplier: f32) -> (Pack, u32) {
        let codes = e4m3::<E>(values, multiplier);
        (Pack([codes as u32, (codes >> 32) as u32, 0, 0]), 0)
    }

    #[inline(always)]
    unsafe fn store_words(&self, index: PackIndex, _norm_out: Address, words: Pack) {
        let Pack([low, high, ..]) = words;
        // SAFETY: as this function's.
        unsafe { store_e4m3::<E>(self, index, u64::from(high) << 32 | u64::from(low)) }
    }
}

/// A pack's codes, one in a byte.
#[inline(always)]
fn e4m3<E: Element>(values: Pack, multiplier: f32) -> u64 {
    let mut codes = 0u64;
    for (index, &[low, high]) in convert::widen::<E>(values).as_ref().as_chunks::<2>().0.iter().enumerate() {
        codes |= (convert::e4m3_pair(low * multiplier, high * multiplier) as u64) << (16 * index);
    }
    codes
}

/// # Safety
/// `index` is inside the tensor.
#[inline(always)]
unsafe fn store_e4m3<E: Element>(quantizer: &Fp8Static, index: PackIndex, codes: u64) {
    let address = quantizer.values.offset(index.in_tensor() * E::LANES as u64);
    // SAFETY: a byte for each element, at a multiple of as many bytes as are stored.
    unsafe {
        match E::LANES {
            8 => simt::store_value(address, codes),
            _ => simt::store_value(address, codes as u32),
        }
    }
}

impl<E: Element> Quantizer<E> for NvFp4 {
    /// A word for each pack. In types of 16 bits it is full; in those of 32 the codes leave half of it, which the block's
    /// scale takes.
    const WORDS: u32 = 1;
    /// In types of 16 bits four blocks' scales have a word of their own.
    const SCALE_PACKS: u32 = if E::LANES == 8 { 8 } else { 0 };
    /// The global scale.
    type Constants = f32;

    #[inline(always)]
    unsafe fn constants(&self) -> f32 {
        // SAFETY: the scale is one `f32` and constant.
        scale::nvfp4_global(f32::from_bits(unsafe { simt::load_constant_u32(self.global_scale) }))
    }

    /// Zeroes the scales of the rows that pad the last row of tiles, with the round that has the last token.
    #[inline(always)]
    unsafe fn fill_padding(&self, shape: &Shape, thread: u32, threads: u32) {
        let is_last = shape.first_token + shape.tokens as u64 == shape.total_tokens;
        let used = shape.total_tokens as u32 % TILE_ROWS;
        if self.swizzled == 0 || used == 0 || !is_last {
            return;
        }
        let cols = shape.row_packs / (BLOCK / E::LANES as u32);
        let row = shape.total_tokens - used as u64;
        let tiles = self.scales.offset(ScaleLayout::Swizzled128x4.offset(row, 0, cols as u64));
        // A tile is 32 lines of 16 bytes: four for each of the rows `line`, `line + 32`, `line + 64`, `line + 96`.
        let lines = cols.div_ceil(4) * 32;
        let mut index = thread;
        while index < lines {
            let at = tiles.offset(index as u64 * 16);
            let line = index % 32;
            // SAFETY: inside `ScaleLayout::bytes`, and of no row that a thread stores scales of.
            unsafe {
                if line >= used {
                    simt::store(at, Pack([0; 4]));
                } else {
                    for quarter in 1..TILE_ROWS / 32 {
                        if quarter * 32 + line >= used {
                            simt::store_value(at.offset(quarter as u64 * 4), 0u32);
                        }
                    }
                }
            }
            index += threads;
        }
    }

    #[inline(always)]
    unsafe fn store(&self, index: PackIndex, values: Pack, global_scale: f32) {
        let (codes, scale) = nvfp4::<E>(values, global_scale, index.lanes());
        // SAFETY: as this function's; a block's scale is its first lane's to store.
        unsafe {
            store_e2m1::<E>(self, index, codes);
            if index.pack.is_multiple_of(packs_per_block::<E>()) {
                store_scale(self, index, packs_per_block::<E>(), scale);
            }
        }
    }

    #[inline(always)]
    fn encode(index: PackIndex, values: Pack, global_scale: f32) -> (Pack, u32) {
        let (codes, scale) = nvfp4::<E>(values, global_scale, WARP);
        if E::LANES != 8 {
            return (Pack([codes | u32::from(scale) << 16, 0, 0, 0]), 0);
        }
        // What no block of the row has a scale for is padding, and zero.
        let scale = if index.pack < index.row_packs { u32::from(scale) } else { 0 };
        (
            Pack([lamport::swap_e2m1(codes), 0, 0, 0]),
            simt::tile_or::<8>(scale << (index.pack / 2 % 4 * 8), WARP),
        )
    }

    #[inline(always)]
    unsafe fn store_words(&self, index: PackIndex, _norm_out: Address, words: Pack) {
        let Pack([word, ..]) = words;
        // SAFETY: as this function's.
        unsafe {
            store_e2m1::<E>(self, index, if E::LANES == 8 { lamport::swap_e2m1(word) } else { word });
            if E::LANES != 8 && index.pack.is_multiple_of(packs_per_block::<E>()) {
                store_scale(self, index, packs_per_block::<E>(), (word >> 16) as u8);
            }
        }
    }

    #[inline(always)]
    unsafe fn store_scales(&self, index: PackIndex, scales: u32) {
        let packs_per_block = packs_per_block::<E>();
        let (col, cols) = (index.pack / packs_per_block, index.row_packs / packs_per_block);
        let layout = if self.swizzled == 0 { ScaleLayout::Linear } else { ScaleLayout::Swizzled128x4 };
        let address = self.scales.offset(layout.offset(index.token, col as u64, cols as u64));
        // SAFETY: inside `ScaleLayout::bytes`, padding columns included. Swizzled, four columns from a multiple of four
        // on are a word, aligned; linear, rows of whole words are.
        unsafe {
            if self.swizzled != 0 || cols.is_multiple_of(4) {
                simt::store_value(address, scales);
                return;
            }
            let mut rest = scales;
            let mut byte = 0;
            while byte < 4 && col + byte < cols {
                simt::store_value(address.offset(byte as u64), rest as u8);
                rest >>= 8;
                byte += 1;
            }
        }
    }
}

/// Packs, and lanes, of an NVFP4 block.
#[inline(always)]
const fn packs_per_block<E: Element>() -> u32 {
    BLOCK / E::LANES as u32
}

/// A pack's codes, two in a byte, and its block's scale. The first `lanes` lanes of a warp call this together.
#[inline(always)]
fn nvfp4<E: Element>(values: Pack, global_scale: f32, lanes: u32) -> (u32, u8) {
    let wide = convert::widen::<E>(values);
    let own = wide.as_ref().iter().fold(0.0, |largest, &value| scale::amax_or_nan(largest, value));
    // Magnitudes, NaN included, are in the order of their bits. A block is the packs of two or four lanes.
    let bits = match E::LANES {
        8 => simt::tile_max::<2>(own.to_bits(), lanes),
        _ => simt::tile_max::<4>(own.to_bits(), lanes),
    };
    // As `scale::nvfp4_block` and `scale::nvfp4_multiplier`.
    let code = convert::ue4m3(scale::nvfp4_scale(f32::from_bits(bits), global_scale));
    let multiplier = scale::nvfp4_multiplier_of(convert::from_ue4m3(code), global_scale);
    (e2m1::canonical(convert::e2m1_codes(wide.as_ref(), multiplier), E::LANES), code)
}

/// # Safety
/// `index` is inside the tensor.
#[inline(always)]
unsafe fn store_e2m1<E: Element>(quantizer: &NvFp4, index: PackIndex, codes: u32) {
    let address = quantizer.values.offset(index.in_tensor() * (E::LANES as u64 / 2));
    // SAFETY: half a byte for each element, at a multiple of as many bytes as are stored.
    unsafe {
        match E::LANES {
            8 => simt::store_value(address, codes),
            _ => simt::store_value(address, codes as u16),
        }
    }
}

/// Stores a block's scale, and with the last one of a row its padding columns.
///
/// # Safety
/// `index` is inside the tensors.
#[inline(always)]
unsafe fn store_scale(quantizer: &NvFp4, index: PackIndex, packs_per_block: u32, code: u8) {
    let (col, cols) = (index.pack / packs_per_block, index.row_packs / packs_per_block);
    let layout = if quantizer.swizzled == 0 { ScaleLayout::Linear } else { ScaleLayout::Swizzled128x4 };
    let scale = quantizer.scales.offset(layout.offset(index.token, col as u64, cols as u64));
    // SAFETY: inside `ScaleLayout::bytes`. Padding columns follow the last one: they end a group of four.
    unsafe {
        simt::store_value(scale, code);
        if quantizer.swizzled != 0 && col + 1 == cols {
            let mut padding = col;
            while padding % 4 != 3 {
                padding += 1;
                simt::store_value(scale.offset((padding - col) as u64), 0u8);
            }
        }
    }
}
