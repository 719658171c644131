//! The types of the C ABI.
//!
//! A struct that may grow begins with its own size. A field that holds a value of an enum is a number, since C may write any.

#![allow(non_camel_case_types, reason = "these are C's names")]

use std::ffi::{c_char, c_int, c_void};

/// The outcome of a call. Of one that failed, `fc_error_text`, `fc_error_rank` and `fc_error_peer` say more.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum fc_status {
    /// Success.
    Ok = 0,
    /// An argument, an operation, a tensor or an option is invalid. Nothing was sent.
    Invalid = 1,
    /// The backend cannot do it. Nothing was sent.
    Unsupported = 2,
    /// Driver, device or kernels are missing or unusable.
    Unavailable = 3,
    /// Memory has no room.
    OutOfMemory = 4,
    /// The ranks could not form a group.
    Bootstrap = 5,
    /// The operating system or the driver refused something.
    System = 6,
    /// A rank did not come within the deadline.
    TimedOut = 7,
    /// A rank was lost, or gave up.
    Lost = 8,
    /// The group was aborted.
    Aborted = 9,
    /// Ranks made different calls.
    Mismatch = 10,
    /// The library has a bug: it panicked.
    Panic = 11,
}

/// The processors that a group computes with.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum fc_backend {
    /// CPUs of one host, over shared memory. An operation runs inside of the call that enqueues it.
    Cpu = 1,
    /// NVIDIA GPUs of one host.
    Cuda = 2,
}

/// The type of a tensor's elements.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum fc_type {
    /// There is no such tensor.
    None = 0,
    /// IEEE binary32.
    F32 = 1,
    /// IEEE binary16.
    F16 = 2,
    /// bfloat16.
    Bf16 = 3,
    /// Bytes: codes of a quantization, or its scales. Scales of 4 bytes are bytes as well.
    Bytes = 4,
    /// `int32_t`: indices of rows.
    I32 = 5,
}

/// Presence and distribution of the residual.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum fc_residual {
    /// No residual is added.
    None = 0,
    /// Every rank holds the same whole residual.
    Replicated = 1,
    /// Token `t` is row `t / world_size` of rank `t % world_size`, and no other rank has it.
    Sharded = 2,
}

/// The norm of the sum.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum fc_norm {
    /// None: an all-reduce, and the residual add.
    None = 0,
    /// RMSNorm: `x * rsqrt(mean(x^2) + epsilon) * (weight_bias + gamma)`.
    Rms = 1,
}

/// The quantization of the norm, of `T` tokens and hidden size `H`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum fc_quantization {
    /// None.
    None = 0,
    /// `[T, H]` E4M3, with one scale of the caller's for the whole tensor.
    Fp8Static = 1,
    /// `[T, H]` E4M3, `[T]` scales in `float`.
    Fp8PerToken = 2,
    /// `[T, H]` E4M3, `[T, H / group]` scales of type `group_scale`.
    Fp8PerGroup = 3,
    /// NVFP4: `[T, H / 2]` pairs of E2M1, `[T, H / 16]` UE4M3 scales, one global scale of the caller's.
    Nvfp4 = 4,
    /// OCP MXFP8: `[T, H]` E4M3, `[T, H / 32]` UE8M0 scales.
    Mxfp8 = 5,
    /// OCP MXFP4: `[T, H / 2]` pairs of E2M1, `[T, H / 32]` UE8M0 scales.
    Mxfp4 = 6,
}

/// The layout of the scales of blocks.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum fc_scale_layout {
    /// Row-major, without padding.
    Linear = 0,
    /// Column-major, without padding.
    ColumnMajor = 1,
    /// Column-major words of 4 bytes, columns at multiples of 16 bytes, as DeepGEMM reads them.
    DeepGemm = 2,
    /// Tiles of 128 rows by 4 columns, as cuBLAS reads them.
    Swizzled128x4 = 3,
    /// Tiles of 8 rows by 4 columns.
    Swizzled8x4 = 4,
}

/// The type of the scales of `FC_QUANTIZATION_FP8_PER_GROUP`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum fc_group_scale {
    /// Powers of two in a byte.
    Ue8m0 = 0,
    /// `float`.
    F32 = 1,
}

/// Roundings of the sum to the element type.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum fc_rounding {
    /// Once, after the residual was added.
    Once = 0,
    /// Twice, as separate operations do: after the all-reduce, and after the residual was added.
    AfterAllReduce = 1,
}

/// The format in which rows cross the links between ranks.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum fc_wire {
    /// The element type: nothing is lost.
    Exact = 0,
    /// 8.5 bits an element; the sum of normal rows misses by 0.55% in one-shot.
    Int8 = 1,
    /// 4.5 bits an element; the sum of normal rows misses by 8.6% in one-shot.
    Int4 = 2,
}

/// The type in which the sum of a host's ranks crosses to other hosts.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum fc_partial_sums {
    /// `float`, for every element type.
    F32 = 0,
    /// The element type, rounded once.
    Element = 1,
}

/// The collective.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum fc_mode {
    /// The faster one, as the library expects.
    Auto = 0,
    /// One hop: every rank sends to every other.
    OneShot = 1,
    /// Two hops: every token has an owner.
    TwoShot = 2,
}

/// The collective of a plan.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum fc_algorithm {
    /// One hop.
    OneShot = 1,
    /// Two hops.
    TwoShot = 2,
    /// Two hops, the second with the norm or its codes.
    ShardedTwoShot = 3,
    /// Two hops within each host, with an exchange of partial sums between hosts.
    Hierarchical = 4,
    /// The same, the second hop with the norm or its codes.
    ShardedHierarchical = 5,
}

/// The device of rank `r`: GPU `r` modulo the number of GPUs that the process sees.
pub const FC_DEVICE_BY_RANK: i32 = -1;

/// A group's settings. All ranks give the same, but for `device` and `kernels`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fc_options {
    /// `sizeof(fc_options)`.
    pub size: u64,
    /// An `fc_backend`.
    pub backend: u32,
    /// Of GPUs, the ordinal among those that the process sees, or `FC_DEVICE_BY_RANK`.
    pub device: i32,
    /// Bytes of the longest row of any operation: hidden size times bytes of an element.
    pub max_row_bytes: u64,
    /// Tokens that an operation on GPUs may have to run in one round; a larger one takes several.
    pub max_tokens: u64,
    /// Milliseconds, at least 1, that a wait for another rank may take.
    pub deadline_ms: u64,
    /// 1 lets ranks share a GPU, on which they take turns: operations are right, and take milliseconds.
    pub oversubscribe: u32,
    /// 1 reads each scale from the GPU before its operation, and refuses an invalid one: for debugging.
    pub check_scales: u32,
    /// A folder of kernels in place of those in the library, or null.
    pub kernels: *const c_char,
}

/// A process's place in its group, of processes of one host.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fc_membership {
    /// `sizeof(fc_membership)`.
    pub size: u64,
    /// The rank, from 0.
    pub rank: u32,
    /// Ranks in the group, at least 2.
    pub world_size: u32,
    /// UTF-8 that the ranks of this group have in common, and no other group's.
    pub key: *const c_char,
}

/// The caller's own means of exchanging small messages while a group is made and left: those of MPI, for instance. The
/// functions return 0, or another number if they fail, and throw no exception. They are called by the thread that calls
/// `fc_join_over` or `fc_leave`, and `context` is theirs.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fc_bootstrap {
    /// `sizeof(fc_bootstrap)`.
    pub size: u64,
    /// The rank, from 0.
    pub rank: u32,
    /// Ranks in the group, at least 2.
    pub world_size: u32,
    /// Passed to the functions as it is.
    pub context: *mut c_void,
    /// Writes the `length` bytes of every rank to `gathered`, by rank. All ranks give the same `length`.
    pub all_gather: Option<
        unsafe extern "C" fn(
            context: *mut c_void,
            bytes: *const c_void,
            length: u64,
            gathered: *mut c_void,
        ) -> c_int,
    >,
    /// Returns when every rank has called it. Null: an all-gather does.
    pub barrier: Option<unsafe extern "C" fn(context: *mut c_void) -> c_int>,
}

/// One fused operation, the same on every rank. Fields of 0 leave out what they name.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fc_operation {
    /// `sizeof(fc_operation)`.
    pub size: u64,
    /// Rows.
    pub tokens: u64,
    /// Elements of a row.
    pub hidden: u64,
    /// An `fc_type`: that of all activations, `FC_TYPE_F32`, `FC_TYPE_F16` or `FC_TYPE_BF16`.
    pub dtype: u32,
    /// An `fc_residual`.
    pub residual: u32,
    /// An `fc_norm`.
    pub norm: u32,
    /// An `fc_type`, that of gamma: 0 for that of the activations, or `FC_TYPE_F32`.
    pub gamma: u32,
    /// Addend of the mean square.
    pub epsilon: f32,
    /// Addend of gamma: 0, or 1 in Gemma's norm.
    pub weight_bias: f32,
    /// An `fc_quantization`.
    pub quantization: u32,
    /// An `fc_scale_layout`, if the quantization has blocks.
    pub scale_layout: u32,
    /// Elements of a group, if the quantization is per group: 32, 64 or 128.
    pub group: u32,
    /// An `fc_group_scale`, if the quantization is per group.
    pub group_scale: u32,
    /// 1 writes the norm beside its quantization.
    pub keep_norm: u32,
    /// An `fc_rounding`.
    pub rounding: u32,
    /// An `fc_mode`.
    pub mode: u32,
    /// 1 adds a bias to the sum of all ranks, before it is rounded and the residual is added.
    pub bias: u32,
    /// An `fc_norm`: that of the sum of all ranks, before the residual is added. It needs `norm`.
    pub post_norm: u32,
    /// An `fc_type`, that of `post_gamma`: as `gamma`.
    pub post_gamma: u32,
    /// Addend of the mean square of the sum.
    pub post_epsilon: f32,
    /// Addend of `post_gamma`.
    pub post_weight_bias: f32,
    /// Experts of a token, at most 64: this rank's addend is made of rows of its experts. 0: it is the input.
    pub top_k: u32,
    /// An `fc_type`, that of `expert_scales`: as `gamma`.
    pub expert_scales: u32,
    /// 1 adds the input, the rows of a shared expert, to those of experts.
    pub shared_expert: u32,
    /// An `fc_wire`. Rows in a format of fewer bits do not cross hosts.
    pub wire: u32,
    /// An `fc_partial_sums`. Nothing reads it in a group of one host.
    pub partial_sums: u32,
    /// 0.
    pub reserved: u32,
}

/// A contiguous tensor: on GPUs at a multiple of 16 bytes, on CPUs at a multiple of its elements' size. `expert_index` and
/// `expert_scales` are at a multiple of their elements' size everywhere.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fc_tensor {
    /// Its address, in the memory of the group's backend.
    pub data: *mut c_void,
    /// Its elements; of codes and scales, its bytes.
    pub length: u64,
    /// An `fc_type`; 0 if the operation has no such tensor.
    pub r#type: u32,
    /// 0.
    pub reserved: u32,
}

/// The tensors of an operation on one rank. `norm_out` may be `input`'s memory, and `residual_out` `residual`'s, address for
/// address; no other tensors overlap. `rows` is `tokens`, or with a sharded residual what `fc_plan` says.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fc_tensors {
    /// `sizeof(fc_tensors)`.
    pub size: u64,
    /// `[tokens, hidden]`: this rank's addend; with experts the rows of the shared one, if there is one.
    pub input: fc_tensor,
    /// `[rows, hidden]`, if the operation has a residual.
    pub residual: fc_tensor,
    /// `[hidden]`, if the operation has a bias.
    pub bias: fc_tensor,
    /// `[hidden]`, if the operation has a norm. On GPUs it is read before the kernel ahead on the stream has ended, which must
    /// not write it.
    pub gamma: fc_tensor,
    /// One `float`, at a multiple of 4 bytes: the scale of static FP8, or the global scale of NVFP4. Read as early as `gamma`.
    pub scale: fc_tensor,
    /// `[rows, hidden]`: the sum, plus the residual.
    pub residual_out: fc_tensor,
    /// `[tokens, hidden]`: the norm, if it is written.
    pub norm_out: fc_tensor,
    /// `quant_bytes` of `fc_plan`: the codes, if there is a quantization.
    pub quant_out: fc_tensor,
    /// `scale_bytes` of `fc_plan`: their scales, if the quantization writes any.
    pub scale_out: fc_tensor,
    /// `[hidden]`, if the operation has a norm of the sum of all ranks.
    pub post_gamma: fc_tensor,
    /// `[any, hidden]`, if the operation has experts: the rows of this rank's.
    pub expert_rows: fc_tensor,
    /// `[tokens, top_k]` of `FC_TYPE_I32`, if the operation has experts: the row of each, or less than 0 for an expert on
    /// another rank. On GPUs nothing checks that there is such a row.
    pub expert_index: fc_tensor,
    /// `[tokens, top_k]`, if the operation has experts: the scale of each.
    pub expert_scales: fc_tensor,
}

/// The plan of an operation on one rank.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fc_plan {
    /// `sizeof(fc_plan)`, set by the caller.
    pub size: u64,
    /// Rows of the residual and of `residual_out` on this rank.
    pub residual_rows: u64,
    /// Bytes of `quant_out`.
    pub quant_bytes: u64,
    /// Bytes of `scale_out`.
    pub scale_bytes: u64,
    /// Launches that the operation takes.
    pub rounds: u64,
    /// An `fc_algorithm`.
    pub algorithm: u32,
    /// 1 if `norm_out` is written.
    pub writes_norm: u32,
}

/// Operations that were captured into a CUDA graph.
#[derive(Debug)]
pub struct fc_capture(pub(crate) fused_collective::raw::Captured);
