//! The limits that operations are planned with, the same on every rank.

use fused_collective_core::plan::Limits;

use crate::{
    error::Error,
    group::{Bootstrap, BootstrapError},
};

/// The bytes that a GPU pushes while two-shot waits for its second hop. Between two H200 GPUs, which push the same in both
/// modes, two-shot takes 1.0 to 1.3 µs longer at 1 to 16 tokens, and 364 bytes are pushed in a nanosecond: `bench` and
/// `links` show both.
pub(super) const HOP_BYTES: u64 = 364_000;

/// The least of all ranks' limits.
pub(super) fn agree(bootstrap: &dyn Bootstrap, own: Limits) -> Result<Limits, Error> {
    let all = bootstrap.all_gather(&to_bytes(own)).map_err(Error::bootstrap)?;
    let limits: Option<Vec<Limits>> = all.iter().map(|bytes| from_bytes(bytes)).collect();
    limits.and_then(|limits| Limits::agree(&limits)).ok_or_else(|| {
        Error::bootstrap(BootstrapError::from(
            "ranks disagree on the size of the group, or are of different versions",
        ))
    })
}

fn to_bytes(limits: Limits) -> Vec<u8> {
    let Limits { world_size, hosts, slot_bytes, compute_units, max_cluster, one_shot_bytes } = limits;
    let numbers = [
        world_size.into(),
        hosts.into(),
        slot_bytes,
        compute_units.into(),
        max_cluster.into(),
        one_shot_bytes,
    ];
    numbers.map(u64::to_le_bytes).concat()
}

fn from_bytes(bytes: &[u8]) -> Option<Limits> {
    let ([world_size, hosts, slot_bytes, units, cluster, one_shot_bytes], []) =
        bytes.as_chunks().0.split_first_chunk()?
    else {
        return None;
    };
    let number = |bytes: &[u8; 8]| u64::from_le_bytes(*bytes);
    Some(Limits {
        world_size: number(world_size).try_into().ok()?,
        hosts: number(hosts).try_into().ok()?,
        slot_bytes: number(slot_bytes),
        compute_units: number(units).try_into().ok()?,
        max_cluster: number(cluster).try_into().ok()?,
        one_shot_bytes: number(one_shot_bytes),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_as_they_were_written() {
        let limits = Limits {
            world_size: 4,
            hosts: 2,
            slot_bytes: 1 << 40,
            compute_units: 132,
            max_cluster: 8,
            one_shot_bytes: u64::MAX,
        };
        assert_eq!(from_bytes(&to_bytes(limits)), Some(limits));
        assert_eq!(from_bytes(&[0; 47]), None);
        assert_eq!(from_bytes(&[0xff; 48]), None);
    }
}
