"""DLPack capsules, made of an address and read for one: arrays go from library to library without a copy.

The structures are those of DLPack 0.x, which all of NumPy, PyTorch, CuPy and JAX exchange when no version is agreed
(https://dmlc.github.io/dlpack/latest/c_api.html).
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CPU, CUDA = 1, 2
"""Device types."""

_KINDS = {"i": 0, "u": 1, "f": 2}
_NAMES = {code: kind for kind, code in _KINDS.items()}
_FRESH = b"dltensor"
"""The name of a capsule whose tensor nobody has taken over yet."""


class _Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("number", ctypes.c_int32)]


class _DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("dimensions", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
    ]


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    _fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter)]


@dataclass(frozen=True, slots=True)
class View:
    """What a capsule says of an array. strides: in values, None for C order. owner: keeps the memory while it lives."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: np.dtype[Any]
    device: tuple[int, int]
    owner: object

    @property
    def contiguous(self) -> bool:
        """Whether it is in C order without gaps."""
        expected = [int(np.prod(self.shape[axis + 1 :])) for axis in range(len(self.shape))]
        return self.strides is None or all(
            size == 1 or stride == wanted
            for size, stride, wanted in zip(self.shape, self.strides, expected, strict=True)
        )


_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
# By address: a capsule that is being destroyed must not be held as an object again.
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)

_exported: dict[int, tuple[object, ...]] = {}
"""What must live as long as an exported tensor, by the address of its structure."""


def _forget(address: int) -> None:
    _exported.pop(address, None)


_delete = _Deleter(_forget)


def _end(capsule: int) -> None:
    """End a capsule whose tensor nobody took over; who did calls the deleter."""
    if _is_valid(capsule, _FRESH):
        _forget(_pointer(capsule, _FRESH))


_destroy = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(_end)


def export(address: int, shape: Sequence[int], dtype: np.dtype[Any], device: tuple[int, int], owner: object) -> object:
    """A capsule of the C-contiguous array at `address`. owner: an object that keeps its memory while it lives."""
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    kind = _DataType(_KINDS[dtype.kind], 8 * dtype.itemsize, 1)
    tensor = _Tensor(address, _Device(*device), len(shape), kind, sizes, None, 0)
    managed = _Managed(tensor, None, _delete)
    place = ctypes.addressof(managed)
    _exported[place] = (managed, sizes, owner)
    return _new(place, _FRESH, ctypes.cast(_destroy, ctypes.c_void_p))


def view(array: Any, stream: int | None = None) -> View:
    """What an array that speaks DLPack says of itself. stream: in whose order its values are wanted.

    Raises TypeError for an array that speaks none, ValueError for a type that NumPy does not know.
    """
    if not hasattr(array, "__dlpack__"):
        raise TypeError(f"expected an array that speaks DLPack, found {type(array).__name__}")
    capsule = array.__dlpack__() if stream is None else array.__dlpack__(stream=stream)
    tensor = _Managed.from_address(_pointer(id(capsule), _FRESH)).tensor
    code, bits = tensor.dtype.code, tensor.dtype.bits
    if code not in _NAMES or tensor.dtype.lanes != 1:
        raise ValueError(f"expected integers or floating-point numbers, found DLPack's type {code} of {bits} bits")
    count = tensor.dimensions
    return View(
        (tensor.data or 0) + tensor.offset,
        tuple(tensor.shape[:count]),
        tuple(tensor.strides[:count]) if tensor.strides else None,
        np.dtype(f"{_NAMES[code]}{bits // 8}"),
        (tensor.device.type, tensor.device.number),
        capsule,  # as long as it keeps its name, it ends the tensor when it goes
    )
