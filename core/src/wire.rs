//! Formats of fewer bits in which rows cross the links between ranks: whole numbers in blocks of [`BLOCK`] elements, which
//! share a scale.
//!
//! | format | codes `c` | scale `s` | bits an element | error of normal rows |
//! | --- | --- | --- | --- | --- |
//! | [`Int8`](WireFormat::Int8) | -128 to 127 | `-extreme / 128` in bf16 | 8.5 | 0.55% |
//! | [`Int4`](WireFormat::Int4) | -8 to 7 | `-extreme / 8` in bf16 | 4.5 | 8.6% |
//!
//! The error is the root mean square, relative to the row's, of one hop. The example `wire_formats` measures it beside that
//! of other formats.
//!
//! # Arithmetic
//! - `extreme` is the element of the largest magnitude; of two, the negative one.
//! - `s` is truncated to bf16, so that no element becomes larger than `extreme`. Its magnitude is at least 2^-126, and
//!   `1 / s` is finite. The element `extreme` has the least code, so every code is used.
//! - `c = round(clamp(x * (1 / s)))`, to nearest even. The product and the reciprocal are rounded to `f32`.
//! - An element is decoded to `c * s`, which is exact in `f32`. A decoder may thus fuse the product with an addition.
//! - A block with NaN or infinity is decoded to NaN, in all its elements. Its scale is NaN, and its codes are the least.
//! - Zeros are decoded to zeros, whose signs are lost. So are elements of a magnitude below 2^-127.
//!
//! # Error
//! An element misses by `|s| / 2` at most. One that has the least or the largest code may miss by `2 |s|`, and the first
//! of a stripped word, below, by `3 |s|`. `|s|` is at most 1/128 or 1/8 of `extreme`, or else 2^-126.
//!
//! # Layout
//! Codes are stored with an offset: `c + 128` in a byte, or `c + 8` in half a byte. Of every eight elements, four bytes have the
//! first four in their low halves and the others in their high halves: so either format is bytes after one mask. A row's codes
//! are followed by its scales, of two bytes each, and by zeros up to a multiple of 16 bytes. All numbers are
//! little-endian. Hidden sizes are multiples of 16, so codes are whole words; the last block may have 16 elements.
//!
//! A word of codes may be [the sentinel](lamport::SENTINEL): the largest code in every place. It is
//! [stripped](lamport::strip), and the first of its elements has the code below. Words of scales cannot be the sentinel.
//!
//! ```
//! use fused_collective_core::wire::WireFormat;
//!
//! let row: [f32; 16] = core::array::from_fn(|index| index as f32 - 8.0);
//! let mut sent = [0; 16];
//! assert_eq!(WireFormat::Int4.row_bytes(16), 16);
//! WireFormat::Int4.encode(&row, &mut sent);
//! let mut sum = [0.5; 16];
//! WireFormat::Int4.add(&sent, &mut sum);
//! assert!(row.iter().zip(sum).all(|(x, sum)| x + 0.5 == sum));
//! ```

use core::fmt;

use crate::lamport;

/// Elements that share a scale.
pub const BLOCK: usize = 32;
/// Elements of the last block of a row that is not whole blocks.
const HALF: usize = BLOCK / 2;
/// Bytes of a scale.
const SCALE_BYTES: usize = 2;
/// Divisor of the bytes of a row.
const ROW_MULTIPLE: u64 = 16;
/// The code of the scale of a block that has no numbers only: a NaN in bf16.
const NAN: u16 = 0x7fc0;

/// A format of rows between ranks: see the [module](self).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WireFormat {
    /// Codes of 8 bits.
    Int8,
    /// Codes of 4 bits.
    Int4,
}

impl WireFormat {
    /// Every format.
    pub const ALL: [WireFormat; 2] = [WireFormat::Int8, WireFormat::Int4];

    /// The name in messages and options.
    pub const fn name(self) -> &'static str {
        match self {
            WireFormat::Int8 => "int8",
            WireFormat::Int4 => "int4",
        }
    }

    /// Bits of a code.
    pub const fn bits(self) -> u32 {
        match self {
            WireFormat::Int8 => 8,
            WireFormat::Int4 => 4,
        }
    }

    /// Bytes of the codes of a row.
    const fn code_bytes(self, hidden: u64) -> u64 {
        hidden * self.bits() as u64 / 8
    }

    /// Bytes of a row of `hidden` elements.
    pub const fn row_bytes(self, hidden: u64) -> u64 {
        let scales = hidden.div_ceil(BLOCK as u64) * SCALE_BYTES as u64;
        (self.code_bytes(hidden) + scales).next_multiple_of(ROW_MULTIPLE)
    }

    /// Encodes `values`, a row, as `row` of [`row_bytes`](Self::row_bytes).
    ///
    /// # Panics
    /// If the lengths are not those of a row.
    #[inline(always)]
    pub fn encode(self, values: &[f32], row: &mut [u8]) {
        let (codes, scales) = row.split_at_mut(self.code_bytes(values.len() as u64) as usize);
        match self {
            WireFormat::Int8 => encode::<8>(values, codes, scales),
            WireFormat::Int4 => encode::<4>(values, codes, scales),
        }
    }

    /// Adds the decoded elements of `row` to `sum`, in `f32`.
    ///
    /// # Panics
    /// If the lengths are not those of a row.
    #[inline(always)]
    pub fn add(self, row: &[u8], sum: &mut [f32]) {
        let (codes, scales) = row.split_at(self.code_bytes(sum.len() as u64) as usize);
        match self {
            WireFormat::Int8 => add::<8>(codes, scales, sum),
            WireFormat::Int4 => add::<4>(codes, scales, sum),
        }
    }
}

impl fmt::Display for WireFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The offset of codes of `bits` bits, and the magnitude of the least one.
const fn offset(bits: u32) -> u32 {
    1 << (bits - 1)
}

/// The bits of `value` in the order of magnitudes, a negative number after the positive one. The largest of a block's is
/// its `extreme`, and those of infinity and NaN are larger than any number's.
#[inline(always)]
pub fn key(value: f32) -> u32 {
    value.to_bits().rotate_left(1)
}

/// The scale of a block whose largest [`key`] is `extreme`, in bf16, with codes of `bits` bits.
#[inline(always)]
pub fn scale(extreme: u32, bits: u32) -> u16 {
    /// Bits of the fraction of `f32`; one in the exponent.
    const ONE: u32 = 1 << 23;
    let magnitude = (extreme >> 1).saturating_sub((bits - 1) * ONE).max(ONE);
    let sign = !extreme & 1;
    if extreme < key(f32::INFINITY) { (magnitude >> 16 | sign << 15) as u16 } else { NAN }
}

/// The number that a scale's code stands for.
#[inline(always)]
pub fn decode_scale(code: u16) -> f32 {
    f32::from_bits(u32::from(code) << 16)
}

/// The code of `bits` bits, offset included, of `value`, with the reciprocal of its block's scale.
#[inline(always)]
pub fn code(value: f32, reciprocal: f32, bits: u32) -> u32 {
    /// The last place of `f32` numbers near it is 1, so that adding it rounds to whole numbers.
    const WHOLE: f32 = 12_582_912.0;
    let least = offset(bits) as f32;
    let quotient = value * reciprocal;
    // Comparisons with NaN are false: in a block with a NaN scale every code is the least.
    let quotient = if quotient > -least { quotient } else { -least };
    let quotient = if quotient < least - 1.0 { quotient } else { least - 1.0 };
    (quotient + WHOLE).to_bits().wrapping_sub(WHOLE.to_bits()).wrapping_add(offset(bits))
}

/// The element that a code stands for, exactly.
#[inline(always)]
pub fn decode(code: u32, scale: f32, bits: u32) -> f32 {
    (code as i32 - offset(bits) as i32) as f32 * scale
}

#[inline(always)]
fn encode<const BITS: u32>(values: &[f32], codes: &mut [u8], scales: &mut [u8]) {
    let (blocks, half) = values.as_chunks();
    let (scales, padding) = scales.split_at_mut(values.len().div_ceil(BLOCK) * SCALE_BYTES);
    let (scales, half_scale) = scales.split_at_mut(blocks.len() * SCALE_BYTES);
    let (codes, half_codes) = codes.split_at_mut(blocks.len() * BLOCK * BITS as usize / 8);
    let codes = codes.chunks_exact_mut(BLOCK * BITS as usize / 8);
    for ((values, codes), scale) in blocks.iter().zip(codes).zip(scales.as_chunks_mut().0) {
        *scale = encode_block::<BITS, BLOCK>(values, codes);
    }
    for (values, scale) in half.as_chunks().0.iter().zip(half_scale.as_chunks_mut().0) {
        *scale = encode_block::<BITS, HALF>(values, half_codes);
    }
    padding.fill(0);
}

/// Encodes a block, and returns its scale.
#[inline(always)]
fn encode_block<const BITS: u32, const N: usize>(values: &[f32; N], codes: &mut [u8]) -> [u8; SCALE_BYTES] {
    let extreme = values.iter().fold(0, |extreme, value| key(*value).max(extreme));
    let scale = scale(extreme, BITS);
    let reciprocal = 1.0 / decode_scale(scale);
    let wide = values.map(|value| code(value, reciprocal, BITS));
    for (bytes, wide) in codes.as_chunks_mut::<4>().0.iter_mut().zip(wide.chunks_exact(32 / BITS as usize)) {
        let (low, high) = wide.split_at(4);
        *bytes = core::array::from_fn(|byte| (low[byte] | high.get(byte).unwrap_or(&0) << 4) as u8);
    }
    for word in codes.as_chunks_mut().0 {
        *word = lamport::strip(u32::from_le_bytes(*word)).to_le_bytes();
    }
    scale.to_le_bytes()
}

#[inline(always)]
fn add<const BITS: u32>(codes: &[u8], scales: &[u8], sum: &mut [f32]) {
    let (blocks, half) = sum.as_chunks_mut();
    let (codes, half_codes) = codes.split_at(blocks.len() * BLOCK * BITS as usize / 8);
    let codes = codes.chunks_exact(BLOCK * BITS as usize / 8);
    let (scales, half_scale) = scales.split_at(blocks.len() * SCALE_BYTES);
    for ((sum, codes), scale) in blocks.iter_mut().zip(codes).zip(scales.as_chunks().0) {
        add_block::<BITS, BLOCK>(codes, *scale, sum);
    }
    for (sum, scale) in half.as_chunks_mut().0.iter_mut().zip(half_scale.as_chunks().0) {
        add_block::<BITS, HALF>(half_codes, *scale, sum);
    }
}

#[inline(always)]
fn add_block<const BITS: u32, const N: usize>(codes: &[u8], scale: [u8; SCALE_BYTES], sum: &mut [f32; N]) {
    let scale = decode_scale(u16::from_le_bytes(scale));
    let mut wide = [0; N];
    for (wide, bytes) in wide.chunks_exact_mut(32 / BITS as usize).zip(codes.as_chunks::<4>().0) {
        for (half, wide) in (0..).zip(wide.as_chunks_mut::<4>().0) {
            *wide = bytes.map(|byte| u32::from(byte) >> (half * BITS) & ((1 << BITS) - 1));
        }
    }
    for (sum, code) in sum.iter_mut().zip(wide) {
        *sum += decode(code, scale, BITS);
    }
}
