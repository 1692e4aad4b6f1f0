"""DLPack capsules, exchanged with NumPy and PyTorch on the CPU without a copy."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sg_runtime.devices import dlpack

DTYPES = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"]
SHAPES: list[tuple[int, ...]] = [(), (0,), (2, 0, 3), (1,), (7,), (2, 3), (1, 4, 1, 2)]
CONSUMERS: dict[str, Callable[[Any], Any]] = {"numpy": np.from_dlpack, "torch": torch.from_dlpack}


class Token:
    """Keeps the memory of an array alive, like an allocation.

    There is one live token for each export that was not released.
    """

    live: ClassVar["weakref.WeakSet[Token]"] = weakref.WeakSet()

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array
        self.live.add(self)


class Exported:
    """An array that supports DLPack only through this library's capsules."""

    def __init__(self, array: NDArray[Any], device: tuple[int, int] = (dlpack.CPU, 0)) -> None:
        self.array, self.device = array, device

    def __dlpack__(self, **_: Any) -> object:
        array = self.array
        return dlpack.export(array.ctypes.data, array.shape, array.dtype, self.device, Token(array))

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


@pytest.fixture
def exports() -> Iterator[Callable[[], int]]:
    """Yield a function that counts the test's unreleased exports.

    All exports must be released when the test ends.
    """
    before = len(Token.live)
    yield lambda: len(Token.live) - before
    assert len(Token.live) == before


@pytest.fixture(params=CONSUMERS)
def consume(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    """Return a function that makes an array from a DLPack exporter."""
    return CONSUMERS[request.param]


def numbers(shape: tuple[int, ...], dtype: Any = "float32") -> NDArray[Any]:
    return np.arange(1, 1 + np.prod(shape, dtype=int)).astype(dtype).reshape(shape)


def address(array: Any) -> int:
    return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr())


@pytest.mark.usefixtures("exports")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_export_is_the_array_itself(consume: Callable[[Any], Any], shape: tuple[int, ...], dtype: str) -> None:
    array = numbers(shape, dtype)
    found = consume(Exported(array))
    assert tuple(found.shape) == shape
    assert str(found.dtype).removeprefix("torch.") == dtype
    if array.size:  # PyTorch gives an empty tensor no address
        assert address(found) == address(array)
    array += 1
    np.testing.assert_array_equal(np.asarray(found), array)
    if isinstance(found, torch.Tensor) and array.size:
        found.reshape(-1)[0] = 0
        assert array.ravel()[0] == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_export_lives_as_long_as_the_last_that_consumes_it(
    consume: Callable[[Any], Any], exports: Callable[[], int], shape: tuple[int, ...]
) -> None:
    found = [consume(Exported(numbers(shape))), consume(Exported(numbers(shape))).reshape(-1)]
    assert exports() == 2
    found.pop()
    assert exports() == 1
    np.testing.assert_array_equal(np.asarray(found[0]), numbers(shape))
    found.pop()
    assert exports() == 0


def test_export_that_nobody_consumes_goes_with_its_capsule(exports: Callable[[], int]) -> None:
    capsule = Exported(numbers((2,))).__dlpack__()
    assert exports() == 1
    del capsule
    assert exports() == 0


def test_export_that_its_consumer_refuses_says_why_and_goes(exports: Callable[[], int]) -> None:
    """NumPy releases the capsule while its error is raised.

    The release must not clear that error.
    """
    with pytest.raises((BufferError, RuntimeError), match=r"[Dd]evice"):
        np.from_dlpack(Exported(numbers((2,)), (dlpack.CUDA, 0)))
    assert exports() == 0


@pytest.mark.usefixtures("exports")
def test_view_of_an_export_is_what_was_exported() -> None:
    array = numbers((2, 3), "int16")
    found = dlpack.view(Exported(array, (dlpack.CUDA, 5)))
    assert (found.address, found.shape, found.dtype) == (address(array), (2, 3), np.int16)
    assert found.device == (dlpack.CUDA, 5)
    assert found.contiguous


def torch_of(array: NDArray[Any]) -> Any:
    """Return PyTorch's view of the same memory."""
    return torch.from_numpy(array)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [np.asarray, torch_of], ids=["numpy", "torch"])
def test_view_tells_address_shape_and_dtype(make: Callable[[Any], Any], shape: tuple[int, ...], dtype: str) -> None:
    array = make(numbers(shape, dtype))
    found = dlpack.view(array)
    assert (found.shape, found.dtype, found.device) == (shape, np.dtype(dtype), (dlpack.CPU, 0))
    if np.prod(shape):
        assert found.address == address(array)
        assert found.contiguous


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3), (0, 2)], ids=str)
@pytest.mark.parametrize("make", [np.asarray, torch_of], ids=["numpy", "torch"])
def test_view_of_nothing_is_contiguous(make: Callable[[Any], Any], shape: tuple[int, ...]) -> None:
    """NumPy treats an empty array as contiguous for any strides."""
    assert dlpack.view(make(numbers(shape))).contiguous


PARTS: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "rows": (lambda array: array[1:], True),
    "one row": (lambda array: array[1], True),
    "one column": (lambda array: array[:, :1], False),
    "one value": (lambda array: array[1:2, 2:3], True),
    "columns": (lambda array: array[:, 1:], False),
    "every other row": (lambda array: array[::2], False),
    "transposed": (lambda array: array.T, False),
    "one row transposed": (lambda array: array[1:2].T, True),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("make", [np.asarray, torch_of], ids=["numpy", "torch"])
def test_view_of_a_part_tells_its_strides(make: Callable[[Any], Any], part: str) -> None:
    take, contiguous = PARTS[part]
    array = take(make(numbers((4, 5))))
    found = dlpack.view(array)
    assert found.address == address(array)
    assert found.contiguous == contiguous
    strides = [size // 4 for size in array.strides] if isinstance(array, np.ndarray) else array.stride()
    assert found.strides is not None
    kept = [axis for axis, size in enumerate(array.shape) if size > 1]  # strides of the other axes have no meaning
    assert [found.strides[axis] for axis in kept] == [strides[axis] for axis in kept]


cuts = st.builds(
    lambda start, count, step: slice(start, start + count, step),
    st.integers(0, 1),
    st.integers(1, 4),
    st.integers(1, 3),
)
"""Slices that are never empty. Empty arrays have their own test."""


@given(st.lists(cuts, min_size=3, max_size=3), st.permutations(range(3)))
def test_view_is_contiguous_where_numpy_says_so(cut: list[slice], axes: list[int]) -> None:
    array = numbers((4, 3, 2))[tuple(cut)].transpose(axes)
    assert dlpack.view(array).contiguous == array.flags.c_contiguous


@pytest.mark.parametrize("make", [lambda memory: memory, torch_of], ids=["numpy", "torch"])
def test_view_keeps_the_memory_by_its_owner(make: Callable[[Any], Any]) -> None:
    memory = numbers((3,))
    alive, found = weakref.ref(memory), dlpack.view(make(memory))
    del memory
    assert alive() is not None
    del found
    assert alive() is None


@pytest.mark.parametrize("stream", [None, 7])
def test_view_hands_a_stream_on_where_there_is_one(stream: int | None) -> None:
    asked: list[dict[str, Any]] = []

    class Noting(Exported):
        def __dlpack__(self, **how: Any) -> object:
            asked.append(how)
            return super().__dlpack__()

    dlpack.view(Noting(numbers((2,))), stream)
    assert asked == [{} if stream is None else {"stream": stream}]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.bool], ids=str)
def test_view_of_a_type_that_numpy_has_not_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"^expected integers or floating-point numbers, found DLPack's type \d+ of"):
        dlpack.view(torch.zeros(3, dtype=dtype))


@pytest.mark.parametrize("array", [[1.0], 3, "text", None, b"bytes"], ids=str)
def test_view_of_what_speaks_no_dlpack_is_refused(array: Any) -> None:
    with pytest.raises(TypeError, match=f"^expected an array that supports DLPack, found {type(array).__name__}$"):
        dlpack.view(array)
