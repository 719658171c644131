//! From an operation and the group's agreed limits to what every rank does: algorithm, rounds, token
//! ownership, and how many blocks of a GPU share a token.
//!
//! [`Plan::new`] is a pure function of its arguments. Ranks that agree on the [`Limits`] (by
//! [`Limits::agree`], once, at set-up) and are given the same operation therefore make the same plan.
//!
//! The size of a grid is no part of it: each rank starts as many blocks as its own GPU holds at once. No rank waits for
//! another's blocks or counts them, only for data, and where that lies follows from the round alone.

use core::fmt;

use crate::{
    MAX_WORLD_SIZE,
    fusion::{Mode, Operation, OperationError, Residual},
    workspace::SlotRows,
};

/// The collective that a plan settled on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// One hop: see [`Mode::OneShot`].
    OneShot,
    /// Two hops: see [`Mode::TwoShot`].
    TwoShot,
    /// Two hops, the second with what the owner made of the sum: see [`Residual::Sharded`].
    ShardedTwoShot,
}

/// What the group can do: the least that any of its ranks can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Ranks in the group.
    pub world_size: u32,
    /// Bytes of one workspace slot.
    pub slot_bytes: u64,
    /// Multiprocessors of a GPU; 1 for a rank that is one thread.
    pub compute_units: u32,
    /// Blocks of the largest cluster, a power of two; 1 where there are no clusters.
    pub max_cluster: u32,
    /// [`Mode::Auto`] takes one-shot up to this many bytes of activation, two-shot above.
    pub one_shot_bytes: u64,
}

impl Limits {
    /// The limits that every rank of the group can keep to: the least of each. `None` if there are none,
    /// or if ranks disagree on the world size.
    pub fn agree(ranks: &[Limits]) -> Option<Limits> {
        let (first, rest) = ranks.split_first()?;
        rest.iter().try_fold(*first, |least, other| {
            (least.world_size == other.world_size).then(|| Limits {
                world_size: least.world_size,
                slot_bytes: least.slot_bytes.min(other.slot_bytes),
                compute_units: least.compute_units.min(other.compute_units),
                max_cluster: least.max_cluster.min(other.max_cluster),
                one_shot_bytes: least.one_shot_bytes.min(other.one_shot_bytes),
            })
        })
    }
}

/// How many bytes of activation [`Mode::Auto`] should take one-shot up to, among GPUs with links from each to every
/// other: [`Limits::one_shot_bytes`].
///
/// Of `n` ranks, each pushes an activation of `b` bytes `n - 1` times in one-shot, and `2 (n - 1) / n` times in two-shot,
/// which waits for a hop more. If `hop_bytes` could be pushed during such a wait, both take the same time where
/// `b (n - 1) = 2 b (n - 1) / n + hop_bytes`. Two ranks push the same in both modes, so that one-shot is always ahead.
pub const fn one_shot_bytes(world_size: u32, hop_bytes: u64) -> u64 {
    if world_size <= 2 {
        return u64::MAX;
    }
    let ranks = world_size as u64;
    hop_bytes.saturating_mul(ranks) / ((ranks - 1) * (ranks - 2))
}

/// What every rank does for one operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The collective.
    pub algorithm: Algorithm,
    /// Tokens of the operation.
    pub tokens: u64,
    /// Tokens of every round but the last, which has what is left. A round fills one workspace slot and
    /// counts as one operation of the [Lamport rotation](crate::lamport).
    pub tokens_per_round: u64,
    /// Ranks in the group.
    pub world_size: u32,
    /// Bytes of a row.
    pub row_bytes: u64,
    /// Blocks that share a token; 1 where there are no clusters. Kernels that cannot hold a row in the registers of so
    /// few may take more, up to [`Limits::max_cluster`].
    pub cluster: u32,
}

/// Why there is no plan.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PlanError {
    /// The operation itself is not valid.
    Operation(OperationError),
    /// The limits are none that a group can have.
    Limits(&'static str),
    /// The smallest round is more than a slot holds.
    Slot {
        /// Tokens of that round: one, or with a sharded residual one for each rank.
        tokens: u64,
        /// Bytes that it takes.
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
            PlanError::Slot { tokens, needed, slot_bytes } => {
                if tokens == 1 {
                    f.write_str("one token takes")?;
                } else {
                    write!(f, "{tokens} tokens take")?;
                }
                write!(f, " {needed} bytes of a workspace slot that has {slot_bytes}: use a larger workspace")
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
    /// The plan for `operation` under `limits`.
    pub fn new(operation: &Operation, limits: &Limits) -> Result<Plan, PlanError> {
        operation.validate()?;
        if !(crate::MIN_WORLD_SIZE..=MAX_WORLD_SIZE).contains(&limits.world_size) {
            return Err(PlanError::Limits("the world size must be 1 to 16"));
        }
        if limits.compute_units == 0 {
            return Err(PlanError::Limits("there must be a compute unit"));
        }
        if !limits.max_cluster.is_power_of_two() {
            return Err(PlanError::Limits("the largest cluster must be a power of two"));
        }
        let row_bytes = operation.row_bytes();
        let plan = |algorithm| {
            tokens_per_round(algorithm, operation.tokens, row_bytes, limits).map(|tokens| (algorithm, tokens))
        };
        let (algorithm, tokens_per_round) = match operation.mode {
            _ if operation.residual == Residual::Sharded => plan(Algorithm::ShardedTwoShot)?,
            Mode::OneShot => plan(Algorithm::OneShot)?,
            Mode::TwoShot => plan(Algorithm::TwoShot)?,
            Mode::Auto => {
                let (first, second) = if operation.activation_bytes() <= limits.one_shot_bytes {
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
            row_bytes,
            cluster: cluster(tokens_per_round, row_bytes, limits),
        })
    }

    /// The rounds, in order: first token and number of tokens. None for an operation without tokens.
    pub fn rounds(&self) -> impl DoubleEndedIterator<Item = Round> + use<> {
        let plan = *self;
        let count = if plan.tokens == 0 { 0 } else { plan.tokens.div_ceil(plan.tokens_per_round) };
        (0..count).map(move |index| {
            let first_token = index * plan.tokens_per_round;
            let tokens = plan.tokens_per_round.min(plan.tokens - first_token);
            let rows = SlotRows { world_size: plan.world_size, tokens, row_bytes: plan.row_bytes };
            Round { first_token, rows }
        })
    }
}

/// The tokens that fill one slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// The operation's token that is token 0 of the round.
    pub first_token: u64,
    /// Where the round's rows are in a slot.
    pub rows: SlotRows,
}

/// Two-shot: the rank that sums token `token` of a round. Interleaved, so that few tokens still occupy
/// every rank and every link.
pub const fn owner(token: u64, world_size: u32) -> u32 {
    (token % world_size as u64) as u32
}

/// Two-shot: which of its owner's tokens `token` is.
pub const fn owned_index(token: u64, world_size: u32) -> u64 {
    token / world_size as u64
}

/// Two-shot: how many of `tokens` tokens rank `rank` owns.
pub const fn owned_tokens(tokens: u64, rank: u32, world_size: u32) -> u64 {
    (tokens + world_size as u64 - 1 - rank as u64) / world_size as u64
}

/// Two-shot: the `owned`-th token of rank `rank`.
pub const fn owned_token(owned: u64, rank: u32, world_size: u32) -> u64 {
    owned * world_size as u64 + rank as u64
}

fn slot_bytes_of(algorithm: Algorithm, tokens: u64, row_bytes: u64, world_size: u32) -> Option<u64> {
    let rows = SlotRows { world_size, tokens, row_bytes };
    match algorithm {
        Algorithm::OneShot => rows.one_shot_bytes(),
        Algorithm::TwoShot | Algorithm::ShardedTwoShot => rows.two_shot_bytes(),
    }
}

/// The most tokens, of those there are, that fit one slot; at least 1. With a sharded residual, rounds that others
/// follow have a token for each rank or several: so an operation's token is its owner's in the round, too.
fn tokens_per_round(
    algorithm: Algorithm,
    tokens: u64,
    row_bytes: u64,
    limits: &Limits,
) -> Result<u64, PlanError> {
    let bytes = |tokens| slot_bytes_of(algorithm, tokens, row_bytes, limits.world_size);
    let fits = |tokens| bytes(tokens).is_some_and(|bytes| bytes <= limits.slot_bytes);
    let unit = if algorithm == Algorithm::ShardedTwoShot { u64::from(limits.world_size) } else { 1 };
    let least = unit.min(tokens.max(1));
    if !fits(least) {
        let needed = bytes(least).unwrap_or(u64::MAX);
        return Err(PlanError::Slot { tokens: least, needed, slot_bytes: limits.slot_bytes });
    }
    // The bytes grow with the tokens: bisect. `low` fits, `high` does not.
    let (mut low, mut high) = (least, tokens.max(1).saturating_add(1));
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(middle) { low = middle } else { high = middle }
    }
    Ok(if low < tokens { low - low % unit } else { low })
}

/// A token is a block's, or a cluster's where tokens are so few that most units would idle.
fn cluster(tokens: u64, row_bytes: u64, limits: &Limits) -> u32 {
    const WARP: u32 = 32;
    let packs = row_bytes.div_ceil(16) as u32; // at most 16,384: the hidden size is limited
    let mut cluster = 1;
    // Widen while every cluster still finds units of its own and its threads have a warp's worth each.
    while cluster * 2 <= limits.max_cluster
        && tokens.saturating_mul(u64::from(cluster) * 2) <= u64::from(limits.compute_units)
        && packs / (cluster * 2) >= WARP
    {
        cluster *= 2;
    }
    cluster
}
