//! Instructions that compute a value from values: what each does to the bits of registers.
//!
//! Registers hold 64 bits; instructions for fewer look at no others. Predicates are 0 or 1.
//!
//! Conversions to and from FP8 and FP4 are those of `core`. On H200 `fused-collective verify` found E4M3's instruction to do
//! the same for every `float32`; E2M1's, which only later GPUs have, has run on none.

use fused_collective_core::quant::{e2m1, e4m3};
use half::{bf16, f16};

/// A value from up to three.
pub(crate) type Compute = fn(u64, u64, u64) -> u64;

/// What a GPU makes of every NaN that it computes.
const NAN: u32 = 0x7fff_ffff;
const HALF_NAN: u64 = 0x7fff;
const DOUBLE_NAN: u64 = 0x7fff_ffff_ffff_ffff;

fn float(bits: u64) -> f32 {
    f32::from_bits(bits as u32)
}

fn bits(value: f32) -> u64 {
    u64::from(if value.is_nan() { NAN } else { value.to_bits() })
}

fn double(bits: u64) -> f64 {
    f64::from_bits(bits)
}

fn double_bits(value: f64) -> u64 {
    if value.is_nan() { DOUBLE_NAN } else { value.to_bits() }
}

fn to_f16(value: u64) -> u64 {
    let value = float(value);
    if value.is_nan() { HALF_NAN } else { u64::from(f16::from_f32(value).to_bits()) }
}

fn to_bf16(value: u64) -> u64 {
    let value = float(value);
    if value.is_nan() { HALF_NAN } else { u64::from(bf16::from_f32(value).to_bits()) }
}

/// The bytes of `b` and `a` that the nibbles of `selectors` name; a nibble's top bit asks for copies of the byte's sign.
fn permute(a: u64, b: u64, selectors: u64) -> u64 {
    let bytes = (a & 0xffff_ffff) | b << 32;
    let byte = |place: u32| {
        let selector = selectors >> (place * 4) & 0xf;
        let byte = bytes >> ((selector & 7) * 8) & 0xff;
        if selector & 8 == 0 { byte } else { (byte >> 7) * 0xff }
    };
    (0..4).map(|place| byte(place) << (place * 8)).sum()
}

fn extract(value: u64, first: u64, count: u64) -> u64 {
    let (first, count) = (first & 0xff, count & 0xff);
    let shifted = if first > 63 { 0 } else { value >> first };
    if count > 63 { shifted } else { shifted & ((1 << count) - 1) }
}

/// [`extract`] of 32 bits, of which the last bit taken is repeated above. Of a field past the end, that is the sign.
fn extract_signed(value: u64, first: u64, count: u64) -> u64 {
    let (first, count) = ((first & 0xff).min(31) as u32, (count & 0xff) as u32);
    let shifted = value as i32 >> first;
    let above = 32u32.saturating_sub(count);
    let field = if count == 0 { 0 } else { shifted << above >> above };
    u64::from(field as u32)
}

fn both(of: fn(f32, f32) -> f32, a: u64, b: u64) -> u64 {
    bits(of(float(a), float(b))) | bits(of(float(a >> 32), float(b >> 32))) << 32
}

/// What an instruction computes, by its name; none for one that the kernels do not have.
pub(crate) fn compute(name: &str) -> Option<Compute> {
    macro_rules! table {
        ($($name:literal: $compute:expr,)*) => {
            match name {
                $($name => Some($compute),)*
                _ => None,
            }
        };
    }
    macro_rules! compare {
        (f32, $operator:tt) => {
            |a, b, _| u64::from(float(a) $operator float(b))
        };
        (f64, $operator:tt) => {
            |a, b, _| u64::from(double(a) $operator double(b))
        };
        ($type:ty, $operator:tt) => {
            |a, b, _| u64::from((a as $type) $operator (b as $type))
        };
    }
    table! {
        "mov.b16": |a, _, _| a & 0xffff,
        "mov.b32": |a, _, _| a & 0xffff_ffff,
        "mov.u32": |a, _, _| a & 0xffff_ffff,
        "mov.b64": |a, _, _| a,
        "mov.u64": |a, _, _| a,
        "mov.pred": |a, _, _| u64::from(a != 0),
        "selp.b16": |a, b, c| if c != 0 { a } else { b },
        "selp.b32": |a, b, c| if c != 0 { a } else { b },
        "selp.u32": |a, b, c| if c != 0 { a } else { b },
        "selp.b64": |a, b, c| if c != 0 { a } else { b },
        "selp.f64": |a, b, c| if c != 0 { a } else { b },
        // Local addresses are generic ones: see `LOCAL`.
        "cvta.local.u64": |a, _, _| a,
        "cvta.to.local.u64": |a, _, _| a,
        "selp.f32": |a, b, c| if c != 0 { a } else { b },

        "add.s16": |a, b, _| u64::from((a as u16).wrapping_add(b as u16)),
        "add.s32": |a, b, _| u64::from((a as u32).wrapping_add(b as u32)),
        "add.s64": |a, b, _| a.wrapping_add(b),
        "add.u64": |a, b, _| a.wrapping_add(b),
        "sub.s32": |a, b, _| u64::from((a as u32).wrapping_sub(b as u32)),
        "sub.s64": |a, b, _| a.wrapping_sub(b),
        "neg.s32": |a, _, _| u64::from((a as u32).wrapping_neg()),
        "neg.s64": |a, _, _| a.wrapping_neg(),
        "mul.lo.s32": |a, b, _| u64::from((a as u32).wrapping_mul(b as u32)),
        "mul.lo.s64": |a, b, _| a.wrapping_mul(b),
        "mul.hi.u32": |a, b, _| (u64::from(a as u32) * u64::from(b as u32)) >> 32,
        "mul.wide.u16": |a, b, _| u64::from(a as u16) * u64::from(b as u16),
        "mul.wide.u32": |a, b, _| u64::from(a as u32) * u64::from(b as u32),
        "mad.lo.s32": |a, b, c| u64::from((a as u32).wrapping_mul(b as u32).wrapping_add(c as u32)),
        "mad.lo.s64": |a, b, c| a.wrapping_mul(b).wrapping_add(c),
        "div.u32": |a, b, _| u64::from((a as u32).checked_div(b as u32).unwrap_or(u32::MAX)),
        "div.u64": |a, b, _| a.checked_div(b).unwrap_or(u64::MAX),
        "rem.u32": |a, b, _| u64::from((a as u32).checked_rem(b as u32).unwrap_or(a as u32)),
        "rem.u64": |a, b, _| a.checked_rem(b).unwrap_or(a),
        "min.u32": |a, b, _| u64::from((a as u32).min(b as u32)),
        "max.u32": |a, b, _| u64::from((a as u32).max(b as u32)),
        "min.s32": |a, b, _| u64::from((a as i32).min(b as i32) as u32),
        "max.s32": |a, b, _| u64::from((a as i32).max(b as i32) as u32),
        "min.u64": |a, b, _| a.min(b),
        "max.u64": |a, b, _| a.max(b),
        "max.u16": |a, b, _| u64::from((a as u16).max(b as u16)),
        "max.s16": |a, b, _| u64::from((a as i16).max(b as i16) as u16),

        "and.pred": |a, b, _| u64::from(a != 0 && b != 0),
        "and.b16": |a, b, _| a & b & 0xffff,
        "and.b32": |a, b, _| a & b & 0xffff_ffff,
        "and.b64": |a, b, _| a & b,
        "xor.pred": |a, b, _| u64::from((a != 0) != (b != 0)),
        "or.b16": |a, b, _| (a | b) & 0xffff,
        "or.pred": |a, b, _| u64::from(a != 0 || b != 0),
        "or.b32": |a, b, _| (a | b) & 0xffff_ffff,
        "or.b64": |a, b, _| a | b,
        "xor.b32": |a, b, _| (a ^ b) & 0xffff_ffff,
        "xor.b64": |a, b, _| a ^ b,
        "not.pred": |a, _, _| u64::from(a == 0),
        "not.b32": |a, _, _| u64::from(!(a as u32)),
        "not.b64": |a, _, _| !a,
        "shl.b16": |a, b, _| u64::from((a as u16).checked_shl(b as u32).unwrap_or(0)),
        "shr.u16": |a, b, _| u64::from((a as u16).checked_shr(b as u32).unwrap_or(0)),
        "clz.b64": |a, _, _| u64::from(a.leading_zeros()),
        "brev.b64": |a, _, _| a.reverse_bits(),
        "shl.b32": |a, b, _| u64::from((a as u32).checked_shl(b as u32).unwrap_or(0)),
        "shl.b64": |a, b, _| a.checked_shl(b as u32).unwrap_or(0),
        "shr.u32": |a, b, _| u64::from((a as u32).checked_shr(b as u32).unwrap_or(0)),
        "shr.u64": |a, b, _| a.checked_shr(b as u32).unwrap_or(0),
        "shf.l.wrap.b32": |a, b, c| (((a & 0xffff_ffff) | b << 32) << (c & 31)) >> 32,
        "prmt.b32": permute,
        "bfe.u32": |a, b, c| extract(a & 0xffff_ffff, b, c) & 0xffff_ffff,
        "bfe.u64": extract,
        "bfe.s32": extract_signed,

        "setp.eq.b16": compare!(u16, ==),
        "setp.ne.b16": compare!(u16, !=),
        "setp.lt.u16": compare!(u16, <),
        "setp.gt.u16": compare!(u16, >),
        "setp.gt.s16": compare!(i16, >),
        "setp.eq.b32": compare!(u32, ==),
        "setp.ne.b32": compare!(u32, !=),
        "setp.ne.u32": compare!(u32, !=),
        "setp.lt.u32": compare!(u32, <),
        "setp.le.u32": compare!(u32, <=),
        "setp.gt.u32": compare!(u32, >),
        "setp.ge.u32": compare!(u32, >=),
        "setp.lt.s32": compare!(i32, <),
        "setp.gt.s32": compare!(i32, >),
        "setp.ge.s32": compare!(i32, >=),
        "setp.eq.b64": compare!(u64, ==),
        "setp.ne.b64": compare!(u64, !=),
        "setp.lt.s64": compare!(i64, <),
        "setp.le.u64": compare!(u64, <=),
        "setp.lt.u64": compare!(u64, <),
        "setp.gt.u64": compare!(u64, >),
        "setp.ge.u64": compare!(u64, >=),
        "setp.eq.f32": compare!(f32, ==),
        "setp.lt.f32": compare!(f32, <),
        "setp.le.f32": compare!(f32, <=),
        "setp.gt.f32": compare!(f32, >),
        "setp.ge.f32": compare!(f32, >=),
        // Unlike `!=`, false of a NaN.
        "setp.ne.f32": |a, b, _| u64::from(float(a) < float(b) || float(a) > float(b)),
        "setp.nan.f32": |a, b, _| u64::from(float(a).is_nan() || float(b).is_nan()),
        "setp.eq.f64": compare!(f64, ==),
        "setp.lt.f64": compare!(f64, <),

        "cvt.u16.u32": |a, _, _| a & 0xffff,
        "cvt.u16.u64": |a, _, _| a & 0xffff,
        "cvt.s32.s16": |a, _, _| u64::from(a as i16 as u32),
        "cvt.u32.u8": |a, _, _| a & 0xff,
        "cvt.u32.u16": |a, _, _| a & 0xffff,
        "cvt.u64.u16": |a, _, _| a & 0xffff,
        "cvt.u32.u64": |a, _, _| a & 0xffff_ffff,
        "cvt.u64.u32": |a, _, _| a & 0xffff_ffff,
        "cvt.s8.s32": |a, _, _| u64::from(a as i8 as u32),
        "cvt.s16.s8": |a, _, _| u64::from(a as i8 as u16),

        "add.rn.f32": |a, b, _| bits(float(a) + float(b)),
        "sub.rn.f32": |a, b, _| bits(float(a) - float(b)),
        "add.rn.f32x2": |a, b, _| both(|a, b| a + b, a, b),
        "mul.rn.f32": |a, b, _| bits(float(a) * float(b)),
        "mul.rn.f32x2": |a, b, _| both(|a, b| a * b, a, b),
        "fma.rn.f32": |a, b, c| bits(float(a).mul_add(float(b), float(c))),
        "div.rn.f32": |a, b, _| bits(float(a) / float(b)),
        "rcp.rn.f32": |a, _, _| bits(1.0 / float(a)),
        "ex2.approx.f32": |a, _, _| bits(float(a).exp2()),
        "max.f32": |a, b, _| bits(float(a).max(float(b))),
        "min.f32": |a, b, _| bits(float(a).min(float(b))),
        "abs.f32": |a, _, _| bits(float(a).abs()),
        "neg.f32": |a, _, _| bits(-float(a)),
        "cvt.rn.f32.u16": |a, _, _| bits(f32::from(a as u16)),
        "cvt.rn.f32.u32": |a, _, _| bits(a as u32 as f32),
        "cvt.rn.f32.s32": |a, _, _| bits(a as i32 as f32),
        "cvt.rn.f32.u64": |a, _, _| bits(a as f32),
        "cvt.rn.f32.f64": |a, _, _| bits(double(a) as f32),
        "cvt.f64.f32": |a, _, _| double_bits(f64::from(float(a))),
        "add.rn.f64": |a, b, _| double_bits(double(a) + double(b)),
        "sub.rn.f64": |a, b, _| double_bits(double(a) - double(b)),
        "mul.rn.f64": |a, b, _| double_bits(double(a) * double(b)),
        "cvt.f32.f16": |a, _, _| bits(f16::from_bits(a as u16).to_f32()),
        "cvt.rn.f16x2.f32": |high, low, _| to_f16(high) << 16 | to_f16(low),
        "cvt.rn.bf16x2.f32": |high, low, _| to_bf16(high) << 16 | to_bf16(low),
        "cvt.rn.satfinite.e4m3x2.f32": |high, low, _| {
            u64::from(e4m3::encode(float(high))) << 8 | u64::from(e4m3::encode(float(low)))
        },
        "cvt.rn.satfinite.e2m1x2.f32": |high, low, _| {
            u64::from(e2m1::encode(float(high))) << 4 | u64::from(e2m1::encode(float(low)))
        },
        "cvt.rn.f16x2.e4m3x2": |a, _, _| {
            let half = |code: u64| to_f16(bits(e4m3::decode(code as u8)));
            half(a >> 8) << 16 | half(a)
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: &str, a: u64, b: u64, c: u64) -> u64 {
        compute(name).unwrap()(a, b, c)
    }

    /// Examples of the PTX manual, and edges that it names.
    #[test]
    fn instructions_do_what_the_manual_says() {
        assert_eq!(of("prmt.b32", 0x3322_1100, 0x7766_5544, 0x7531), 0x7755_3311);
        assert_eq!(of("prmt.b32", 0x0000_8000, 0, 0x9999), 0xffff_ffff);
        assert_eq!(of("shf.l.wrap.b32", 0x8000_0001, 0x1234_5678, 36), 0x2345_6788);
        assert_eq!(of("shl.b32", 1, 32, 0), 0);
        assert_eq!(of("shr.u64", u64::MAX, 64, 0), 0);
        assert_eq!(of("bfe.u64", 0x1234_5678_9abc_def0, 60, 8), 1);
        assert_eq!(of("cvt.s16.s8", 0x80, 0, 0), 0xff80);
        assert_eq!(of("setp.gt.s16", 0xffff, 0, 0), 0);
        assert_eq!(of("setp.lt.f32", u64::from(f32::NAN.to_bits()), 0, 0), 0);
        assert_eq!(of("not.pred", of("mov.pred", u64::MAX, 0, 0), 0, 0), 0);
        assert_eq!(of("mul.hi.u32", 0xffff_ffff, 0xffff_ffff, 0), 0xffff_fffe);
        assert_eq!(of("setp.ne.f32", bits(f32::NAN), 0, 0), 0);
        assert_eq!(of("setp.ne.f32", bits(1.0), 0, 0), 1);
        assert_eq!(of("setp.nan.f32", 0, bits(f32::NAN), 0), 1);
        assert_eq!(of("setp.lt.s64", u64::MAX, 0, 0), 1);
        assert_eq!(of("bfe.u32", 0xffff_ffff_1234_5678, 28, 8), 1);
        assert_eq!(of("clz.b64", 1, 0, 0), 63);
        assert_eq!(of("cvt.s32.s16", 0x8000, 0, 0), 0xffff_8000);
        assert_eq!(of("neg.f32", 0, 0, 0), 0x8000_0000);
        assert_eq!(of("mul.wide.u16", 0xffff, 0x1_ffff, 0), 0xfffe_0001);
        // Halfway between two of `float32`, to even.
        assert_eq!(of("cvt.rn.f32.f64", double_bits(1.0 + f64::from(f32::EPSILON) / 2.0), 0, 0), bits(1.0));
        assert_eq!(of("sub.rn.f64", double_bits(1.0), double_bits(0.25), 0), double_bits(0.75));
        // The first source is the upper half.
        assert_eq!(of("cvt.rn.bf16x2.f32", bits(1.0), bits(-2.0), 0), 0x3f80_c000);
        assert_eq!(of("cvt.rn.f16x2.f32", bits(f32::NAN), bits(1e9), 0), 0x7fff_7c00);
        assert_eq!(of("cvt.rn.satfinite.e4m3x2.f32", bits(1e9), bits(f32::NAN), 0), 0x7e7f);
        assert_eq!(of("cvt.rn.satfinite.e2m1x2.f32", bits(-6.0), bits(0.5), 0), 0xf1);
        assert_eq!(of("cvt.rn.f16x2.e4m3x2", 0x38c0, 0, 0), 0x3c00_c000);
        assert_eq!(of("add.rn.f32", bits(f32::INFINITY), bits(f32::NEG_INFINITY), 0), 0x7fff_ffff);
        assert_eq!(
            of("add.rn.f32x2", bits(1.0) | bits(2.0) << 32, bits(0.5) | bits(-2.0) << 32, 0),
            bits(1.5) | bits(0.0) << 32
        );
        assert_eq!(
            of("mul.rn.f32x2", bits(3.0) | bits(2.0) << 32, bits(0.5) | bits(-2.0) << 32, 0),
            bits(1.5) | bits(-4.0) << 32
        );
        assert_eq!(of("max.s32", 0xffff_ffff, 0, 0), 0);
        assert_eq!(of("min.s32", 0xffff_ffff, 0, 0), 0xffff_ffff);
    }

    #[test]
    fn an_unknown_instruction_is_none() {
        assert!(compute("wgmma.mma_async").is_none());
    }
}
