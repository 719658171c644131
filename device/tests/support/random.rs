//! Random numbers, the same in every run.

use fused_collective_core::dtype::Element;

/// xorshift64*.
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        (self.bits() >> 33) % end
    }

    /// From -4 to 4, now and then a zero of either sign.
    pub fn element<E: Element>(&mut self) -> E {
        match self.below(32) {
            0 => E::from_f32(-0.0),
            1 => E::from_f32(0.0),
            _ => E::from_f32(self.below(1 << 20) as f32 / (1 << 17) as f32 - 4.0),
        }
    }

    pub fn elements<E: Element>(&mut self, count: usize) -> Vec<E> {
        (0..count).map(|_| self.element()).collect()
    }
}
