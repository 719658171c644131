//! What operations are planned with, the same on every rank.

use fused_collective_core::plan::Limits;

use super::super::{Error, gather};
use crate::rendezvous::Group;

/// The bytes that a GPU pushes while two-shot waits for its second hop. Between two H200 GPUs, which push the same in both
/// modes, two-shot takes 1.0 to 1.3 µs longer at 1 to 16 tokens, and 364 bytes are pushed in a nanosecond: `bench` and
/// `links` show both.
pub(super) const HOP_BYTES: u64 = 364_000;

/// The least of all ranks' limits.
pub(super) fn agree(group: &Group, own: Limits) -> Result<Limits, Error> {
    let Limits { world_size, slot_bytes, compute_units, max_cluster, one_shot_bytes } = own;
    let numbers =
        [u64::from(world_size), slot_bytes, u64::from(compute_units), u64::from(max_cluster), one_shot_bytes];
    let all: Vec<[u64; 5]> = gather(group, &numbers)?;
    let limits: Vec<Limits> = all
        .into_iter()
        .map(|[world_size, slot_bytes, units, cluster, one_shot_bytes]| Limits {
            world_size: world_size as u32,
            slot_bytes,
            compute_units: units as u32,
            max_cluster: cluster as u32,
            one_shot_bytes,
        })
        .collect();
    Limits::agree(&limits).ok_or_else(|| Error::Group("ranks disagree on the size of the group".to_owned()))
}
