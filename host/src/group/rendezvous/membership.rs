//! The terms on which ranks meet.

use std::time::{Duration, Instant};

/// The time that the others wait longer than rank 0. Rank 0 knows which rank is missing and tells them; if it says
/// nothing either, rank 0 is the one.
pub(super) const MARGIN: Duration = Duration::from_millis(250);

/// The terms of a rank's membership in its group.
#[derive(Clone, Copy, Debug)]
pub struct Membership<'a> {
    /// This rank, from 0.
    pub rank: u32,
    /// Ranks in the group, 2 to 16, or over a network to [`MAX_RANKS`](super::MAX_RANKS).
    pub world_size: u32,
    /// A text that this job's ranks have in common, and no other job's.
    pub key: &'a str,
    /// Bytes that must be equal on all ranks: the settings that they were started with, in any form. At
    /// most 64 KiB.
    pub config: &'a [u8],
    /// The longest wait of any rank for the others: to join, and at each operation. The same on all ranks.
    pub deadline: Duration,
}

/// `instant + duration`, with a duration past what the clock holds taken for a century.
pub(super) fn saturating_add(instant: Instant, duration: Duration) -> Instant {
    instant.checked_add(duration).unwrap_or(instant + Duration::from_secs(100 * 365 * 86_400))
}
