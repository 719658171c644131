//! What a kernel is launched with: parameter structs, and the memory that they point to.
//!
//! The host fills these and passes the struct by value as the kernel's only parameter. Host and device share them
//! through this crate: all are `repr(C)`, without padding, and hold no Rust pointer. [`LAYOUT`] is a fingerprint of
//! these structs: builds whose structs differ have different ones.
//!
//! # Launch rules
//! - The grid has at most as many blocks as can be resident at once, at most [`MAX_BLOCKS`], and at most as many
//!   clusters as the round has tokens. Blocks have one dimension, a multiple of 32 threads and at most [`MAX_BLOCK_THREADS`]; clusters
//!   have 1, 2, 4 or 8 blocks (1 before `sm_90`).
//! - A kernel of `P` packs per thread needs `cluster * threads * P >= row_packs` and `threads * P <=`
//!   [`MAX_BLOCK_THREADS`]; a streamed one takes any row, and any number of threads.
//! - Gammas and the quantization scales are constant while kernels run: they may be read before the dependent-launch
//!   wait.
//! - Launches that share a [`RankState`] follow each other in one stream (programmatic dependent launch included)
//!   or are ordered by events: two of them never run at once.
//! - A kernel that stands between two collectives and was itself launched as a programmatic dependent executes
//!   `griddepcontrol.wait`, as all kernels here do.
//! - In a group of several hosts each round is a [`HostSum`], a gather of its [`Partials`], and a [`FusedHosts`], in this order
//!   in one stream. No other launch of the same [`RankState`] comes between them.
//! - Every rank of a group launches the same sequence of operations, with the same [`Shape`] and mode. Grids, packs per
//!   thread, clusters and threads of a block may differ: results do not depend on them.
//! - [`RmsNorm::norm_out`] may be [`Activations::input`], and [`Activations::residual_out`] the residual, address for
//!   address. No other output overlaps anything. A thread that writes a pack has read, before, what was there, and nobody
//!   else reads it.

mod address;
mod epilogue;

use crate::{
    fingerprint::in_ptx,
    fusion::Rounding,
    lamport::{SENTINEL, SLOTS},
    pack::Pack,
    plan::{Plan, Round, owned_index},
    wire::WireFormat,
    workspace::{self, SLOTS_OFFSET},
};

pub use address::Address;
pub use epilogue::{
    AnyEpilogue, AnyQuantizer, BlockScales, Fp4, Fp8Block, Fp8PerToken, Fp8Static, MxFp4, Plain, RmsNorm,
    Unquantized,
};

/// The most threads of a block.
pub const MAX_BLOCK_THREADS: u32 = 1024;
/// The most blocks of a cluster: what every GPU with clusters guarantees.
pub const MAX_CLUSTER: u32 = 8;

/// The most blocks of a grid: each has an [`Epoch`] of its own.
pub const MAX_BLOCKS: u32 = 1024;
/// The most ranks of a group that a kernel serves.
pub const MAX_RANKS: usize = 8;

/// What a rank keeps on its device from one operation to the next. Zeroed when the group is made; only kernels
/// write it afterwards.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RankState {
    /// 0, or why the group is unusable: [`TIMED_OUT`] or [`ABORTED`].
    pub poisoned: u32,
    /// Keeps what follows on lines of its own.
    pub reserved: [u32; 15],
    /// The operation to run, once for every block that a grid may have: all are the same between operations.
    pub epochs: [Epoch; MAX_BLOCKS as usize],
}

impl RankState {
    /// The offset of `poisoned`.
    pub const POISONED: u64 = core::mem::offset_of!(RankState, poisoned) as u64;

    /// The offset of block `block`'s epoch.
    #[inline(always)]
    pub const fn epoch(block: u32) -> u64 {
        core::mem::offset_of!(RankState, epochs) as u64 + block as u64 * size_of::<Epoch>() as u64
    }
}

/// An operation's number, and what follows from it.
#[repr(C, align(16))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Epoch {
    /// Operations finished, which is the number of the one to run.
    pub operation: u64,
    /// The slot that it uses: [`lamport::slot`](crate::lamport::slot) of it, kept because a
    /// remainder of 64-bit numbers is slow on a GPU.
    pub slot: u32,
    /// Keeps the struct free of padding.
    pub reserved: u32,
}

/// [`Status::failed`]: a wait was longer than [`Group::timeout_ns`].
pub const TIMED_OUT: u32 = 1;
/// [`Status::failed`]: the host asked for the end.
pub const ABORTED: u32 = 2;
/// [`Status::failed`] and [`Status::hop`]: another host's sums say that a wait failed there.
pub const HOST_FAILED: u32 = 3;

/// The words by which host and kernels tell each other of failure, and kernels of progress, in host memory that the device can reach.
/// Zeroed when the group is made.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Set by the host, not to 0, to end every wait of this rank.
    pub abort: u32,
    /// 0, or [`TIMED_OUT`], [`ABORTED`] or [`HOST_FAILED`]. A kernel writes it last (release): when it is set, the rest is valid.
    pub failed: u32,
    /// The rank whose data was awaited; with [`HOST_FAILED`] the host whose sum it was.
    pub missing_rank: u32,
    /// 1: an input, in one-shot or as a token's owner; 2: a token's sum, from its owner; [`HOST_FAILED`]: a token's sum, from
    /// another host. Kernels of other crates have numbers of their own, from 4 on.
    pub hop: u32,
    /// The operation: see [`Epoch::operation`].
    pub operation: u64,
    /// The token, counted from the operation's first.
    pub token: u64,
    /// What the operation is: its [`Shape::call`].
    pub call: u64,
    /// Of a group of several hosts: 1 more than the number of the last operation that [`HostSum`] has begun with, its low
    /// 32 bits. While it differs from [`gathers_ended`](Self::gathers_ended), hosts gather what they sum, or are about to.
    pub gathers_begun: u32,
    /// The same of the last operation that [`FusedHosts`] has begun with.
    pub gathers_ended: u32,
}

impl Status {
    /// The offset of `abort`.
    pub const ABORT: u64 = core::mem::offset_of!(Status, abort) as u64;
    /// The offset of `failed`.
    pub const FAILED: u64 = core::mem::offset_of!(Status, failed) as u64;
    /// The offset of `missing_rank`.
    pub const MISSING_RANK: u64 = core::mem::offset_of!(Status, missing_rank) as u64;
    /// The offset of `hop`.
    pub const HOP: u64 = core::mem::offset_of!(Status, hop) as u64;
    /// The offset of `operation`.
    pub const OPERATION: u64 = core::mem::offset_of!(Status, operation) as u64;
    /// The offset of `token`.
    pub const TOKEN: u64 = core::mem::offset_of!(Status, token) as u64;
    /// The offset of `call`.
    pub const CALL: u64 = core::mem::offset_of!(Status, call) as u64;
    /// The offset of `gathers_begun`.
    pub const GATHERS_BEGUN: u64 = core::mem::offset_of!(Status, gathers_begun) as u64;
    /// The offset of `gathers_ended`.
    pub const GATHERS_ENDED: u64 = core::mem::offset_of!(Status, gathers_ended) as u64;
}

/// A rank's place in its group. The same for every operation.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// For each rank the address at which this device sees that rank's [region](crate::workspace); null past the
    /// group's size.
    pub regions: [Address; MAX_RANKS],
    /// Device memory: this rank's [`RankState`].
    pub state: Address,
    /// Mapped host memory: this rank's [`Status`].
    pub status: Address,
    /// Bytes of a slot: [`Layout::slot_bytes`](crate::workspace::Layout::slot_bytes).
    pub slot_bytes: u64,
    /// The longest that one wait may take, in nanoseconds: at most an hour, and kept to within some microseconds.
    pub timeout_ns: u64,
    /// Ranks in the group, from 2 to the kernel's largest. Of several hosts, this host's, from 1 on.
    pub world_size: u32,
    /// This rank.
    pub rank: u32,
}

/// The rows that one launch works on: a [round](crate::plan::Round) of an operation.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The operation's token that is token 0 of the round.
    pub first_token: u64,
    /// Tokens of the operation.
    pub total_tokens: u64,
    /// Tokens of the round: less than 2^31.
    pub tokens: u32,
    /// 16-byte packs of a row.
    pub row_packs: u32,
    /// What the host calls the operation: kernels hand it back in [`Status::call`], and make nothing of it.
    pub call: u64,
}

impl Shape {
    /// A round of a plan, of an operation that kernels know as `call`; `None` for one of 2^31 tokens or more.
    pub const fn of_round(plan: &Plan, round: &Round, call: u64) -> Option<Shape> {
        match Shape::of_rows(round.rows.tokens, plan.row_bytes) {
            Some(shape) => {
                Some(Shape { first_token: round.first_token, total_tokens: plan.tokens, call, ..shape })
            }
            None => None,
        }
    }

    /// All rows of an operation, for a kernel without a collective; `None` for 2^31 tokens or more. `row_bytes` are a
    /// valid operation's.
    pub const fn of_rows(tokens: u64, row_bytes: u64) -> Option<Shape> {
        if tokens >= 1 << 31 {
            return None;
        }
        // A row has at most 65,536 elements.
        let row_packs = (row_bytes / Pack::BYTES) as u32;
        Some(Shape { first_token: 0, total_tokens: tokens, tokens: tokens as u32, row_packs, call: 0 })
    }

    /// Which of the operation's tokens token `token` of the round is.
    #[inline(always)]
    pub const fn operation_token(&self, token: u32) -> u64 {
        self.first_token + token as u64
    }

    /// Bytes of a row.
    #[inline(always)]
    pub const fn row_bytes(&self) -> u64 {
        self.row_packs as u64 * 16
    }
}

/// The activations, `[total_tokens, hidden]` elements each, 16-byte aligned.
///
/// With a sharded residual, `residual` and `residual_out` have a row for each token of the round that this rank owns,
/// and start with the first of them; neither is null.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Activations {
    /// This rank's addend. Where a kernel makes it, as from [`Experts`], the kernel writes it here: into memory of the launch's
    /// own, of which only the round's rows are used.
    pub input: Address,
    /// The residual, or null: then none is read.
    pub residual: Address,
    /// The sum, plus the residual. Null only without a residual, and only in kernels without a collective.
    pub residual_out: Address,
    /// [`ROUNDS_SUM`](Self::ROUNDS_SUM), and the [`Extras`] that there are. Of the kernels without a collective only
    /// [`LocalAny`]'s read these, and all read [`HOLDS_DEPENDENTS`](Self::HOLDS_DEPENDENTS).
    pub flags: u32,
    /// Keeps the struct free of padding.
    pub reserved: u32,
}

impl Activations {
    /// Rounds the sum to the element type before the residual is added: [`Rounding::AfterAllReduce`].
    pub const ROUNDS_SUM: u32 = 1;
    /// Adds [`Extras::bias`].
    pub const BIAS: u32 = 2;
    /// Normalizes the sum: [`Extras::post_norm`].
    pub const POST_NORM: u32 = 4;
    /// Makes the addend of [`Extras::experts`].
    pub const EXPERTS: u32 = 8;
    /// Lets no dependent in before the end, of a kernel without a collective: for dependents that do not wait.
    pub const HOLDS_DEPENDENTS: u32 = 16;

    /// The activations at these addresses, of an operation with this rounding and without extras.
    pub const fn new(
        input: Address,
        residual: Address,
        residual_out: Address,
        rounding: Rounding,
    ) -> Activations {
        let flags = if matches!(rounding, Rounding::AfterAllReduce) { Self::ROUNDS_SUM } else { 0 };
        Activations { input, residual, residual_out, flags, reserved: 0 }
    }

    /// True if `flag` is among the flags.
    #[inline(always)]
    pub const fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// An operation's activations as the kernel of one of its rounds takes them. Where the kernel makes the addend, `input` has
    /// room for one round's rows.
    pub const fn of_round(self, plan: &Plan, round: &Round) -> Activations {
        let mut activations = self;
        if self.has(Self::EXPERTS) {
            let before = round.first_token * plan.row_bytes;
            activations.input = self.input.offset(before.wrapping_neg());
        }
        if plan.algorithm.is_sharded() {
            // Rounds start with a token of rank 0's, so that as many of every rank's come before.
            let before = owned_index(round.first_token, plan.ranks_per_host()) * plan.row_bytes;
            activations.residual = self.residual.offset(before);
            activations.residual_out = self.residual_out.offset(before);
        }
        activations
    }
}

/// The parts that few operations have: [`Activations::flags`] names those that there are, and kernels read no others. They are
/// the last parameters, so that what every launch reads lies close together.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Extras {
    /// `[hidden]` elements, 16-byte aligned, added to the sum of all ranks before it is rounded. Constant.
    pub bias: Address,
    /// The norm of the sum.
    pub post_norm: PostNorm,
    /// The experts that the addend is made of.
    pub experts: Experts,
    /// The format in which addends cross the links; only for the kernels of [`Addends::Encoded`](crate::kernels::Addends),
    /// which read it whatever the flags are.
    pub encoding: Encoding,
}

impl Extras {
    /// No extras.
    pub const NONE: Extras = Extras {
        bias: Address::NULL,
        post_norm: PostNorm::NONE,
        experts: Experts::NONE,
        encoding: Encoding::NONE,
    };
}

/// The RMSNorm of the sum of all ranks, before the residual is added.
///
/// The sum plus the bias is rounded to the element type, with [`ROUNDS_SUM`](Activations::ROUNDS_SUM) or without, and this norm
/// is computed from that. With `ROUNDS_SUM` the norm is rounded to the element type before the residual is added.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PostNorm {
    /// `[hidden]` elements, or `f32`, 16-byte aligned. Constant.
    pub gamma: Address,
    /// `1 / hidden`, as a sum is not made by its epilogue.
    pub inverse_hidden: f32,
    /// Added to the mean square.
    pub epsilon: f32,
    /// Added to gamma.
    pub weight_bias: f32,
    /// 1: gamma is `f32`, and elements are not; else 0.
    pub gamma_f32: u32,
}

impl PostNorm {
    /// No norm of the sum.
    pub const NONE: PostNorm =
        PostNorm { gamma: Address::NULL, inverse_hidden: 0.0, epsilon: 0.0, weight_bias: 0.0, gamma_f32: 0 };
}

/// The experts' rows that this rank's addend is made of: [`fusion::Experts`](crate::fusion::Experts) states the order. The
/// kernel leaves the addend in [`Activations::input`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Experts {
    /// `[any, hidden]` elements, 16-byte aligned.
    pub rows: Address,
    /// `[total_tokens, top_k]` `i32`, 4-byte aligned: a row, or less than 0 for none. Kernels do not check them against the
    /// number of rows.
    pub index: Address,
    /// `[total_tokens, top_k]` elements, or `f32`, aligned to one of them.
    pub scales: Address,
    /// `[total_tokens, hidden]` elements, 16-byte aligned, the shared expert's rows; null: there is no shared expert.
    pub shared: Address,
    /// Experts of a token, from 1 to [`MAX_TOP_K`](crate::fusion::MAX_TOP_K).
    pub top_k: u32,
    /// 1: scales are `f32`, and elements are not; else 0.
    pub scales_f32: u32,
}

impl Experts {
    /// No experts.
    pub const NONE: Experts = Experts {
        rows: Address::NULL,
        index: Address::NULL,
        scales: Address::NULL,
        shared: Address::NULL,
        top_k: 0,
        scales_f32: 0,
    };
}

/// A [format](crate::wire) of fewer bits.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Encoding {
    /// Bits of a code: 8 or 4.
    pub bits: u32,
    /// Keeps the struct free of padding.
    pub reserved: u32,
}

impl Encoding {
    /// Elements as they are.
    pub const NONE: Encoding = Encoding { bits: 0, reserved: 0 };

    /// The format of an operation's addends.
    pub const fn of(format: Option<WireFormat>) -> Encoding {
        match format {
            Some(format) => Encoding { bits: format.bits(), reserved: 0 },
            None => Encoding::NONE,
        }
    }
}

/// The parameters of a fused kernel with epilogue `X`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fused<X> {
    /// This rank's place in its group.
    pub group: Group,
    /// The round.
    pub shape: Shape,
    /// What is summed.
    pub activations: Activations,
    /// What is made of the sum.
    pub epilogue: X,
    /// The parts that few operations have.
    pub extras: Extras,
}

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

/// The parameters of the kernel that sums the addends of a host's ranks. It advances no [`Epoch`]: the
/// [`FusedHosts`] of the same round follows it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostSum {
    /// This rank's place in its host. Here alone, and in [`FusedHosts`], a group may have one rank.
    pub group: Group,
    /// The round.
    pub shape: Shape,
    /// The addends: of these, the input, and of the flags [`EXPERTS`](Activations::EXPERTS).
    pub activations: Activations,
    /// The experts that the addend is made of, if the flags say so.
    pub experts: Experts,
    /// The place of the sums: this host's part.
    pub partials: Partials,
}

/// The parameters of a fused kernel with epilogue `X` that sums what the hosts have summed.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FusedHosts<X> {
    /// As of the other fused kernels, the group being the ranks of this host. The input is not read.
    pub fused: Fused<X>,
    /// The addends: every host's part.
    pub partials: Partials,
}

/// The parameters of a kernel that has an epilogue `X` and no collective.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Local<X> {
    /// All rows of the operation.
    pub shape: Shape,
    /// What the epilogue is applied to.
    pub activations: Activations,
    /// What is made of it.
    pub epilogue: X,
}

/// The parameters of the kernel without a collective that has any epilogue, and code for [`Extras`].
///
/// With [`EXPERTS`](Activations::EXPERTS) it makes the addend of an all-reduce, and nothing else. Else the input is a sum,
/// rounded, and there may be [`POST_NORM`](Activations::POST_NORM): that takes an epilogue with a norm, a `residual_out`, and
/// rows in registers. The kernel reads no other extras.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LocalAny {
    /// As of other kernels without a collective.
    pub local: Local<AnyEpilogue>,
    /// The parts that few operations have.
    pub extras: Extras,
}

/// To be raised when a field, or the memory that it points to, comes to mean something else in the same place.
const REVISION: u64 = 1;

// What epilogue or quantizer there is does not move what comes before it; extras follow any epilogue.
type AnyFused = Fused<Unquantized>;
type AnyFusedHosts = FusedHosts<Unquantized>;
type AnyLocal = Local<Unquantized>;
type AnyPlain = Plain<Unquantized>;
type AnyRmsNorm = RmsNorm<Unquantized>;

/// A fingerprint of the launch ABI: of these structs, and of the workspace. The host refuses kernels whose fingerprint
/// differs.
pub const LAYOUT: u32 = crate::fingerprint! {
    [SLOTS, SLOTS_OFFSET, SENTINEL, workspace::VERSION, REVISION]
    RankState { poisoned, reserved, epochs }
    Epoch { operation, slot, reserved }
    Status { abort, failed, missing_rank, hop, operation, token, call, gathers_begun, gathers_ended }
    Group { regions, state, status, slot_bytes, timeout_ns, world_size, rank }
    Shape { first_token, total_tokens, tokens, row_packs, call }
    Activations { input, residual, residual_out, flags, reserved }
    Extras { bias, post_norm, experts, encoding }
    Encoding { bits, reserved }
    PostNorm { gamma, inverse_hidden, epsilon, weight_bias, gamma_f32 }
    Experts { rows, index, scales, shared, top_k, scales_f32 }
    AnyFused { group, shape, activations, epilogue, extras }
    Partials { rows, host_stride, hosts, host, element, reserved }
    HostSum { group, shape, activations, experts, partials }
    AnyFusedHosts { fused, partials }
    AnyLocal { shape, activations, epilogue }
    LocalAny { local, extras }
    AnyPlain { quantizer }
    AnyRmsNorm { gamma, norm_out, inverse_hidden, epsilon, weight_bias, gamma_f32, quantizer }
    Unquantized {}
    Fp8Static { values, scale }
    Fp8PerToken { values, scales }
    BlockScales { address, strides }
    Fp8Block { values, scales, block_packs_log2, reserved }
    Fp4 { values, scales, global_scale }
    MxFp4 { values, scales }
    AnyQuantizer { values, scales, scale, kind, block_packs_log2 }
    AnyEpilogue { norm }
};

/// The variable of a PTX module that holds its [`LAYOUT`].
pub const LAYOUT_SYMBOL: &str = "fused_collective_layout";

/// The [`LAYOUT`] that a module was built with, from its PTX; `None` if the text has none.
pub fn layout_of(ptx: &str) -> Option<u32> {
    in_ptx(ptx, LAYOUT_SYMBOL)
}

// Host and device are compiled by different compilers: neither may pad what the other does not.
const _: () = {
    assert!(size_of::<RankState>() == 64 + 16 * MAX_BLOCKS as usize && size_of::<Status>() == 64);
    assert!(size_of::<Group>() == 104 && size_of::<Shape>() == 32 && size_of::<Activations>() == 32);
    assert!(size_of::<Extras>() == 80 && size_of::<PostNorm>() == 24 && size_of::<Experts>() == 40);
    assert!(size_of::<Encoding>() == 8);
    assert!(size_of::<Unquantized>() == 0 && size_of::<Fp8Static>() == 16 && size_of::<Fp8PerToken>() == 16);
    assert!(size_of::<BlockScales>() == 40 && size_of::<Fp8Block>() == 56 && size_of::<Fp4>() == 56);
    assert!(size_of::<MxFp4>() == 48);
    assert!(size_of::<AnyQuantizer>() == 64 && size_of::<AnyEpilogue>() == 96);
    assert!(size_of::<Plain<Fp4>>() == 56 && size_of::<RmsNorm<Unquantized>>() == 32);
    assert!(size_of::<Fused<RmsNorm<Fp4>>>() == 104 + 32 + 32 + 88 + 80);
    assert!(size_of::<Partials>() == 32 && size_of::<HostSum>() == 104 + 32 + 32 + 40 + 32);
    assert!(size_of::<FusedHosts<AnyEpilogue>>() == 104 + 32 + 32 + 96 + 80 + 32);
    assert!(size_of::<Local<RmsNorm<Fp8Static>>>() == 32 + 32 + 48);
    assert!(size_of::<LocalAny>() == 32 + 32 + 96 + 80);
};

#[cfg(test)]
mod tests {
    use std::format;

    #[test]
    fn every_launch_struct_is_in_the_fingerprint() {
        let source = include_str!("mod.rs");
        let declared =
            [source, include_str!("epilogue.rs")].into_iter().flat_map(str::lines).filter_map(|line| {
                let name = line.strip_prefix("pub struct ")?;
                name.split(|c: char| !c.is_alphanumeric()).next()
            });
        let mut count = 0;
        for name in declared.filter(|&name| name != "Address") {
            let lists = |prefix: &str| source.contains(&format!("\n    {prefix}{name} {{"));
            assert!(lists("") || lists("Any"), "{name} is not in `LAYOUT`");
            count += 1;
        }
        assert_eq!(count, 27);
    }
}
