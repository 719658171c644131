//! The element types of activations: `f32`, `f16` and `bf16`.
//!
//! Arithmetic is done in `f32`: an element is widened on load and rounded once, to nearest even, on store. The
//! conversions are branch-free, so that a compiler vectorizes a loop over them. They equal those of the crate `half`
//! on every input.

use core::{fmt, str::FromStr};
pub use half::{bf16, f16};

/// An element type, as a value. [`Element`] is the same as a type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16: the upper half of a binary32.
    Bf16,
}

impl DType {
    /// Every element type.
    pub const ALL: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

    /// Bytes of one element.
    pub const fn bytes(self) -> u64 {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::Bf16 => 2,
        }
    }

    /// Elements in one 16-byte [`Pack`](crate::pack::Pack).
    pub const fn lanes(self) -> u64 {
        16 / self.bytes()
    }

    /// Bits of the significand, the implied one included. Rounding changes a normal number by at most `2^-digits` of
    /// it.
    pub const fn digits(self) -> u32 {
        match self {
            DType::F32 => 24,
            DType::F16 => 11,
            DType::Bf16 => 8,
        }
    }

    /// Exponent of the smallest normal number.
    pub const fn min_exponent(self) -> i32 {
        match self {
            DType::F32 | DType::Bf16 => -126,
            DType::F16 => -14,
        }
    }

    /// The name in PyTorch.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "float32",
            DType::F16 => "float16",
            DType::Bf16 => "bfloat16",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A text that names no element type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownDType;

impl fmt::Display for UnknownDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not an element type: use float16, bfloat16 or float32")
    }
}

impl core::error::Error for UnknownDType {}

impl FromStr for DType {
    type Err = UnknownDType;

    /// Parses the name in PyTorch or a usual short form (`f32`, `fp16`, `half`, `bf16`, ...).
    fn from_str(text: &str) -> Result<Self, UnknownDType> {
        match text {
            "float32" | "f32" | "fp32" | "float" => Ok(DType::F32),
            "float16" | "f16" | "fp16" | "half" => Ok(DType::F16),
            "bfloat16" | "bf16" => Ok(DType::Bf16),
            _ => Err(UnknownDType),
        }
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for super::f16 {}
    impl Sealed for super::bf16 {}
}

/// An element type, as a type: `f32`, `f16` or `bf16`. The trait is sealed.
pub trait Element: sealed::Sealed + Copy + Default + PartialEq + fmt::Debug + Send + Sync + 'static {
    /// The element type as a value.
    const DTYPE: DType;
    /// Elements in one 16-byte pack.
    const LANES: usize = 16 / size_of::<Self>();
    /// One pack widened: `[f32; LANES]`.
    type Wide: AsRef<[f32]> + AsMut<[f32]> + Copy + Default + Send + Sync + 'static;
    /// A pack of zeros, widened.
    const WIDE_ZERO: Self::Wide;

    /// The exact value as `f32`.
    fn to_f32(self) -> f32;
    /// The nearest element, ties to even. NaN stays NaN; magnitudes too large for the type become infinite.
    fn from_f32(value: f32) -> Self;
    /// The element nearest to an `f64`, rounded once, ties to even.
    fn from_f64(value: f64) -> Self;
    /// The bits, zero-extended.
    fn to_bits(self) -> u32;
    /// The element whose bits are the low bits of `bits`.
    fn from_bits(bits: u32) -> Self;
    /// Widens the elements of four words. The first element has the low bits of the first word.
    fn widen(words: [u32; 4]) -> Self::Wide;
    /// Rounds widened elements and packs them into four words: the inverse of [`widen`](Self::widen).
    fn narrow(wide: Self::Wide) -> [u32; 4];
}

/// `value` as an `f32`, rounded to odd: an inexact result has an odd last bit. Rounding this result to a type of at
/// least two bits less equals rounding `value` once (Boldo and Melquiond, 2008).
#[inline(always)]
fn round_to_odd(value: f64) -> f32 {
    let nearest = value as f32;
    let back = f64::from(nearest);
    if back == value || value.is_nan() {
        return nearest;
    }
    // Toward zero, then odd.
    let bits = nearest.to_bits();
    let truncated = if back.abs() > value.abs() { bits - 1 } else { bits };
    f32::from_bits(truncated | 1)
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
    type Wide = [f32; 4];
    const WIDE_ZERO: Self::Wide = [0.0; 4];

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }

    #[inline]
    fn from_f64(value: f64) -> Self {
        value as f32
    }

    #[inline(always)]
    fn to_bits(self) -> u32 {
        f32::to_bits(self)
    }

    #[inline(always)]
    fn from_bits(bits: u32) -> Self {
        f32::from_bits(bits)
    }

    #[inline(always)]
    fn widen(words: [u32; 4]) -> [f32; 4] {
        words.map(f32::from_bits)
    }

    #[inline(always)]
    fn narrow(wide: [f32; 4]) -> [u32; 4] {
        wide.map(f32::to_bits)
    }
}

macro_rules! sixteen_bit_element {
    ($ty:ident, $dtype:expr, $widen:ident, $narrow:ident) => {
        impl Element for $ty {
            const DTYPE: DType = $dtype;
            type Wide = [f32; 8];
            const WIDE_ZERO: Self::Wide = [0.0; 8];

            #[inline(always)]
            fn to_f32(self) -> f32 {
                $widen(self.to_bits() as u32)
            }

            #[inline(always)]
            fn from_f32(value: f32) -> Self {
                $ty::from_bits($narrow(value) as u16)
            }

            #[inline]
            fn from_f64(value: f64) -> Self {
                // Not `half`'s `from_f64`, which ignores the lower half of the significand.
                $ty::from_f32(round_to_odd(value))
            }

            #[inline(always)]
            fn to_bits(self) -> u32 {
                $ty::to_bits(self) as u32
            }

            #[inline(always)]
            fn from_bits(bits: u32) -> Self {
                $ty::from_bits(bits as u16)
            }

            #[inline(always)]
            fn widen(words: [u32; 4]) -> [f32; 8] {
                let [a, b, c, d] = words;
                [
                    $widen(a & 0xffff),
                    $widen(a >> 16),
                    $widen(b & 0xffff),
                    $widen(b >> 16),
                    $widen(c & 0xffff),
                    $widen(c >> 16),
                    $widen(d & 0xffff),
                    $widen(d >> 16),
                ]
            }

            #[inline(always)]
            fn narrow(wide: [f32; 8]) -> [u32; 4] {
                let [a, b, c, d, e, f, g, h] = wide;
                [
                    $narrow(a) | $narrow(b) << 16,
                    $narrow(c) | $narrow(d) << 16,
                    $narrow(e) | $narrow(f) << 16,
                    $narrow(g) | $narrow(h) << 16,
                ]
            }
        }
    };
}

sixteen_bit_element!(f16, DType::F16, widen_f16, narrow_f16);
sixteen_bit_element!(bf16, DType::Bf16, widen_bf16, narrow_bf16);

/// bf16 bits (low half of `bits`) to `f32`: exact, a shift.
#[inline(always)]
fn widen_bf16(bits: u32) -> f32 {
    f32::from_bits(bits << 16)
}

/// `f32` to bf16 bits. A NaN keeps its sign and upper payload and becomes quiet.
#[inline(always)]
fn narrow_bf16(value: f32) -> u32 {
    let bits = value.to_bits();
    let nearest_even = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if value.is_nan() { bits >> 16 | 0x40 } else { nearest_even }
}

/// f16 bits (low half of `bits`) to `f32`: exact. A signaling NaN becomes quiet.
#[inline(always)]
fn widen_f16(bits: u32) -> f32 {
    const SMALLEST_NORMAL: f32 = 1.0 / 16384.0; // 2^-14
    let magnitude = (bits & 0x7fff) << 13;
    let exponent = magnitude & 0x1f << 23;
    let normal = magnitude + ((127 - 15) << 23);
    // Exponent 31 means infinity or NaN in f16; in f32 that is 255. A NaN's quiet bit is set, as hardware does.
    let quiet = if magnitude > 0x1f << 23 { 1 << 22 } else { 0 };
    let special = (magnitude + ((255 - 31) << 23)) | quiet;
    // The fraction of a subnormal gets exponent -14, then the implied one is subtracted: exact.
    let subnormal = (f32::from_bits(magnitude + ((127 - 14) << 23)) - SMALLEST_NORMAL).to_bits();
    let unsigned = if exponent == 0x1f << 23 {
        special
    } else if exponent == 0 {
        subnormal
    } else {
        normal
    };
    f32::from_bits(unsigned | (bits & 0x8000) << 16)
}

/// `f32` to f16 bits. A NaN keeps its sign and upper payload and becomes quiet.
#[inline(always)]
fn narrow_f16(value: f32) -> u32 {
    const INFINITE_FROM: u32 = 0x477f_f000; // 65520: halfway between the largest f16 and the next step
    const NORMAL_FROM: u32 = 0x3880_0000; // 2^-14
    let bits = value.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    let normal = magnitude.wrapping_add(0xfff + (magnitude >> 13 & 1)).wrapping_sub((127 - 15) << 23) >> 13;
    // Adding 0.5 aligns the last place of an f16 subnormal with that of an f32, so the addition rounds.
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let unsigned = if magnitude > 0x7f80_0000 {
        0x7e00 | (magnitude >> 13 & 0x3ff)
    } else if magnitude >= INFINITE_FROM {
        0x7c00
    } else if magnitude < NORMAL_FROM {
        subnormal
    } else {
        normal
    };
    unsigned | (bits >> 16 & 0x8000)
}
