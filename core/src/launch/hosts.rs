//! The sums that hosts exchange, as kernels take them.

use super::address::Address;
use crate::{
    fusion::PartialSums,
    plan::{Plan, Round},
};

/// The sums of the hosts: the buffer that the ranks of the same place gather, and this host's part of it.
///
/// Row `i` of a host's part is the sum of its ranks' addends of token `i * world_size + rank` of the round, `world_size` and
/// `rank` being those of [`Group`](crate::launch::Group): the `i`-th of the tokens that the rank owns.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partials {
    /// `[hosts][rows][hidden]` numbers, 16-byte aligned: a row for each token of the round that this rank owns. Each host's
    /// rows start [`host_stride`](Self::host_stride) bytes after those of the host before.
    pub rows: Address,
    /// Bytes from a host's rows to the next one's, a multiple of 16.
    pub host_stride: u64,
    /// Hosts of the group, at least 1.
    pub hosts: u32,
    /// This rank's host. Hosts are numbered in the order in which they are summed.
    pub host: u32,
    /// 1: the numbers are elements, each sum rounded once; 0: they are `f32`.
    pub element: u32,
    /// Keeps the struct free of padding.
    pub reserved: u32,
}

impl Partials {
    /// The partial sums of a round of a plan for several hosts, as host `host` leaves and gathers them at `rows`: of each host
    /// [`Plan::host_bytes`], one after the other.
    pub const fn of_round(
        rows: Address,
        plan: &Plan,
        round: &Round,
        host: u32,
        sums: PartialSums,
    ) -> Partials {
        let (hosts, host_stride) = (plan.hosts, plan.host_bytes(round));
        Partials {
            rows,
            host_stride,
            hosts,
            host,
            element: matches!(sums, PartialSums::Element) as u32,
            reserved: 0,
        }
    }
}
