//! The parameters of kernels of a group of several hosts.
//!
//! An operation takes two kernels a round. The first, [`HostSum`], sums the addends of a host's ranks. Then the ranks of the
//! same place, one of each host, gather their [`Partials`]. The second kernel, [`FusedHosts`], sums those.

use super::{Activations, Experts, Fused, Group, Shape, address::Address};

/// The sums of the hosts: the buffer that the ranks of the same place gather, and this host's part of it.
///
/// Row `i` of a host's part is the sum of its ranks' addends of token `i * world_size + rank` of the round, `world_size` and
/// `rank` being those of [`Group`]: the `i`-th of the tokens that the rank owns.
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

/// The parameters of the kernel that sums the addends of a host's ranks. It advances no [`Epoch`](super::Epoch): the
/// [`FusedHosts`] of the same round follows it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostSum {
    /// This rank's place in its host. Here alone, and in [`FusedHosts`], a group may have one rank.
    pub group: Group,
    /// The round.
    pub shape: Shape,
    /// What is summed: of these, the input, and of the flags [`EXPERTS`](Activations::EXPERTS).
    pub activations: Activations,
    /// The experts that the addend is made of, if the flags say so.
    pub experts: Experts,
    /// Where the sums go: this host's part.
    pub partials: Partials,
}

/// The parameters of a fused kernel with epilogue `X` that sums what the hosts have summed.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FusedHosts<X> {
    /// As of the other fused kernels, the group being the ranks of this host. The input is not read.
    pub fused: Fused<X>,
    /// What is summed: every host's part.
    pub partials: Partials,
}
