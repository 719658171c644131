//! The quantizers to E4M3: with a static scale, a scale for each token, a scale for each block.

use fused_collective_core::{
    dtype::Element,
    pack::Pack,
    quant::{scale, ue8m0},
};

use super::{PackIndex, Quantizer, WHOLE_ROW, scales::Blocks};
use crate::{
    convert,
    launch::{Address, Fp8Block, Fp8PerToken, Fp8Static, Shape},
    simt::{self, WARP},
};

impl<E: Element> Quantizer<E> for Fp8Static {
    const WORDS: u32 = code_words::<E>();
    /// The multiplier of values.
    type Constants = f32;

    #[inline(always)]
    unsafe fn constants(&self) -> f32 {
        // SAFETY: the scale is one `f32` and constant.
        scale::fp8_multiplier(f32::from_bits(unsafe { simt::load_constant_u32(self.scale) }))
    }

    #[inline(always)]
    unsafe fn store(&self, index: PackIndex, values: Pack, _: f32, multiplier: f32) {
        // SAFETY: as this function's.
        unsafe { store_codes::<E>(self.values, index, codes::<E>(values, multiplier)) }
    }

    #[inline(always)]
    fn encode(&self, _index: PackIndex, values: Pack, _: f32, multiplier: f32) -> (Pack, u32) {
        (words(codes::<E>(values, multiplier)), 0)
    }

    #[inline(always)]
    unsafe fn store_words(&self, index: PackIndex, _norm_out: Address, words: Pack) {
        // SAFETY: as this function's.
        unsafe { store_codes::<E>(self.values, index, from_words(words)) }
    }
}

impl<E: Element> Quantizer<E> for Fp8PerToken {
    const WORDS: u32 = code_words::<E>();
    /// One `f32` a row.
    const SCALES: bool = true;
    const ROW_MAX: bool = true;
    type Constants = ();

    #[inline(always)]
    fn scale_packs_log2(&self) -> u32 {
        WHOLE_ROW
    }

    #[inline(always)]
    unsafe fn store(&self, index: PackIndex, values: Pack, row_max: f32, _: ()) {
        let (codes, scale) = per_token::<E>(values, row_max);
        // SAFETY: as this function's; a row's scale is stored with its first pack.
        unsafe {
            store_codes::<E>(self.values, index, codes);
            if index.pack == 0 {
                Quantizer::<E>::store_scales(self, index, scale);
            }
        }
    }

    #[inline(always)]
    fn encode(&self, _index: PackIndex, values: Pack, row_max: f32, _: ()) -> (Pack, u32) {
        let (codes, scale) = per_token::<E>(values, row_max);
        (words(codes), scale)
    }

    #[inline(always)]
    unsafe fn store_words(&self, index: PackIndex, _norm_out: Address, words: Pack) {
        // SAFETY: as this function's.
        unsafe { store_codes::<E>(self.values, index, from_words(words)) }
    }

    #[inline(always)]
    unsafe fn store_scales(&self, index: PackIndex, scale: u32) {
        // SAFETY: inside the tensor, which has an `f32` for each token.
        unsafe { simt::store_value(self.scales.offset(index.token * 4), scale) }
    }
}

/// A pack's codes, and the bits of its token's scale, from the largest magnitude of the token.
#[inline(always)]
fn per_token<E: Element>(values: Pack, row_max: f32) -> (u64, u32) {
    let scale = scale::fp8_per_token(row_max);
    let mut wide = convert::widen::<E>(values);
    divide::<E>(&mut wide, scale);
    (encode::<E>(wide), scale.to_bits())
}

#[inline(always)]
fn blocks(quantizer: &Fp8Block) -> Blocks<'_> {
    Blocks { scales: &quantizer.scales, block_packs_log2: block_packs_log2(quantizer) }
}

/// `black_box`, so that nothing that follows from this is kept in registers.
#[inline(always)]
fn block_packs_log2(quantizer: &Fp8Block) -> u32 {
    simt::black_box_u32(quantizer.block_packs_log2)
}

/// The logarithm of the blocks whose scales are a word: at most four of a byte, as many as a warp has.
#[inline(always)]
fn word_blocks_log2(quantizer: &Fp8Block) -> u32 {
    const WARP_LOG2: u32 = WARP.ilog2();
    if quantizer.scales.strides.size == 4 { 0 } else { (WARP_LOG2 - block_packs_log2(quantizer)).min(2) }
}

/// A pack's codes, and the bits of its block's scale. The first `lanes` lanes of a warp call this together.
#[inline(always)]
fn per_block<E: Element>(quantizer: &Fp8Block, values: Pack, lanes: u32) -> (u64, u32) {
    // Magnitudes are in the order of their bits.
    let own = Quantizer::<E>::magnitude(quantizer, values);
    let amax = f32::from_bits(simt::tile_max(own.to_bits(), 1 << block_packs_log2(quantizer), lanes));
    // One call of the encoder, whose code is long where there is no instruction for it.
    let mut wide = convert::widen::<E>(values);
    let scale = if quantizer.scales.strides.size == 4 {
        let scale = scale::fp8_group(amax);
        divide::<E>(&mut wide, scale);
        scale.to_bits()
    } else {
        let code = scale::fp8_block(amax);
        multiply::<E>(&mut wide, ue8m0::decode_reciprocal(code));
        u32::from(code)
    };
    (encode::<E>(wide), scale)
}

impl<E: Element> Quantizer<E> for Fp8Block {
    const WORDS: u32 = code_words::<E>();
    const SCALES: bool = true;
    type Constants = ();

    #[inline(always)]
    fn scale_packs_log2(&self) -> u32 {
        block_packs_log2(self) + word_blocks_log2(self)
    }

    #[inline(always)]
    unsafe fn fill_padding(&self, shape: &Shape, thread: u32, threads: u32) {
        // SAFETY: as this function's.
        unsafe { blocks(self).fill_padding(shape, thread, threads) }
    }

    #[inline(always)]
    unsafe fn store(&self, index: PackIndex, values: Pack, _: f32, _: ()) {
        let (codes, scale) = per_block::<E>(self, values, index.lanes());
        // SAFETY: as this function's; a block's scale is its first lane's to store.
        unsafe {
            store_codes::<E>(self.values, index, codes);
            if blocks(self).starts(index) {
                blocks(self).store(index, 1, scale);
            }
        }
    }

    /// Codes of scales are never NaN, so that no word of them is the sentinel.
    #[inline(always)]
    fn encode(&self, index: PackIndex, values: Pack, _: f32, _: ()) -> (Pack, u32) {
        let (codes, scale) = per_block::<E>(self, values, WARP);
        let blocks_log2 = word_blocks_log2(self);
        // What no block of the row has a scale for is padding, and zero.
        let scale = if index.pack < index.row_packs { scale } else { 0 };
        let block = index.pack >> block_packs_log2(self) & ((1 << blocks_log2) - 1);
        (words(codes), simt::tile_or(scale << (block * 8), 1 << (block_packs_log2(self) + blocks_log2), WARP))
    }

    #[inline(always)]
    unsafe fn store_words(&self, index: PackIndex, _norm_out: Address, words: Pack) {
        // SAFETY: as this function's.
        unsafe { store_codes::<E>(self.values, index, from_words(words)) }
    }

    #[inline(always)]
    unsafe fn store_scales(&self, index: PackIndex, scales: u32) {
        // SAFETY: as this function's.
        unsafe { blocks(self).store(index, 1 << word_blocks_log2(self), scales) }
    }
}

/// Words of a pack's codes: a byte for each element.
const fn code_words<E: Element>() -> u32 {
    E::LANES as u32 / 4
}

/// A pack's codes under a static scale, one in a byte.
#[inline(always)]
fn codes<E: Element>(values: Pack, multiplier: f32) -> u64 {
    let mut wide = convert::widen::<E>(values);
    multiply::<E>(&mut wide, multiplier);
    encode::<E>(wide)
}

#[inline(always)]
fn multiply<E: Element>(values: &mut E::Wide, multiplier: f32) {
    values.as_mut().iter_mut().for_each(|value| *value *= multiplier);
}

/// Divides by the scale of a token or group.
#[inline(always)]
fn divide<E: Element>(values: &mut E::Wide, scale: f32) {
    let divisor = convert::Divisor::new(scale);
    values.as_mut().iter_mut().for_each(|value| *value = divisor.divide::<E>(*value));
}

#[inline(always)]
fn encode<E: Element>(values: E::Wide) -> u64 {
    let mut codes = 0u64;
    for (index, &[low, high]) in values.as_ref().as_chunks::<2>().0.iter().enumerate() {
        codes |= (convert::e4m3_pair(low, high) as u64) << (16 * index);
    }
    codes
}

/// Codes as they are sent.
#[inline(always)]
fn words(codes: u64) -> Pack {
    Pack([codes as u32, (codes >> 32) as u32, 0, 0])
}

#[inline(always)]
fn from_words(Pack([low, high, ..]): Pack) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

/// # Safety
/// `index` is inside the tensor.
#[inline(always)]
unsafe fn store_codes<E: Element>(values: Address, index: PackIndex, codes: u64) {
    let address = values.offset(index.in_tensor() * E::LANES as u64);
    // SAFETY: a byte for each element, at a multiple of as many bytes as are stored.
    unsafe {
        match E::LANES {
            8 => simt::store_value(address, codes),
            _ => simt::store_value(address, codes as u32),
        }
    }
}
