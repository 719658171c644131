"""PyTorch operators: for eager calls, ``torch.compile(fullgraph=True)`` and CUDA graphs.

::

    communicator = fused_collective.Communicator.from_torch(max_hidden=8192, dtype="bfloat16")
    group = fused_collective.torch.register(communicator)

    @torch.compile(fullgraph=True)
    def end_of_layer(x, residual, weight):
        out = fused_collective.torch.all_reduce(x, group=group, residual=residual, weight=weight)
        return out.norm_out, out.residual_out

Each function is an operator of ``torch.ops.fused_collective`` with a fake implementation, and declares what it writes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import library

from . import _native
from ._communicator import Communicator, Experts, Norm, Outputs
from ._errors import InvalidError
from ._tensors import NUMBERS

__all__ = ["all_reduce", "all_reduce_norm_", "all_reduce_out", "register", "unregister"]

_COMMUNICATORS: dict[int, Communicator] = {}
_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_NUMBERS = {dtype: NUMBERS[name] for dtype, name in (_DTYPES | {torch.int32: "int32"}).items()}
#: Elements of a block of scales, and bytes of a scale.
_BLOCKS = {"nvfp4": (16, 1), "mxfp8": (32, 1), "mxfp4": (32, 1)}


def register(communicator: Communicator) -> int:
    """Makes a number for a communicator, by which operators know it. The communicator lives until :func:`unregister`."""
    for number, known in _COMMUNICATORS.items():
        if known is communicator:
            return number
    number = max(_COMMUNICATORS, default=0) + 1
    _COMMUNICATORS[number] = communicator
    return number


def unregister(group: int) -> None:
    """Forgets a number, and with it the communicator. Graphs that were captured with it must not be launched again."""
    _COMMUNICATORS.pop(group, None)


def _communicator(group: int) -> Communicator:
    try:
        return _COMMUNICATORS[group]
    except KeyError:
        raise InvalidError(f"there is no group {group}: use a number that register returned") from None


@functools.lru_cache(maxsize=4096)
def _plan(
    dtype: str, tokens: int, hidden: int, residual: str, bias: bool, norm: bool, gamma: str | None, epsilon: float, weight_bias: float,
    quant: str, layout: str, block: int, block_scale: str, keep_norm: bool, rounding: str, mode: str, wire: str | None,
    partial_sums: str, post_gamma: str | None = None, post_epsilon: float = 0.0, post_weight_bias: float = 0.0,
    top_k: int = 0, expert_scales: str | None = None, shared_expert: bool = False,
) -> _native.Operation:
    return _native.Operation(
        dtype, tokens, hidden, residual=residual, bias=bias, norm=norm, gamma=gamma, epsilon=epsilon, weight_bias=weight_bias,
        quantization=quant, layout=layout, group=block, group_scale=block_scale, keep_norm=keep_norm,
        rounding=rounding, mode=mode, post_norm=post_gamma is not None, post_gamma=post_gamma, post_epsilon=post_epsilon,
        post_weight_bias=post_weight_bias, top_k=top_k, expert_scales=expert_scales, shared_expert=shared_expert,
        wire=wire, partial_sums=partial_sums,
    )


def _scale_bytes(quant: str, layout: str, block: int, block_scale: str, tokens: Any, hidden: Any) -> Any:
    """Bytes of the scales of blocks, padding included. ``tokens`` may be a symbol."""
    block, size = (block, 1 if block_scale == "ue8m0" else 4) if quant == "fp8_per_group" else _BLOCKS[quant]
    columns = hidden // block
    if layout == "deep_gemm":
        return 4 * ((tokens + 3) // 4 * 4) * ((columns * size + 3) // 4)
    if layout == "swizzled_128x4":
        return 512 * ((tokens + 127) // 128) * ((columns + 3) // 4)
    if layout == "swizzled_8x4":
        return 32 * ((tokens + 7) // 8) * ((columns + 3) // 4)
    return tokens * columns * size


def _outputs(
    x: torch.Tensor, group: int, norm: bool, quant: str, layout: str, block: int, block_scale: str, keep_norm: bool,
    sharded: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Makes the outputs of an operation; those that it does not write are empty."""
    hidden, leading = x.shape[-1], x.shape[:-1]
    tokens = x.numel() // hidden
    residual_out = torch.empty_like(x)
    if sharded:
        communicator = _communicator(group)
        rank, world_size = communicator.rank, communicator.world_size
        residual_out = x.new_empty((tokens + world_size - 1 - rank) // world_size, hidden)
    norm_out = torch.empty_like(x) if norm and (keep_norm or quant == "none") else x.new_empty(0)
    # An operator's outputs are tensors of their own, the empty ones too.
    quant_out, scale_out = x.new_empty(0), x.new_empty(0)
    if quant in ("nvfp4", "mxfp4"):
        quant_out = x.new_empty((*leading, hidden // 2), dtype=torch.uint8)
    elif quant != "none":
        quant_out = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    if quant == "fp8_per_token":
        scale_out = x.new_empty((*leading, 1), dtype=torch.float32)
    elif quant == "fp8_per_group" or quant in _BLOCKS:
        size = _scale_bytes(quant, layout, block, block_scale, tokens, hidden)
        if quant == "fp8_per_group" and block_scale == "float32":
            scale_out = x.new_empty(size // 4, dtype=torch.float32)
        else:
            scale_out = x.new_empty(size, dtype=torch.uint8)
    return residual_out, norm_out, quant_out, scale_out


_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def _stream(gpu: int) -> int:
    if gpu < 0:
        return 0
    if _raw_stream is not None:
        return _raw_stream(gpu)
    return torch.cuda.current_stream(gpu).cuda_stream


def _elements(tensor: torch.Tensor, role: str, gpu: int) -> tuple[int, int, int]:
    if not tensor.is_contiguous():
        raise InvalidError(f"{role} is not contiguous: use {role}.contiguous()")
    if tensor.get_device() != gpu:
        raise InvalidError(f"{role} is on {tensor.device}, and x is not")
    return tensor.data_ptr(), tensor.numel(), _NUMBERS.get(tensor.dtype, 0)


def _codes(tensor: torch.Tensor, gpu: int, needed: int | None = None) -> tuple[int, int, int]:
    if tensor.get_device() != gpu:
        raise InvalidError(f"an output is on {tensor.device}, and x is not")
    length = tensor.numel() * tensor.element_size()
    if needed is None:
        if not tensor.is_contiguous():
            raise InvalidError("quant_out and scale_out are contiguous: give others")
        return tensor.data_ptr(), length, 0
    # Room for more, or with gaps that the layout has.
    room = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()
    return tensor.data_ptr(), needed if room >= needed else length, 0


def enqueue(
    communicator: Communicator,
    x: torch.Tensor | None,
    residual: torch.Tensor | None,
    bias: torch.Tensor | None,
    weight: torch.Tensor | None,
    scale: torch.Tensor | None,
    outputs: tuple[torch.Tensor | None, ...],
    epsilon: float,
    weight_bias: float,
    quant: str,
    layout: str,
    block: int,
    block_scale: str,
    keep_norm: bool,
    sharded: bool,
    rounding: str,
    mode: str,
    roomy: bool = False,
    post_norm: Norm | None = None,
    experts: Experts | None = None,
    wire: str | None = None,
    partial_sums: str = "float32",
) -> None:
    """Enqueues an operation on the current stream, with outputs that are there. It is what the operators run.

    With ``roomy``, memory of codes and scales may be larger than the operation needs.
    """
    like = x if experts is None or x is not None else experts.rows
    if like is None:
        raise InvalidError("x is missing: only with experts it may be")
    # Of a tensor on the CPU it is -1.
    gpu, native = like.get_device(), communicator._native
    if gpu != (-1 if native.device is None else native.device):
        raise InvalidError(f"x is on {like.device}, and the group is {communicator!r}")
    dtype = _DTYPES.get(like.dtype)
    if dtype is None:
        raise InvalidError(f"dtype {like.dtype} is not valid: use torch.float32, torch.float16 or torch.bfloat16")
    shape, elements = like.shape, like.numel()
    hidden = shape[-1] if shape else 0
    fields: dict[str, Any] = {}
    more: dict[str, Any] = {}
    if post_norm is not None:
        fields |= {"post_epsilon": post_norm.epsilon, "post_weight_bias": post_norm.weight_bias}
        fields["post_gamma"] = _DTYPES.get(post_norm.weight.dtype, "codes")
        more["post_gamma"] = _elements(post_norm.weight, "the post-norm's weight", gpu)
    if experts is not None:
        top_k = experts.index.shape[-1] if experts.index.dim() else 0
        elements = experts.index.numel() // max(top_k, 1) * hidden
        fields |= {"top_k": top_k, "shared_expert": x is not None}
        fields["expert_scales"] = _DTYPES.get(experts.scales.dtype, "codes")
        more["experts"] = tuple(
            _elements(it, f"the experts' {name}", gpu)
            for name, it in (("rows", experts.rows), ("index", experts.index), ("scales", experts.scales))
        )
    plan = _plan(
        dtype,
        elements // hidden if hidden else 0,
        hidden,
        "none" if residual is None else "sharded" if sharded else "replicated",
        bias is not None,
        weight is not None,
        None if weight is None else _DTYPES.get(weight.dtype, "codes"),
        epsilon,
        weight_bias,
        quant,
        layout,
        block,
        block_scale,
        keep_norm,
        rounding,
        mode,
        wire,
        partial_sums,
        **fields,
    )
    residual_out, norm_out, quant_out, scale_out = outputs
    if residual_out is None:
        raise InvalidError("residual_out is missing: every operation writes it")
    codes = None if quant_out is None else _codes(quant_out, gpu)
    if roomy and codes is not None:
        codes = codes[0], min(codes[1], elements // hidden * plan.quant_row_bytes if hidden else 0), codes[2]
    given_x = None if x is None else _elements(x, "x", gpu)
    given_residual = None if residual is None else _elements(residual, "residual", gpu)
    native.enqueue(
        plan,
        given_x,
        given_residual,
        None if bias is None else _elements(bias, "bias", gpu),
        None if weight is None else _elements(weight, "weight", gpu),
        None if scale is None else _elements(scale, "scale", gpu),
        given_residual if residual_out is residual else _elements(residual_out, "residual_out", gpu),
        None if norm_out is None else given_x if norm_out is x else _elements(norm_out, "norm_out", gpu),
        codes,
        None if scale_out is None else _codes(scale_out, gpu, plan.scale_bytes if roomy else None),
        _stream(gpu),
        **more,
    )


# An argument of a mutating operator cannot be called mode: functionalization has one of its own.
_OPTIONS = (
    "int group, float epsilon, float weight_bias, str quant, str layout, int block, str block_scale, bool keep_norm, "
    "bool sharded, str rounding, str algorithm"
)
_MORE = (
    "Tensor? post_weight=None, float post_epsilon=1e-06, float post_weight_bias=0.0, "
    "Tensor? expert_rows=None, Tensor? expert_index=None, Tensor? expert_scales=None, str? wire=None, "
    "str partial_sums='float32'"
)
_LIBRARY = library.Library("fused_collective", "DEF")
_LIBRARY.define(
    "all_reduce(Tensor? x, Tensor? residual, Tensor? bias, Tensor? weight, Tensor? scale, "
    f"{_OPTIONS}, {_MORE}) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "all_reduce_out(Tensor? x, Tensor? residual, Tensor? bias, Tensor? weight, Tensor? scale, Tensor(a!) residual_out, "
    f"Tensor(b!)? norm_out, Tensor(c!)? quant_out, Tensor(d!)? scale_out, {_OPTIONS}, {_MORE}) -> ()"
)
_LIBRARY.define(
    "all_reduce_norm_(Tensor(a!) x, Tensor(b!) residual, Tensor weight, int group, float epsilon=1e-06, float weight_bias=0.0, "
    "str rounding='once', str algorithm='auto') -> ()"
)


def _written(outputs, norm, quant, keep_norm):
    """The norm, codes and scales that an operation writes; None for the others. A written one may be empty, too."""
    norm = norm and (keep_norm or quant == "none")
    scales = quant not in ("none", "fp8")
    return outputs[1] if norm else None, outputs[2] if quant != "none" else None, outputs[3] if scales else None


def _more(
    post_weight=None, post_epsilon=1e-6, post_weight_bias=0.0, rows=None, index=None, scales=None, wire=None,
    partial_sums="float32",
):  # fmt: skip
    """Makes keyword arguments of an operator's last ones."""
    return {
        "post_norm": None if post_weight is None else Norm(post_weight, post_epsilon, post_weight_bias),
        "experts": None if rows is None else Experts(rows, index, scales),
        "wire": wire,
        "partial_sums": partial_sums,
    }


def _like(x, more):
    """A tensor of the shape of the sum: the shared expert's rows, unless there is none."""
    experts = more["experts"]
    if x is not None or experts is None:
        return x
    return experts.rows.new_empty((*experts.index.shape[:-1], experts.rows.shape[-1]))


def _run(
    x, residual, bias, weight, scale, group, epsilon, weight_bias, quant, layout, block, block_scale, keep_norm, sharded,
    rounding, mode, *last,
):  # fmt: skip
    more = _more(*last)
    outputs = _outputs(_like(x, more), group, weight is not None, quant, layout, block, block_scale, keep_norm, sharded)
    enqueue(
        _communicator(group), x, residual, bias, weight, scale,
        (outputs[0], *_written(outputs, weight is not None, quant, keep_norm)),
        epsilon, weight_bias, quant, layout, block, block_scale, keep_norm, sharded, rounding, mode, **more,
    )  # fmt: skip
    return outputs


def _run_out(x, residual, bias, weight, scale, residual_out, norm_out, quant_out, scale_out, group, *options):
    outputs = (residual_out, norm_out, quant_out, scale_out)
    options, last = options[:10], options[10:]
    enqueue(_communicator(group), x, residual, bias, weight, scale, outputs, *options, **_more(*last))


def _run_norm_(x, residual, weight, group, epsilon=1e-6, weight_bias=0.0, rounding="once", mode="auto"):
    outputs = (residual, x, None, None)
    enqueue(
        _communicator(group), x, residual, None, weight, None, outputs,
        epsilon, weight_bias, "none", "linear", 128, "ue8m0", False, False, rounding, mode,
    )  # fmt: skip


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("all_reduce", _run, _key)
    _LIBRARY.impl("all_reduce_out", _run_out, _key)
    _LIBRARY.impl("all_reduce_norm_", _run_norm_, _key)


@library.register_fake("fused_collective::all_reduce", lib=_LIBRARY)
def _fake(
    x, residual, bias, weight, scale, group, epsilon, weight_bias, quant, layout, block, block_scale, keep_norm, sharded,
    rounding, mode, *last,
):  # fmt: skip
    return _outputs(_like(x, _more(*last)), group, weight is not None, quant, layout, block, block_scale, keep_norm, sharded)


@library.register_fake("fused_collective::all_reduce_out", lib=_LIBRARY)
def _fake_out(*_):
    return None


@library.register_fake("fused_collective::all_reduce_norm_", lib=_LIBRARY)
def _fake_norm_(*_):
    return None


# By name and arguments, PyTorch would look for them anew in each call.
_ALL_REDUCE = torch.ops.fused_collective.all_reduce.default
_ALL_REDUCE_OUT = torch.ops.fused_collective.all_reduce_out.default
_ALL_REDUCE_NORM_ = torch.ops.fused_collective.all_reduce_norm_.default


def _last(post_norm: Norm | None, experts: Experts | None, *crossing: str | None) -> tuple[Any, ...]:
    """Makes an operator's last arguments. ``crossing`` is ``wire`` and ``partial_sums``."""
    post = (None, 1e-6, 0.0) if post_norm is None else (post_norm.weight, post_norm.epsilon, post_norm.weight_bias)
    return (*post, *((None,) * 3 if experts is None else (experts.rows, experts.index, experts.scales)), *crossing)


def all_reduce(
    x: torch.Tensor | None,
    *,
    group: int,
    residual: torch.Tensor | None = None,
    sharded: bool = False,
    bias: torch.Tensor | None = None,
    post_norm: Norm | None = None,
    experts: Experts | None = None,
    weight: torch.Tensor | None = None,
    epsilon: float = 1e-6,
    weight_bias: float = 0.0,
    quant: str = "none",
    scale: torch.Tensor | None = None,
    layout: str = "linear",
    block: int = 128,
    block_scale: str = "ue8m0",
    keep_norm: bool = False,
    rounding: str = "once",
    mode: str = "auto",
    wire: str | None = None,
    partial_sums: str = "float32",
) -> Outputs:
    """Adds up ``x`` of all ranks and ``residual``, normalizes the sum with ``weight``, and quantizes the norm, into new tensors.

    Shapes, formats and layouts are those of :meth:`fused_collective.Communicator.all_reduce` and
    :class:`fused_collective.Quant`; ``group`` is a number of :func:`register`, ``scale`` a tensor of one float32, and ``block``
    the elements of a group of ``fp8_per_group``.
    """
    made = _ALL_REDUCE(
        x, residual, bias, weight, scale, group, epsilon, weight_bias, quant, layout, block, block_scale, keep_norm,
        sharded and residual is not None, rounding, mode, *_last(post_norm, experts, wire, partial_sums),
    )  # fmt: skip
    return Outputs(made[0], *_written(made, weight is not None, quant, keep_norm))


def all_reduce_out(
    x: torch.Tensor | None,
    *,
    group: int,
    residual_out: torch.Tensor,
    norm_out: torch.Tensor | None = None,
    quant_out: torch.Tensor | None = None,
    scale_out: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    sharded: bool = False,
    bias: torch.Tensor | None = None,
    post_norm: Norm | None = None,
    experts: Experts | None = None,
    weight: torch.Tensor | None = None,
    epsilon: float = 1e-6,
    weight_bias: float = 0.0,
    quant: str = "none",
    scale: torch.Tensor | None = None,
    layout: str = "linear",
    block: int = 128,
    block_scale: str = "ue8m0",
    rounding: str = "once",
    mode: str = "auto",
    wire: str | None = None,
    partial_sums: str = "float32",
) -> None:
    """As :func:`all_reduce`, into tensors of the caller's. ``norm_out`` beside a quantization keeps the norm."""
    _ALL_REDUCE_OUT(
        x, residual, bias, weight, scale, residual_out, norm_out, quant_out, scale_out, group, epsilon, weight_bias, quant,
        layout, block, block_scale, norm_out is not None and quant != "none", sharded and residual is not None, rounding,
        mode, *_last(post_norm, experts, wire, partial_sums),
    )  # fmt: skip


def all_reduce_norm_(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    *,
    group: int,
    epsilon: float = 1e-6,
    weight_bias: float = 0.0,
    rounding: str = "once",
    mode: str = "auto",
) -> None:
    """Adds up ``x`` of all ranks and ``residual`` in place: the sum takes the residual's memory, the norm ``x``'s."""
    # Each argument takes its time on the way.
    options = () if weight_bias == 0.0 and rounding == "once" and mode == "auto" else (weight_bias, rounding, mode)
    _ALL_REDUCE_NORM_(x, residual, weight, group, epsilon, *options)
