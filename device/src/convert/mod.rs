//! Conversions by instruction, where the GPU has one; elsewhere the portable ones of `core`, which say what is
//! right.
//!
//! They agree in every bit but one: the instructions to `f16` and `bf16` give every NaN the same payload, where
//! `core` keeps its upper bits.

#[cfg(not(all(target_arch = "nvptx64", any(target_feature = "sm_100a", target_feature = "sm_120a"))))]
mod e2m1;

#[cfg(target_arch = "nvptx64")]
use core::arch::asm;

#[cfg(target_arch = "nvptx64")]
use fused_collective_core::dtype::DType;

use fused_collective_core::{dtype::Element, pack::Pack};

use crate::simt;

/// The elements of a pack as `f32`, exactly.
#[inline(always)]
pub fn widen<E: Element>(pack: Pack) -> E::Wide {
    #[cfg(target_arch = "nvptx64")]
    if let DType::F16 = E::DTYPE {
        let mut wide = E::WIDE_ZERO;
        for (pair, word) in wide.as_mut().as_chunks_mut::<2>().0.iter_mut().zip(&pack.0) {
            let (low, high);
            // SAFETY: arithmetic.
            unsafe {
                asm!(
                    "{{ .reg .b16 l, h; mov.b32 {{l, h}}, {2}; cvt.f32.f16 {0}, l; cvt.f32.f16 {1}, h; }}",
                    out(reg32) low, out(reg32) high, in(reg32) *word, options(pure, nomem),
                );
            }
            *pair = [low, high];
        }
        return wide;
    }
    pack.widen::<E>()
}

/// Rounds to elements, to nearest even.
#[inline(always)]
pub fn narrow<E: Element>(wide: E::Wide) -> Pack {
    #[cfg(target_arch = "nvptx64")]
    if let DType::F16 | DType::Bf16 = E::DTYPE {
        let mut words = [0u32; 4];
        for (word, &[low, high]) in words.iter_mut().zip(wide.as_ref().as_chunks::<2>().0) {
            *word = narrow_pair::<E>(low, high);
        }
        return Pack(words);
    }
    Pack::narrow::<E>(wide)
}

/// Two elements in a word.
#[cfg(target_arch = "nvptx64")]
#[inline(always)]
fn narrow_pair<E: Element>(low: f32, high: f32) -> u32 {
    let word;
    // SAFETY: arithmetic.
    unsafe {
        if let DType::F16 = E::DTYPE {
            asm!("cvt.rn.f16x2.f32 {0}, {1}, {2};", out(reg32) word, in(reg32) high, in(reg32) low, options(pure, nomem));
        } else {
            asm!("cvt.rn.bf16x2.f32 {0}, {1}, {2};", out(reg32) word, in(reg32) high, in(reg32) low, options(pure, nomem));
        }
    }
    word
}

/// A number whose lowest bits take a byte as it is: see [`byte_in_float`].
pub const BYTE_IN_FLOAT: f32 = 8_388_608.0;

/// [`BYTE_IN_FLOAT`] plus byte `index` of a word, by one instruction. `index` is a constant.
#[inline(always)]
pub fn byte_in_float(word: u32, index: u32) -> f32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let bits: u32;
        // SAFETY: arithmetic: the byte, and three of the constant's.
        unsafe {
            asm!(
                "prmt.b32 {0}, {1}, {2}, {3};", out(reg32) bits, in(reg32) word, in(reg32) BYTE_IN_FLOAT.to_bits(),
                in(reg32) 0x7440 + index, options(pure, nomem),
            );
        }
        f32::from_bits(bits)
    }
    #[cfg(not(target_arch = "nvptx64"))]
    f32::from_bits(BYTE_IN_FLOAT.to_bits() | (word >> (8 * index) & 0xff))
}

/// A positive number, or infinity, that divides several others.
#[derive(Clone, Copy, Debug)]
pub struct Divisor {
    /// At most the largest number, so that zero times it is zero.
    number: f32,
    reciprocal: f32,
}

impl Divisor {
    /// Prepares to divide by `number`.
    #[inline(always)]
    pub fn new(number: f32) -> Divisor {
        Divisor { number: number.min(f32::MAX), reciprocal: 1.0 / number }
    }

    /// Divides `value`, of type `E`, as near as E4M3 tells apart: the code is that of the quotient that is rounded to nearest
    /// even. Two fused multiply-adds, or four for `f32`, where a division of GPUs' is a dozen instructions.
    ///
    /// Markstein's step makes the rounded quotient of one that is right to its last place, by a rounded reciprocal. The product
    /// may miss by a place more. After one step it is wrong only if the quotient is within 2^-46 of the middle between two
    /// `f32`, and E4M3 sees that only where one of these is a tie. No value of 16 bits is so near, by any divisor.
    #[inline(always)]
    pub fn divide<E: Element>(self, value: f32) -> f32 {
        // The order of signs keeps that of zero.
        let step = |quotient| simt::fma(simt::fma(quotient, self.number, -value), -self.reciprocal, quotient);
        let quotient = step(value * self.reciprocal);
        if E::LANES == 8 { quotient } else { step(quotient) }
    }
}

/// Two E4M3 codes, `low` in the low byte: [`e4m3::encode`](fused_collective_core::quant::e4m3::encode) of each.
#[inline(always)]
pub fn e4m3_pair(low: f32, high: f32) -> u16 {
    #[cfg(all(target_arch = "nvptx64", target_feature = "sm_89"))]
    {
        let codes;
        // SAFETY: arithmetic.
        unsafe {
            asm!("cvt.rn.satfinite.e4m3x2.f32 {0}, {1}, {2};", out(reg16) codes, in(reg32) high, in(reg32) low, options(pure, nomem));
        }
        codes
    }
    #[cfg(not(all(target_arch = "nvptx64", target_feature = "sm_89")))]
    u16::from_le_bytes([
        fused_collective_core::quant::e4m3::encode(low),
        fused_collective_core::quant::e4m3::encode(high),
    ])
}

/// A UE4M3 code: [`ue4m3::encode`](fused_collective_core::quant::ue4m3::encode).
#[inline(always)]
pub fn ue4m3(value: f32) -> u8 {
    let code = e4m3_pair(value, 0.0) as u8;
    if code & 0x80 != 0 { 0 } else { code }
}

/// Decodes a UE4M3 code: [`ue4m3::decode`](fused_collective_core::quant::ue4m3::decode).
#[inline(always)]
pub fn from_ue4m3(code: u8) -> f32 {
    #[cfg(all(target_arch = "nvptx64", target_feature = "sm_89"))]
    {
        let value;
        // SAFETY: arithmetic. Every E4M3 number is one of `f16` as well.
        unsafe {
            asm!(
                "{{ .reg .b32 pair; .reg .b16 low, high; cvt.rn.f16x2.e4m3x2 pair, {1}; mov.b32 {{low, high}}, pair; \
                 cvt.f32.f16 {0}, low; }}",
                out(reg32) value, in(reg16) u16::from(code & 0x7f), options(pure, nomem),
            );
        }
        value
    }
    #[cfg(not(all(target_arch = "nvptx64", target_feature = "sm_89")))]
    fused_collective_core::quant::ue4m3::decode(code)
}

/// The E2M1 codes of at most eight values, an even number, each multiplied by `multiplier`: half a byte each, the first in
/// the lowest. [`e2m1::encode`](fused_collective_core::quant::e2m1::encode) of each product.
#[inline(always)]
pub fn e2m1_codes(values: &[f32], multiplier: f32) -> u32 {
    #[cfg(not(all(target_arch = "nvptx64", any(target_feature = "sm_100a", target_feature = "sm_120a"))))]
    return e2m1::codes(values, multiplier);
    #[cfg(all(target_arch = "nvptx64", any(target_feature = "sm_100a", target_feature = "sm_120a")))]
    {
        let mut codes = 0;
        for (index, &[low, high]) in values.as_chunks::<2>().0.iter().enumerate() {
            let pair: u32;
            // SAFETY: arithmetic.
            unsafe {
                asm!(
                    "{{ .reg .b8 pair; cvt.rn.satfinite.e2m1x2.f32 pair, {1}, {2}; cvt.u32.u8 {0}, pair; }}",
                    out(reg32) pair, in(reg32) high * multiplier, in(reg32) low * multiplier, options(pure, nomem),
                );
            }
            codes |= pair << (8 * index);
        }
        codes
    }
}
