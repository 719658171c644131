//! Quantization and dequantization of a whole tensor, between slices of the caller.
//!
//! All arguments are checked before anything is written. After a conversion every byte of the outputs is defined,
//! padding of scales included.

use core::fmt;

use super::{
    e2m1, e4m3,
    layout::{ScaleLayout, ScaleTensor},
    quantization::{GroupScale, Quantization, ScaleError},
    row::write_row,
    ue4m3, ue8m0,
};
use crate::dtype::Element;

/// A slice that [`quantize`] or [`dequantize`] takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorPart {
    /// The elements, `[tokens, hidden]`.
    Elements,
    /// The codes of the elements.
    Codes,
    /// The scales of tokens or blocks, padding included.
    Scales,
}

/// A tensor that [`quantize`] or [`dequantize`] refused. Nothing was written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TensorError {
    /// [`Quantization::None`] has no codes.
    NotQuantized,
    /// The hidden size is 0 or not a whole number of blocks.
    Hidden {
        /// The hidden size.
        hidden: u64,
        /// A valid hidden size is a positive multiple of this.
        multiple: u64,
    },
    /// Per-group FP8 has no groups of this many elements.
    Group(u32),
    /// The layout is for scales of one byte, and these are `f32`.
    Layout(ScaleLayout),
    /// A slice has a wrong length.
    Length {
        /// The slice.
        part: TensorPart,
        /// The right length, in elements or bytes; `None` past 64 bits.
        needed: Option<u64>,
        /// The length of the slice.
        given: u64,
    },
    /// The per-tensor or global scale cannot be meant.
    Scale(ScaleError),
}

impl fmt::Display for TensorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            TensorError::NotQuantized => {
                f.write_str("a tensor without quantization has no codes: use a format")
            }
            TensorError::Hidden { hidden, multiple } => {
                write!(f, "hidden size {hidden} is not valid: use a positive multiple of {multiple}")
            }
            TensorError::Group(group) => {
                write!(f, "groups of {group} elements are not supported: use 32, 64 or 128")
            }
            TensorError::Layout(layout) => {
                write!(f, "scales of float32 have no {layout} layout: use linear, column-major or DeepGEMM")
            }
            TensorError::Length { part, needed, given } => {
                let (name, unit) = match part {
                    TensorPart::Elements => ("tensor", "elements"),
                    TensorPart::Codes => ("codes", "bytes"),
                    TensorPart::Scales => ("scales", "bytes"),
                };
                match needed {
                    Some(needed) => write!(f, "the slice of {name} has {given} {unit}: use one of {needed}"),
                    None => write!(f, "the {name} would be more {unit} than 64 bits count: use fewer tokens"),
                }
            }
            TensorError::Scale(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for TensorError {}

impl From<ScaleError> for TensorError {
    fn from(error: ScaleError) -> Self {
        TensorError::Scale(error)
    }
}

/// Quantizes a tensor `[tokens, hidden]`, row-major.
///
/// - `scale`: the per-tensor scale of [`Fp8Static`](Quantization::Fp8Static) or the global scale of
///   [`NvFp4`](Quantization::NvFp4); the other quantizations compute their scales and ignore it;
/// - `codes`: receives `tokens` times [`value_bytes_per_row`](Quantization::value_bytes_per_row) bytes, row-major;
/// - `scales`: receives [`scale_bytes`](Quantization::scale_bytes) bytes in the layout of `quantization`, padding
///   zeroed.
///
/// The formulas are those of the [module](super). `f32` scales of tokens are little-endian.
///
/// ```
/// use fused_collective_core::quant::{Quantization, ScaleLayout, e2m1, quantize, ue4m3};
///
/// let nvfp4 = Quantization::NvFp4 { layout: ScaleLayout::Linear };
/// let mut tensor = [0.25f32; 2 * 16];
/// tensor[17] = -6.0;
/// let (mut codes, mut scales) = ([0; 2 * 8], [0; 2]);
/// quantize(nvfp4, [2, 16], &tensor, 448.0 * 6.0 / 6.0, &mut codes, &mut scales)?;
/// // Block scale of the first row: 448 * (0.25 / 6), nearest number of UE4M3.
/// assert_eq!(scales.map(ue4m3::decode), [18.0, 448.0]);
/// assert_eq!(codes[0], 0x77, "0.25 * (448 / 18) is above 6 and saturates");
/// assert_eq!(e2m1::unpack(codes[8]).map(e2m1::decode), [0.0, -6.0]);
/// # Ok::<(), fused_collective_core::quant::TensorError>(())
/// ```
///
/// # Errors
/// [`TensorError`] for [`Quantization::None`], a hidden size without whole blocks, a slice of a wrong length, and a
/// scale that [cannot be meant](Quantization::check_scale).
#[inline(always)]
pub fn quantize<E: Element>(
    quantization: Quantization,
    [tokens, hidden]: [u64; 2],
    elements: &[E],
    scale: f32,
    codes: &mut [u8],
    scales: &mut [u8],
) -> Result<(), TensorError> {
    check(quantization, [tokens, hidden], [elements.len(), codes.len(), scales.len()], scale)?;
    if tokens == 0 {
        return Ok(()); // The hidden size of no rows may exceed `usize`.
    }
    let row_bytes = quantization.value_bytes_per_row(hidden) as usize;
    let rows = elements.chunks_exact(hidden as usize).zip(codes.chunks_exact_mut(row_bytes));
    for (token, (row, codes)) in (0..).zip(rows) {
        write_row(quantization, row, [token, tokens], scale, codes, scales);
    }
    if let Some(tensor) = quantization.scales(tokens, hidden) {
        tensor.zero_padding_rows(scales);
    }
    Ok(())
}

/// Dequantizes a tensor `[tokens, hidden]`, row-major: the inverse of [`quantize`].
///
/// Codes, scales and `scale` are as [`quantize`] takes and writes them. Padding of scales is not read.
///
/// # Values
/// An element is the last column of the [table](super), rounded once to `f32` (`c * b` is exact) and once more to
/// `E`. Results beyond the largest number of a type are infinite. NaN codes and codes under a NaN scale become NaN.
///
/// # Inverse
/// - Encoding the `f32` results under the same scales gives the same codes, bit for bit, as long as no result is
///   infinite. Only NaN codes lose their sign, and a block under an NVFP4 scale of 0 becomes zeros.
/// - Under UE8M0 scales, finite `f32` results are exact. Quantizing such a tensor once more may choose smaller scales,
///   but dequantizes to the same bits.
/// - A finite element comes back within half the spacing of its format, times `s` or `b / g`, apart from `f32`
///   rounding. Only an element that saturated is further off, which scales of the caller and the nearest scales of
///   NVFP4 allow.
///
/// ```
/// use fused_collective_core::quant::{Quantization, ScaleLayout, dequantize, quantize};
///
/// let mxfp8 = Quantization::MxFp8 { layout: ScaleLayout::Swizzled128x4 };
/// let tensor: [f32; 64] = core::array::from_fn(|i| i as f32 / 8.0);
/// let mut codes = [0; 64];
/// let mut scales = [0xff; 512]; // one tile, of which two scales are in use
/// quantize(mxfp8, [1, 64], &tensor, 1.0, &mut codes, &mut scales)?;
/// assert_eq!(scales.iter().filter(|&&scale| scale != 0).count(), 2);
///
/// let mut restored = [0.0f32; 64];
/// dequantize(mxfp8, [1, 64], &codes, &scales, 1.0, &mut restored)?;
/// assert!(tensor.iter().zip(&restored).all(|(x, y)| (x - y).abs() <= x / 16.0));
/// # Ok::<(), fused_collective_core::quant::TensorError>(())
/// ```
///
/// # Errors
/// As for [`quantize`].
#[inline(always)]
pub fn dequantize<E: Element>(
    quantization: Quantization,
    [tokens, hidden]: [u64; 2],
    codes: &[u8],
    scales: &[u8],
    scale: f32,
    elements: &mut [E],
) -> Result<(), TensorError> {
    check(quantization, [tokens, hidden], [elements.len(), codes.len(), scales.len()], scale)?;
    if tokens == 0 {
        return Ok(()); // The hidden size of no rows may exceed `usize`.
    }
    let row_bytes = quantization.value_bytes_per_row(hidden) as usize;
    let rows = elements.chunks_exact_mut(hidden as usize).zip(codes.chunks_exact(row_bytes));
    let tensor = quantization.scales(tokens, hidden);
    for (token, (row, codes)) in (0..).zip(rows) {
        let Some(tensor) = tensor else {
            decode_e4m3(codes, row, |c| c * scale);
            continue;
        };
        for (bits, codes, block) in blocks(tensor, token, codes, scales, row) {
            match quantization {
                Quantization::Fp8PerToken | Quantization::Fp8PerGroup { scales: GroupScale::F32, .. } => {
                    decode_e4m3(codes, block, |c| c * f32::from_bits(bits));
                }
                Quantization::MxFp4 { .. } => {
                    let scale = ue8m0::decode(bits as u8);
                    decode_e2m1(codes, block, |c| c * scale);
                }
                Quantization::NvFp4 { .. } => {
                    let block_scale = ue4m3::decode(bits as u8);
                    // A product of two and four significant bits is exact: the division alone rounds.
                    decode_e2m1(codes, block, |c| c * block_scale / scale);
                }
                _ => {
                    let scale = ue8m0::decode(bits as u8);
                    decode_e4m3(codes, block, |c| c * scale);
                }
            }
        }
    }
    Ok(())
}

/// Checks all arguments; `lengths` are those of elements, codes and scales.
// Inlined as its callers are: a kernel calls no functions.
#[inline(always)]
fn check(
    quantization: Quantization,
    [tokens, hidden]: [u64; 2],
    lengths: [usize; 3],
    scale: f32,
) -> Result<(), TensorError> {
    match quantization {
        Quantization::None => return Err(TensorError::NotQuantized),
        Quantization::Fp8PerGroup { group, .. } if !quantization.has_group() => {
            return Err(TensorError::Group(group));
        }
        Quantization::Fp8PerGroup { layout, .. } if !quantization.has_layout() => {
            return Err(TensorError::Layout(layout));
        }
        _ => {}
    }
    if hidden == 0 || !quantization.supports(hidden) {
        return Err(TensorError::Hidden { hidden, multiple: quantization.block().unwrap_or(1) });
    }
    let needed = [
        tokens.checked_mul(hidden),
        tokens.checked_mul(quantization.value_bytes_per_row(hidden)),
        quantization.scale_bytes(tokens, hidden),
    ];
    let parts = [TensorPart::Elements, TensorPart::Codes, TensorPart::Scales];
    for ((part, needed), given) in parts.into_iter().zip(needed).zip(lengths.map(|length| length as u64)) {
        if needed != Some(given) {
            return Err(TensorError::Length { part, needed, given });
        }
    }
    Ok(quantization.check_scale(scale)?)
}

/// The blocks of a row: bits of the scale, codes of the elements, and place for the elements.
#[inline(always)]
fn blocks<'a, E>(
    tensor: ScaleTensor,
    token: u64,
    codes: &'a [u8],
    scales: &'a [u8],
    row: &'a mut [E],
) -> impl Iterator<Item = (u32, &'a [u8], &'a mut [E])> {
    let cols = tensor.cols as usize;
    let blocks = codes.chunks_exact(codes.len() / cols).zip(row.chunks_exact_mut(row.len() / cols));
    (0..).zip(blocks).map(move |(col, (codes, block))| {
        // The length was checked.
        (tensor.get(scales, token, col).unwrap_or(0), codes, block)
    })
}

#[inline(always)]
fn decode_e4m3<E: Element>(codes: &[u8], elements: &mut [E], element: impl Fn(f32) -> f32) {
    for (out, &code) in elements.iter_mut().zip(codes) {
        *out = E::from_f32(element(e4m3::decode(code)));
    }
}

#[inline(always)]
fn decode_e2m1<E: Element>(codes: &[u8], elements: &mut [E], element: impl Fn(f32) -> f32) {
    for (pair, &byte) in elements.as_chunks_mut().0.iter_mut().zip(codes) {
        *pair = e2m1::unpack(byte).map(|code| E::from_f32(element(e2m1::decode(code))));
    }
}
