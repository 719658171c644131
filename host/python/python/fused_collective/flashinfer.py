"""FlashInfer's fused all-reduce (0.7.4), by its names: an engine switches by one import.

::

    from fused_collective.flashinfer import (
        AllReduceFusionPattern, QuantizationSFLayout, allreduce_fusion, create_allreduce_fusion_workspace
    )

Arguments have FlashInfer's meanings. These differ:

- results are the bits of this library: sums are taken in float32 and in rank order, so ``fp32_acc`` changes nothing; and they are
  rounded once, with the residual added, unless ``rounding`` says otherwise;
- ``launch_with_pdl`` and ``trigger_completion_at_end`` change nothing: kernels overlap where that is safe;
- an operation larger than the workspace runs in several rounds;
- ``use_oneshot=False`` is ``None`` between two ranks, where one-shot sends as much and is faster. The bits are the same;
- scales of FP8 and NVFP4 are needed where FlashInfer reads them;
- ``residual_in`` is the same on all ranks, as a tensor-parallel layer's is: two-shot adds a token's residual on one rank;
- packed scales of groups get their padding zeroed. If the memory of ``scale_out`` ends before the last column's padding, as it
  does where ``torch.empty_strided`` made it and ``token_num`` is no multiple of four, they are copied there by a kernel of PyTorch;
- the reduction of experts (pattern 6) raises :class:`fused_collective.UnsupportedError`, with the reason. Of the patterns that
  finalize a mixture of experts, each product and its addition are rounded once, and the addend of each rank once more.
"""

from __future__ import annotations

import secrets
import socket
import warnings
from typing import Any, Literal, NamedTuple

import torch

from ._communicator import DEADLINE, Communicator, Experts
from ._errors import Error, InvalidError, UnsupportedError
from .torch import enqueue

__all__ = [
    "AllReduceFusionPattern",
    "AllReduceFusionWorkspace",
    "QuantizationSFLayout",
    "allreduce_fusion",
    "create_allreduce_fusion_workspace",
]


class AllReduceFusionPattern:
    """The steps of an operation."""

    kAllReduce = 0
    kARResidualRMSNorm = 1
    kARResidualRMSNormFP8Quant = 2
    kARResidualRMSNormFP4Quant = 3
    kARResidualRMSNormOutFP8Quant = 4
    kARResidualRMSNormOutFP4Quant = 5
    kMoEReductionARResidualRMSNorm = 6
    kMoEFinalizeARResidualRMSNorm = 7
    kARResidualRMSNormPerTokenGroupFP8PackedQuant = 8
    kARResidualRMSNormOutPerTokenGroupFP8PackedQuant = 9
    kARResidualRMSNormDynamicFP8Quant = 10
    kARResidualRMSNormOutDynamicFP8Quant = 11
    kMoEFinalizeARResidualRMSNormFP8Quant = 12
    kARResidualRMSNormMXFP8Quant = 13
    kARResidualRMSNormOutMXFP8Quant = 14


class QuantizationSFLayout:
    """The layout of the scales of blocks."""

    SWIZZLED_128x4 = 0
    SWIZZLED_8x4 = 1
    LINEAR = 2


class _Steps(NamedTuple):
    """What a pattern does after the all-reduce."""

    norm: bool
    quant: str = "none"
    norm_out: bool = False
    experts: bool = False


_P = AllReduceFusionPattern
_STEPS = {
    _P.kAllReduce: _Steps(False),
    _P.kARResidualRMSNorm: _Steps(True, norm_out=True),
    _P.kARResidualRMSNormFP8Quant: _Steps(True, "fp8"),
    _P.kARResidualRMSNormFP4Quant: _Steps(True, "nvfp4"),
    _P.kARResidualRMSNormOutFP8Quant: _Steps(True, "fp8", True),
    _P.kARResidualRMSNormOutFP4Quant: _Steps(True, "nvfp4", True),
    _P.kMoEFinalizeARResidualRMSNorm: _Steps(True, norm_out=True, experts=True),
    _P.kMoEFinalizeARResidualRMSNormFP8Quant: _Steps(True, "fp8", experts=True),
    _P.kARResidualRMSNormPerTokenGroupFP8PackedQuant: _Steps(True, "fp8_per_group"),
    _P.kARResidualRMSNormOutPerTokenGroupFP8PackedQuant: _Steps(True, "fp8_per_group", True),
    _P.kARResidualRMSNormDynamicFP8Quant: _Steps(True, "fp8_per_token"),
    _P.kARResidualRMSNormOutDynamicFP8Quant: _Steps(True, "fp8_per_token", True),
    _P.kARResidualRMSNormMXFP8Quant: _Steps(True, "mxfp8"),
    _P.kARResidualRMSNormOutMXFP8Quant: _Steps(True, "mxfp8", True),
}
_MISSING = {
    _P.kMoEReductionARResidualRMSNorm: "the weighted sum of experts",
}
_LAYOUTS = {
    QuantizationSFLayout.SWIZZLED_128x4: "swizzled_128x4",
    QuantizationSFLayout.SWIZZLED_8x4: "swizzled_8x4",
    QuantizationSFLayout.LINEAR: "linear",
}


class AllReduceFusionWorkspace:
    """The memory and the group of an operation's ranks."""

    def __init__(self, communicator: Communicator, max_token_num: int, row_bytes: int) -> None:
        self.world_size, self.rank = communicator.world_size, communicator.rank
        self.communicator: Communicator | None = communicator
        self._max_token_num, self._row_bytes = max_token_num, row_bytes

    @property
    def backend(self) -> str:
        """The implementation: none of FlashInfer's."""
        return "fused_collective"

    def is_buffer_size_sufficient(
        self, tp_size: int, num_tokens: int, hidden_dim: int, dtype: torch.dtype, use_oneshot: bool | None = None
    ) -> bool:
        """Tells whether an operation runs in one round. A larger one of no longer rows runs in several."""
        row_bytes = hidden_dim * dtype.itemsize
        fits = row_bytes <= self._row_bytes and num_tokens * row_bytes <= self._max_token_num * self._row_bytes
        return self.communicator is not None and tp_size == self.world_size and fits

    def destroy(self) -> None:
        """Leaves the group together with all others, and frees the workspace. A second call does nothing."""
        communicator, self.communicator = self.communicator, None
        if communicator is not None:
            try:
                communicator.leave()
            except Error as error:
                warnings.warn(f"the group ended otherwise: {error}", ResourceWarning, stacklevel=2)

    def __del__(self) -> None:
        if getattr(self, "communicator", None) is not None:
            warnings.warn(f"{self!r} was not destroyed: call destroy() on all ranks", ResourceWarning, stacklevel=2)


def create_allreduce_fusion_workspace(
    backend: Literal["trtllm", "mnnvl", "auto"] = "auto",
    world_size: int | None = None,
    rank: int | None = None,
    max_token_num: int | None = None,
    hidden_dim: int | None = None,
    dtype: torch.dtype | None = None,
    gpus_per_node: int | None = None,
    comm_backend: Any = None,
    force_oneshot_support: bool = False,
    group: Any = None,
    *,
    device: Any = None,
    deadline: float = DEADLINE,
    oversubscribe: bool = False,
) -> AllReduceFusionWorkspace:
    """Makes the workspace of a group. All ranks call it.

    Ranks meet over ``comm_backend``, an object with FlashInfer's ``allgather``, or over ``group`` of ``torch.distributed``, the
    default one if it is None. ``backend`` names FlashInfer's own implementations, and all of them are this library here.
    ``gpus_per_node`` and ``force_oneshot_support`` change nothing. The last arguments are this library's:
    see :meth:`fused_collective.Communicator.local`.
    """
    if backend not in ("auto", "trtllm", "mnnvl"):
        raise RuntimeError(f"Unknown backend: {backend}")
    if max_token_num is None or hidden_dim is None:
        raise InvalidError("max_token_num and hidden_dim are needed")
    dtype = torch.float16 if dtype is None else dtype
    options: dict[str, Any] = dict(
        max_hidden=hidden_dim,
        max_tokens=max_token_num,
        dtype=str(dtype),
        deadline=deadline,
        oversubscribe=oversubscribe,
    )
    if device is None:
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    if comm_backend is not None:
        own, size = comm_backend.Get_rank(), comm_backend.Get_size()
        told = list(comm_backend.allgather((socket.gethostname(), secrets.token_hex(16))))
        if len({host for host, _ in told}) > 1:
            raise UnsupportedError("the ranks are on several hosts, and this library takes those of one")
        communicator = Communicator.local(device=device, rank=own, world_size=size, key=told[0][1], **options)
    else:
        communicator = Communicator.from_torch(group, device=device, **options)
    for name, given, found in (("world_size", world_size, communicator.world_size), ("rank", rank, communicator.rank)):
        if given is not None and given != found:
            communicator.abort()
            raise InvalidError(f"{name} is {given}, and the group's is {found}")
    return AllReduceFusionWorkspace(communicator, max_token_num, hidden_dim * dtype.itemsize)


def _need(pattern: int, **arguments: Any) -> None:
    for name, value in arguments.items():
        if value is None:
            raise InvalidError(f"{name} is needed for pattern {pattern}")


def allreduce_fusion(
    input: torch.Tensor,
    workspace: AllReduceFusionWorkspace,
    pattern: int,
    launch_with_pdl: bool = False,
    trigger_completion_at_end: bool = True,
    output: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
    norm_out: torch.Tensor | None = None,
    quant_out: torch.Tensor | None = None,
    scale_out: torch.Tensor | None = None,
    residual_in: torch.Tensor | None = None,
    rms_gamma: torch.Tensor | None = None,
    rms_eps: float = 1e-6,
    scale_factor: torch.Tensor | float | None = None,
    layout_code: int | None = None,
    use_oneshot: bool | None = None,
    fp32_acc: bool = False,
    moe_reduction_device_num_experts: int | None = None,
    moe_reduction_scale_input: torch.Tensor | None = None,
    moe_reduction_active_experts_token_input: torch.Tensor | None = None,
    moe_reduction_token_input: torch.Tensor | None = None,
    expanded_idx_to_permuted_idx: torch.Tensor | None = None,
    expert_scale_factor: torch.Tensor | None = None,
    shared_expert_output: torch.Tensor | None = None,
    block_quant_group_size: int | None = None,
    weight_bias: float = 0.0,
    *,
    moe_finalize_backend: Literal["trtllm", "cake"] = "trtllm",
    rounding: Literal["once", "after_all_reduce"] = "once",
) -> torch.Tensor:
    """Adds up ``input``, ``[token_num, hidden_dim]``, of all ranks, and does what ``pattern`` says.

    Where that finalizes a mixture of experts, ``input`` has the rows of this rank's experts, any number of them.

    Outputs that are not given are made, but for the scales of groups, whose strides say the layout. Returns ``output``,
    ``norm_out`` if the pattern writes it, or else ``quant_out``. ``rounding`` is this library's: ``after_all_reduce`` rounds the sum
    before the residual is added, too, as FlashInfer does; it takes a little longer.
    """
    communicator = workspace.communicator
    if communicator is None:
        raise InvalidError("the workspace was destroyed")
    if pattern in _MISSING:
        raise UnsupportedError(f"pattern {pattern} is not supported: this library has no kernel with {_MISSING[pattern]}")
    steps = _STEPS.get(pattern)
    if steps is None:
        raise InvalidError(f"pattern {pattern} is not valid: use a constant of AllReduceFusionPattern")
    if input.dim() != 2:
        raise InvalidError(f"input has {input.dim()} dimensions: use [token_num, hidden_dim]")
    mode = {None: "auto", True: "one_shot", False: "auto" if communicator.world_size == 2 else "two_shot"}[use_oneshot]
    tokens, hidden = input.shape
    addend, experts = input, None
    if steps.experts:
        _need(
            pattern,
            expanded_idx_to_permuted_idx=expanded_idx_to_permuted_idx,
            expert_scale_factor=expert_scale_factor,
            residual_in=residual_in,
        )
        assert residual_in is not None
        experts = Experts(input, expanded_idx_to_permuted_idx, expert_scale_factor)
        addend, input = shared_expert_output, residual_in
        tokens = residual_in.shape[0]
    if not steps.norm:
        output = torch.empty_like(input) if output is None else output
        alone = (output, None, None, None)
        enqueue(
            communicator, input, None, None, None, None, alone, 0.0, 0.0, "none", "linear", 128, "ue8m0", False, False, "once", mode
        )
        return output
    _need(pattern, residual_in=residual_in, rms_gamma=rms_gamma)
    assert residual_in is not None
    quant = steps.quant
    scale = None
    if quant in ("fp8", "nvfp4"):
        _need(pattern, scale_factor=scale_factor)
        assert scale_factor is not None
        scale = scale_factor if isinstance(scale_factor, torch.Tensor) else _constant(communicator, input, scale_factor)
    layout, block = _LAYOUTS.get(QuantizationSFLayout.SWIZZLED_128x4 if layout_code is None else layout_code), 128
    packed = None
    if layout is None:
        raise InvalidError(f"layout_code {layout_code} is not valid: use a constant of QuantizationSFLayout")
    if quant == "fp8_per_group":
        _need(pattern, block_quant_group_size=block_quant_group_size, scale_out=scale_out)
        assert block_quant_group_size is not None and scale_out is not None
        layout, block = "deep_gemm", block_quant_group_size
        memory = _packed(scale_out, tokens, hidden, block)
        if memory is not scale_out:
            packed, scale_out = scale_out, memory
    residual_out = torch.empty_like(residual_in) if residual_out is None else residual_out
    if steps.norm_out and norm_out is None:
        norm_out = torch.empty_like(input)
    if quant_out is None and quant != "none":
        fp4 = quant == "nvfp4"
        shape, dtype = ((tokens, hidden // 2), torch.uint8) if fp4 else (input.shape, torch.float8_e4m3fn)
        quant_out = torch.empty(shape, dtype=dtype, device=input.device)
    if scale_out is None and quant not in ("none", "fp8"):
        scale_out = _scales(input, quant, layout)
    outputs = (
        residual_out,
        norm_out if steps.norm_out else None,
        quant_out if quant != "none" else None,
        scale_out if quant not in ("none", "fp8") else None,
    )
    enqueue(
        communicator, addend, residual_in, None, rms_gamma, scale, outputs, rms_eps, weight_bias, quant, layout, block,
        "ue8m0", steps.norm_out and quant != "none", False, rounding, mode, roomy=True,
        experts=experts,
    )  # fmt: skip
    if packed is not None:
        assert scale_out is not None
        # To its last element.
        words = sum((size - 1) * stride for size, stride in zip(packed.shape, packed.stride())) + 1
        packed.as_strided((words,), (1,)).copy_(scale_out[:words])
    result = norm_out if steps.norm_out else quant_out
    assert result is not None
    return result


def _constant(communicator: Communicator, input: torch.Tensor, value: float) -> torch.Tensor:
    """A tensor of one float32, made once for each value."""
    key = (input.device, float(value))
    if key not in communicator._scales:
        if input.is_cuda and torch.cuda.is_current_stream_capturing():
            raise InvalidError("scale_factor is a number that no call before the capture had: use a tensor")
        communicator._scales[key] = torch.full((1,), float(value), dtype=torch.float32, device=input.device)
        if input.is_cuda:
            # Another stream may be the first that reads it.
            torch.cuda.current_stream(input.device).synchronize()
    return communicator._scales[key]


def _scales(input: torch.Tensor, quant: str, layout: str) -> torch.Tensor:
    from .torch import _scale_bytes

    tokens, hidden = input.shape
    if quant == "fp8_per_token":
        return torch.empty(tokens, 1, dtype=torch.float32, device=input.device)
    size = _scale_bytes(quant, layout, 0, "ue8m0", tokens, hidden)
    return torch.empty(size, dtype=torch.uint8, device=input.device)


def _packed(scale_out: torch.Tensor, tokens: int, hidden: int, block: int) -> torch.Tensor:
    """Memory for the scales of groups, four in an int32, in columns whose length is a multiple of four: that of ``scale_out``, unless
    it ends before the last column does."""
    column = (tokens + 3) // 4 * 4
    shape, stride = (tokens, (hidden // block + 3) // 4), (1, column)
    found = tuple(scale_out.shape), scale_out.stride(), scale_out.dtype
    strides = all(is_ == should or size == 1 for size, is_, should in zip(shape, found[1], stride))
    if found[0] != shape or not strides or found[2] != torch.int32:
        raise InvalidError(f"scale_out has shape, strides and type {found}: use {(shape, stride, torch.int32)}")
    words = column * shape[1]
    room = scale_out.untyped_storage().nbytes() // 4 - scale_out.storage_offset()
    return scale_out if room >= words else scale_out.new_empty(words)
