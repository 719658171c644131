"""Tensors of any library as addresses: PyTorch's, of the CUDA array interface, NumPy's, of DLPack, of the buffer protocol."""

from __future__ import annotations

import ctypes
import sys
from typing import Any, NamedTuple

from ._errors import InvalidError

#: Numbers of element types, as ``_native`` has them, and their bytes.
NUMBERS = {"codes": 0, "float32": 1, "float16": 2, "bfloat16": 3, "int32": 4}
BYTES = {"codes": 1, "float32": 4, "float16": 2, "bfloat16": 2}

_BUFFER_FORMATS = {"f": "float32", "e": "float16", "B": "uint8", "b": "int8", "c": "uint8", "H": "uint16", "h": "int16", "i": "int32"}
_DLPACK_TYPES = {(0, 32): "int32", (2, 32): "float32", (2, 16): "float16", (4, 16): "bfloat16"}
#: Names of PyTorch's types, of those that came.
_TORCH_NAMES: dict[Any, str] = {}
_SIZES = {"uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "int32": 4, "float64": 8}


class Tensor(NamedTuple):
    """A contiguous tensor. ``gpu`` is the ordinal of its GPU, or None on the CPU."""

    address: int
    shape: tuple[int, ...]
    dtype: str
    gpu: int | None
    read_only: bool
    #: Keeps the memory, until the call has ended.
    owner: Any

    @property
    def elements(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count

    @property
    def bytes(self) -> int:
        return self.elements * (BYTES.get(self.dtype) or _SIZES.get(self.dtype, 1))


def is_torch(x: Any) -> bool:
    """Tells whether ``x`` is a tensor of PyTorch's, without importing it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def describe(x: Any, role: str) -> Tensor:
    """Describes the tensor ``x``; ``role`` names it in errors."""
    if isinstance(x, Tensor):
        return x
    if is_torch(x):
        if not x.is_contiguous():
            raise InvalidError(f"{role} is not contiguous: use {role}.contiguous()")
        if not (x.is_cuda or x.is_cpu):
            raise InvalidError(f"{role} is on {x.device}: use a CPU or a CUDA tensor")
        # Not by `x.device` and the type's text: each takes as long as all the rest.
        dtype = _TORCH_NAMES.get(x.dtype) or _TORCH_NAMES.setdefault(x.dtype, str(x.dtype)[6:])
        return Tensor(x.data_ptr(), x.shape, dtype, x.get_device() if x.is_cuda else None, False, x)
    if hasattr(x, "__cuda_array_interface__"):
        return _of_interface(x, x.__cuda_array_interface__, role, True)
    if hasattr(x, "__array_interface__"):
        return _of_interface(x, x.__array_interface__, role, False)
    try:
        view = memoryview(x)
    except TypeError:
        view = None
    if view is not None:
        return _of_buffer(view, role)
    if hasattr(x, "__dlpack__"):
        return _of_dlpack(x, role)
    raise InvalidError(
        f"{role} is a {type(x).__name__}: use a tensor of PyTorch or NumPy, or another with the CUDA array interface, "
        "DLPack or the buffer protocol"
    )


def _of_interface(x: Any, interface: dict[str, Any], role: str, cuda: bool) -> Tensor:
    shape, strides = tuple(interface["shape"]), interface.get("strides")
    # Types that NumPy has not, bfloat16 for instance, have a name all the same.
    dtype = str(getattr(x, "dtype", "")) or {"<f4": "float32", "<f2": "float16", "|u1": "uint8"}.get(interface["typestr"], "")
    size = int(interface["typestr"][2:])
    if strides is not None:
        expected = size
        for length, stride in zip(reversed(shape), reversed(tuple(strides))):
            if length > 1 and stride != expected:
                raise InvalidError(f"{role} is not contiguous: give it in rows without gaps")
            expected *= length
    address, read_only = interface["data"]
    gpu = None
    if cuda:
        device = getattr(x, "device", None)
        gpu = getattr(device, "id", device if isinstance(device, int) else 0)
    return Tensor(int(address or 0), shape, dtype, gpu, bool(read_only), x)


class _Buffer(ctypes.Structure):
    """CPython's ``Py_buffer``, which every version from 3.0 on has in this form."""

    _fields_ = [
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    ]


def _of_buffer(view: memoryview, role: str) -> Tensor:
    if not view.c_contiguous:
        raise InvalidError(f"{role} is not contiguous: give it in rows without gaps")
    dtype = _BUFFER_FORMATS.get(view.format.lstrip("@=<"), view.format)
    buffer = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(buffer), 0)
    address = buffer.buf or 0
    # The view, which the tensor owns, holds the memory from here on.
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    return Tensor(address, tuple(view.shape or ()), dtype, None, view.readonly, view)


class _DLTensor(ctypes.Structure):
    """DLPack's ``DLTensor``, the first field of ``DLManagedTensor``."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


def _of_dlpack(x: Any, role: str) -> Tensor:
    kind, device = (int(number) for number in x.__dlpack_device__())
    if kind not in (1, 2, 3):
        raise InvalidError(f"{role} is on a device of DLPack's kind {kind}: use the CPU (1) or CUDA (2)")
    capsule = x.__dlpack__()
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    tensor = ctypes.cast(get(capsule, b"dltensor"), ctypes.POINTER(_DLTensor)).contents
    shape = tuple(tensor.shape[: tensor.ndim])
    if tensor.strides:
        expected = 1
        for length, stride in zip(reversed(shape), reversed(tensor.strides[: tensor.ndim])):
            if length > 1 and stride != expected:
                raise InvalidError(f"{role} is not contiguous: give it in rows without gaps")
            expected *= length
    dtype = _DLPACK_TYPES.get((tensor.code, tensor.bits)) or ("uint8" if tensor.bits == 8 else f"{tensor.bits} bits")
    address = (tensor.data or 0) + tensor.byte_offset
    # The capsule, which is not consumed, frees the export when it goes.
    return Tensor(address, shape, dtype, device if kind == 2 else None, False, (x, capsule))


def given(tensor: Tensor | None, dtype: str) -> tuple[int, int, int] | None:
    """Address, length and number of the type of a tensor that holds ``dtype``: ``codes`` for bytes of any type."""
    if tensor is None:
        return None
    if dtype == "codes":
        return tensor.address, tensor.bytes, 0
    return tensor.address, tensor.elements, NUMBERS.get(tensor.dtype, 0)


def empty(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """Makes a tensor of the library that ``like`` is of. Codes and scales are bytes, scales of 4 bytes ``float32``."""
    if is_torch(like):
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    if hasattr(like, "__array_interface__"):
        import numpy

        return numpy.empty(shape, dtype=like.dtype if dtype == str(like.dtype) else dtype)
    raise InvalidError(f"outputs beside a {type(like).__name__} cannot be made: give them all in out")
