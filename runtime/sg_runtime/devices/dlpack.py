"""DLPack capsules, made from an address and read for one: arrays go from library to library without a copy.

The structures are those of DLPack before 1.0, which NumPy, PyTorch, CuPy and JAX exchange when no version is agreed on
(https://dmlc.github.io/dlpack/latest/c_api.html).
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CPU, CUDA = 1, 2
"""Device types."""

_KINDS = {0: "i", 1: "u", 2: "f"}
"""NumPy's names of the type codes that it knows."""


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
        return (
            self.strides is None
            or 0 in self.shape
            or all(
                size == 1 or stride == wanted
                for size, stride, wanted in zip(self.shape, self.strides, expected, strict=True)
            )
        )


_address = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _tensor(capsule: object) -> _Tensor:
    """The tensor that begins what a capsule points to."""
    return _Tensor.from_address(_address(capsule, b"dltensor"))


class _Lent:
    """Memory as NumPy wraps it, which does not look into it."""

    def __init__(self, address: int, shape: Sequence[int], dtype: np.dtype[Any], owner: object) -> None:
        self.owner = owner
        self.__array_interface__ = {"data": (address, False), "shape": tuple(shape), "typestr": dtype.str, "version": 3}


def export(address: int, shape: Sequence[int], dtype: np.dtype[Any], device: tuple[int, int], owner: object) -> object:
    """A capsule of the C-contiguous array at `address`. owner: an object that keeps its memory while it lives.

    NumPy makes it, of memory that it takes for its own: a destructor in Python could not run where one is called with
    an error on its way.
    """
    capsule = np.asarray(_Lent(address, shape, dtype, owner)).__dlpack__()
    _tensor(capsule).device = _Device(*device)
    return capsule


def view(array: Any, stream: int | None = None) -> View:
    """What an array that speaks DLPack says of itself. stream: in whose order its values are wanted.

    Raises TypeError for an array that speaks none, ValueError for a type that NumPy does not know.
    """
    if not hasattr(array, "__dlpack__"):
        raise TypeError(f"expected an array that speaks DLPack, found {type(array).__name__}")
    capsule = array.__dlpack__() if stream is None else array.__dlpack__(stream=stream)
    tensor = _tensor(capsule)
    code, bits = tensor.dtype.code, tensor.dtype.bits
    if code not in _KINDS or tensor.dtype.lanes != 1:
        raise ValueError(f"expected integers or floating-point numbers, found DLPack's type {code} of {bits} bits")
    count = tensor.dimensions
    return View(
        (tensor.data or 0) + tensor.offset,
        tuple(tensor.shape[:count]),
        tuple(tensor.strides[:count]) if tensor.strides else None,
        np.dtype(f"{_KINDS[code]}{bits // 8}"),
        (tensor.device.type, tensor.device.number),
        capsule,  # as long as it keeps its name, it ends the tensor when it goes
    )
