//! FP8 and FP4 quantization: formats, scales, the layouts of scales, and conversion of rows and whole tensors.
//!
//! [`quantize`] and [`dequantize`] convert a tensor between slices of the caller. [`quantize_row`] converts one row,
//! for a processor that finishes a tensor row by row. A GPU thread, which holds a part of a row, combines [`scale`]
//! with the formats [`e4m3`], [`e2m1`], [`ue4m3`] and [`ue8m0`].
//!
//! # Scales
//! `x` is an element and `c` the number that its code stands for. `amax` is the largest magnitude of the elements that
//! share a scale. A format's name as a function rounds to the nearest number of the format, ties to even, and
//! saturates. `UE8M0` rounds up instead: see [`ue8m0`].
//!
//! | quantization | scale | number that is encoded | dequantized element |
//! | --- | --- | --- | --- |
//! | `Fp8Static` | `s`, from the caller | `c = E4M3(x * (1 / s))` | `c * s` |
//! | `Fp8PerToken` | `s = max(amax / 448, 1 / (448 * 512))` | `c = E4M3(x / s)` | `c * s` |
//! | `Fp8PerGroup`, `MxFp8` | `s = UE8M0(amax / 448)` | `c = E4M3(x * (1 / s))` | `c * s` |
//! | `Fp8PerGroup` with `f32` scales | `s = max(amax, 1e-10) / 448` | `c = E4M3(x / s)` | `c * s` |
//! | `MxFp4` | `s = UE8M0(amax / 6)` | `c = E2M1(x * (1 / s))` | `c * s` |
//! | `NvFp4` | `b = UE4M3(g * (amax / 6))`, `g` from the caller | `c = E2M1(x * (g / b))` | `c * b / g` |
//!
//! A scale `s` and a block scale `b` divide when a tensor is quantized and multiply when it is dequantized. NVFP4's
//! global scale `g` does the opposite. For a tensor whose largest magnitude is `A`, the usual choices are
//! `s = A / 448` and `g = 448 * 6 / A`. Libraries that store `A / (448 * 6)` store the reciprocal of `g`.
//!
//! # Codes
//! An E4M3 code is a byte. Two E2M1 codes share a byte: the element with the even index has the low four bits.
//!
//! # Guarantees
//! - A quantization reads elements after they were rounded to their type.
//! - Encoders are exact for every `f32` and equal PTX's `cvt` instructions, so all backends agree bit for bit.
//! - Each scale is computed by the `f32` operations that [`scale`] states, in the stated order.
//! - Padding of a [`ScaleLayout`] is zero.

pub mod e2m1;
pub mod e4m3;
mod layout;
mod minifloat;
mod quantization;
mod row;
pub mod scale;
mod tensor;
pub mod ue4m3;
pub mod ue8m0;

pub use layout::{ScaleLayout, ScaleStrides, ScaleTensor};
pub use quantization::{GroupScale, Quantization, ScaleError};
pub use row::{RowError, quantize_row};
pub use tensor::{TensorError, TensorPart, dequantize, quantize};
