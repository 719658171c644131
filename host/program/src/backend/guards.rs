//! Guards around tensors, which show stray reads and writes.

use std::ops::{BitOr, BitXor};

/// Bytes of the guard before and of the guard after each tensor.
pub(crate) const GUARD_BYTES: usize = 4096;
/// The byte that fills guards. It makes NaN in every element type, so a read past a tensor's end shows in the results.
pub(crate) const GUARD: u8 = 0xff;

/// Describes a write into the guards `before` and `after` a tensor.
pub(crate) fn stray_write(before: &[u8], after: &[u8]) -> Option<String> {
    if let Some(at) = before.iter().rposition(|&byte| byte != GUARD) {
        return Some(format!("{} bytes before its start", before.len() - at));
    }
    first_other(after, GUARD).map(|at| format!("{at} bytes past its end"))
}

/// The index of the first of `items` that is not `value`.
pub(crate) fn first_other<T>(items: &[T], value: T) -> Option<usize>
where
    T: Copy + Default + PartialEq + BitXor<Output = T> + BitOr<Output = T>,
{
    // A loop that may end at each item would not be vectorized.
    const CHUNK: usize = 4096;
    let differs = |chunk: &[T]| chunk.iter().fold(T::default(), |bits, &item| bits | (item ^ value));
    let chunk = items.chunks(CHUNK).position(|chunk| differs(chunk) != T::default())?;
    let first = chunk * CHUNK;
    items[first..].iter().position(|&item| item != value).map(|at| first + at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_others_is_found_wherever_it_is() {
        assert_eq!(first_other::<u8>(&[], 1), None);
        for length in [1, 4095, 4096, 4097, 9000] {
            let mut items = vec![7u32; length];
            assert_eq!(first_other(&items, 7), None);
            items[length - 1] = 0;
            assert_eq!(first_other(&items, 7), Some(length - 1));
            items[length / 2] = 8;
            assert_eq!(first_other(&items, 7), Some(length / 2));
        }
    }

    #[test]
    fn a_stray_write_is_described_by_its_distance() {
        let guard = [GUARD; 8];
        let written = |at: usize| {
            let mut bytes = guard;
            bytes[at] = 0;
            bytes
        };
        assert_eq!(stray_write(&guard, &guard), None);
        assert_eq!(stray_write(&written(7), &written(0)).as_deref(), Some("1 bytes before its start"));
        assert_eq!(stray_write(&guard, &written(3)).as_deref(), Some("3 bytes past its end"));
    }
}
