"""CPU memory, and tables of arrays in it. GPU memory is in `test_cuda.py`."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sg_runtime.devices import dlpack
from sg_runtime.devices.cuda import CudaArray
from sg_runtime.devices.memory import ALIGNMENT, HostMemory, Table, aligned
from sg_runtime.errors import UsageError

MEMORY = HostMemory()
shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
dtypes = st.sampled_from(["uint8", "int16", "float16", "float32", "int64", "float64"])


class Counting(HostMemory):
    """CPU memory that counts allocations and uploads."""

    def __init__(self) -> None:
        self.allocations = self.uploads = 0

    def empty(self, shape: Any, dtype: Any) -> NDArray[Any]:
        self.allocations += 1
        return super().empty(shape, dtype)

    def upload(self, source: Any, target: Any) -> None:
        self.uploads += 1
        super().upload(source, target)


@given(st.integers(0, 1 << 40))
def test_aligned_is_the_next_multiple(size: int) -> None:
    found = aligned(size)
    assert found % ALIGNMENT == 0
    assert size <= found < size + ALIGNMENT


@given(shapes, dtypes)
def test_empty_begins_at_a_multiple_of_the_alignment(shape: tuple[int, ...], dtype: str) -> None:
    found = MEMORY.empty(shape, dtype)
    assert (found.shape, found.dtype) == (shape, np.dtype(dtype))
    assert found.flags.c_contiguous
    assert MEMORY.address(found) == found.ctypes.data
    if found.size:  # NumPy gives an empty array no address
        assert found.ctypes.data % ALIGNMENT == 0
    found[...] = 1  # all of it is writable


@given(shapes, dtypes)
def test_upload_copy_and_download_give_the_values_on(shape: tuple[int, ...], dtype: str) -> None:
    values = np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape)
    there, copy = MEMORY.empty(shape, dtype), MEMORY.empty(shape, dtype)
    MEMORY.upload(values, there)
    MEMORY.copy(there, copy)
    there.fill(0)
    found = MEMORY.download(copy)
    copy.fill(0)
    MEMORY.wait()
    np.testing.assert_array_equal(found, values)


def test_upload_of_another_dtype_is_an_error() -> None:
    """No value may change during the upload."""
    with pytest.raises(TypeError, match="Cannot cast"):
        MEMORY.upload(np.zeros(2), MEMORY.empty((2,), np.float32))


@given(st.integers(1, 5), st.lists(st.integers(0, 4), max_size=7), st.integers(0, 2))
def test_take_is_the_rows_that_are_named(width: int, rows: list[int], rest: int) -> None:
    """The values behind them stay as they are."""
    source, target = np.arange(15 * width).reshape(3, 5, width), np.full((3, len(rows) * width + rest), -1)
    MEMORY.take(source, np.array(rows, np.int64), target)
    expected = source[:, np.array(rows, np.int64)].reshape(3, -1)
    np.testing.assert_array_equal(target, np.pad(expected, ((0, 0), (0, rest)), constant_values=-1))


def test_free_bytes_is_told_where_the_system_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = MEMORY.free_bytes()
    assert found is None or found > 0
    assert found is not None or sys.platform != "linux"

    def absent(*_: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr("pathlib.Path.read_text", absent)  # as on Windows
    assert MEMORY.free_bytes() is None


def test_hold_of_numpys_array_is_itself() -> None:
    for array in (np.ones((2, 3)), np.array(1.5), np.zeros((0, 2))):
        assert MEMORY.hold(array) is array


@pytest.mark.parametrize("shape", [(), (0, 2), (3,), (2, 3)], ids=str)
def test_hold_of_torchs_array_is_a_view(shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape)
    found = MEMORY.hold(tensor)
    assert (found.shape, found.dtype) == (shape, np.float32)
    if tensor.numel():
        assert MEMORY.address(found) == tensor.data_ptr()
    tensor += 1
    np.testing.assert_array_equal(found, tensor.numpy())


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("part", [lambda x: x.T, lambda x: x[:, 1:], lambda x: x[::2]], ids=["T", "columns", "rows"])
def test_hold_of_an_array_with_gaps_is_a_copy_in_order(make: Callable[[Any], Any], part: Callable[[Any], Any]) -> None:
    array = part(make(np.arange(12.0).reshape(3, 4)))
    found = MEMORY.hold(array)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, np.asarray(array))


@pytest.mark.parametrize(
    "array",
    [
        [1.0, 2.0],
        None,
        torch.zeros(2, dtype=torch.bfloat16),
        torch.zeros(2, requires_grad=True),
        torch.zeros(2, device="meta"),
        CudaArray(4096, (2,), np.float32, 0, None),
    ],
    ids=["list", "none", "bfloat16", "gradient", "meta", "cuda"],
)
def test_hold_of_what_the_cpu_cannot_read_is_refused(array: Any) -> None:
    """The message quotes the other library's error in brackets."""
    with pytest.raises(UsageError) as caught:
        MEMORY.hold(array)
    expected = f"expected a NumPy array, or one that DLPack can export to the CPU, found {type(array).__name__} ("
    assert str(caught.value).startswith(expected)


@given(st.integers(1, 4), shapes, dtypes)
def test_table_is_one_allocation_of_aligned_arrays(count: int, shape: tuple[int, ...], dtype: str) -> None:
    memory = Counting()
    table = Table(memory, count, shape, dtype)
    assert memory.allocations == 1
    rows = [table[row] for row in range(count)]
    for number, row in enumerate(rows):
        assert (row.shape, row.dtype) == (shape, np.dtype(dtype))
        assert memory.address(row) % ALIGNMENT == 0 or not row.size  # NumPy gives an empty array no address
        row[...] = number
    for number, row in enumerate(rows):
        np.testing.assert_array_equal(row, np.full(shape, number))  # so no two rows overlap


@pytest.mark.parametrize("shape", [(), (3,), (2, 100)], ids=str)
def test_table_upload_sets_all_rows_in_one_copy(shape: tuple[int, ...]) -> None:
    memory = Counting()
    table = Table(memory, 4, shape, np.float32)
    for row in range(4):
        table[row][...] = 9
    values = np.stack([np.full(shape, row + 1, np.float32) for row in (0, 2)])
    table.upload([0, 2], values)
    assert memory.uploads == 1
    for row, value in enumerate((1, 0, 3, 0)):
        np.testing.assert_array_equal(table[row], np.full(shape, value))


def test_device_types_are_those_that_dlpack_gives() -> None:
    assert np.zeros(1).__dlpack_device__()[0] == dlpack.CPU
    assert CudaArray(4096, (2,), np.float32, 1, None).__dlpack_device__() == (dlpack.CUDA, 1) == (2, 1)
