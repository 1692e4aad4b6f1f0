"""Where arrays live: the memory of a device, with the few operations that a run needs of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from sg_runtime.arrays import Indices
from sg_runtime.errors import UsageError

ALIGNMENT = 256
"""Bytes at which every tensor that an engine reads or writes begins."""


class DeviceArray(Protocol):
    """A C-contiguous array on some device. NumPy's arrays are those of the CPU.

    An index or a slice with step 1 along the first axis is a view, and so is another shape. It exports itself by
    DLPack, without a copy.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def nbytes(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...

    def reshape(self, shape: Any, /) -> Any: ...

    def __dlpack__(self, *, stream: Any = None) -> Any: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


class Memory(Protocol):
    """The memory of one device, in the order of one stream. Nothing but `download` and `wait` waits for the device.

    device: "cpu", or "cuda:0".
    """

    device: str

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> DeviceArray:
        """An array of unset values. Raises DeviceError where the memory does not suffice."""
        ...

    def upload(self, source: NDArray[Any], target: DeviceArray) -> None:
        """Copy from the CPU, array of the same shape and dtype."""
        ...

    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        """Copy within the device."""
        ...

    def take(self, source: DeviceArray, rows: Indices, target: DeviceArray) -> None:
        """target[b] = source[rows[b]], for source (U, M), rows (B,) on the CPU, target (B, M)."""
        ...

    def download(self, source: DeviceArray) -> NDArray[Any]:
        """A copy on the CPU."""
        ...

    def hold(self, array: Any) -> DeviceArray:
        """`array` on this device: itself, or a view by DLPack of what lies here, or a copy of what NumPy holds.

        Raises UsageError for what lies elsewhere; and on a GPU for what is not contiguous.
        """
        ...

    def address(self, array: DeviceArray) -> int:
        """Where its first value lies."""
        ...

    def free_bytes(self) -> int | None:
        """What can be allocated, None where that cannot be told."""
        ...

    def wait(self) -> None:
        """Return when all that was asked for is done. Raises DeviceError where the device is lost."""
        ...


class HostMemory:
    """The memory of the CPU, in NumPy's arrays."""

    device = "cpu"

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """An array that begins at a multiple of ALIGNMENT bytes."""
        wanted = np.dtype(dtype)
        count = int(np.prod(shape, dtype=np.int64)) * wanted.itemsize
        raw = np.empty(count + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        return raw[start : start + count].view(wanted).reshape(shape)

    def upload(self, source: NDArray[Any], target: Any) -> None:
        np.copyto(target, source, casting="no")

    def copy(self, source: Any, target: Any) -> None:
        np.copyto(target, source, casting="no")

    def take(self, source: Any, rows: Indices, target: Any) -> None:
        np.take(source, rows, axis=0, out=target, mode="clip")

    def download(self, source: Any) -> NDArray[Any]:
        return np.array(source)

    def hold(self, array: Any) -> NDArray[Any]:
        if not isinstance(array, np.ndarray):
            array = from_dlpack(array)
        return np.asarray(array, order="C")

    def address(self, array: Any) -> int:
        return int(array.ctypes.data)

    def free_bytes(self) -> int | None:
        """What the system says it can still give without swapping, on Linux."""
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
        except OSError:
            return None
        found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        return found[0] if found else None

    def wait(self) -> None:
        pass


def from_dlpack(array: Any) -> NDArray[Any]:
    """A NumPy view of an array of another library on the CPU. Raises UsageError for one that is none, or elsewhere."""
    try:
        found: NDArray[Any] = np.from_dlpack(array)
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"expected a NumPy array, or one that DLPack can hand to the CPU, found {type(array).__name__} ({error})"
        ) from None
    return found


class Table:
    """Arrays of one shape in one allocation, each at a multiple of ALIGNMENT bytes."""

    def __init__(self, memory: Memory, count: int, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        kind = np.dtype(dtype)
        self._memory, self._size = memory, int(np.prod(shape, dtype=np.int64))
        self._whole = memory.empty((count, aligned(self._size * kind.itemsize) // kind.itemsize), kind)
        self._rows: list[DeviceArray] = [self._whole[row][: self._size].reshape(shape) for row in range(count)]

    def __getitem__(self, row: int) -> DeviceArray:
        return self._rows[row]

    def upload(self, values: Mapping[int, NDArray[Any]]) -> None:
        """Set the arrays at these rows in one copy, and the others to zeros."""
        staged = np.zeros(self._whole.shape, self._whole.dtype)
        for row, value in values.items():
            staged[row, : self._size] = value.ravel()
        self._memory.upload(staged, self._whole)


def aligned(size: int) -> int:
    """`size` bytes, rounded up to a multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT
