//! A cache line of shared words, moved in as few instructions as the processor has for it.
//!
//! The protocol needs words of 64 bits to arrive whole, in any order ([`lamport`]).
//! Compilers do not merge atomic accesses, and one instruction a word takes longer than the arithmetic on it. x86-64
//! processors with AVX access 16 aligned bytes at once; Rust has no atomics for that, but inline assembly, to which the
//! same rules apply: here each instruction stands for two relaxed accesses that happen to be simultaneous.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use fused_collective_core::lamport;

/// Words in a line.
pub const WORDS: usize = 8;
/// Bytes in a line.
pub const BYTES: usize = 8 * WORDS;

/// A line of a row.
pub type Line = [u8; BYTES];

/// True once every word of a line has arrived. A word arrives at once, so either half tells; both are looked at.
#[inline(always)]
pub fn is_complete(line: &[u64; WORDS]) -> bool {
    #[cfg(target_arch = "x86_64")]
    return sse2::is_complete(line);
    #[cfg(not(target_arch = "x86_64"))]
    bytemuck::cast_slice::<u64, u32>(line).iter().all(|&half| lamport::is_complete(half))
}

/// Instructions that every x86-64 processor has. A compiler's vectors take several times as many here.
#[cfg(target_arch = "x86_64")]
mod sse2 {
    use std::arch::x86_64::{__m128i, _mm_cmpeq_epi32, _mm_movemask_epi8, _mm_or_si128, _mm_set1_epi32};

    use super::*;

    #[inline(always)]
    pub(super) fn is_complete(line: &[u64; WORDS]) -> bool {
        let [a, b, c, d]: [__m128i; 4] = bytemuck::cast(*line);
        // SAFETY: every x86-64 processor has SSE2.
        unsafe {
            let sentinel = _mm_set1_epi32(lamport::SENTINEL as i32);
            let first = _mm_or_si128(_mm_cmpeq_epi32(a, sentinel), _mm_cmpeq_epi32(b, sentinel));
            let second = _mm_or_si128(_mm_cmpeq_epi32(c, sentinel), _mm_cmpeq_epi32(d, sentinel));
            _mm_movemask_epi8(_mm_or_si128(first, second)) == 0
        }
    }
}

/// The instructions that move a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mover {
    /// Word by word.
    Words,
    /// 16 bytes at a time: the processor has AVX.
    #[cfg(target_arch = "x86_64")]
    Avx,
}

impl Mover {
    /// The fastest that this processor has.
    pub fn of_this_processor() -> Self {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx") {
            return Mover::Avx;
        }
        Mover::Words
    }

    /// Each word, loaded relaxed.
    #[inline(always)]
    pub fn load(self, words: &[AtomicU64; WORDS]) -> [u64; WORDS] {
        match self {
            #[cfg(target_arch = "x86_64")]
            Mover::Avx if avx::is_aligned(words) => avx::load(words),
            _ => std::array::from_fn(|index| words[index].load(Relaxed)),
        }
    }

    /// Stores each word relaxed.
    #[inline(always)]
    pub fn store(self, words: &[AtomicU64; WORDS], values: [u64; WORDS]) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Mover::Avx if avx::is_aligned(words) => avx::store(words, values),
            _ => {
                for (word, value) in words.iter().zip(values) {
                    word.store(value, Relaxed);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx {
    use std::arch::{asm, x86_64::__m128i};

    use super::*;

    #[inline(always)]
    pub(super) fn is_aligned(words: &[AtomicU64; WORDS]) -> bool {
        words.as_ptr().addr().is_multiple_of(16)
    }

    /// `words` are [aligned](is_aligned), and the processor has AVX.
    #[inline(always)]
    pub(super) fn load(words: &[AtomicU64; WORDS]) -> [u64; WORDS] {
        let (a, b, c, d): (__m128i, __m128i, __m128i, __m128i);
        // SAFETY: loads the 64 bytes that `words` borrows. `vmovdqa` of 16 aligned bytes is atomic on processors with AVX
        // (Intel's Software Developer's Manual, volume 3, "Guaranteed Atomic Operations"; AMD's Programmer's Manual,
        // volume 2, "Access Atomicity"), so it is two relaxed atomic loads of 8 bytes, and more: no data race.
        unsafe {
            asm!(
                "vmovdqa {a}, xmmword ptr [{words}]",
                "vmovdqa {b}, xmmword ptr [{words} + 16]",
                "vmovdqa {c}, xmmword ptr [{words} + 32]",
                "vmovdqa {d}, xmmword ptr [{words} + 48]",
                words = in(reg) words.as_ptr(),
                a = out(xmm_reg) a,
                b = out(xmm_reg) b,
                c = out(xmm_reg) c,
                d = out(xmm_reg) d,
                options(nostack, preserves_flags, readonly),
            );
        }
        bytemuck::cast([a, b, c, d])
    }

    /// `words` are [aligned](is_aligned), and the processor has AVX.
    #[inline(always)]
    pub(super) fn store(words: &[AtomicU64; WORDS], values: [u64; WORDS]) {
        let [a, b, c, d]: [__m128i; 4] = bytemuck::cast(values);
        // SAFETY: stores to the 64 bytes that `words` borrows, which are atomics; as in `load`, each instruction is two
        // relaxed atomic stores of 8 bytes, and more.
        unsafe {
            asm!(
                "vmovdqa xmmword ptr [{words}], {a}",
                "vmovdqa xmmword ptr [{words} + 16], {b}",
                "vmovdqa xmmword ptr [{words} + 32], {c}",
                "vmovdqa xmmword ptr [{words} + 48], {d}",
                words = in(reg) words.as_ptr(),
                a = in(xmm_reg) a,
                b = in(xmm_reg) b,
                c = in(xmm_reg) c,
                d = in(xmm_reg) d,
                options(nostack, preserves_flags),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_moved_as_its_words_are_wherever_it_lies() {
        let memory: Vec<AtomicU64> = (0..4 * WORDS as u64).map(AtomicU64::new).collect();
        for start in 0..=2 * WORDS {
            let words = memory[start..].first_chunk().unwrap();
            for mover in [Mover::Words, Mover::of_this_processor()] {
                let before = mover.load(words);
                assert_eq!(before, std::array::from_fn(|index| memory[start + index].load(Relaxed)));
                mover.store(words, before.map(|value| value + 1000));
                for (index, word) in memory.iter().enumerate() {
                    let stored = u64::from((start..start + WORDS).contains(&index)) * 1000;
                    assert_eq!(
                        word.swap(index as u64, Relaxed),
                        index as u64 + stored,
                        "{mover:?} at {start}"
                    );
                }
            }
        }
    }
}
