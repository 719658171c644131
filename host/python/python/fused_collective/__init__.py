"""Fused all-reduce + residual + RMSNorm + FP8/FP4 quantization across the ranks of one host, on GPUs and CPUs.

A rank makes a :class:`Communicator`, and calls :meth:`Communicator.all_reduce` with tensors of PyTorch, NumPy or any library with
DLPack, the CUDA array interface or the buffer protocol. Neither a GPU nor PyTorch is needed to import this package.

- :mod:`fused_collective.torch`: operators for ``torch.compile`` and CUDA graphs.
- :mod:`fused_collective.flashinfer`: FlashInfer's calls, by its names.
"""

from __future__ import annotations

from ._communicator import Communicator, Experts, Norm, Outputs, Quant
from ._errors import (
    AbortedError,
    BootstrapError,
    Error,
    InvalidError,
    LostError,
    MismatchError,
    OutOfMemoryError,
    SystemFailure,
    TimedOutError,
    UnavailableError,
    UnsupportedError,
)
from ._native import __version__

__all__ = [
    "AbortedError",
    "BootstrapError",
    "Communicator",
    "Error",
    "Experts",
    "InvalidError",
    "LostError",
    "MismatchError",
    "Norm",
    "OutOfMemoryError",
    "Outputs",
    "Quant",
    "SystemFailure",
    "TimedOutError",
    "UnavailableError",
    "UnsupportedError",
    "__version__",
]
