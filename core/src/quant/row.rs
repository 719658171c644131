//! Quantization of one row, for processors that work on whole rows.
//!
//! The functions are generic over the element type and always inlined. A caller that is compiled for a wider
//! instruction set than the crate therefore gets loops vectorized for that set: no loop branches, checks a bound or
//! exits early. A GPU thread, which holds only some packs of a row, uses [`scale`] and the formats instead.

use core::fmt;

use super::{
    e2m1, e4m3,
    layout::{ScaleLayout, ScaleTensor},
    quantization::{GroupScale, Quantization},
    scale, ue8m0,
};
use crate::dtype::Element;

/// A row that [`quantize_row`] refused. Nothing was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowError {
    /// The token is not below the number of tokens.
    Token {
        /// The token.
        token: u64,
        /// Tokens of the tensor.
        tokens: u64,
    },
    /// The layout is for scales of one byte, and these are `f32`.
    Layout(ScaleLayout),
    /// The row is not a whole number of blocks, or the quantization has no blocks of this size.
    Block {
        /// Elements of the row.
        hidden: u64,
        /// Elements that share a scale.
        block: u64,
    },
    /// The slice for codes has a wrong length.
    Values {
        /// Bytes that the codes of the row take.
        needed: u64,
        /// Bytes that were given.
        given: u64,
    },
    /// The slice for scales is too short.
    Scales {
        /// Bytes that the scales of the tensor take; `None` past 64 bits.
        needed: Option<u64>,
        /// Bytes that were given.
        given: u64,
    },
}

impl fmt::Display for RowError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            RowError::Token { token, tokens } => {
                write!(f, "token {token} of a tensor of {tokens} tokens does not exist: count from 0")
            }
            RowError::Layout(layout) => {
                write!(f, "scales of float32 have no {layout} layout: use linear, column-major or DeepGEMM")
            }
            RowError::Block { hidden, block }
                if hidden.is_multiple_of(block) || !matches!(block, 16 | 32 | 64 | 128) =>
            {
                write!(f, "quantization blocks of {block} elements are not supported: use 32, 64 or 128")
            }
            RowError::Block { hidden, block } => {
                write!(
                    f,
                    "hidden size {hidden} does not divide into quantization blocks of {block}: use a multiple of {block}"
                )
            }
            RowError::Values { needed, given } => {
                write!(f, "the codes of a row take {needed} bytes, but the slice for them has {given}")
            }
            RowError::Scales { needed: Some(needed), given } => {
                write!(
                    f,
                    "the scales take {needed} bytes, but the slice for them has {given}: use a longer one"
                )
            }
            RowError::Scales { needed: None, .. } => {
                f.write_str("the scales are more bytes than 64 bits count: use fewer tokens")
            }
        }
    }
}

impl core::error::Error for RowError {}

/// Quantizes row `token` of a tensor of `tokens` rows. [`quantize`](super::quantize) does so for all rows.
///
/// - `row`: the elements of the token;
/// - `scale`: the per-tensor scale of [`Fp8Static`](Quantization::Fp8Static) or the global scale of
///   [`NvFp4`](Quantization::NvFp4); the other quantizations ignore it. Check it once for all rows with
///   [`check_scale`](Quantization::check_scale), since this function does not;
/// - `values`: receives the codes of the row, [`value_bytes_per_row`](Quantization::value_bytes_per_row) bytes;
/// - `scales`: the scales of the whole tensor, at least [`scale_bytes`](Quantization::scale_bytes) bytes. The scales
///   of the row are written and its padding columns zeroed. Padding rows are not:
///   [`zero_padding_rows`](ScaleTensor::zero_padding_rows) zeroes them. Per-token `f32` scales are little-endian, at
///   `4 * token`.
///
/// E2M1 codes are [canonical](e2m1::canonical): if all codes of a 16-byte pack of elements are `+0` but the last, and that
/// is `-0`, it is written as `+0`. Otherwise each code is [`e2m1::encode`] of its element.
///
/// [`Quantization::None`] writes nothing, and `values` must be empty.
///
/// # Errors
/// [`RowError`] for a token past the end, a hidden size without whole blocks, and slices of a wrong length.
#[inline(always)]
pub fn quantize_row<E: Element>(
    quantization: Quantization,
    row: &[E],
    token: u64,
    tokens: u64,
    scale: f32,
    values: &mut [u8],
    scales: &mut [u8],
) -> Result<(), RowError> {
    check(quantization, row.len() as u64, token, tokens, values.len() as u64, scales.len() as u64)?;
    write_row(quantization, row, [token, tokens], scale, values, scales);
    Ok(())
}

/// [`quantize_row`] of arguments that were checked.
#[inline(always)]
pub(super) fn write_row<E: Element>(
    quantization: Quantization,
    row: &[E],
    [token, tokens]: [u64; 2],
    scale: f32,
    values: &mut [u8],
    scales: &mut [u8],
) {
    let scales =
        quantization.scales(tokens, row.len() as u64).map(|tensor| RowScales::new(tensor, token, scales));
    match (quantization, scales) {
        (Quantization::Fp8Static, _) => {
            let multiplier = scale::fp8_multiplier(scale);
            encode_e4m3(row, |value| value * multiplier, values);
        }
        (Quantization::Fp8PerToken, Some(mut scales)) => {
            let token_scale = scale::fp8_per_token(amax(row));
            encode_e4m3(row, |value| value / token_scale, values);
            scales.set(0, token_scale.to_bits());
        }
        (Quantization::Fp8PerGroup { group, scales: GroupScale::F32, .. }, Some(scales)) => {
            quantize_fp8_blocks::<E, true>(group, row, values, scales);
        }
        (Quantization::Fp8PerGroup { group, .. }, Some(scales)) => {
            quantize_fp8_blocks::<E, false>(group, row, values, scales);
        }
        (Quantization::MxFp8 { .. }, Some(scales)) => {
            quantize_blocks::<E, _, 32>(Fp8Block::<false>, row, values, scales);
        }
        (Quantization::NvFp4 { .. }, Some(scales)) => {
            let format = NvFp4Block { global_scale: scale::nvfp4_global(scale) };
            quantize_blocks::<E, _, 16>(format, row, values, scales);
        }
        (Quantization::MxFp4 { .. }, Some(scales)) => {
            quantize_blocks::<E, _, 32>(MxFp4Block, row, values, scales);
        }
        (_, _) => {}
    }
}

/// Checks all arguments, so that the loops need no check.
#[inline(always)]
fn check(
    quantization: Quantization,
    hidden: u64,
    token: u64,
    tokens: u64,
    values: u64,
    scales: u64,
) -> Result<(), RowError> {
    if token >= tokens {
        return Err(RowError::Token { token, tokens });
    }
    if let Some(layout) = quantization.scale_layout()
        && !quantization.has_layout()
    {
        return Err(RowError::Layout(layout));
    }
    if !quantization.supports(hidden) {
        return Err(RowError::Block { hidden, block: quantization.block().unwrap_or(1) });
    }
    let needed = quantization.value_bytes_per_row(hidden);
    if values != needed {
        return Err(RowError::Values { needed, given: values });
    }
    let needed = quantization.scale_bytes(tokens, hidden);
    if needed.is_none_or(|needed| needed > scales) {
        return Err(RowError::Scales { needed, given: scales });
    }
    Ok(())
}

/// Places of the scales of one row. In every layout four columns are equally far apart, and the next four follow at a
/// constant distance.
struct RowScales<'a> {
    scales: &'a mut [u8],
    start: usize,
    /// Bytes from a column to the next, and from it to the fourth after it.
    strides: [usize; 2],
    size: usize,
}

impl<'a> RowScales<'a> {
    /// The scales of row `token`; zeroes its padding columns.
    #[inline(always)]
    fn new(tensor: ScaleTensor, token: u64, scales: &'a mut [u8]) -> Self {
        let (start, strides) = (tensor.offset(token, 0) as usize, tensor.strides());
        let strides = [strides.col as usize, strides.four_cols as usize];
        let mut row = RowScales { scales, start, strides, size: tensor.size as usize };
        for col in tensor.padding_cols() {
            row.set(col as usize, 0);
        }
        row
    }

    #[inline(always)]
    fn set(&mut self, col: usize, scale: u32) {
        let start = self.start + col / 4 * self.strides[1] + col % 4 * self.strides[0];
        // The length was checked, so the bytes exist. `get_mut` costs less than the code path of a panic.
        if self.size == 1 {
            if let Some(byte) = self.scales.get_mut(start) {
                *byte = scale as u8;
            }
        } else if let Some(bytes) = self.scales.get_mut(start..start + 4) {
            bytes.copy_from_slice(&scale.to_le_bytes());
        }
    }
}

// Without the sign, the bits of elements are in the order of their magnitudes, NaN last. So the largest magnitude is
// found among integers of the size of an element, and only the result is widened.

/// All bits of an `E` but the sign.
const fn magnitude_mask<E: Element>() -> u32 {
    u32::MAX >> (33 - 8 * size_of::<E>())
}

/// The largest magnitude of `values`, NaN skipped: [`scale::amax`] of all of them.
#[inline(always)]
fn amax<E: Element>(values: &[E]) -> f32 {
    // The smallest distance below infinity. The distance of a NaN wraps around and is larger than any other.
    let infinity = E::from_f32(f32::INFINITY).to_bits();
    let distance = |value: &E| infinity.wrapping_sub(value.to_bits() & magnitude_mask::<E>());
    let smallest = values.iter().fold(infinity, |smallest, value| smallest.min(distance(value)));
    E::from_bits(infinity - smallest).to_f32()
}

/// The largest magnitude of `values`, or NaN if there is one: [`scale::amax_or_nan`] of all of them.
#[inline(always)]
fn amax_or_nan<E: Element>(values: &[E]) -> f32 {
    let largest =
        values.iter().fold(0, |largest: u32, value| largest.max(value.to_bits() & magnitude_mask::<E>()));
    E::from_bits(largest).to_f32()
}

#[inline(always)]
fn encode_e4m3<E: Element>(row: &[E], scaled: impl Fn(f32) -> f32, codes: &mut [u8]) {
    for (value, code) in row.iter().zip(codes) {
        *code = e4m3::encode(scaled(value.to_f32()));
    }
}

/// A format of elements and scales that are quantized in blocks.
trait BlockFormat {
    /// Elements that share a byte of codes.
    const ELEMENTS_PER_BYTE: usize;
    /// The largest magnitude of the block.
    fn largest<E: Element>(block: &[E]) -> f32;
    /// The bits of the scale, and the [factor](Self::scaled) of elements, for a block whose largest magnitude is `amax`.
    fn scale(&self, amax: f32) -> (u32, f32);
    /// The number that is encoded, of an element and its block's factor.
    #[inline(always)]
    fn scaled(element: f32, factor: f32) -> f32 {
        element * factor
    }
    /// The codes of at most [`BATCH`] scaled elements, which were `E`.
    fn encode<E: Element>(values: &[f32], codes: &mut [u8]);
}

/// E4M3 with `f32` scales, or with UE8M0 scales.
struct Fp8Block<const F32: bool>;

impl<const F32: bool> BlockFormat for Fp8Block<F32> {
    const ELEMENTS_PER_BYTE: usize = 1;

    #[inline(always)]
    fn largest<E: Element>(block: &[E]) -> f32 {
        amax(block)
    }

    #[inline(always)]
    fn scale(&self, amax: f32) -> (u32, f32) {
        if F32 {
            let scale = scale::fp8_group(amax);
            return (scale.to_bits(), scale);
        }
        let code = scale::fp8_block(amax);
        (code.into(), ue8m0::decode_reciprocal(code))
    }

    #[inline(always)]
    fn scaled(element: f32, factor: f32) -> f32 {
        if F32 { element / factor } else { element * factor }
    }

    #[inline(always)]
    fn encode<E: Element>(values: &[f32], codes: &mut [u8]) {
        for (code, &value) in codes.iter_mut().zip(values) {
            *code = e4m3::encode(value);
        }
    }
}

/// E2M1 with UE8M0 scales.
struct MxFp4Block;

impl BlockFormat for MxFp4Block {
    const ELEMENTS_PER_BYTE: usize = 2;

    #[inline(always)]
    fn largest<E: Element>(block: &[E]) -> f32 {
        amax_or_nan(block)
    }

    #[inline(always)]
    fn scale(&self, amax: f32) -> (u32, f32) {
        let code = scale::mxfp4_block(amax);
        (code.into(), ue8m0::decode_reciprocal(code))
    }

    #[inline(always)]
    fn encode<E: Element>(values: &[f32], codes: &mut [u8]) {
        encode_e2m1::<E>(values, codes);
    }
}

/// E2M1 with UE4M3 scales under a global scale.
struct NvFp4Block {
    global_scale: f32,
}

impl BlockFormat for NvFp4Block {
    const ELEMENTS_PER_BYTE: usize = 2;

    #[inline(always)]
    fn largest<E: Element>(block: &[E]) -> f32 {
        amax_or_nan(block)
    }

    #[inline(always)]
    fn scale(&self, amax: f32) -> (u32, f32) {
        let code = scale::nvfp4_block(amax, self.global_scale);
        (code.into(), scale::nvfp4_multiplier(code, self.global_scale))
    }

    #[inline(always)]
    fn encode<E: Element>(values: &[f32], codes: &mut [u8]) {
        encode_e2m1::<E>(values, codes);
    }
}

/// Elements that are quantized together: a whole number of blocks of any size. The loop of each step, divisions of
/// scales included, is long enough to fill vector registers, and the arrays stay in the nearest cache.
const BATCH: usize = 512;
/// The most blocks of a batch.
const MAX_BLOCKS: usize = BATCH / 16;

#[inline(always)]
fn encode_e2m1<E: Element>(values: &[f32], bytes: &mut [u8]) {
    let mut codes = [0; BATCH];
    for (code, &value) in codes.iter_mut().zip(values) {
        *code = e2m1::encode(value);
    }
    for (byte, &[first, second]) in bytes.iter_mut().zip(codes.as_chunks::<2>().0) {
        *byte = e2m1::pack(first, second);
    }
    if E::LANES == 8 {
        for pack in bytes.as_chunks_mut().0 {
            *pack = e2m1::canonical(u32::from_le_bytes(*pack), 8).to_le_bytes();
        }
    } else {
        for pack in bytes.as_chunks_mut().0 {
            *pack = (e2m1::canonical(u16::from_le_bytes(*pack).into(), 4) as u16).to_le_bytes();
        }
    }
}

/// Quantizes a row to E4M3 in blocks of `block` elements: 32, 64 or 128.
#[inline(always)]
fn quantize_fp8_blocks<E: Element, const F32: bool>(
    block: u32,
    row: &[E],
    codes: &mut [u8],
    scales: RowScales<'_>,
) {
    let format = Fp8Block::<F32>;
    match block {
        32 => quantize_blocks::<E, _, 32>(format, row, codes, scales),
        64 => quantize_blocks::<E, _, 64>(format, row, codes, scales),
        // The check accepts no other.
        _ => quantize_blocks::<E, _, 128>(format, row, codes, scales),
    }
}

/// Quantizes a row in blocks of `BLOCK` elements.
#[inline(always)]
fn quantize_blocks<E: Element, F: BlockFormat, const BLOCK: usize>(
    format: F,
    row: &[E],
    codes: &mut [u8],
    mut scales: RowScales<'_>,
) {
    let mut largest = [0.0; MAX_BLOCKS];
    let mut scale_bits = [0; MAX_BLOCKS];
    let mut factors = [0.0; MAX_BLOCKS];
    let mut values = [0.0; BATCH];
    let batches = row.chunks(BATCH).zip(codes.chunks_mut(BATCH / F::ELEMENTS_PER_BYTE));
    for (batch, (elements, codes)) in batches.enumerate() {
        let blocks = elements.as_chunks::<BLOCK>().0;
        for (largest, block) in largest.iter_mut().zip(blocks) {
            *largest = F::largest(block);
        }
        for ((bits, factor), &amax) in scale_bits.iter_mut().zip(&mut factors).zip(&largest) {
            (*bits, *factor) = format.scale(amax);
        }
        let scaled = values.as_chunks_mut::<BLOCK>().0;
        for ((values, block), &factor) in scaled.iter_mut().zip(blocks).zip(&factors) {
            for (value, element) in values.iter_mut().zip(block) {
                *value = F::scaled(element.to_f32(), factor);
            }
        }
        F::encode::<E>(&values[..elements.len()], codes);
        for (index, &bits) in scale_bits[..blocks.len()].iter().enumerate() {
            scales.set(batch * (BATCH / BLOCK) + index, bits);
        }
    }
}
