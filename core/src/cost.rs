//! A model of the time of an operation by bytes and hops, in a group of one host or of several: fused, with exact rows and in a
//! wire format, and as NCCL's all-reduce over all ranks with separate steps after it.
//!
//! [`fused`] and [`separate`] count what the busiest rank sends, over links within its host and over its own link to
//! other hosts, the hops that the data waits for one after the other, the bytes of its GPU's memory, and the launches.
//! [`Cost::nanoseconds`] weighs these by [`Links`], and adds them up. [`encoding_pays`] compares two such times.
//!
//! # Assumptions
//! - Each GPU has a link to other hosts of its own, and all ranks use theirs at the same time.
//! - Nothing overlaps: a time is the sum of its parts. It is so for few tokens. For many tokens both ways overlap parts, so
//!   only their ratio means something.
//! - An all-gather of `n` ranks is a ring: `n - 1` hops.
//! - An all-reduce is the faster one of a ring over all ranks and a tree: a chain within each host, and a binary tree between
//!   hosts. It has no help of switches (SHARP, NVLS).
//! - Separate steps read and write whole tensors, one kernel each.
//! - In the second hop within a host a rank pushes its rows to each peer, also where a switch could multiply them.

use crate::{
    fusion::{Operation, Residual},
    plan::{Algorithm, Limits, Plan, PlanError},
    quant::Quantization,
};

/// Links of one kind, of one GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Nanoseconds from a write to its arrival.
    pub hop_ns: f64,
    /// Bytes that a GPU sends in a nanosecond: GB/s.
    pub bytes_per_ns: f64,
}

/// The numbers of a machine, by which a [`Cost`] is weighed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Links {
    /// Between GPUs of a host.
    pub within: Link,
    /// Between hosts.
    pub between: Link,
    /// The coding of wire formats: what the first row of a hop takes, and the bytes of elements that are decoded then.
    pub coding: Link,
    /// Bytes of its memory that a GPU reads or writes in a nanosecond.
    pub memory_bytes_per_ns: f64,
    /// Nanoseconds from a kernel's end to the start of the next.
    pub launch_ns: f64,
}

impl Links {
    /// Hosts of H200 GPUs, each GPU with a network adapter of 400 Gb/s.
    ///
    /// `within` was measured between two GPUs, and `coding` fitted to one-shot there in INT8 and INT4, from 16 to 2048 tokens of
    /// 8192 elements of 16 bits. The others are assumed: a hop between hosts from what NCCL's users report of
    /// InfiniBand, its bytes as nine tenths of the adapter's, the memory's as five sixths of the data sheet's.
    pub const H200: Links = Links {
        within: Link { hop_ns: 1_100.0, bytes_per_ns: 364.0 },
        between: Link { hop_ns: 5_000.0, bytes_per_ns: 45.0 },
        coding: Link { hop_ns: 450.0, bytes_per_ns: 5_800.0 },
        memory_bytes_per_ns: 4_000.0,
        launch_ns: 1_500.0,
    };
}

/// Bytes that a rank sends over links of one kind, and hops that follow each other there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes.
    pub bytes: u64,
    /// Hops.
    pub hops: u64,
}

impl Traffic {
    fn nanoseconds(self, link: Link) -> f64 {
        self.bytes as f64 / link.bytes_per_ns + self.hops as f64 * link.hop_ns
    }
}

/// The work of the busiest rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// On links within the host.
    pub within: Traffic,
    /// On links between hosts.
    pub between: Traffic,
    /// The hops in a wire format, and the bytes of elements that are decoded.
    pub coding: Traffic,
    /// Bytes of its memory that are read or written, beside those of the links.
    pub memory_bytes: u64,
    /// Kernels that are launched one after the other.
    pub launches: u64,
}

impl Cost {
    /// The time with these links.
    pub fn nanoseconds(&self, links: &Links) -> f64 {
        self.within.nanoseconds(links.within)
            + self.between.nanoseconds(links.between)
            + self.coding.nanoseconds(links.coding)
            + self.memory_bytes as f64 / links.memory_bytes_per_ns
            + self.launches as f64 * links.launch_ns
    }
}

/// The fused operation, as `plan` has it.
pub fn fused(operation: &Operation, plan: &Plan) -> Cost {
    let (ranks, hosts) = (u64::from(plan.ranks_per_host()), u64::from(plan.hosts));
    let [first, mut second] = plan.sent_bytes;
    if operation.residual == Residual::Sharded {
        second = result_bytes(operation);
    }
    let mut cost = Cost { memory_bytes: local_bytes(operation, plan), ..Cost::default() };
    for round in plan.rounds() {
        let (tokens, owned) = (round.rows.tokens, round.rows.most_owned());
        let hops = match plan.algorithm {
            Algorithm::OneShot => 1,
            _ => 2,
        };
        cost.within.bytes += match plan.algorithm {
            Algorithm::OneShot => tokens * (ranks - 1) * first,
            _ => (tokens - owned.min(tokens)) * first + owned * (ranks - 1) * second,
        };
        cost.within.hops += if ranks > 1 { hops } else { 0 };
        if operation.wire.is_some() {
            // The addends of all ranks, and the rows of the second hop, unless it has the result.
            let (summed, received) = match plan.algorithm {
                Algorithm::OneShot => (tokens * ranks, 0),
                Algorithm::ShardedTwoShot => (owned * ranks, 0),
                _ => (owned * ranks, tokens),
            };
            cost.coding.bytes += (summed + received) * plan.row_bytes;
            cost.coding.hops += 1 + u64::from(received > 0);
        }
        cost.launches += 1;
        if hosts > 1 {
            cost.between.bytes += (hosts - 1) * plan.host_bytes(&round);
            cost.between.hops += hosts - 1;
            // The partial sum is written, and all hosts' are read.
            cost.memory_bytes += (hosts + 1) * plan.host_bytes(&round);
            // The kernel of partial sums, and NCCL's.
            cost.launches += 2;
        }
    }
    cost
}

/// True if the wire format of `operation` is expected to take less time than exact rows do: below some size it does not, and its
/// sums are not exact.
///
/// # Errors
/// Those of the operation's plans.
pub fn encoding_pays(operation: &Operation, limits: &Limits, links: &Links) -> Result<bool, PlanError> {
    let time = |operation: &Operation| {
        Plan::new(operation, limits).map(|plan| fused(operation, &plan).nanoseconds(links))
    };
    Ok(operation.wire.is_some() && time(operation)? < time(&Operation { wire: None, ..*operation })?)
}

/// NCCL's all-reduce over all ranks of `plan`, and then the residual, the norm and its quantization, a kernel each: the faster
/// one of ring and tree with `links`.
pub fn separate(operation: &Operation, plan: &Plan, links: &Links) -> Cost {
    let bytes = operation.activation_bytes();
    let (all, ranks) = (u64::from(plan.world_size), u64::from(plan.ranks_per_host()));
    let hosts = u64::from(plan.hosts);
    let steps = steps(operation);
    if plan.tokens == 0 {
        return Cost::default();
    }
    let of = |within, between| Cost { within, between, ..steps };
    // Each of a host's ranks has a ring of its own, whose way to the next host is its link.
    let sent = bytes * 2 * (all - 1) / all;
    let between = if hosts > 1 { ring_hops(all, ranks) } else { 0 };
    let ring = of(
        Traffic { bytes: if ranks > 1 { sent } else { 0 }, hops: 2 * (all - 1) - between },
        Traffic { bytes: if hosts > 1 { sent / ranks } else { 0 }, hops: between },
    );
    let levels = u64::from(plan.hosts.next_power_of_two().trailing_zeros());
    let tree = of(
        Traffic { bytes: if ranks > 1 { 2 * bytes } else { 0 }, hops: 2 * (ranks - 1) },
        Traffic { bytes: if hosts > 1 { 2 * bytes / ranks } else { 0 }, hops: 2 * levels },
    );
    if tree.nanoseconds(links) < ring.nanoseconds(links) { tree } else { ring }
}

/// Hops between hosts of the `2 (all - 1)` of a ring over `all` ranks, `ranks` of each host: one in `ranks`.
const fn ring_hops(all: u64, ranks: u64) -> u64 {
    (2 * (all - 1)).div_ceil(ranks)
}

/// The kernels after an all-reduce, and its own.
fn steps(operation: &Operation) -> Cost {
    let bytes = operation.activation_bytes();
    let mut cost = Cost { launches: 1, ..Cost::default() };
    let mut step = |bytes| {
        cost.launches += 1;
        cost.memory_bytes += bytes;
    };
    if operation.bias {
        step(2 * bytes);
    }
    if operation.post_norm.is_some() {
        step(2 * bytes);
    }
    if operation.residual.is_some() {
        step(3 * bytes);
    }
    if operation.norm.is_some() {
        step(2 * bytes);
    }
    if operation.quantization != Quantization::None {
        step(bytes + operation.tokens * result_bytes(operation));
    }
    cost
}

/// Bytes of a row of the result that all ranks get: of the norm, or of its codes and scales.
fn result_bytes(operation: &Operation) -> u64 {
    match operation.quantization {
        Quantization::None => operation.row_bytes(),
        quantization => {
            let scales = quantization.scale_bytes(operation.tokens, operation.hidden).unwrap_or(0);
            quantization.value_bytes_per_row(operation.hidden) + scales.div_ceil(operation.tokens.max(1))
        }
    }
}

/// Bytes of memory that the fused operation reads and writes for its own rows: the residual, both ways, and the result.
fn local_bytes(operation: &Operation, plan: &Plan) -> u64 {
    let rows = operation.residual_rows(0, plan.ranks_per_host());
    let sums = if operation.residual.is_some() { 2 } else { 1 };
    let result = if operation.norm.is_some() { operation.tokens * result_bytes(operation) } else { 0 };
    rows * operation.row_bytes() * sums + result
}
