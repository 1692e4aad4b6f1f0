"""DLPack capsules: create one from an address, or read the address from one.

They pass arrays between libraries without a copy. The structures follow DLPack before 1.0. NumPy,
PyTorch, CuPy and JAX exchange these if no version is negotiated
(https://dmlc.github.io/dlpack/latest/c_api.html).
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CPU, CUDA = 1, 2
"""DLPack device types."""

_KINDS = {0: "i", 1: "u", 2: "f"}
"""NumPy kind of each DLPack type code that NumPy supports."""


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
    """Description of an array, read from a DLPack capsule.

    address: address of the first value.
    shape: shape of the array.
    strides: strides in values, None for C order.
    dtype: NumPy dtype of the values.
    device: DLPack device type and device number.
    owner: object that keeps the memory alive.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: np.dtype[Any]
    device: tuple[int, int]
    owner: object

    @property
    def contiguous(self) -> bool:
        """Whether the array is in C order without gaps."""
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
    """Return the tensor at the start of the structure that a capsule points to."""
    return _Tensor.from_address(_address(capsule, b"dltensor"))


class _Lent:
    """Memory that NumPy can wrap without reading it."""

    def __init__(self, address: int, shape: Sequence[int], dtype: np.dtype[Any], owner: object) -> None:
        self.owner = owner
        self.__array_interface__ = {"data": (address, False), "shape": tuple(shape), "typestr": dtype.str, "version": 3}


def export(address: int, shape: Sequence[int], dtype: np.dtype[Any], device: tuple[int, int], owner: object) -> object:
    """Return a capsule of the C-contiguous array at `address`.

    owner: an object that keeps the memory alive.

    NumPy creates the capsule, from memory that it treats as CPU memory. A destructor written in
    Python could not run if it is called while an exception is pending.
    """
    capsule = np.asarray(_Lent(address, shape, dtype, owner)).__dlpack__()
    _tensor(capsule).device = _Device(*device)
    return capsule


def view(array: Any, stream: int | None = None) -> View:
    """Return the description of an array that supports DLPack.

    stream: stream in which its values are read, None for the default.

    Raises TypeError if the array does not support DLPack, ValueError if NumPy lacks its data type.
    """
    if not hasattr(array, "__dlpack__"):
        raise TypeError(f"expected an array that supports DLPack, found {type(array).__name__}")
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
        capsule,  # not renamed, so the capsule deletes the tensor when it is freed
    )
