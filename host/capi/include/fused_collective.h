/* fused-collective: fused all-reduce + residual + RMSNorm + quantization for the ranks of one host.
 * Made from host/capi/src by its tests: do not edit.
 */

#ifndef FUSED_COLLECTIVE_H
#define FUSED_COLLECTIVE_H

#include <stdint.h>

/**
 * The device of rank `r`: GPU `r` modulo the number of GPUs that the process sees.
 */
#define FC_DEVICE_BY_RANK -1

/**
 * The outcome of a call. Of one that failed, `fc_error_text`, `fc_error_rank` and `fc_error_peer` say more.
 */
enum fc_status
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * Success.
   */
  FC_STATUS_OK = 0,
  /**
   * An argument, an operation, a tensor or an option is invalid. Nothing was sent.
   */
  FC_STATUS_INVALID = 1,
  /**
   * The backend cannot do it. Nothing was sent.
   */
  FC_STATUS_UNSUPPORTED = 2,
  /**
   * Driver, device or kernels are missing or unusable.
   */
  FC_STATUS_UNAVAILABLE = 3,
  /**
   * Memory has no room.
   */
  FC_STATUS_OUT_OF_MEMORY = 4,
  /**
   * The ranks could not form a group.
   */
  FC_STATUS_BOOTSTRAP = 5,
  /**
   * The operating system or the driver refused something.
   */
  FC_STATUS_SYSTEM = 6,
  /**
   * A rank did not come within the deadline.
   */
  FC_STATUS_TIMED_OUT = 7,
  /**
   * A rank was lost, or gave up.
   */
  FC_STATUS_LOST = 8,
  /**
   * The group was aborted.
   */
  FC_STATUS_ABORTED = 9,
  /**
   * Ranks made different calls.
   */
  FC_STATUS_MISMATCH = 10,
  /**
   * The library has a bug: it panicked.
   */
  FC_STATUS_PANIC = 11,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum fc_status fc_status;
#else
typedef uint32_t fc_status;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * The processors that a group computes with.
 */
enum fc_backend
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * CPUs of one host, over shared memory. An operation runs inside of the call that enqueues it.
   */
  FC_BACKEND_CPU = 1,
  /**
   * NVIDIA GPUs of one host.
   */
  FC_BACKEND_CUDA = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum fc_backend fc_backend;
#else
typedef uint32_t fc_backend;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * The type of a tensor's elements.
 */
enum fc_type
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * There is no such tensor.
   */
  FC_TYPE_NONE = 0,
  /**
   * IEEE binary32.
   */
  FC_TYPE_F32 = 1,
  /**
   * IEEE binary16.
   */
  FC_TYPE_F16 = 2,
  /**
   * bfloat16.
   */
  FC_TYPE_BF16 = 3,
  /**
   * Bytes: codes of a quantization, or its scales. Scales of 4 bytes are bytes as well.
   */
  FC_TYPE_BYTES = 4,
  /**
   * `int32_t`: indices of rows.
   */
  FC_TYPE_I32 = 5,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum fc_type fc_type;
#else
typedef uint32_t fc_type;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * Presence and distribution of the residual.
 */
enum fc_residual
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * No residual is added.
   */
  FC_RESIDUAL_NONE = 0,
  /**
   * Every rank holds the same whole residual.
   */
  FC_RESIDUAL_REPLICATED = 1,
  /**
   * Token `t` is row `t / world_size` of rank `t % world_size`, and no other rank has it.
   */
  FC_RESIDUAL_SHARDED = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum fc_residual fc_residual;
#else
typedef uint32_t fc_residual;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * The norm of the sum.
 */
enum fc_norm
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * None: an all-reduce, and the residual add.
   */
  FC_NORM_NONE = 0,
  /**
   * RMSNorm: `x * rsqrt(mean(x^2) + epsilon) * (weight_bias + gamma)`.
   */
  FC_NORM_RMS = 1,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum fc_norm fc_norm;
#else
typedef uint32_t fc_norm;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * The quantization of the norm, of `T` tokens and hidden size `H`.
 */
enum fc_quantization
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * None.
   */
  FC_QUANTIZATION_NONE = 0,
  /**
   * `[T, H]` E4M3, with one scale of the caller's for the whole tensor.
   */
  FC_QUANTIZATION_FP8_STATIC = 1,
  /**
   * `[T, H]` E4M3, `[T]` scales in `float`.
   */
  FC_QUANTIZATION_FP8_PER_TOKEN = 2,
  /**
   * `[T, H]` E4M3, `[T, H / group]` scales of type `group_scale`.
   */
  FC_QUANTIZATION_FP8_PER_GROUP = 3,
  /**
   * NVFP4: `[T, H / 2]` pairs of E2M1, `[T, H / 16]` UE4M3 scales, one global scale of the caller's.
   */
  FC_QUANTIZATION_NVFP4 = 4,
  /**
   * OCP MXFP8: `[T, H]` E4M3, `[T, H / 32]` UE8M0 scales.
   */
  FC_QUANTIZATION_MXFP8 = 5,
  /**
   * OCP MXFP4: `[T, H / 2]` pairs of E2M1, `[T, H / 32]` UE8M0 scales.
   */
  FC_QUANTIZATION_MXFP4 = 6,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum fc_quantization fc_quantization;
#else
typedef uint32_t fc_quantization;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * The layout of the scales of blocks.
 */
enum fc_scale_layout
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * Row-major, without padding.
   */
  FC_SCALE_LAYOUT_LINEAR = 0,
  /**
   * Column-major, without padding.
   */
  FC_SCALE_LAYOUT_COLUMN_MAJOR = 1,
  /**
   * Column-major words of 4 bytes, columns at multiples of 16 bytes, as DeepGEMM reads them.
   */
  FC_SCALE_LAYOUT_DEEP_GEMM = 2,
  /**
   * Tiles of 128 rows by 4 columns, as cuBLAS reads them.
   */
  FC_SCALE_LAYOUT_SWIZZLED128X4 = 3,
  /**
   * Tiles of 8 rows by 4 columns.
   */
  FC_SCALE_LAYOUT_SWIZZLED8X4 = 4,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum fc_scale_layout fc_scale_layout;
#else
typedef uint32_t fc_scale_layout;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * The type of the scales of `FC_QUANTIZATION_FP8_PER_GROUP`.
 */
enum fc_group_scale
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * Powers of two in a byte.
   */
  FC_GROUP_SCALE_UE8M0 = 0,
  /**
   * `float`.
   */
  FC_GROUP_SCALE_F32 = 1,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum fc_group_scale fc_group_scale;
#else
typedef uint32_t fc_group_scale;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * Roundings of the sum to the element type.
 */
enum fc_rounding
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * Once, after the residual was added.
   */
  FC_ROUNDING_ONCE = 0,
  /**
   * Twice, as separate operations do: after the all-reduce, and after the residual was added.
   */
  FC_ROUNDING_AFTER_ALL_REDUCE = 1,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum fc_rounding fc_rounding;
#else
typedef uint32_t fc_rounding;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * The format in which rows cross the links between ranks.
 */
enum fc_wire
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * The element type: nothing is lost.
   */
  FC_WIRE_EXACT = 0,
  /**
   * 8.5 bits an element; the sum of normal rows misses by 0.55% in one-shot.
   */
  FC_WIRE_INT8 = 1,
  /**
   * 4.5 bits an element; the sum of normal rows misses by 8.6% in one-shot.
   */
  FC_WIRE_INT4 = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum fc_wire fc_wire;
#else
typedef uint32_t fc_wire;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * The type in which the sum of a host's ranks crosses to other hosts.
 */
enum fc_partial_sums
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * `float`, for every element type.
   */
  FC_PARTIAL_SUMS_F32 = 0,
  /**
   * The element type, rounded once.
   */
  FC_PARTIAL_SUMS_ELEMENT = 1,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum fc_partial_sums fc_partial_sums;
#else
typedef uint32_t fc_partial_sums;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * The collective.
 */
enum fc_mode
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * The faster one, as the library expects.
   */
  FC_MODE_AUTO = 0,
  /**
   * One hop: every rank sends to every other.
   */
  FC_MODE_ONE_SHOT = 1,
  /**
   * Two hops: every token has an owner.
   */
  FC_MODE_TWO_SHOT = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum fc_mode fc_mode;
#else
typedef uint32_t fc_mode;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * The collective of a plan.
 */
enum fc_algorithm
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * One hop.
   */
  FC_ALGORITHM_ONE_SHOT = 1,
  /**
   * Two hops.
   */
  FC_ALGORITHM_TWO_SHOT = 2,
  /**
   * Two hops, the second with the norm or its codes.
   */
  FC_ALGORITHM_SHARDED_TWO_SHOT = 3,
  /**
   * Two hops within each host, with an exchange of partial sums between hosts.
   */
  FC_ALGORITHM_HIERARCHICAL = 4,
  /**
   * The same, the second hop with the norm or its codes.
   */
  FC_ALGORITHM_SHARDED_HIERARCHICAL = 5,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum fc_algorithm fc_algorithm;
#else
typedef uint32_t fc_algorithm;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * Operations that were captured into a CUDA graph.
 */
typedef struct fc_capture fc_capture;

/**
 * One rank's end of a group. Threads may share it: its calls come one after the other, but for `fc_abort`.
 */
typedef struct fc_communicator fc_communicator;

/**
 * A group's settings. All ranks give the same, but for `device` and `kernels`.
 */
typedef struct fc_options {
  /**
   * `sizeof(fc_options)`.
   */
  uint64_t size;
  /**
   * An `fc_backend`.
   */
  uint32_t backend;
  /**
   * Of GPUs, the ordinal among those that the process sees, or `FC_DEVICE_BY_RANK`.
   */
  int32_t device;
  /**
   * Bytes of the longest row of any operation: hidden size times bytes of an element.
   */
  uint64_t max_row_bytes;
  /**
   * Tokens that an operation on GPUs may have to run in one round; a larger one takes several.
   */
  uint64_t max_tokens;
  /**
   * Milliseconds, at least 1, that a wait for another rank may take.
   */
  uint64_t deadline_ms;
  /**
   * 1 lets ranks share a GPU, on which they take turns: operations are right, and take milliseconds.
   */
  uint32_t oversubscribe;
  /**
   * 1 reads each scale from the GPU before its operation, and refuses an invalid one: for debugging.
   */
  uint32_t check_scales;
  /**
   * A folder of kernels in place of those in the library, or null.
   */
  const char *kernels;
} fc_options;

/**
 * A process's place in its group, of processes of one host.
 */
typedef struct fc_membership {
  /**
   * `sizeof(fc_membership)`.
   */
  uint64_t size;
  /**
   * The rank, from 0.
   */
  uint32_t rank;
  /**
   * Ranks in the group, at least 2.
   */
  uint32_t world_size;
  /**
   * UTF-8 that the ranks of this group have in common, and no other group's.
   */
  const char *key;
} fc_membership;

/**
 * The caller's own means of exchanging small messages while a group is made and left: those of MPI, for instance. The
 * functions return 0, or another number if they fail, and throw no exception. They are called by the thread that calls
 * `fc_join_over` or `fc_leave`, and `context` is theirs.
 */
typedef struct fc_bootstrap {
  /**
   * `sizeof(fc_bootstrap)`.
   */
  uint64_t size;
  /**
   * The rank, from 0.
   */
  uint32_t rank;
  /**
   * Ranks in the group, at least 2.
   */
  uint32_t world_size;
  /**
   * Passed to the functions as it is.
   */
  void *context;
  /**
   * Writes the `length` bytes of every rank to `gathered`, by rank. All ranks give the same `length`.
   */
  int (*all_gather)(void *context, const void *bytes, uint64_t length, void *gathered);
  /**
   * Returns when every rank has called it. Null: an all-gather does.
   */
  int (*barrier)(void *context);
} fc_bootstrap;

/**
 * One fused operation, the same on every rank. Fields of 0 leave out what they name.
 */
typedef struct fc_operation {
  /**
   * `sizeof(fc_operation)`.
   */
  uint64_t size;
  /**
   * Rows.
   */
  uint64_t tokens;
  /**
   * Elements of a row.
   */
  uint64_t hidden;
  /**
   * An `fc_type`: that of all activations, `FC_TYPE_F32`, `FC_TYPE_F16` or `FC_TYPE_BF16`.
   */
  uint32_t dtype;
  /**
   * An `fc_residual`.
   */
  uint32_t residual;
  /**
   * An `fc_norm`.
   */
  uint32_t norm;
  /**
   * An `fc_type`, that of gamma: 0 for that of the activations, or `FC_TYPE_F32`.
   */
  uint32_t gamma;
  /**
   * Addend of the mean square.
   */
  float epsilon;
  /**
   * Addend of gamma: 0, or 1 in Gemma's norm.
   */
  float weight_bias;
  /**
   * An `fc_quantization`.
   */
  uint32_t quantization;
  /**
   * An `fc_scale_layout`, if the quantization has blocks.
   */
  uint32_t scale_layout;
  /**
   * Elements of a group, if the quantization is per group: 32, 64 or 128.
   */
  uint32_t group;
  /**
   * An `fc_group_scale`, if the quantization is per group.
   */
  uint32_t group_scale;
  /**
   * 1 writes the norm beside its quantization.
   */
  uint32_t keep_norm;
  /**
   * An `fc_rounding`.
   */
  uint32_t rounding;
  /**
   * An `fc_mode`.
   */
  uint32_t mode;
  /**
   * 1 adds a bias to the sum of all ranks, before it is rounded and the residual is added.
   */
  uint32_t bias;
  /**
   * An `fc_norm`: that of the sum of all ranks, before the residual is added. It needs `norm`.
   */
  uint32_t post_norm;
  /**
   * An `fc_type`, that of `post_gamma`: as `gamma`.
   */
  uint32_t post_gamma;
  /**
   * Addend of the mean square of the sum.
   */
  float post_epsilon;
  /**
   * Addend of `post_gamma`.
   */
  float post_weight_bias;
  /**
   * Experts of a token, at most 64: this rank's addend is made of rows of its experts. 0: it is the input.
   */
  uint32_t top_k;
  /**
   * An `fc_type`, that of `expert_scales`: as `gamma`.
   */
  uint32_t expert_scales;
  /**
   * 1 adds the input, the rows of a shared expert, to those of experts.
   */
  uint32_t shared_expert;
  /**
   * An `fc_wire`. Rows in a format of fewer bits do not cross hosts.
   */
  uint32_t wire;
  /**
   * An `fc_partial_sums`. Nothing reads it in a group of one host.
   */
  uint32_t partial_sums;
  /**
   * 0.
   */
  uint32_t reserved;
} fc_operation;

/**
 * The plan of an operation on one rank.
 */
typedef struct fc_plan {
  /**
   * `sizeof(fc_plan)`, set by the caller.
   */
  uint64_t size;
  /**
   * Rows of the residual and of `residual_out` on this rank.
   */
  uint64_t residual_rows;
  /**
   * Bytes of `quant_out`.
   */
  uint64_t quant_bytes;
  /**
   * Bytes of `scale_out`.
   */
  uint64_t scale_bytes;
  /**
   * Launches that the operation takes.
   */
  uint64_t rounds;
  /**
   * An `fc_algorithm`.
   */
  uint32_t algorithm;
  /**
   * 1 if `norm_out` is written.
   */
  uint32_t writes_norm;
} fc_plan;

/**
 * A contiguous tensor: on GPUs at a multiple of 16 bytes, on CPUs at a multiple of its elements' size. `expert_index` and
 * `expert_scales` are at a multiple of their elements' size everywhere.
 */
typedef struct fc_tensor {
  /**
   * Its address, in the memory of the group's backend.
   */
  void *data;
  /**
   * Its elements; of codes and scales, its bytes.
   */
  uint64_t length;
  /**
   * An `fc_type`; 0 if the operation has no such tensor.
   */
  uint32_t type;
  /**
   * 0.
   */
  uint32_t reserved;
} fc_tensor;

/**
 * The tensors of an operation on one rank. `norm_out` may be `input`'s memory, and `residual_out` `residual`'s, address for
 * address; no other tensors overlap. `rows` is `tokens`, or with a sharded residual what `fc_plan` says.
 */
typedef struct fc_tensors {
  /**
   * `sizeof(fc_tensors)`.
   */
  uint64_t size;
  /**
   * `[tokens, hidden]`: this rank's addend; with experts the rows of the shared one, if there is one.
   */
  struct fc_tensor input;
  /**
   * `[rows, hidden]`, if the operation has a residual.
   */
  struct fc_tensor residual;
  /**
   * `[hidden]`, if the operation has a bias.
   */
  struct fc_tensor bias;
  /**
   * `[hidden]`, if the operation has a norm. On GPUs it is read before the kernel ahead on the stream has ended, which must
   * not write it.
   */
  struct fc_tensor gamma;
  /**
   * One `float`, at a multiple of 4 bytes: the scale of static FP8, or the global scale of NVFP4. Read as early as `gamma`.
   */
  struct fc_tensor scale;
  /**
   * `[rows, hidden]`: the sum, plus the residual.
   */
  struct fc_tensor residual_out;
  /**
   * `[tokens, hidden]`: the norm, if it is written.
   */
  struct fc_tensor norm_out;
  /**
   * `quant_bytes` of `fc_plan`: the codes, if there is a quantization.
   */
  struct fc_tensor quant_out;
  /**
   * `scale_bytes` of `fc_plan`: their scales, if the quantization writes any.
   */
  struct fc_tensor scale_out;
  /**
   * `[hidden]`, if the operation has a norm of the sum of all ranks.
   */
  struct fc_tensor post_gamma;
  /**
   * `[any, hidden]`, if the operation has experts: the rows of this rank's.
   */
  struct fc_tensor expert_rows;
  /**
   * `[tokens, top_k]` of `FC_TYPE_I32`, if the operation has experts: the row of each, or less than 0 for an expert on
   * another rank. On GPUs nothing checks that there is such a row.
   */
  struct fc_tensor expert_index;
  /**
   * `[tokens, top_k]`, if the operation has experts: the scale of each.
   */
  struct fc_tensor expert_scales;
} fc_tensors;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * Returns the text of the last call of this thread that failed, in UTF-8; it is empty if none did. It is valid until the next
 * call of this thread that fails.
 */
const char *fc_error_text(void);

/**
 * Returns the rank that reported the error of `fc_error_text`, or -1 where none is known.
 */
int64_t fc_error_rank(void);

/**
 * Returns the rank that the error of `fc_error_text` is about (awaited, lost, or out of step), or -1 where none is known.
 */
int64_t fc_error_peer(void);

/**
 * Returns the version of the library, as `0.2.0`.
 */
const char *fc_version(void);

/**
 * Joins a group of processes of one host, and returns this rank's end in `communicator`, to be freed by `fc_free`. Waits for
 * all ranks, at most `deadline_ms`. A null `membership` stands for the variables of `torchrun`, `mpirun` or `srun`.
 *
 * # Safety
 * The pointers are null, or point to structs of the size that these state, and to room for a pointer.
 */
fc_status fc_join(const struct fc_options *options,
                  const struct fc_membership *membership,
                  struct fc_communicator **communicator);

/**
 * Joins a group over the caller's own functions, and returns this rank's end in `communicator`, to be freed by `fc_free`.
 * `fc_leave` calls them again. A rank that is lost later is noticed at the deadline only.
 *
 * # Safety
 * As `fc_join`; the functions do as `fc_bootstrap` says, with its `context`, until `fc_leave` or `fc_free` has returned.
 */
fc_status fc_join_over(const struct fc_options *options,
                       const struct fc_bootstrap *bootstrap,
                       struct fc_communicator **communicator);

/**
 * Returns in `bytes` the memory that a group of `world_size` ranks with these options shares: on CPUs all ranks together, on
 * GPUs each on its own GPU.
 *
 * # Safety
 * As `fc_join`.
 */
fc_status fc_workspace_bytes(const struct fc_options *options,
                             uint32_t world_size,
                             uint64_t *bytes);

/**
 * Plans `operation` without running it: `FC_STATUS_OK` if the group can run it, and in `plan`, whose size the caller has set,
 * the sizes of its outputs. On GPUs it loads the kernels, so that the first call need not.
 *
 * # Safety
 * As `fc_join`; `communicator` is null, or was returned by `fc_join` or `fc_join_over` and not freed.
 */
fc_status fc_query(const struct fc_communicator *communicator,
                   const struct fc_operation *operation,
                   struct fc_plan *plan);

/**
 * Enqueues `operation` on `stream`, a `CUstream` or `cudaStream_t` of the rank's device, which may be capturing a graph. On
 * CPUs `stream` is null, and the call returns when this rank's outputs are complete. All ranks make the same calls in the same
 * order.
 *
 * # Safety
 * As `fc_query`; the tensors are where and what they are said to be until the operation has ended, nobody else uses what it
 * writes, and `stream` is a stream of the device's primary context.
 */
fc_status fc_enqueue(const struct fc_communicator *communicator,
                     const struct fc_operation *operation,
                     const struct fc_tensors *tensors,
                     void *stream);

/**
 * Waits until everything on `stream` has ended, and checks it as `fc_check` does. The wait ends when a rank is lost.
 *
 * # Safety
 * As `fc_query`; `stream` as for `fc_enqueue`.
 */
fc_status fc_synchronize(const struct fc_communicator *communicator,
                         void *stream);

/**
 * Checks, without a wait, that all operations that have ended did so well and were the same on every rank. Call it when the
 * stream was synchronized, before results are used. After a failure every later call fails: make a new communicator.
 *
 * # Safety
 * As `fc_query`.
 */
fc_status fc_check(const struct fc_communicator *communicator);

/**
 * Returns in `capture` the operations that were captured since this was last called, to be freed by `fc_capture_free`. Call it
 * when a capture has ended.
 *
 * # Safety
 * As `fc_query`, and for room for a pointer as `fc_join`.
 */
fc_status fc_captured(const struct fc_communicator *communicator,
                      struct fc_capture **capture);

/**
 * Says that a graph with the operations of `capture` is about to be launched, so that the ranks' calls can be compared. Where no
 * rank ever says so, graphs are not compared. If the launch then fails, call `fc_abort`: the other ranks wait for it.
 *
 * # Safety
 * As `fc_query`; `capture` is null, or was returned by `fc_captured` and not freed.
 */
fc_status fc_replay(const struct fc_communicator *communicator,
                    const struct fc_capture *capture);

/**
 * Frees a capture. A null is none.
 *
 * # Safety
 * `capture` is null, or was returned by `fc_captured`, and is not used again.
 */
fc_status fc_capture_free(struct fc_capture *capture);

/**
 * Ends the group's operations, on all ranks. Any thread may call it, also while another is in a call of this communicator.
 *
 * # Safety
 * As `fc_query`.
 */
fc_status fc_abort(const struct fc_communicator *communicator);

/**
 * Leaves the group together with all others, when their operations have ended, after which nobody's end is a loss. Every later
 * call but `fc_free` fails. In a group of several hosts the graphs that operations were captured in are destroyed before.
 *
 * # Safety
 * As `fc_query`.
 */
fc_status fc_leave(const struct fc_communicator *communicator);

/**
 * Frees a communicator. A null is none. Without `fc_leave` before it, this rank is lost to the others.
 *
 * # Safety
 * As `fc_query`, and the communicator is not used again, by any thread. No operation of any rank is under way.
 */
fc_status fc_free(struct fc_communicator *communicator);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* FUSED_COLLECTIVE_H */
