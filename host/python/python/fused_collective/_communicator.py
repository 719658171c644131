"""Communicators on tensors."""

from __future__ import annotations

import array
import functools
import os
import secrets
import socket
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

from . import _native
from ._errors import InvalidError
from ._tensors import BYTES, Tensor, describe, empty, given, is_torch

#: Seconds that a wait for another rank may take, unless others are given.
DEADLINE = 30.0


@dataclass(frozen=True)
class Norm:
    """RMSNorm: ``x * rsqrt(mean(x^2) + epsilon) * (weight_bias + weight)``.

    ``weight`` is ``[hidden]``, of the activations' type or float32. ``weight_bias`` is 1 in Gemma's form.
    """

    weight: Any
    epsilon: float = 1e-6
    weight_bias: float = 0.0


@dataclass(frozen=True)
class Quant:
    """The quantization of the norm, of ``T`` tokens and hidden size ``H``.

    =================  ======================  ============================  ===================
    ``format``         ``quant_out``           ``scale_out``                 ``scale``
    =================  ======================  ============================  ===================
    ``fp8``            ``[T, H]`` E4M3         none                          one float32
    ``fp8_per_token``  ``[T, H]`` E4M3         ``[T, 1]`` float32            none
    ``fp8_per_group``  ``[T, H]`` E4M3         ``[T, H / group]``            none
    ``nvfp4``          ``[T, H / 2]`` bytes    ``[T, H / 16]`` UE4M3         one float32, global
    ``mxfp8``          ``[T, H]`` E4M3         ``[T, H / 32]`` UE8M0         none
    ``mxfp4``          ``[T, H / 2]`` bytes    ``[T, H / 32]`` UE8M0         none
    =================  ======================  ============================  ===================

    ``scale`` is a number, or a tensor of one float32 on the device of the activations, which the kernel ahead on the stream must
    not write: it is read before that has ended, and so is the norm's weight. Scales of blocks are a flat tensor in
    ``layout``: ``linear``, ``column_major``, ``deep_gemm``, ``swizzled_128x4`` or ``swizzled_8x4``. ``group`` is 32, 64 or
    128, and ``group_scale`` is ``ue8m0`` or ``float32``.
    """

    format: str
    scale: Any = None
    layout: str = "linear"
    group: int = 128
    group_scale: str = "ue8m0"


@dataclass(frozen=True)
class Experts:
    """The last step of a mixture of experts: the addend of a token is the sum of ``scales`` times the rows of its experts.

    ``rows``, ``[any, H]``, are those of this rank's experts. ``index``, ``[..., top_k]`` int32, has the row of each expert of
    each token; less than 0 is an expert on another rank. ``scales`` has the same shape, of the activations' type or float32.
    On GPUs nothing checks that ``index`` names rows.
    """

    rows: Any
    index: Any
    scales: Any


class Outputs(NamedTuple):
    """The outputs of an operation; None for one that it does not write.

    ``residual_out`` is ``[T, H]``, or this rank's rows of a sharded residual; ``norm_out`` is ``[T, H]``; ``quant_out`` and
    ``scale_out`` are as :class:`Quant` says.
    """

    residual_out: Any = None
    norm_out: Any = None
    quant_out: Any = None
    scale_out: Any = None


@functools.lru_cache(maxsize=4096)
def operation(dtype: str, tokens: int, hidden: int, **fields: Any) -> _native.Operation:
    """Makes the description of an operation, once."""
    return _native.Operation(dtype, tokens, hidden, **fields)


class Communicator:
    """One rank's end of a group of processes of one host.

    All ranks make the same calls in the same order. Use it as a context manager, or call :meth:`leave`: a rank that ends
    without it is lost to the others. Ctrl-C ends a wait, and the group.
    """

    def __init__(self, native: _native.Communicator, cuda: bool) -> None:
        self._native = native
        self._cuda = cuda
        self._scales: dict[Any, Any] = {}

    @classmethod
    def local(
        cls,
        *,
        max_hidden: int,
        max_tokens: int = 2048,
        dtype: str = "float32",
        device: str | int | None = "cpu",
        rank: int | None = None,
        world_size: int | None = None,
        key: str | None = None,
        deadline: float = DEADLINE,
        oversubscribe: bool = False,
        check_scales: bool = False,
        kernels: str | os.PathLike[str] | None = None,
        address: str | None = None,
    ) -> Communicator:
        """Joins the ranks that ``torchrun``, ``mpirun`` or ``srun`` started, or those with the same ``key``.

        ``max_hidden`` and ``dtype`` say how long rows may be. On GPUs, operations of up to ``max_tokens`` tokens run in one
        round, and larger ones in several. ``device`` is ``"cpu"``, ``"cuda"`` (the rank modulo the number of GPUs) or the
        ordinal of a GPU. ``deadline`` is in seconds. ``oversubscribe`` lets ranks share a GPU, on which they take turns.

        Ranks of several hosts that were given their ``rank`` meet at ``address``, ``HOST:PORT`` on the host of rank 0. They
        have the same secret in ``FUSED_COLLECTIVE_SECRET``, which is never sent. NCCL carries sums from host to host.

        Raises :class:`BootstrapError` if a rank does not come.
        """
        name = str(dtype).removeprefix("torch.")
        if name not in BYTES or name == "codes":
            raise InvalidError(f"dtype {name!r} is not valid: use float32, float16 or bfloat16")
        together = (rank, world_size, key)
        if any(part is None for part in together) and any(part is not None for part in together):
            raise InvalidError("rank, world_size and key are given together, or none of them")
        text = "cpu" if device is None else str(device)
        cuda = text != "cpu"
        ordinal = text.removeprefix("cuda").removeprefix(":")
        if cuda and ordinal and not ordinal.isdigit():
            raise InvalidError(f"device {text!r} is not valid: use cpu, cuda, or the ordinal of a GPU")
        native = _native.Communicator.join(
            None if rank is None else (rank, world_size, key),  # type: ignore[arg-type]
            cuda=cuda,
            device=int(ordinal) if cuda and ordinal else None,
            max_row_bytes=max_hidden * BYTES[name],
            max_tokens=max_tokens,
            deadline=deadline,
            oversubscribe=oversubscribe,
            check_scales=check_scales,
            kernels=kernels,
            address=address,
        )
        return cls(native, cuda)

    @classmethod
    def from_torch(cls, group: Any = None, *, device: Any = None, **options: Any) -> Communicator:
        """Joins the ranks of a ``torch.distributed`` group, the default one if it is None.

        The group's all-gather tells the ranks of a key under which they meet, and on several hosts of a free port at
        ``MASTER_ADDR``, or else at rank 0's host name; nothing else of it is used. ``device`` is the current CUDA device if there is one. The other options are those of :meth:`local`.
        """
        import torch
        import torch.distributed as dist

        if device is None:
            device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        elif isinstance(device, torch.device):
            current = torch.cuda.current_device() if device.type == "cuda" else None
            device = (device.index if device.index is not None else current) if device.type == "cuda" else "cpu"
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        told: list[Any] = [None] * world_size
        host = os.environ.get("NCCL_HOSTID") or socket.gethostname()
        # The master is the host of the first of all ranks.
        master = os.environ.get("MASTER_ADDR") if dist.get_rank() == 0 else None
        with socket.socket() as free:
            free.bind(("", 0))
            address = f"{master or socket.gethostname()}:{free.getsockname()[1]}"
        dist.all_gather_object(told, (host, secrets.token_hex(16), address), group=group)
        if len({host for host, *_ in told}) > 1:
            options.setdefault("address", told[0][2])
        return cls.local(device=device, rank=rank, world_size=world_size, key=told[0][1], **options)

    @property
    def rank(self) -> int:
        """This rank."""
        return self._native.rank

    @property
    def world_size(self) -> int:
        """Ranks in the group."""
        return self._native.world_size

    @property
    def device(self) -> int | None:
        """The ordinal of this rank's GPU; None on CPUs."""
        return self._native.device

    def all_reduce(
        self,
        x: Any = None,
        *,
        residual: Any = None,
        sharded: bool = False,
        bias: Any = None,
        post_norm: Norm | Any = None,
        experts: Experts | None = None,
        norm: Norm | Any = None,
        quant: Quant | str | None = None,
        keep_norm: bool = False,
        out: Outputs | None = None,
        rounding: str = "once",
        mode: str = "auto",
        wire: str | None = None,
        partial_sums: str = "float32",
        dtype: str | None = None,
        stream: int | None = None,
    ) -> Outputs:
        """Adds up ``x`` of all ranks and ``residual``, normalizes the sum, and quantizes the norm.

        ``x`` is ``[..., H]``: all but its last dimension are tokens. ``residual`` is of the same shape and the same on all
        ranks; or, if it is ``sharded``, this rank's rows. ``bias``, ``[H]``, is added to the sum of all ranks once. ``norm`` is a :class:`Norm`, or its weight. ``quant`` is a
        :class:`Quant`, or the name of a format. ``keep_norm`` writes the norm beside its codes.

        ``post_norm`` normalizes the sum before the residual is added, as in Gemma 2 and 3. With ``experts`` this rank's addend is
        made of their rows, and ``x`` is the output of a shared expert, or None.

        Outputs that ``out`` has not are made. ``out.norm_out`` may be ``x``, and ``out.residual_out`` the residual.
        ``rounding`` is ``once`` or ``after_all_reduce``, ``mode`` is ``auto``, ``one_shot`` or ``two_shot``. ``dtype`` is the
        type of elements that ``x`` cannot name: bfloat16 in arrays of 16-bit integers.

        ``wire`` is ``int8`` or ``int4`` for rows of fewer bits between ranks. Sums of normal rows then miss by 0.55% or
        8.6% in one-shot, the same on all ranks; the residual and the norm lose nothing. They do not cross hosts.

        ``partial_sums`` is the type in which sums cross between hosts: ``float32``, or ``element`` for half the bytes and one
        more rounding of each host's sum.

        On GPUs the operation is enqueued on ``stream``, PyTorch's current one if it is None, and may be captured. On CPUs the
        outputs are complete when this returns.

        Raises :class:`InvalidError` before anything is sent; others of :class:`Error` when the group is over.
        """
        shared = None if x is None else self._describe(x, "x")
        rows = index = scales = None
        if experts is not None:
            rows = self._describe(experts.rows, "the experts' rows")
            index = self._describe(experts.index, "the experts' index")
            scales = self._describe(experts.scales, "the experts' scales")
        input = shared or rows
        if input is None:
            raise InvalidError("x is missing: only with experts it may be")
        like = experts.rows if x is None else x  # type: ignore[union-attr]
        element = _element(input, dtype)
        if not input.shape or (index is not None and not index.shape):
            raise InvalidError("x has no dimension: use [tokens, hidden]")
        hidden = input.shape[-1]
        if shared is None:
            assert index is not None
            input = input._replace(shape=(*index.shape[:-1], hidden))
        tokens = input.elements // hidden if hidden else 0
        norm, post_norm = (it if it is None or isinstance(it, Norm) else Norm(it) for it in (norm, post_norm))
        if isinstance(quant, str):
            quant = Quant(quant)
        weight = None if norm is None else self._describe(norm.weight, "the norm's weight")
        post_weight = None if post_norm is None else self._describe(post_norm.weight, "the post-norm's weight")
        fields: dict[str, Any] = {}

        def weights(tensor: Tensor) -> str:
            return _element(tensor, dtype if tensor.dtype == input.dtype else None)

        if norm is not None and weight is not None:
            fields |= {"norm": True, "epsilon": norm.epsilon, "weight_bias": norm.weight_bias, "gamma": weights(weight)}
        if post_norm is not None and post_weight is not None:
            fields |= {"post_norm": True, "post_epsilon": post_norm.epsilon, "post_weight_bias": post_norm.weight_bias}
            fields["post_gamma"] = weights(post_weight)
        if index is not None and scales is not None:
            fields |= {"top_k": index.shape[-1], "expert_scales": weights(scales), "shared_expert": shared is not None}
        if quant is not None:
            fields |= {"quantization": quant.format, "layout": quant.layout}
            fields |= {"group": quant.group, "group_scale": quant.group_scale, "keep_norm": keep_norm}
        if residual is not None:
            fields["residual"] = "sharded" if sharded else "replicated"
        if bias is not None:
            fields["bias"] = True
        plan = operation(element, tokens, hidden, rounding=rounding, mode=mode, wire=wire, partial_sums=partial_sums, **fields)
        made = self._outputs(like, input, plan, quant, out or Outputs(), sharded and residual is not None)
        outputs = [
            None if it is None else self._describe(it, name, True) for name, it in list(zip(Outputs._fields, made))[1:]
        ]
        scale = self._scale(like, quant, plan)
        more: dict[str, Any] = {}
        if post_weight is not None:
            more["post_gamma"] = _elements(post_weight, fields["post_gamma"])
        if rows is not None and index is not None and scales is not None:
            more["experts"] = (
                _elements(rows, element),
                given(index, "int32"),
                _elements(scales, fields["expert_scales"]),
            )
        self._native.enqueue(
            plan,
            None if shared is None else _elements(shared, element),
            None if residual is None else _elements(self._describe(residual, "residual"), element),
            None if bias is None else _elements(self._describe(bias, "bias"), element),
            None if weight is None else _elements(weight, fields["gamma"]),
            None if scale is None else given(describe(scale, "scale"), "float32"),
            _elements(self._describe(made.residual_out, "residual_out", True), element),
            None if outputs[0] is None else _elements(outputs[0], element),
            given(outputs[1], "codes"),
            given(outputs[2], "codes"),
            self._stream(like, stream),
            **more,
        )
        return made

    def _describe(self, x: Any, role: str, written: bool = False) -> Tensor:
        tensor = describe(x, role)
        place = tensor.gpu if self._cuda else None
        if (tensor.gpu is not None) != self._cuda or (self._cuda and place != self._native.device):
            here = f"GPU {self._native.device}" if self._cuda else "the CPU"
            there = "the CPU" if tensor.gpu is None else f"GPU {tensor.gpu}"
            raise InvalidError(f"{role} is on {there}, and this communicator on {here}")
        if written and tensor.read_only:
            raise InvalidError(f"{role} is read-only")
        return tensor

    def _outputs(
        self, x: Any, input: Tensor, plan: _native.Operation, quant: Quant | None, out: Outputs, sharded: bool
    ) -> Outputs:
        hidden, leading = input.shape[-1], input.shape[:-1]
        rows = (self._native.residual_rows(plan),) if sharded else leading
        residual_out, norm_out, quant_out, scale_out = out
        if residual_out is None:
            residual_out = empty(x, (*rows, hidden), input.dtype)
        if norm_out is None and plan.writes_norm:
            norm_out = empty(x, input.shape, input.dtype)
        if quant is not None and quant_out is None and plan.quant_row_bytes:
            fp8 = "float8_e4m3fn" if plan.quant_row_bytes == hidden and is_torch(x) else "uint8"
            quant_out = empty(x, (*leading, plan.quant_row_bytes), fp8)
        if quant is not None and scale_out is None and plan.scale_bytes:
            if quant.format == "fp8_per_token":
                scale_out = empty(x, (*leading, 1), "float32")
            elif quant.format == "fp8_per_group" and quant.group_scale == "float32":
                scale_out = empty(x, (plan.scale_bytes // 4,), "float32")
            else:
                scale_out = empty(x, (plan.scale_bytes,), "uint8")
        return Outputs(residual_out, norm_out, quant_out, scale_out)

    def _scale(self, x: Any, quant: Quant | None, plan: _native.Operation) -> Any:
        if quant is None or quant.scale is None:
            return None
        if not plan.reads_scale:
            raise InvalidError(f"scale is given, and {quant.format} has none of the caller's")
        if not isinstance(quant.scale, (int, float)):
            return quant.scale
        if not self._cuda:
            return array.array("f", [quant.scale])
        if not is_torch(x):
            raise InvalidError("scale is a number: on GPUs use a tensor of one float32 there")
        key = float(quant.scale)
        if key not in self._scales:
            torch = sys.modules["torch"]
            if torch.cuda.is_current_stream_capturing():
                raise InvalidError("scale is a number that no call before the capture had: use a tensor, or call it once before")
            self._scales[key] = torch.full((1,), key, dtype=torch.float32, device=x.device)
            # Another stream may be the first that reads it.
            torch.cuda.current_stream(x.device).synchronize()
        return self._scales[key]

    def _stream(self, x: Any, stream: int | None) -> int:
        if stream is not None or not self._cuda:
            return stream or 0
        if is_torch(x):
            return sys.modules["torch"].cuda.current_stream(x.device).cuda_stream
        cupy = sys.modules.get("cupy")
        if cupy is not None and isinstance(x, cupy.ndarray):
            return cupy.cuda.get_current_stream().ptr
        return 0

    def query(self, dtype: str, tokens: int, hidden: int, **fields: Any) -> tuple[str, int]:
        """Returns the algorithm and the number of launches of an operation, without running it, and on GPUs loads its kernels.

        ``fields`` are those of :class:`fused_collective._native.Operation`. Raises :class:`UnsupportedError` if the backend has no
        kernels for it.
        """
        return self._native.query(operation(str(dtype).removeprefix("torch."), tokens, hidden, **fields))

    def synchronize(self, stream: int | None = None) -> None:
        """Waits until everything on ``stream``, PyTorch's current one if it is None, has ended, and checks it.

        Raises if a rank was lost meanwhile, made another call, or did not come. Other threads run, and Ctrl-C ends the wait.
        """
        if stream is None:
            torch = sys.modules.get("torch")
            stream = torch.cuda.current_stream(self.device).cuda_stream if self._cuda and torch else 0
        self._native.synchronize(stream)

    def check(self) -> None:
        """Checks, without a wait, that all operations that have ended did so well. Call it before results are used."""
        self._native.check()

    def captured(self) -> _native.Capture:
        """Returns the operations that were captured into a CUDA graph since this was last called, for :meth:`replay`."""
        return self._native.captured()

    def replay(self, capture: _native.Capture) -> None:
        """Says that a graph is about to be launched, so that the ranks' calls can be compared. It is optional."""
        self._native.replay(capture)

    def abort(self) -> None:
        """Ends the group's operations, on all ranks. Any thread may call it."""
        self._native.abort()

    def leave(self) -> None:
        """Leaves the group together with all others. Every later call fails.

        PyTorch's streams are waited for; without PyTorch, call it when the operations have ended. In a group of several hosts, delete
        the CUDA graphs that operations were captured in before: NCCL waits for their end.
        """
        torch = sys.modules.get("torch")
        if self._cuda and torch is not None:
            # Peers write into this rank's memory for as long as an operation runs.
            torch.cuda.synchronize(self.device)
        self._native.leave()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self.leave()
        else:
            self.abort()

    def __repr__(self) -> str:
        where = f"GPU {self.device}" if self._cuda else "CPU"
        return f"<fused_collective.Communicator: rank {self.rank} of {self.world_size}, {where}>"


def _element(tensor: Tensor, dtype: str | None) -> str:
    """The type of a tensor's elements: its own, or ``dtype`` if it is of integers of that size."""
    if dtype is None or tensor.dtype == dtype:
        if tensor.dtype not in ("float32", "float16", "bfloat16"):
            raise InvalidError(f"dtype {tensor.dtype} is not valid: use float32, float16 or bfloat16")
        return tensor.dtype
    dtype = str(dtype).removeprefix("torch.")
    if tensor.dtype in ("uint16", "int16") and dtype in ("bfloat16", "float16"):
        return dtype
    raise InvalidError(f"dtype is {dtype}, and the elements are {tensor.dtype}")


def _elements(tensor: Tensor, element: str) -> tuple[int, int, int]:
    """A tensor of elements; 16-bit integers hold those of the operation."""
    if tensor.dtype in ("uint16", "int16"):
        tensor = tensor._replace(dtype=element)
    return given(tensor, element)  # type: ignore[return-value]
