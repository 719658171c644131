//! A digest of bytes, of the same value on a GPU and on a CPU: to tell whether memory was changed without a copy of it.
//!
//! It is the sum of [`part`] over the words of 8 bytes, so any threads may add any words, in any order. It guards against
//! faults, not against forgers.

/// Bytes of a word.
pub const WORD_BYTES: usize = 8;

/// The part of a word in a digest: any other word, or the same in another place, very likely has another.
#[inline(always)]
pub const fn part(index: u64, word: u64) -> u64 {
    // The steps of SplitMix64, by which every bit changes about half of the others.
    let mixed = index.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(word);
    let mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

/// The parts of `bytes`, of which the first is in word `first`. Zeros fill up the last word.
pub fn of(first: u64, bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<WORD_BYTES>();
    let mut last = [0; WORD_BYTES];
    last[..rest.len()].copy_from_slice(rest);
    let last = (!rest.is_empty()).then_some(&last);
    let parts =
        (first..).zip(words.iter().chain(last)).map(|(index, word)| part(index, u64::from_le_bytes(*word)));
    parts.fold(0, u64::wrapping_add)
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    #[test]
    fn any_change_shows_and_parts_add_up() {
        let bytes: Vec<u8> = (0..1001u32).map(|index| ((index * index) >> 3) as u8).collect();
        let digest = of(0, &bytes);
        for at in [0, 8, 504, 1000] {
            assert_eq!(of(0, &bytes[..at]).wrapping_add(of(at as u64 / 8, &bytes[at..])), digest, "{at}");
        }
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut changed = bytes.clone();
                changed[at] ^= 1 << bit;
                assert_ne!(of(0, &changed), digest, "bit {bit} of byte {at}");
            }
        }
        let mut turned = bytes.clone();
        turned.swap(0, 8);
        assert_ne!(of(0, &turned), digest);
        // Words of one value are no sum that any other value has.
        assert_ne!(of(0, &[0xff; 64]), of(0, &[0; 64]));
        assert_ne!(of(0, &[0; 64]), of(0, &[0; 72]));
    }
}
