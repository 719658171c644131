//! The partition of a row: the version of a kernel, the blocks of a cluster, the threads of a block.

use fused_collective_core::{kernels::Version, launch::MAX_BLOCK_THREADS};

use crate::error::Error;

/// Threads of a warp.
const WARP: u32 = 32;

/// The version of a kernel that serves rows of `row_packs` packs, the blocks that share a row, and their threads; `None`
/// where no version that is there does.
///
/// A version holds a share of a row in registers or, as the last resort, streams it. `clusters` are the numbers of blocks
/// that may share a row, the best first; `max_threads` tells what each version allows, `None` of one that is not there.
pub(super) fn choose_version(
    row_packs: u32,
    clusters: impl Iterator<Item = u32>,
    max_threads: impl Fn(Version) -> Option<u32>,
) -> Option<(Version, u32, u32)> {
    let mut widest = 1;
    for cluster in clusters {
        widest = cluster;
        for (version, packs) in [(Version::P1, 1), (Version::P2, 2)] {
            let threads = row_packs.div_ceil(cluster * packs).next_multiple_of(WARP);
            if max_threads(version).is_some_and(|most| threads <= most.min(MAX_BLOCK_THREADS / packs)) {
                return Some((version, cluster, threads));
            }
        }
    }
    let most = max_threads(Version::Streamed)? / WARP * WARP;
    Some((Version::Streamed, widest, row_packs.div_ceil(widest).next_multiple_of(WARP).min(most)))
}

/// The reason that a kernel stands still with one row while it could work on another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waits {
    /// The links are busy.
    Never,
    /// A row that it computes.
    ForItself,
    /// A row that another rank sends.
    ForOthers,
}

/// Rows for each place from which on narrower blocks gain more by computing several rows at once than they lose with the last.
const MANY_ROWS: u64 = 6;

/// As [`choose_version`], for `tokens` rows: `places` tells how many of them a version in clusters of so many blocks of so
/// many threads works on at once. A kernel that waits is taken in narrower blocks, of which more are resident: where there
/// are more rows than places or, if it waits for itself, [many more](MANY_ROWS).
pub(super) fn choose_places(
    row_packs: u32,
    tokens: u64,
    waits: Waits,
    clusters: impl Iterator<Item = u32> + Clone,
    max_threads: impl Fn(Version) -> Option<u32>,
    mut places: impl FnMut(Version, u32, u32) -> Result<u64, Error>,
) -> Result<Option<(Version, u32, u32)>, Error> {
    let Some(wide @ (version, cluster, threads)) = choose_version(row_packs, clusters.clone(), &max_threads)
    else {
        return Ok(None);
    };
    if version != Version::P1 || waits == Waits::Never {
        return Ok(Some(wide));
    }
    let only_narrow = |version| max_threads(version).filter(|_| version == Version::P2);
    let narrow = choose_version(row_packs, clusters, only_narrow).filter(|(_, narrow_cluster, _)| {
        // Blocks that wait for others gain nothing by waiting for each other, too.
        waits == Waits::ForItself || *narrow_cluster == cluster
    });
    let Some(narrow @ (_, narrow_cluster, narrow_threads)) = narrow else { return Ok(Some(wide)) };
    let wide_places = places(version, cluster, threads)?;
    let most = if waits == Waits::ForItself { MANY_ROWS * wide_places } else { wide_places };
    if tokens <= most {
        return Ok(Some(wide));
    }
    Ok(Some(if places(Version::P2, narrow_cluster, narrow_threads)? > wide_places { narrow } else { wide }))
}

#[cfg(test)]
mod tests {
    use Version::{P1, P2, Streamed};
    use Waits::{ForItself, ForOthers, Never};

    use super::*;

    #[test]
    fn a_row_is_held_in_registers_where_threads_allow_it() {
        let limits = |version| Some(if version == P1 { 1024 } else { 512 });
        let choose =
            |packs, clusters: &[u32]| choose_version(packs, clusters.iter().copied(), limits).unwrap();
        // 1,024 packs are a row of 8,192 elements of two bytes.
        assert_eq!(choose(1024, &[1, 2, 4, 8]), (P1, 1, 1024));
        assert_eq!(choose(1024, &[8]), (P1, 8, 128));
        assert_eq!(choose(6, &[1]), (P1, 1, 32));
        // What one block cannot hold, two can; without clusters it is streamed.
        assert_eq!(choose(2048, &[1, 2, 4, 8]), (P1, 2, 1024));
        assert_eq!(choose(2048, &[1]), (Streamed, 1, 512));
        assert_eq!(choose(16_384, &[1, 2, 4, 8]), (Streamed, 8, 512));
        // Registers may allow fewer threads than the version was made for.
        let tight = |version| Some(if version == P1 { 896 } else { 600 });
        assert_eq!(choose_version(1024, [1].into_iter(), tight).unwrap(), (P2, 1, 512));
        assert_eq!(choose_version(4096, [1].into_iter(), tight).unwrap(), (Streamed, 1, 576));
    }

    /// Versions of 64 registers a thread and, for `p2`, blocks of at most 512 threads: two of those are resident where one
    /// of 1,024 is.
    fn choose_on_gpu(units: u64, tokens: u64, row_packs: u32, waits: Waits) -> (Version, u32, u32) {
        let max_threads = |version| Some(if version == P1 { 1024 } else { 512 });
        let places =
            |_, cluster: u32, threads: u32| Ok(u64::from(1024 / threads) * units / u64::from(cluster));
        choose_places(row_packs, tokens, waits, [1, 2, 4, 8].into_iter(), max_threads, places)
            .unwrap()
            .unwrap()
    }

    #[test]
    fn more_rows_than_places_are_taken_in_narrower_blocks_unless_a_row_is_pushed_ahead() {
        assert_eq!(choose_on_gpu(132, 132, 1024, ForOthers), (P1, 1, 1024));
        assert_eq!(choose_on_gpu(132, 133, 1024, ForOthers), (P2, 1, 512));
        assert_eq!(choose_on_gpu(132, 133, 1024, Never), (P1, 1, 1024));
        // Clusters share the places: 2,048 packs are two blocks'.
        assert_eq!(choose_on_gpu(132, 66, 2048, ForOthers), (P1, 2, 1024));
        assert_eq!(choose_on_gpu(132, 67, 2048, ForOthers), (P2, 2, 512));
    }

    #[test]
    fn many_rows_that_are_computed_are_taken_in_narrower_blocks_of_wider_clusters() {
        let choose = |tokens| {
            let max_threads = |version| Some(if version == P1 { 1024 } else { 256 });
            let places = |_, cluster: u32, threads: u32| {
                Ok(132 * if threads > 256 { 1 } else { 3 } / u64::from(cluster))
            };
            choose_places(1024, tokens, ForItself, [1, 2, 4, 8].into_iter(), max_threads, places).unwrap()
        };
        assert_eq!(choose(6 * 132), Some((P1, 1, 1024)));
        assert_eq!(choose(6 * 132 + 1), Some((P2, 2, 256)));
    }

    #[test]
    fn narrower_blocks_that_do_not_fit_or_gain_no_place_are_not_taken() {
        let choose = |p2_threads, p2_places| {
            let max_threads = |version| Some(if version == P1 { 1024 } else { p2_threads });
            let places = |version, _, _| Ok(if version == P1 { 132 } else { p2_places });
            choose_places(1024, 500, ForOthers, [1].into_iter(), max_threads, places).unwrap().unwrap()
        };
        assert_eq!(choose(512, 264), (P2, 1, 512));
        assert_eq!(choose(512, 132), (P1, 1, 1024));
        assert_eq!(choose(480, 264), (P1, 1, 1024));
    }

    #[test]
    fn a_kernel_with_one_version_serves_the_rows_that_it_can_hold_and_no_others() {
        let only_p1 = |version| (version == P1).then_some(512);
        assert_eq!(choose_version(1024, [1, 2].into_iter(), only_p1), Some((P1, 2, 512)));
        assert_eq!(choose_version(1025, [1, 2].into_iter(), only_p1), None);
        // However large the blocks are that it was compiled for, it holds no more packs than the largest of one each.
        let only_p2 = |version| (version == P2).then_some(1024);
        assert_eq!(choose_version(2048, [1, 2].into_iter(), only_p2), Some((P2, 2, 512)));
        let places = |_, _, _| Ok(1);
        let chosen = choose_places(512, 500, ForOthers, [1].into_iter(), only_p1, places).unwrap();
        assert_eq!(chosen, Some((P1, 1, 512)));
    }
}
