//! The quantizers to E2M1: NVFP4 and MXFP4.

use fused_collective_core::{
    dtype::Element,
    lamport,
    pack::Pack,
    quant::{e2m1, scale, ue8m0},
};

use super::{PackIndex, Quantizer, scales::Blocks};
use crate::{
    convert,
    launch::{Address, BlockScales, Fp4, MxFp4, Shape},
    simt::{self, WARP},
};

/// Packs whose block scales have a word of their own, in types of 16 bits: four blocks of NVFP4 or two of MXFP4. So no word
/// of scales is the sentinel: NVFP4's have no sign, and MXFP4's fill half of it.
const SCALE_PACKS: u32 = 8;

/// The scales of blocks of `block` elements.
#[inline(always)]
fn blocks<E: Element>(scales: &BlockScales, block: u32) -> Blocks<'_> {
    Blocks { scales, block_packs_log2: (block / E::LANES as u32).ilog2() }
}

/// Elements of NVFP4's blocks, and of MXFP4's.
const NV: u32 = 16;
const MX: u32 = 32;

/// A pack's codes, two in a byte, and its block's scale. The first `lanes` lanes of a warp call this together. `scale_of` gives
/// the scale of a block with a magnitude, and the multiplier of its values.
#[inline(always)]
fn quantize<E: Element>(
    values: Pack,
    block: u32,
    lanes: u32,
    scale_of: impl Fn(f32) -> (u8, f32),
) -> (u32, u8) {
    let wide = convert::widen::<E>(values);
    let own = wide.as_ref().iter().fold(0.0, |largest, &value| scale::amax_or_nan(largest, value));
    // Magnitudes, NaN included, are in the order of their bits.
    let amax = f32::from_bits(simt::tile_max(own.to_bits(), block / E::LANES as u32, lanes));
    let (code, multiplier) = scale_of(amax);
    (e2m1::canonical(convert::e2m1_codes(wide.as_ref(), multiplier), E::LANES), code)
}

/// As `scale::nvfp4_block` and `scale::nvfp4_multiplier`.
#[inline(always)]
fn nvfp4_scale(amax: f32, global_scale: f32) -> (u8, f32) {
    let code = convert::ue4m3(scale::nvfp4_scale(amax, global_scale));
    (code, scale::nvfp4_multiplier_of(convert::from_ue4m3(code), global_scale))
}

#[inline(always)]
fn mxfp4_scale(amax: f32) -> (u8, f32) {
    let code = scale::mxfp4_block(amax);
    (code, ue8m0::decode_reciprocal(code))
}

/// The items that both quantizers have alike, with `$scale_of` the scale of a block of `$block` elements.
macro_rules! quantizer {
    ($block:expr, |$constants:ident: $of:ty| $scale_of:expr) => {
        /// A word for each pack. In types of 16 bits it is full; in those of 32 the codes leave half of it, which the
        /// block's scale takes.
        const WORDS: u32 = 1;
        const SCALES: bool = E::LANES == 8;
        type Constants = $of;

        #[inline(always)]
        fn scale_packs_log2(&self) -> u32 {
            const { SCALE_PACKS.ilog2() }
        }

        #[inline(always)]
        unsafe fn fill_padding(&self, shape: &Shape, thread: u32, threads: u32) {
            // SAFETY: as this function's.
            unsafe { blocks::<E>(&self.scales, $block).fill_padding(shape, thread, threads) }
        }

        #[inline(always)]
        unsafe fn store(&self, index: PackIndex, values: Pack, _: f32, $constants: $of) {
            let (codes, scale) = quantize::<E>(values, $block, index.lanes(), $scale_of);
            let blocks = blocks::<E>(&self.scales, $block);
            // SAFETY: as this function's; a block's scale is its first lane's to store.
            unsafe {
                store_codes::<E>(self.values, index, codes);
                if blocks.starts(index) {
                    blocks.store(index, 1, u32::from(scale));
                }
            }
        }

        #[inline(always)]
        fn encode(&self, index: PackIndex, values: Pack, _: f32, $constants: $of) -> (Pack, u32) {
            let (codes, scale) = quantize::<E>(values, $block, WARP, $scale_of);
            if E::LANES != 8 {
                return (Pack([codes | u32::from(scale) << 16, 0, 0, 0]), 0);
            }
            // What no block of the row has a scale for is padding, and zero.
            let scale = if index.pack < index.row_packs { u32::from(scale) } else { 0 };
            let block = (index.pack % SCALE_PACKS) >> blocks::<E>(&self.scales, $block).block_packs_log2;
            let scales = simt::tile_or(scale << (block * 8), SCALE_PACKS, WARP);
            (Pack([lamport::swap_e2m1(codes), 0, 0, 0]), scales)
        }

        #[inline(always)]
        unsafe fn store_words(&self, index: PackIndex, _norm_out: Address, words: Pack) {
            let Pack([word, ..]) = words;
            let blocks = blocks::<E>(&self.scales, $block);
            // SAFETY: as this function's.
            unsafe {
                store_codes::<E>(
                    self.values,
                    index,
                    if E::LANES == 8 { lamport::swap_e2m1(word) } else { word },
                );
                if E::LANES != 8 && blocks.starts(index) {
                    blocks.store(index, 1, word >> 16);
                }
            }
        }

        #[inline(always)]
        unsafe fn store_scales(&self, index: PackIndex, scales: u32) {
            let blocks = blocks::<E>(&self.scales, $block);
            // SAFETY: as this function's.
            unsafe { blocks.store(index, SCALE_PACKS >> blocks.block_packs_log2, scales) }
        }
    };
}

impl<E: Element> Quantizer<E> for Fp4 {
    quantizer!(NV, |global_scale: f32| |amax| nvfp4_scale(amax, global_scale));

    #[inline(always)]
    unsafe fn constants(&self) -> f32 {
        // SAFETY: the scale is one `f32` and constant.
        scale::nvfp4_global(f32::from_bits(unsafe { simt::load_constant_u32(self.global_scale) }))
    }
}

impl<E: Element> Quantizer<E> for MxFp4 {
    quantizer!(MX, |_none: ()| mxfp4_scale);
}

/// # Safety
/// `index` is inside the tensor.
#[inline(always)]
unsafe fn store_codes<E: Element>(values: Address, index: PackIndex, codes: u32) {
    let address = values.offset(index.in_tensor() * (E::LANES as u64 / 2));
    // SAFETY: half a byte for each element, at a multiple of as many bytes as are stored.
    unsafe {
        match E::LANES {
            8 => simt::store_value(address, codes),
            _ => simt::store_value(address, codes as u16),
        }
    }
}
