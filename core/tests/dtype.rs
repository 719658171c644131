//! The element types' conversions against `half`, on every input.

use std::{
    num::NonZero,
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

use fused_collective_core::dtype::{Element, bf16, f16};

/// Checks every `f32`; `wrong` says whether one is converted wrongly.
fn for_every_f32(wrong: impl Fn(f32) -> bool + Sync) {
    let next = AtomicU32::new(0);
    let work = || {
        loop {
            let upper = next.fetch_add(1, Ordering::Relaxed);
            if upper > 0xff {
                return;
            }
            for lower in 0..1 << 24 {
                let bits = upper << 24 | lower;
                assert!(!wrong(f32::from_bits(bits)), "{bits:#010x}");
            }
        }
    };
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(work);
        }
    });
}

#[test]
fn every_f32_becomes_the_bf16_that_half_makes_of_it() {
    const QUIET: u16 = 0x0040;
    for_every_f32(|value| {
        let (ours, theirs) = (<bf16 as Element>::from_f32(value), bf16::from_f32_const(value));
        let quiet_nan = ours.is_nan() && ours.to_bits() & QUIET != 0;
        if value.is_nan() { !quiet_nan } else { ours.to_bits() != theirs.to_bits() }
    });
}

#[test]
fn every_f32_becomes_the_f16_that_half_makes_of_it() {
    const QUIET: u16 = 0x0200;
    for_every_f32(|value| {
        let (ours, theirs) = (<f16 as Element>::from_f32(value), f16::from_f32_const(value));
        let quiet_nan = ours.is_nan() && ours.to_bits() & QUIET != 0;
        if value.is_nan() { !quiet_nan } else { ours.to_bits() != theirs.to_bits() }
    });
}

#[test]
fn every_bf16_and_f16_becomes_the_f32_that_half_makes_of_it() {
    const QUIET: u32 = 0x0040_0000;
    for bits in 0..=u16::MAX {
        let ours = Element::to_f32(bf16::from_bits(bits));
        let theirs = bf16::from_bits(bits).to_f32_const();
        // A bf16 is an f32's upper half: widening is a shift, and keeps even a signaling NaN as it is.
        assert!(ours.to_bits() == u32::from(bits) << 16, "bf16 {bits:#06x}");
        assert!(ours == theirs || ours.is_nan() && theirs.is_nan(), "bf16 {bits:#06x}");

        let ours = Element::to_f32(f16::from_bits(bits));
        let theirs = f16::from_bits(bits).to_f32_const();
        if theirs.is_nan() {
            assert!(ours.is_nan() && ours.to_bits() & QUIET != 0, "f16 {bits:#06x}");
        } else {
            assert_eq!(ours.to_bits(), theirs.to_bits(), "f16 {bits:#06x}");
        }
    }
}

fn packs_convert_as_single_elements_do<E: Element>() {
    for bits in 0..=u16::MAX {
        // Two neighbours in every word, so that a mix-up of halves or words shows.
        let words =
            [0, 1, 2, 3].map(|word| u32::from(bits).wrapping_mul(0x9e37_79b1).rotate_left(7 * word) ^ word);
        let bits_of = |lane: usize| match size_of::<E>() {
            4 => words[lane],
            _ => words[lane / 2] >> (lane % 2 * 16) & 0xffff,
        };
        let wide = E::widen(words);
        assert_eq!(wide.as_ref().len(), E::LANES);
        let mut narrow_again = [0; 4];
        for (lane, value) in wide.as_ref().iter().enumerate() {
            let element = E::from_bits(bits_of(lane));
            assert_eq!(value.to_bits(), element.to_f32().to_bits(), "lane {lane} of {words:#x?}");
            let narrow = E::from_f32(*value).to_bits();
            narrow_again[lane * size_of::<E>() / 4] |= narrow << (lane * size_of::<E>() % 4 * 8);
        }
        assert_eq!(E::narrow(wide), narrow_again);
    }
}

#[test]
fn packs_of_every_type_convert_as_single_elements_do() {
    packs_convert_as_single_elements_do::<f32>();
    packs_convert_as_single_elements_do::<f16>();
    packs_convert_as_single_elements_do::<bf16>();
}

/// Between each value and the next one up: what lies closest to the middle on either side rounds to its own side.
fn doubles_are_rounded_once<E: Element>() {
    for bits in 0..0x7fff {
        let (low, high) = (E::from_bits(bits), E::from_bits(bits + 1));
        let middle = (f64::from(low.to_f32()) + f64::from(high.to_f32())) / 2.0;
        if !middle.is_finite() {
            continue;
        }
        for sign in [1.0, -1.0] {
            let below = E::from_f64(sign * middle.next_down());
            let above = E::from_f64(sign * middle.next_up());
            assert_eq!(f64::from(below.to_f32()), sign * f64::from(low.to_f32()), "below {middle:e}");
            assert_eq!(f64::from(above.to_f32()), sign * f64::from(high.to_f32()), "above {middle:e}");
        }
    }
}

#[test]
fn doubles_are_rounded_once_however_close_to_a_tie_they_are() {
    doubles_are_rounded_once::<f16>();
    doubles_are_rounded_once::<bf16>();
}
