//! The plan of an operation: algorithm, rounds, owners of tokens, and GPU blocks that share a token.
//!
//! [`Plan::new`] is a pure function of the operation and of the [`Limits`] of the group. Ranks that agree on the limits
//! ([`Limits::agree`], once, at set-up) and call the same operation therefore have the same plan.
//!
//! The number of blocks of a grid is not part of a plan. Each rank starts as many blocks as its own GPU holds at once:
//! no rank waits for blocks of another or counts them. Ranks wait for data, whose place follows from the round alone.
//!
//! ```
//! use fused_collective_core::{
//!     dtype::DType,
//!     fusion::{Mode, Norm, Operation, PartialSums, Residual, Rounding},
//!     plan::{Algorithm, Limits, Plan},
//!     quant::Quantization,
//! };
//!
//! let operation = Operation {
//!     dtype: DType::Bf16,
//!     tokens: 1000,
//!     hidden: 4096, // rows of 8192 bytes
//!     residual: Residual::Replicated,
//!     norm: Some(Norm::default()),
//!     quantization: Quantization::Fp8Static,
//!     keep_norm: false,
//!     rounding: Rounding::Once,
//!     bias: false,
//!     post_norm: None,
//!     experts: None,
//!     wire: None,
//!     partial_sums: PartialSums::F32,
//!     mode: Mode::Auto,
//! };
//! let limits = Limits {
//!     world_size: 2,
//!     hosts: 1,
//!     slot_bytes: 8 << 20,
//!     compute_units: 132,
//!     max_cluster: 8,
//!     one_shot_bytes: 1 << 20,
//! };
//! let plan = Plan::new(&operation, &limits)?;
//! assert_eq!(plan.algorithm, Algorithm::TwoShot);
//! // A two-shot slot holds the owned rows of two ranks and all sums: two rows a token.
//! let rounds: Vec<[u64; 2]> =
//!     plan.rounds().map(|round| [round.first_token, round.rows.tokens]).collect();
//! assert_eq!(rounds, [[0, 512], [512, 488]]);
//! # Ok::<(), fused_collective_core::plan::PlanError>(())
//! ```

use core::fmt;

use crate::{
    MAX_RANKS, MAX_WORLD_SIZE,
    fusion::{Mode, Operation, OperationError, Residual},
    wire::WireFormat,
    workspace::SlotRows,
};

pub use crate::tokens::{owned_index, owned_token, owned_tokens, owner};

/// The collective of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// One hop: see [`Mode::OneShot`].
    OneShot,
    /// Two hops: see [`Mode::TwoShot`].
    TwoShot,
    /// Two hops, the second with the norm or its quantization in place of the sum: see [`Residual::Sharded`].
    ShardedTwoShot,
    /// [Two-shot](Algorithm::TwoShot) within each host, with an exchange of partial sums between its hops: the owners of a
    /// token, one on each host, gather the sums of all hosts and add them in host order.
    Hierarchical,
    /// [Two-shot with a sharded residual](Algorithm::ShardedTwoShot) within each host, with the exchange of
    /// [`Hierarchical`](Algorithm::Hierarchical) between its hops.
    ShardedHierarchical,
}

impl Algorithm {
    /// True if partial sums cross between hosts.
    pub const fn spans_hosts(self) -> bool {
        matches!(self, Algorithm::Hierarchical | Algorithm::ShardedHierarchical)
    }

    /// True if only the owner of a token has its residual.
    pub const fn is_sharded(self) -> bool {
        matches!(self, Algorithm::ShardedTwoShot | Algorithm::ShardedHierarchical)
    }
}

/// The capabilities of a group: of each, the least that any of its ranks has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Ranks in the group, of all hosts together.
    pub world_size: u32,
    /// Hosts of the group, which have as many ranks each; 1 for a group of one host.
    pub hosts: u32,
    /// Bytes of one workspace slot, and between hosts of the buffer of partial sums.
    pub slot_bytes: u64,
    /// Multiprocessors of a GPU; 1 for a rank that is a single thread.
    pub compute_units: u32,
    /// Blocks of the largest cluster, a power of two; 1 where there are no clusters.
    pub max_cluster: u32,
    /// The largest activation, in bytes as it crosses the links, for which [`Mode::Auto`] is one-shot; above it is two-shot.
    pub one_shot_bytes: u64,
}

impl Limits {
    /// The limits that every rank can keep: the least of each. `None` for no ranks, or if ranks differ in the world
    /// size or the number of hosts.
    pub fn agree(ranks: &[Limits]) -> Option<Limits> {
        let (first, rest) = ranks.split_first()?;
        rest.iter().try_fold(*first, |least, other| {
            let same = least.world_size == other.world_size && least.hosts == other.hosts;
            same.then(|| Limits {
                world_size: least.world_size,
                hosts: least.hosts,
                slot_bytes: least.slot_bytes.min(other.slot_bytes),
                compute_units: least.compute_units.min(other.compute_units),
                max_cluster: least.max_cluster.min(other.max_cluster),
                one_shot_bytes: least.one_shot_bytes.min(other.one_shot_bytes),
            })
        })
    }

    /// Ranks of each host. The limits must be valid.
    pub const fn ranks_per_host(&self) -> u32 {
        self.world_size / self.hosts
    }

    /// Checks the numbers that the parts of a plan divide by.
    fn validate(&self) -> Result<(), PlanError> {
        let Limits { world_size, hosts, .. } = *self;
        if hosts == 0 {
            return Err(PlanError::Limits("the number of hosts must be 1 or more"));
        }
        if hosts == 1 && !(crate::MIN_WORLD_SIZE..=MAX_WORLD_SIZE).contains(&world_size) {
            return Err(PlanError::Limits("the world size must be 1 to 16"));
        }
        if world_size == 0 || !world_size.is_multiple_of(hosts) {
            return Err(PlanError::UnequalHosts { world_size, hosts });
        }
        if world_size > MAX_RANKS || self.ranks_per_host() > MAX_WORLD_SIZE {
            return Err(PlanError::Limits(
                "the world size must be 1 to 16 on each host, and at most 128 together",
            ));
        }
        if self.compute_units == 0 {
            return Err(PlanError::Limits("the number of compute units must be 1 or more"));
        }
        if !self.max_cluster.is_power_of_two() {
            return Err(PlanError::Limits("the largest cluster must be a power of two"));
        }
        Ok(())
    }
}

/// A model of [`Limits::one_shot_bytes`] for GPUs with direct links between every two of them.
///
/// For an activation of `b` bytes, each of `n` ranks pushes `b (n - 1)` bytes in one-shot. In two-shot it pushes
/// `2 b (n - 1) / n` bytes and waits for one more hop. Let `hop_bytes` be the bytes that could be pushed during this
/// wait. Both take the same time where `b (n - 1) = 2 b (n - 1) / n + hop_bytes`. Two ranks push the same bytes in both
/// modes, so one-shot is always faster there.
pub const fn one_shot_bytes(world_size: u32, hop_bytes: u64) -> u64 {
    if world_size <= 2 {
        return u64::MAX;
    }
    let ranks = world_size as u64;
    hop_bytes.saturating_mul(ranks) / ((ranks - 1) * (ranks - 2))
}

/// The work of every rank for one operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The collective.
    pub algorithm: Algorithm,
    /// Tokens of the operation.
    pub tokens: u64,
    /// Tokens of every round but the last, which has the rest. A round uses one workspace slot and counts as one
    /// operation of the [Lamport rotation](crate::lamport).
    pub tokens_per_round: u64,
    /// Ranks in the group, of all hosts together.
    pub world_size: u32,
    /// Hosts of the group.
    pub hosts: u32,
    /// Bytes of a row of elements.
    pub row_bytes: u64,
    /// Bytes of a row in each hop: see [`Operation::sent_bytes`].
    pub sent_bytes: [u64; 2],
    /// Bytes of a row of partial sums between hosts; 0 in a group of one host.
    pub partial_row_bytes: u64,
    /// Blocks that share a token; 1 where there are no clusters. Kernels that cannot hold a row in the registers of
    /// this many blocks may use more, up to [`Limits::max_cluster`].
    pub cluster: u32,
}

/// A reason why an operation has no plan under the limits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PlanError {
    /// The operation is not valid.
    Operation(OperationError),
    /// No group can have these limits; the text names the rule.
    Limits(&'static str),
    /// The ranks of the group are not as many on each host.
    UnequalHosts {
        /// Ranks in the group.
        world_size: u32,
        /// Hosts of the group.
        hosts: u32,
    },
    /// Rows in a wire format do not cross hosts.
    WireAcrossHosts {
        /// The format.
        wire: WireFormat,
        /// Hosts of the group.
        hosts: u32,
    },
    /// One-shot does not cross hosts.
    OneShotAcrossHosts {
        /// Hosts of the group.
        hosts: u32,
    },
    /// The smallest round does not fit a slot.
    Slot {
        /// Tokens of the smallest round: one, or with a sharded residual one for each rank.
        tokens: u64,
        /// Bytes of the smallest round.
        needed: u64,
        /// Bytes of a slot.
        slot_bytes: u64,
    },
}

impl fmt::Display for PlanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            PlanError::Operation(error) => error.fmt(f),
            PlanError::Limits(what) => write!(f, "the group's limits are not valid: {what}"),
            PlanError::UnequalHosts { world_size, hosts } => write!(
                f,
                "{world_size} ranks cannot be as many on each of {hosts} hosts: use a multiple of {hosts} ranks"
            ),
            PlanError::WireAcrossHosts { wire, hosts } => write!(
                f,
                "the wire format {wire} does not cross hosts, and the group has {hosts}: leave it out, or use partial sums in \
                 the element type for fewer bytes"
            ),
            PlanError::OneShotAcrossHosts { hosts } => {
                write!(f, "one-shot does not cross hosts, and the group has {hosts}: use auto or two-shot")
            }
            PlanError::Slot { tokens, needed, slot_bytes } => {
                if tokens == 1 {
                    f.write_str("one token takes")?;
                } else {
                    write!(f, "{tokens} tokens take")?;
                }
                write!(f, " {needed} bytes, but a workspace slot has {slot_bytes}: use a larger workspace")
            }
        }
    }
}

impl core::error::Error for PlanError {}

impl From<OperationError> for PlanError {
    fn from(error: OperationError) -> Self {
        PlanError::Operation(error)
    }
}

impl Plan {
    /// Plans `operation` under `limits`.
    ///
    /// # Errors
    /// [`PlanError`] for an operation or limits that are not valid, and for a slot that is too small for one round.
    pub fn new(operation: &Operation, limits: &Limits) -> Result<Plan, PlanError> {
        operation.validate()?;
        limits.validate()?;
        let (row_bytes, sent_bytes) = (operation.row_bytes(), operation.sent_bytes());
        let hosts = limits.hosts;
        if hosts > 1 {
            if let Some(wire) = operation.wire {
                return Err(PlanError::WireAcrossHosts { wire, hosts });
            }
            if operation.mode == Mode::OneShot {
                return Err(PlanError::OneShotAcrossHosts { hosts });
            }
        }
        let partial_row_bytes = if hosts > 1 { operation.partial_row_bytes() } else { 0 };
        let plan = |algorithm| {
            tokens_per_round(algorithm, operation.tokens, sent_bytes, partial_row_bytes, limits)
                .map(|tokens| (algorithm, tokens))
        };
        let (algorithm, tokens_per_round) = match operation.mode {
            _ if hosts > 1 && operation.residual == Residual::Sharded => {
                plan(Algorithm::ShardedHierarchical)?
            }
            _ if hosts > 1 => plan(Algorithm::Hierarchical)?,
            _ if operation.residual == Residual::Sharded => plan(Algorithm::ShardedTwoShot)?,
            Mode::OneShot => plan(Algorithm::OneShot)?,
            Mode::TwoShot => plan(Algorithm::TwoShot)?,
            Mode::Auto => {
                let (first, second) = if operation.tokens * sent_bytes[0] <= limits.one_shot_bytes {
                    (Algorithm::OneShot, Algorithm::TwoShot)
                } else {
                    (Algorithm::TwoShot, Algorithm::OneShot)
                };
                // A slot may hold the smallest round of one algorithm alone.
                plan(first).or_else(|error| plan(second).map_err(|_| error))?
            }
        };
        Ok(Plan {
            algorithm,
            tokens: operation.tokens,
            tokens_per_round,
            world_size: limits.world_size,
            hosts,
            row_bytes,
            sent_bytes,
            partial_row_bytes,
            cluster: cluster(tokens_per_round, row_bytes, limits),
        })
    }

    /// Ranks of each host, which deal the tokens of a round out among themselves.
    pub const fn ranks_per_host(&self) -> u32 {
        self.world_size / self.hosts
    }

    /// The rounds, in order. An operation without tokens has no rounds.
    pub fn rounds(&self) -> impl DoubleEndedIterator<Item = Round> + use<> {
        let plan = *self;
        let count = if plan.tokens == 0 { 0 } else { plan.tokens.div_ceil(plan.tokens_per_round) };
        (0..count).map(move |index| {
            let first_token = index * plan.tokens_per_round;
            let tokens = plan.tokens_per_round.min(plan.tokens - first_token);
            Round { first_token, rows: slot_rows(tokens, plan.sent_bytes, plan.ranks_per_host()) }
        })
    }

    /// Bytes of the partial sums of one host in a round: `[rows, hidden]`, a row for each token that one rank owns.
    pub const fn host_bytes(&self, round: &Round) -> u64 {
        round.rows.most_owned() * self.partial_row_bytes
    }
}

/// Tokens of an operation that are exchanged through one slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// The token of the operation that is token 0 of the round.
    pub first_token: u64,
    /// Places of the rows of the round in a slot.
    pub rows: SlotRows,
}

const fn slot_rows(tokens: u64, [row_bytes, sum_bytes]: [u64; 2], world_size: u32) -> SlotRows {
    SlotRows { world_size, tokens, row_bytes, sum_bytes }
}

fn slot_bytes_of(algorithm: Algorithm, tokens: u64, sent_bytes: [u64; 2], world_size: u32) -> Option<u64> {
    let rows = slot_rows(tokens, sent_bytes, world_size);
    match algorithm {
        Algorithm::OneShot => rows.one_shot_bytes(),
        _ => rows.two_shot_bytes(),
    }
}

/// Bytes of the partial sums of all hosts that one rank gathers; `None` past 64 bits.
fn gathered_bytes(tokens: u64, partial_row_bytes: u64, limits: &Limits) -> Option<u64> {
    let rows = tokens.div_ceil(u64::from(limits.ranks_per_host()));
    rows.checked_mul(partial_row_bytes)?.checked_mul(u64::from(limits.hosts))
}

/// The largest number of tokens of a round, at least 1. With a sharded residual, it is a multiple of the ranks of a host if
/// more rounds follow. A token then has the same owner in the operation and in its round.
fn tokens_per_round(
    algorithm: Algorithm,
    tokens: u64,
    sent_bytes: [u64; 2],
    partial_row_bytes: u64,
    limits: &Limits,
) -> Result<u64, PlanError> {
    let ranks = limits.ranks_per_host();
    let bytes = |tokens| {
        let slot = slot_bytes_of(algorithm, tokens, sent_bytes, ranks)?;
        Some(slot.max(gathered_bytes(tokens, partial_row_bytes, limits)?))
    };
    let fits = |tokens| bytes(tokens).is_some_and(|bytes| bytes <= limits.slot_bytes);
    let unit = if algorithm.is_sharded() { u64::from(ranks) } else { 1 };
    let least = unit.min(tokens.max(1));
    if !fits(least) {
        let needed = bytes(least).unwrap_or(u64::MAX);
        return Err(PlanError::Slot { tokens: least, needed, slot_bytes: limits.slot_bytes });
    }
    // Bytes grow with tokens: bisect. `low` fits, `high` does not.
    let (mut low, mut high) = (least, tokens.max(1).saturating_add(1));
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(middle) { low = middle } else { high = middle }
    }
    Ok(if low < tokens { low - low % unit } else { low })
}

/// Blocks that share a token: more than one if the tokens are so few that most compute units would idle.
fn cluster(tokens: u64, row_bytes: u64, limits: &Limits) -> u32 {
    const WARP: u32 = 32;
    let packs = row_bytes.div_ceil(16) as u32; // at most 16,384: the hidden size is limited
    let mut cluster = 1;
    // Double while all clusters run at once and every block still has a pack for each thread of a warp.
    while cluster * 2 <= limits.max_cluster
        && tokens.saturating_mul(u64::from(cluster) * 2) <= u64::from(limits.compute_units)
        && packs / (cluster * 2) >= WARP
    {
        cluster *= 2;
    }
    cluster
}
