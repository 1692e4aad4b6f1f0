"""Memory of a device: arrays and the few operations on them that a run needs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from sg_runtime.arrays import Indices
from sg_runtime.errors import UsageError

ALIGNMENT = 256
"""Alignment in bytes of every tensor that an engine reads or writes."""


class DeviceArray(Protocol):
    """A C-contiguous array on a device. On the CPU it is a NumPy array.

    An index or a slice with step 1 along the first axis returns a view, and so does `reshape`.
    `view` returns the bytes of an array with one axis as another dtype. DLPack exports the array
    without a copy.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def nbytes(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...

    def reshape(self, shape: Any, /) -> Any: ...

    def view(self, dtype: Any, /) -> Any: ...

    def __dlpack__(self, *, stream: Any = None) -> Any: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


class Memory(Protocol):
    """Memory of one device. Operations run in the order of one stream.

    Only `download` and `wait` wait for the device. device: "cpu", or a GPU such as "cuda:0".
    """

    device: str

    def enter(self) -> None:
        """Make the device current in the calling thread until `leave`."""
        ...

    def leave(self) -> None:
        """Make the device current that was so before `enter`."""
        ...

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> DeviceArray:
        """Return an uninitialised array. Raises DeviceError if the memory does not suffice."""
        ...

    def upload(self, source: NDArray[Any], target: DeviceArray) -> None:
        """Copy a CPU array to an array of the same shape and dtype on the device."""
        ...

    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        """Copy within the device."""
        ...

    def take(self, source: DeviceArray, rows: Indices, target: DeviceArray) -> None:
        """Set target[e, b * M + m] = source[e, rows[b], m].

        source: (E, U, M). rows: (B,) on the CPU. target: (E, W) with W of at least B * M; the
        values after B * M stay as they are.
        """
        ...

    def download(self, source: DeviceArray) -> NDArray[Any]:
        """Return a copy on the CPU."""
        ...

    def hold(self, array: Any) -> DeviceArray:
        """Return `array` on this device.

        It is returned unchanged, as a zero-copy DLPack view if it is already here, or copied if it
        is a NumPy array. Raises UsageError if it is on another device, or not contiguous on a GPU.
        """
        ...

    def address(self, array: DeviceArray) -> int:
        """Return the address of the first value."""
        ...

    def free_bytes(self) -> int | None:
        """Return the bytes that can be allocated, None if that is unknown."""
        ...

    def wait(self) -> None:
        """Wait until all submitted work is done. Raises DeviceError if the device was lost."""
        ...


class HostMemory:
    """Memory of the CPU, as NumPy arrays."""

    device = "cpu"

    def enter(self) -> None:
        pass

    def leave(self) -> None:
        pass

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """Return an uninitialised array that starts at a multiple of ALIGNMENT bytes."""
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
        size = source.shape[2]
        for image, row in enumerate(rows.tolist()):
            target[:, image * size : (image + 1) * size] = source[:, row]

    def download(self, source: Any) -> NDArray[Any]:
        return np.array(source)

    def hold(self, array: Any) -> NDArray[Any]:
        if not isinstance(array, np.ndarray):
            array = from_dlpack(array)
        return np.asarray(array, order="C")

    def address(self, array: Any) -> int:
        return int(array.ctypes.data)

    def free_bytes(self) -> int | None:
        """Return the bytes that Linux reports as available without swapping, None elsewhere."""
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
        except OSError:
            return None
        found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        return found[0] if found else None

    def wait(self) -> None:
        pass


def from_dlpack(array: Any) -> NDArray[Any]:
    """Return a NumPy view of another library's CPU array.

    Raises UsageError if it does not support DLPack, or is on another device.
    """
    try:
        found: NDArray[Any] = np.from_dlpack(array)
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"expected a NumPy array, or one that DLPack can export to the CPU, found {type(array).__name__} ({error})"
        ) from None
    return found


class Table:
    """Arrays of one shape in one allocation. Each starts at a multiple of ALIGNMENT bytes."""

    def __init__(self, memory: Memory, count: int, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        kind = np.dtype(dtype)
        self._memory, self._size = memory, int(np.prod(shape, dtype=np.int64))
        self._whole = memory.empty((count, aligned(self._size * kind.itemsize) // kind.itemsize), kind)
        self._rows: list[DeviceArray] = [self._whole[row][: self._size].reshape(shape) for row in range(count)]

    def __getitem__(self, row: int) -> DeviceArray:
        return self._rows[row]

    def upload(self, places: Sequence[int], values: NDArray[Any]) -> None:
        """Set the arrays at `places` to values (P, …) and zero all others, in one copy."""
        staged = np.zeros(self._whole.shape, self._whole.dtype)
        staged[places, : self._size] = values.reshape(len(places), -1)
        self._memory.upload(staged, self._whole)

    def take(self, source: DeviceArray, rows: Indices) -> None:
        """Set the first E arrays: array e is source[e, rows], source (E, U, M), rows (B,)."""
        self._memory.take(source, rows, self._whole[: source.shape[0]])


def aligned(size: int) -> int:
    """Return `size` bytes, rounded up to a multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT
