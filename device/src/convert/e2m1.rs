//! E2M1 where the GPU has no instruction for it: what `core` does with one value, in few instructions for several, most of
//! them additions and multiplications, as a multiprocessor has half as many units for anything else.

#[cfg(target_arch = "nvptx64")]
use core::arch::asm;

use fused_collective_core::quant::e2m1;

use crate::simt;

/// Next to this number, numbers are 1 apart: a sum with it is rounded to an integer, ties to even, and has that in its
/// lowest bits.
const INTEGERS: f32 = 1.5 * (1 << 23) as f32;
/// The largest code.
const LARGEST: u32 = 7;
const _: () = assert!(e2m1::MAX == 6.0);

/// See [`e2m1_codes`](super::e2m1_codes).
#[inline(always)]
pub(super) fn codes(values: &[f32], multiplier: f32) -> u32 {
    let mut codes = 0;
    let mut products = [0; 8];
    for (&value, product) in values.iter().zip(&mut products) {
        let scaled = multiply(value, multiplier);
        *product = scaled.to_bits();
        // Codes count halves up to 2, ones from there to 4, and twos beyond: the least of three lines, each rounded
        // once. Bits of positive numbers are in the numbers' order, and a NaN's are above all others.
        let magnitude = scaled.abs();
        let halves = simt::fma(magnitude, 2.0, INTEGERS).to_bits();
        let ones = (magnitude + (INTEGERS + 2.0)).to_bits();
        let twos = simt::fma(magnitude, 0.5, INTEGERS + 4.0).to_bits();
        let code = halves.min(ones).min(twos).min(INTEGERS.to_bits() + LARGEST);
        codes = codes >> 4 | code << 28;
    }
    codes >>= 32 - 4 * values.len();
    let mut signs = 0;
    if values.len() == 8 {
        // Of the products `a`, `a + 2`, `a + 4` and `a + 6`, the signs: all bits of a byte each.
        let four = |a: usize| {
            let first = permute(products[a], products[a + 2], 0x00fb);
            permute(first, permute(products[a + 4], products[a + 6], 0xfb00), 0x7610)
        };
        signs = four(0) & 0x0808_0808 | four(1) & 0x8080_8080;
    } else {
        for (index, _) in values.iter().enumerate() {
            signs |= (products[index] >> 28 & 8) << (4 * index);
        }
    }
    codes | signs
}

/// The product, where a NaN is positive, as all are that PTX makes.
#[inline(always)]
fn multiply(a: f32, b: f32) -> f32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let product;
        // SAFETY: arithmetic.
        unsafe {
            asm!("mul.rn.f32 {0}, {1}, {2};", out(reg32) product, in(reg32) a, in(reg32) b, options(pure, nomem));
        }
        product
    }
    #[cfg(not(target_arch = "nvptx64"))]
    if (a * b).is_nan() { f32::from_bits(0x7fff_ffff) } else { a * b }
}

/// Four bytes of two words, the first word's counted from 0 and the second's from 4, as the nibbles of `select` name
/// them; where a nibble has its highest bit set, eight times the byte's highest bit.
#[inline(always)]
fn permute(a: u32, b: u32, select: u32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let bytes;
        // SAFETY: arithmetic.
        unsafe {
            asm!(
                "prmt.b32 {0}, {1}, {2}, {3};",
                out(reg32) bytes, in(reg32) a, in(reg32) b, in(reg32) select, options(pure, nomem),
            );
        }
        bytes
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        let bytes = (u64::from(b) << 32 | u64::from(a)).to_le_bytes();
        u32::from_le_bytes(core::array::from_fn(|byte| {
            let nibble = select >> (4 * byte);
            let value = bytes[nibble as usize & 7];
            if nibble & 8 == 0 { value } else { (value as i8 >> 7) as u8 }
        }))
    }
}
