//! The size of the processor's caches.

use std::{fs, path::Path, sync::OnceLock};

use crate::bounded::{self, PATIENCE};

/// The folder in which Linux lists the caches of a processor.
const CACHES: &str = "/sys/devices/system/cpu/cpu0/cache";
/// The assumed size if the system does not say, more than most processors have.
const UNKNOWN: u64 = 64 << 20;
/// The most bytes of a cache's size, as text, that are read.
const MAX_SIZE: u64 = 64;

/// Bytes of the last cache before main memory.
pub(crate) fn cache_bytes() -> u64 {
    static BYTES: OnceLock<u64> = OnceLock::new();
    *BYTES.get_or_init(|| largest(Path::new(CACHES)).unwrap_or(UNKNOWN))
}

/// The size of the largest cache that a folder lists.
fn largest(caches: &Path) -> Option<u64> {
    let sizes = fs::read_dir(caches).ok()?.filter_map(|cache| {
        let size = bounded::read_to_string(&cache.ok()?.path().join("size"), MAX_SIZE, PATIENCE).ok()?;
        parse_size(size.trim())
    });
    sizes.max()
}

/// `32768K`, or `32M`.
fn parse_size(text: &str) -> Option<u64> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let shift = match unit {
        "K" => 10,
        "M" => 20,
        "G" => 30,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_cache_counts_and_an_unknown_one_does_not() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(largest(folder.path()), None);
        for (index, size) in ["32K\n", "32768K\n", "1M\n", "large\n"].into_iter().enumerate() {
            let cache = folder.path().join(format!("index{index}"));
            fs::create_dir(&cache).unwrap();
            fs::write(cache.join("size"), size).unwrap();
        }
        fs::create_dir(folder.path().join("power")).unwrap();
        assert_eq!(largest(folder.path()), Some(32 << 20));
        assert_eq!(largest(Path::new("/nonexistent")), None);
        assert_eq!([parse_size(""), parse_size("K"), parse_size("8")], [None; 3]);
    }
}
