//! The number that values are folded into.

use fused_collective_core::{dtype::Element, quant::e4m3};

/// FNV-1a of 64 bits, by words in place of bytes. A step is a bijection of the state, so no single difference is lost.
pub(crate) struct Fold(u64);

impl Default for Fold {
    fn default() -> Self {
        Fold(0xcbf2_9ce4_8422_2325)
    }
}

impl Fold {
    /// The value of all that was folded.
    pub(crate) fn value(&self) -> u64 {
        self.0
    }

    /// Folds a word.
    #[inline(always)]
    pub(crate) fn word(&mut self, word: u64) {
        self.0 = (self.0 ^ word).wrapping_mul(0x0000_0100_0000_01b3);
    }

    /// Folds elements by their bits, and every NaN as the same.
    #[inline(always)]
    pub(crate) fn elements<E: Element>(&mut self, elements: &[E]) {
        for element in elements {
            let bits = if element.to_f32().is_nan() { u32::MAX } else { element.to_bits() };
            self.word(u64::from(bits));
        }
    }

    /// Folds bytes.
    #[inline(always)]
    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.word(u64::from(byte));
        }
    }

    /// Folds codes of E4M3, and every NaN as the same.
    #[inline(always)]
    pub(crate) fn e4m3(&mut self, codes: &[u8]) {
        for &code in codes {
            self.word(if e4m3::decode(code).is_nan() { u64::MAX } else { u64::from(code) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: &[f32]) -> u64 {
        let mut fold = Fold::default();
        fold.elements(values);
        fold.value()
    }

    #[test]
    fn every_bit_counts_except_those_of_a_nan() {
        assert_ne!(of(&[0.0, 1.0]), of(&[-0.0, 1.0]));
        assert_ne!(of(&[0.0, 1.0]), of(&[1.0, 0.0]));
        assert_eq!(of(&[f32::NAN]), of(&[-f32::from_bits(0x7fc0_0001)]));
        let codes = |codes: &[u8]| {
            let mut fold = Fold::default();
            fold.e4m3(codes);
            fold.value()
        };
        assert_eq!(codes(&[0x7f]), codes(&[0xff]));
        assert_ne!(codes(&[0x7e]), codes(&[0xfe]));
    }
}
