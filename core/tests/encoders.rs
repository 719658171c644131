//! Every `f32` through every encoder, against the digests that `digests/make.py` made with `ml_dtypes`; every code
//! through every decoder, against the format's definition.

use std::{
    num::NonZero,
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

use fused_collective_core::quant::{e2m1, e4m3, scale, ue4m3, ue8m0};
use sha2::{Digest, Sha256};

const DIGESTS: &str = include_str!("digests/encoders.txt");
const BLOCKS: u32 = 256;
const BLOCK: u32 = 1 << 24;

/// The 256 digests of `encoder`.
fn expected(encoder: &str) -> Vec<&'static str> {
    let mut digests = Vec::new();
    for line in DIGESTS.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let [name, first, last, digest] = fields[..] else { panic!("not a line of digests: {line}") };
        if name == encoder {
            let [first, last] = [first, last].map(|block| usize::from_str_radix(block, 16).unwrap());
            assert_eq!(digests.len(), first, "blocks are listed in order: {line}");
            digests.resize(last + 1, digest);
        }
    }
    assert_eq!(digests.len(), BLOCKS as usize, "every block of {encoder} has a digest");
    digests
}

fn encodes_every_f32(name: &str, encode: impl Fn(f32) -> u8 + Sync) {
    let expected = expected(name);
    let next = AtomicU32::new(0);
    let work = || {
        let mut codes = vec![0; BLOCK as usize];
        let mut wrong = Vec::new();
        loop {
            let block = next.fetch_add(1, Ordering::Relaxed);
            if block >= BLOCKS {
                return wrong;
            }
            let first = block * BLOCK;
            for (low, code) in (0..BLOCK).zip(&mut codes) {
                *code = encode(f32::from_bits(first | low));
            }
            let digest = Sha256::digest(&codes);
            let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
            if digest != expected[block as usize] {
                wrong.push(format!("{block:02x}"));
            }
        }
    };
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    let mut wrong: Vec<String> = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
    });
    wrong.sort();
    assert!(wrong.is_empty(), "{name} differs among inputs with these upper bytes: {wrong:?}");
}

#[test]
fn e4m3_encodes_every_f32_as_ml_dtypes_does() {
    encodes_every_f32("e4m3", e4m3::encode);
}

#[test]
fn ue4m3_encodes_every_f32_as_ml_dtypes_does() {
    encodes_every_f32("ue4m3", ue4m3::encode);
}

#[test]
fn e2m1_encodes_every_f32_as_ml_dtypes_does() {
    encodes_every_f32("e2m1", e2m1::encode);
}

#[test]
fn ue8m0_encodes_every_f32_as_ml_dtypes_does() {
    encodes_every_f32("ue8m0", ue8m0::encode);
}

#[test]
fn ue8m0_encodes_every_f32_upwards_as_numpy_does() {
    encodes_every_f32("ue8m0_up", ue8m0::encode_up);
}

/// Every magnitude: products of a `f32` and a power of two with 448 or 6 are exact in `f64`.
#[test]
fn block_scales_are_the_least_powers_of_two_under_which_no_element_saturates() {
    type BlockScale = fn(f32) -> u8;
    for (block, largest) in [(scale::fp8_block as BlockScale, 448.0), (scale::mxfp4_block, 6.0)] {
        let step = |code: u8| f64::from(ue8m0::decode(code)) * largest;
        let steps: Vec<f64> = (0..=254).map(step).collect();
        for bits in 0..=f32::MAX.to_bits() {
            let amax = f64::from(f32::from_bits(bits));
            let code = usize::from(block(f32::from_bits(bits)));
            let is_least = code == 0 || steps[code - 1] < amax;
            assert!(steps[code] >= amax && is_least, "{amax:e} has the scale {code}, {largest}");
        }
        assert_eq!([f32::INFINITY, f32::NEG_INFINITY, f32::NAN].map(block), [254, 254, 255]);
    }
}

/// A code's value by the definition of a format with `mantissa` stored bits and bias `bias`, sign aside.
fn definition(code: u8, mantissa: u32, bias: i32) -> f64 {
    let exponent = i32::from(code >> mantissa);
    let fraction = f64::from(code & ((1 << mantissa) - 1)) / f64::from(1 << mantissa);
    if exponent == 0 { fraction * 2f64.powi(1 - bias) } else { (1.0 + fraction) * 2f64.powi(exponent - bias) }
}

/// True for equal numbers; zeros of different signs are different.
fn same(found: f32, expected: f64) -> bool {
    f64::from(found) == expected && found.is_sign_negative() == expected.is_sign_negative()
}

#[test]
fn e4m3_decodes_every_code_by_definition() {
    for code in 0..=u8::MAX {
        let decoded = e4m3::decode(code);
        if code & 0x7f == 0x7f {
            assert!(decoded.is_nan(), "{code:#04x}");
            continue;
        }
        let magnitude = definition(code & 0x7f, 3, 7);
        let expected = if code & 0x80 == 0 { magnitude } else { -magnitude };
        assert!(same(decoded, expected), "{code:#04x}: {decoded}, not {expected}");
        assert_eq!(e4m3::encode(decoded), code, "a code's value is encoded as that code");
    }
    assert_eq!(f64::from(e4m3::MAX), definition(0x7e, 3, 7));
}

#[test]
fn ue4m3_decodes_every_code_by_definition() {
    for code in 0..=u8::MAX {
        let decoded = ue4m3::decode(code);
        if code & 0x7f == 0x7f {
            assert!(decoded.is_nan(), "{code:#04x}");
        } else {
            let expected = definition(code & 0x7f, 3, 7);
            assert!(same(decoded, expected), "{code:#04x}: {decoded}, not {expected}");
        }
    }
}

#[test]
fn e2m1_decodes_every_code_by_definition() {
    const VALUES: [f64; 16] =
        [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];
    for code in 0..=u8::MAX {
        let decoded = e2m1::decode(code);
        let expected = VALUES[usize::from(code & 0xf)];
        assert!(same(decoded, expected), "{code:#04x}: {decoded}, not {expected}");
        assert_eq!(e2m1::encode(decoded), code & 0xf, "a code's value is encoded as that code");
    }
    assert_eq!(e2m1::MAX, 6.0);
}

#[test]
fn e2m1_packs_the_first_element_in_the_low_half() {
    for byte in 0..=u8::MAX {
        let [first, second] = e2m1::unpack(byte);
        assert_eq!((first, second), (byte % 16, byte / 16));
        assert_eq!(e2m1::pack(first, second), byte);
    }
}

#[test]
fn ue8m0_decodes_every_code_by_definition() {
    for code in 0..u8::MAX {
        let expected = 2f64.powi(i32::from(code) - 127);
        assert!(same(ue8m0::decode(code), expected), "{code:#04x}");
        assert_eq!(ue8m0::encode(ue8m0::decode(code)), code);
        assert_eq!(ue8m0::encode_up(ue8m0::decode(code)), code);
        assert!(same(ue8m0::decode_reciprocal(code), expected.recip()), "{code:#04x}");
    }
    assert!(ue8m0::decode(255).is_nan());
    assert!(ue8m0::decode_reciprocal(255).is_nan());
    assert_eq!((ue8m0::MIN, ue8m0::MAX), (ue8m0::decode(0), ue8m0::decode(254)));
}
