//! The quantizers: none, static FP8, NVFP4.

use fused_collective_core::{
    dtype::Element,
    pack::Pack,
    quant::{ScaleLayout, scale},
};

use super::{Place, Quantizer};
use crate::{
    convert,
    params::{Fp8Static, NvFp4, Unquantized},
    simt,
};

/// Elements of an NVFP4 block.
const BLOCK: u32 = 16;

impl<E: Element> Quantizer<E> for Unquantized {
    type Constants = ();

    #[inline(always)]
    unsafe fn constants(&self) {}

    #[inline(always)]
    unsafe fn store(&self, _place: Place, _values: Pack, _constants: ()) {}
}

impl<E: Element> Quantizer<E> for Fp8Static {
    /// What values are multiplied by.
    type Constants = f32;

    #[inline(always)]
    unsafe fn constants(&self) -> f32 {
        // SAFETY: the scale is one `f32` and constant.
        scale::fp8_multiplier(f32::from_bits(unsafe { simt::load_constant_u32(self.scale) }))
    }

    #[inline(always)]
    unsafe fn store(&self, place: Place, values: Pack, multiplier: f32) {
        let mut codes = 0u64;
        for (index, &[low, high]) in
            convert::widen::<E>(values).as_ref().as_chunks::<2>().0.iter().enumerate()
        {
            codes |= (convert::e4m3_pair(low * multiplier, high * multiplier) as u64) << (16 * index);
        }
        let address = self.values.offset(place.index() * E::LANES as u64);
        // SAFETY: a byte for each element, at a multiple of as many bytes as are stored.
        unsafe {
            match E::LANES {
                8 => simt::store_value(address, codes),
                _ => simt::store_value(address, codes as u32),
            }
        }
    }
}

impl<E: Element> Quantizer<E> for NvFp4 {
    /// The global scale.
    type Constants = f32;

    #[inline(always)]
    unsafe fn constants(&self) -> f32 {
        // SAFETY: the scale is one `f32` and constant.
        f32::from_bits(unsafe { simt::load_constant_u32(self.global_scale) })
    }

    #[inline(always)]
    unsafe fn store(&self, place: Place, values: Pack, global_scale: f32) {
        let wide = convert::widen::<E>(values);
        let own = wide.as_ref().iter().fold(0.0, |largest, &value| scale::amax_or_nan(largest, value));
        // Magnitudes, NaN included, are in the order of their bits. A block is the packs of two or four lanes.
        let packs_per_block = BLOCK / E::LANES as u32;
        let bits = match E::LANES {
            8 => simt::tile_max::<2>(own.to_bits()),
            _ => simt::tile_max::<4>(own.to_bits()),
        };
        let code = scale::nvfp4_block(f32::from_bits(bits), global_scale);
        let multiplier = scale::nvfp4_multiplier(code, global_scale);

        let mut codes = 0u32;
        for (index, &[low, high]) in wide.as_ref().as_chunks::<2>().0.iter().enumerate() {
            codes |= (convert::e2m1_pair(low * multiplier, high * multiplier) as u32) << (8 * index);
        }
        let address = self.values.offset(place.index() * (E::LANES as u64 / 2));
        // SAFETY: half a byte for each element, at a multiple of as many bytes as are stored; a block's scale is
        // its first lane's to store.
        unsafe {
            match E::LANES {
                8 => simt::store_value(address, codes),
                _ => simt::store_value(address, codes as u16),
            }
            if place.pack.is_multiple_of(packs_per_block) {
                store_scale(self, place, packs_per_block, code);
            }
        }
    }
}

/// Stores a block's scale, and with the last one of a row its padding columns.
///
/// # Safety
/// `place` is inside the tensors.
#[inline(always)]
unsafe fn store_scale(quantizer: &NvFp4, place: Place, packs_per_block: u32, code: u8) {
    let (col, cols) = (place.pack / packs_per_block, place.row_packs / packs_per_block);
    let layout = if quantizer.swizzled == 0 { ScaleLayout::Linear } else { ScaleLayout::Swizzled128x4 };
    let scale = quantizer.scales.offset(layout.offset(place.token, col as u64, cols as u64));
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
