"""GPU memory on a stand-in for the CUDA driver. The real driver has every name that is called."""

import ast
import importlib
import inspect
import re
import threading
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cuda_stand_in import CUresult, Driver
from numpy.typing import NDArray

import sg_runtime.devices.cuda
import sg_runtime.devices.gpus
from sg_runtime.devices import dlpack
from sg_runtime.devices.cuda import CudaArray, CudaMemory, keep_current, stream_handle, use_gpu
from sg_runtime.devices.gpus import Gpu, call, driver_cuda, find_gpus, load_driver
from sg_runtime.devices.memory import ALIGNMENT, Table
from sg_runtime.errors import DeviceError, DeviceMemoryError, UsageError

REAL = importlib.import_module("cuda.bindings.driver")


@pytest.fixture
def memory(driver: Driver) -> CudaMemory:
    """Return the memory of the GPU that is current."""
    memory = CudaMemory()
    memory.enter()
    return memory


def numbers(*shape: int) -> NDArray[np.float32]:
    return np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)


def there(memory: CudaMemory, values: NDArray[Any]) -> CudaArray:
    """Return the values as an array on the device."""
    found = memory.empty(values.shape, values.dtype)
    memory.upload(values, found)
    return found


class Foreign:
    """An array of another library, exported by DLPack from memory of this library."""

    def __init__(self, array: CudaArray, device: tuple[int, int] = (dlpack.CUDA, 0)) -> None:
        self.array, self.device = array, device
        self.streams: list[Any] = []

    def __dlpack__(self, *, stream: Any = None, **_: Any) -> object:
        """Export the array.

        By the array API standard only GPUs take a stream, and a stream of CUDA is never 0.
        """
        assert stream is None or (self.device[0] == dlpack.CUDA and stream != 0)
        self.streams.append(stream)
        own = self.array
        return dlpack.export(own.address, own.shape, own.dtype, self.device, own.owner)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


# Names of the driver.


def driver_calls() -> Iterator[tuple[str, int]]:
    """Yield each driver call in the two modules: the function and its number of arguments."""
    for module in (sg_runtime.devices.cuda, sg_runtime.devices.gpus):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Attribute) and re.match("cu[A-Z]", node.func.attr):
                yield node.func.attr, len(node.args)
            if isinstance(node.func, ast.Name) and node.func.id == "call":
                name = node.args[1]
                assert isinstance(name, ast.Constant)
                yield name.value, len(node.args) - 2


def driver_enums() -> Iterator[tuple[str, ...]]:
    """Yield each enumeration member, with its enumeration if the code names it."""
    for module in (sg_runtime.devices.cuda, sg_runtime.devices.gpus):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Attribute) and node.attr.startswith(("CU_", "CUDA_")):
                yield (*((node.value.attr,) if isinstance(node.value, ast.Attribute) else ()), node.attr)


@pytest.mark.parametrize(("name", "count"), sorted(set(driver_calls())))
def test_driver_has_the_function_with_as_many_parameters(name: str, count: int) -> None:
    assert len(inspect.signature(getattr(REAL, name)).parameters) == count


@pytest.mark.parametrize("member", sorted(set(driver_enums())), ids=".".join)
def test_driver_has_the_member(member: tuple[str, ...]) -> None:
    owner = {"driver": REAL}.get(member[0]) or getattr(REAL, member[0] if len(member) == 2 else "CUdevice_attribute")
    assert hasattr(owner, member[-1])


def test_stand_in_has_the_functions_that_are_called_with_the_drivers_parameters() -> None:
    names = {name for name, _ in driver_calls()}
    assert {name for name in vars(Driver) if re.match("cu[A-Z]", name)} == names
    for name in names:
        own = [*inspect.signature(getattr(Driver, name)).parameters][1:]  # without self
        assert own == [*inspect.signature(getattr(REAL, name)).parameters]


def test_find_gpus_of_the_stand_in_is_one(driver: Driver) -> None:
    assert find_gpus() == (Gpu("a stand-in", 89),)


def test_driver_cuda_is_its_major_and_minor_version(driver: Driver) -> None:
    for driver.version, expected in ((12080, (12, 8)), (13000, (13, 0)), (13010, (13, 1))):
        assert driver_cuda() == expected


def test_load_driver_without_a_gpu_says_what_it_gave(driver: Driver) -> None:
    driver.statuses["cuInit"] = CUresult.CUDA_ERROR_NO_DEVICE
    with pytest.raises(DeviceError, match=r"^the CUDA driver: cuInit gave CUDA_ERROR_NO_DEVICE; nvidia-smi may say mo"):
        load_driver()


def test_memory_of_a_gpu_that_is_not_there_is_an_error(driver: Driver) -> None:
    with pytest.raises(DeviceError, match="cuDeviceGet gave CUDA_ERROR_INVALID_DEVICE"):
        CudaMemory(1)


# Arrays.


@pytest.fixture
def array() -> CudaArray:
    """Return 3 × 2 × 4 values at address 4096, which nobody reads."""
    return CudaArray(4096, [3, 2, 4], "float32", 1, "owner")


def test_array_tells_of_itself(array: CudaArray) -> None:
    assert (array.shape, array.dtype, array.device, array.owner) == ((3, 2, 4), np.float32, 1, "owner")
    assert array.nbytes == 96
    assert CudaArray(0, (), "int64", 0, None).nbytes == 8
    assert CudaArray(0, (0, 5), "int64", 0, None).nbytes == 0


INDICES = [
    0,
    2,
    -1,
    -3,
    np.int64(1),
    slice(None),
    slice(1, 2),
    slice(-2, None),
    slice(2, 1),
    slice(9, 12),
    slice(1, 99),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_index_of_an_array_is_the_view_that_numpy_gives(array: CudaArray, index: Any) -> None:
    expected = np.zeros(array.shape, array.dtype)
    found, part = array[index], expected[index]
    assert (found.shape, found.dtype, found.device, found.owner) == (part.shape, part.dtype, 1, "owner")
    if part.size:
        assert found.address - array.address == part.ctypes.data - expected.ctypes.data


@pytest.mark.parametrize("index", [3, -4, slice(None, None, 2), slice(None, None, -1)], ids=str)
def test_index_that_gives_no_view_is_refused(array: CudaArray, index: Any) -> None:
    with pytest.raises(IndexError):
        array[index]


@pytest.mark.parametrize("shape", [(24,), (6, 4), [1, 3, 8, 1], (2, 3, 4)], ids=str)
def test_reshape_is_the_same_values(array: CudaArray, shape: Any) -> None:
    found = array.reshape(shape)
    assert (found.address, found.shape, found.dtype, found.owner) == (4096, tuple(shape), np.float32, "owner")


def test_view_of_bytes_is_another_dtype(memory: CudaMemory) -> None:
    content = there(memory, np.arange(8, dtype=np.uint8))
    view = content[4:8].view(np.float16)
    assert (view.shape, view.dtype, view.owner) == ((2,), np.float16, content.owner)
    np.testing.assert_array_equal(memory.download(view), np.arange(4, 8, dtype=np.uint8).view(np.float16))


@pytest.mark.parametrize("shape", [(), (23,), (6, 5), (0, 24)], ids=str)
def test_reshape_to_another_size_is_refused(array: CudaArray, shape: Any) -> None:
    with pytest.raises(ValueError, match=r"^expected a shape with the same number of values as \(3, 2, 4\), found \("):
        array.reshape(shape)


def test_array_exports_itself(array: CudaArray) -> None:
    view = dlpack.view(array[1])
    assert (view.address, view.shape, view.dtype) == (4096 + 32, (2, 4), np.float32)
    assert view.contiguous
    assert view.device == array.__dlpack_device__() == (dlpack.CUDA, 1)
    assert array[1].__cuda_array_interface__ == {
        "shape": (2, 4),
        "typestr": "<f4",
        "data": (4096 + 32, False),
        "strides": None,
        "version": 3,
    }
    assert array.__dlpack__(stream=5, max_version=(1, 0), dl_device=None, copy=None) is not None


# Memory.


def test_empty_begins_at_a_multiple_of_the_alignment_and_is_given_back_with_its_last_view(
    driver: Driver, memory: CudaMemory
) -> None:
    found = memory.empty((2, 3), "float32")
    assert (memory.device, found.shape, found.dtype, found.device) == ("cuda:0", (2, 3), np.float32, 0)
    assert memory.address(found) % ALIGNMENT == 0
    assert driver.used == 24
    view, exported = found[1:][0], found[0].__dlpack__()
    for held in (found, view):
        assert driver.used == 24
        del held
    del found
    assert driver.used == 24
    del view
    assert driver.used == 24
    del exported
    assert driver.used == 0


@pytest.mark.parametrize("shape", [(0,), (3, 0)], ids=str)
def test_empty_of_no_values_is_an_array(memory: CudaMemory, shape: tuple[int, ...]) -> None:
    """The driver cannot allocate 0 bytes."""
    assert memory.download(there(memory, numbers(*shape))).shape == shape


def test_empty_beyond_what_is_free_says_what_is_needed_and_free(driver: Driver, memory: CudaMemory) -> None:
    driver.total = 5_000_000
    kept = memory.empty((1_000_000,), np.uint8)
    assert memory.free_bytes() == 4_000_000
    with pytest.raises(DeviceMemoryError) as caught:
        memory.empty((3_000_000,), np.float32)
    assert str(caught.value) == (
        "cuda:0: an allocation needs 12 MB, found 4 MB free: the CUDA driver: cuMemAlloc gave CUDA_ERROR_OUT_OF_MEMORY"
    )
    assert (driver.used, kept.nbytes) == (1_000_000, 1_000_000)
    assert memory.empty((1_000_000,), np.float32).nbytes == 4_000_000


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "int64", "uint8"])
def test_upload_copy_and_download_give_the_values_on(memory: CudaMemory, shape: tuple[int, ...], dtype: str) -> None:
    values = numbers(*shape).astype(dtype)
    sent, copy = values.copy(), memory.empty(shape, dtype)
    source = there(memory, sent)
    sent.fill(0)  # the caller may reuse the array when upload returns
    memory.copy(source, copy)
    del source
    found = memory.download(copy)
    np.testing.assert_array_equal(found, values)
    assert (found.shape, found.dtype) == (shape, np.dtype(dtype))


def test_upload_of_an_array_with_gaps_is_its_values_in_order(memory: CudaMemory) -> None:
    values = numbers(3, 4).T
    np.testing.assert_array_equal(memory.download(there(memory, values)), values)


def test_copy_into_a_view_leaves_the_rest_alone(memory: CudaMemory) -> None:
    target = there(memory, numbers(4, 3))
    memory.copy(there(memory, np.full((2, 3), 9, np.float32)), target[1:3])
    np.testing.assert_array_equal(memory.download(target), [[0, 1, 2], [9, 9, 9], [9, 9, 9], [9, 10, 11]])


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 1, 0], [0, 0], [1, 1, 1, 2], []], ids=str)
def test_take_is_the_rows_that_are_named(driver: Driver, memory: CudaMemory, rows: list[int]) -> None:
    """All evaluations of an image are copied at once. The values behind them stay as they are."""
    source, target = there(memory, numbers(5, 3, 4)), there(memory, np.full((5, len(rows) * 4 + 3), -1, np.float32))
    memory.take(source, np.array(rows, np.int64), target)
    expected = numbers(5, 3, 4)[:, rows].reshape(5, -1)
    np.testing.assert_array_equal(memory.download(target), np.pad(expected, ((0, 0), (0, 3)), constant_values=-1))
    assert driver.calls.count("cuMemcpy2DAsync") == len(rows)


def test_nothing_waits_but_download_and_wait(driver: Driver, memory: CudaMemory) -> None:
    source = there(memory, numbers(3, 4))
    target = memory.empty((3, 4), np.float32)
    memory.copy(source, target)
    memory.take(source.reshape((1, 3, 4)), np.array([1, 1, 0]), target.reshape((1, 12)))
    memory.hold(source), memory.hold(Foreign(target)), memory.free_bytes(), memory.address(target)
    assert not {"cuStreamSynchronize", "cuMemFree"} & {*driver.calls}
    memory.wait()
    memory.download(target)
    assert driver.calls.count("cuStreamSynchronize") == 2


def test_table_in_a_gpus_memory_is_one_upload(driver: Driver, memory: CudaMemory) -> None:
    table = Table(memory, 3, (2, 5), np.float32)
    table.upload([1], numbers(1, 2, 5))
    assert driver.calls.count("cuMemcpyHtoDAsync") == driver.calls.count("cuMemAlloc") == 1
    for row, expected in enumerate((np.zeros((2, 5)), numbers(2, 5), np.zeros((2, 5)))):
        assert memory.address(table[row]) % ALIGNMENT == 0
        np.testing.assert_array_equal(memory.download(table[row]), expected)


def test_memory_that_another_thread_gives_back_is_free(driver: Driver, memory: CudaMemory) -> None:
    """A thread that never used the GPU may drop a sample.

    That thread has no CUDA context.
    """
    held = [memory.empty((2, 3), "float32")]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join(60)
    assert driver.used == 0


REFUSED = [CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED]


@pytest.mark.parametrize("status", REFUSED, ids=lambda status: status.name)
def test_memory_that_the_driver_does_not_free_is_freed_with_the_next(
    driver: Driver, memory: CudaMemory, status: CUresult
) -> None:
    """The driver refuses frees while another library captures."""
    first, second = memory.empty((3,), np.float32), memory.empty((5,), np.float32)
    driver.statuses["cuMemFree"] = status
    del first
    assert driver.used == 32
    del driver.statuses["cuMemFree"]
    del second
    assert driver.used == 0
    driver.statuses["cuMemFree"] = status
    kept = [memory.empty((3,), np.float32)]
    kept.clear()
    del driver.statuses["cuMemFree"]
    assert memory.empty((1,), np.float32).nbytes == 4
    assert driver.used == 0


def test_memory_waits_for_captures_in_the_global_mode(driver: Driver, memory: CudaMemory) -> None:
    """An allocation starts after the capture, and a free is put off, whichever thread asks."""
    kept, made = [memory.empty((3,), np.float32)], []
    thread = threading.Thread(target=lambda: made.append(memory.empty((5,), np.float32)))
    with memory.captures:
        driver.capture_globally(memory.stream)
        kept.clear()
        thread.start()
        thread.join(0.05)
        assert (made, driver.used) == ([], 12)
        assert driver.end_globally(memory.stream) == []
    thread.join(60)
    assert (len(made), driver.used) == (1, 20)


def test_end_capture_of_a_stream_ends_and_discards_it(driver: Driver, memory: CudaMemory) -> None:
    memory.end_capture()
    assert "cuStreamEndCapture" not in driver.calls
    array = there(memory, numbers(2))
    driver.capture_globally(memory.stream)
    memory.copy(array, array)
    memory.end_capture()
    assert not driver.capturing(memory.stream)
    assert not driver.graphs
    assert memory.download(array).tolist() == [0, 1]


def test_enter_makes_the_gpu_that_of_the_thread(driver: Driver, memory: CudaMemory) -> None:
    found: list[object] = []

    def work() -> None:
        try:
            memory.wait()
        except DeviceError as error:
            found.append(str(error))
        memory.enter()
        found.append(memory.download(there(memory, numbers(2))).tolist())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert found == [
        "the CUDA driver: cuStreamSynchronize gave CUDA_ERROR_INVALID_CONTEXT; nvidia-smi may say more",
        [0, 1],
    ]


# Arrays of other libraries.


def test_hold_of_an_array_of_this_gpu_is_itself(memory: CudaMemory) -> None:
    array = memory.empty((2, 3), np.float32)
    assert memory.hold(array) is array


@pytest.mark.parametrize(
    "values", [numbers(2, 3), numbers(4, 4)[:, ::2], np.array(3, np.int64), numbers(0, 2)], ids=str
)
def test_hold_of_numpys_array_is_a_copy(memory: CudaMemory, values: NDArray[Any]) -> None:
    found = memory.hold(values)
    assert (found.shape, found.dtype) == (values.shape, values.dtype)
    np.testing.assert_array_equal(memory.download(found), values)


@pytest.mark.parametrize("shape", [(), (2, 3), (0, 3)], ids=str)
def test_hold_of_anothers_array_is_a_view_in_the_order_of_the_stream(
    driver: Driver, memory: CudaMemory, shape: tuple[int, ...]
) -> None:
    foreign = Foreign(there(memory, numbers(*shape)))
    found, streams, address = memory.hold(foreign), foreign.streams, foreign.array.address
    assert (found.address, found.shape, found.dtype, found.device) == (address, shape, np.float32, 0)
    assert streams == [memory.stream]
    del foreign
    np.testing.assert_array_equal(memory.download(found), numbers(*shape))
    del found
    assert driver.used == 0


def test_hold_of_an_array_elsewhere_is_refused(memory: CudaMemory) -> None:
    own = memory.empty((2,), np.float32)
    another = CudaArray(own.address, (2,), np.float32, 1, own)
    for array, device in ((Foreign(own, (dlpack.CUDA, 1)), (2, 1)), (another, (2, 1)), (Foreign(own, (1, 0)), (1, 0))):
        with pytest.raises(UsageError) as caught:
            memory.hold(array)
        message = str(caught.value)
        assert message.startswith(f"expected a contiguous array on cuda:0, found {type(array).__name__} on DLPack ")
        assert str(device) in message


@pytest.mark.parametrize(
    "array",
    [
        torch.zeros(2),
        torch.zeros(2, requires_grad=True),
        torch.zeros(2, dtype=torch.bfloat16),
        [1.0, 2.0],
        None,
    ],
    ids=["cpu", "gradient", "bfloat16", "list", "none"],
)
def test_hold_of_what_a_gpu_cannot_read_is_refused(memory: CudaMemory, array: Any) -> None:
    with pytest.raises(UsageError, match=r"^expected a"):
        memory.hold(array)


@pytest.mark.parametrize(
    "made", [torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, requires_grad=True)], ids=["bfloat16", "gradient"]
)
def test_hold_of_what_dlpack_cannot_tell_is_refused(memory: CudaMemory, made: torch.Tensor) -> None:
    class Made(Foreign):
        """An exporter of a PyTorch tensor that claims to be on the GPU."""

        def __dlpack__(self, *, stream: Any = None, **_: Any) -> object:
            return made.__dlpack__()

    with pytest.raises(UsageError, match=r"^expected "):
        memory.hold(Made(memory.empty((2,), np.uint16)))


@pytest.mark.parametrize("part", [np.s_[:, :2], np.s_[::2]], ids=str)
def test_hold_of_an_array_with_gaps_is_refused(memory: CudaMemory, part: Any) -> None:
    class Gaps(Foreign):
        def __dlpack__(self, *, stream: Any = None, **_: Any) -> object:
            return torch.zeros(4, 4)[part].__dlpack__()

    with pytest.raises(UsageError, match=r"^expected a contiguous array on cuda:0, found Gaps"):
        memory.hold(Gaps(memory.empty((2,), np.float32)))


# Streams.


class Method:
    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, 0x70


class Property:
    __cuda_stream__ = (0, 0x70)


@pytest.mark.parametrize(
    "stream",
    [0x70, Method(), Property(), SimpleNamespace(cuda_stream=0x70), REAL.CUstream(0x70)],
    ids=["int", "method", "property", "torch", "cuda-bindings"],
)
def test_stream_handle_of_each_kind_is_its_number(stream: Any) -> None:
    assert stream_handle(stream) == 0x70
    assert type(stream_handle(stream)) is int


@pytest.mark.parametrize("stream", [True, "7", 7.0, None, object()], ids=lambda stream: type(stream).__name__)
def test_stream_handle_of_something_else_is_refused(stream: Any) -> None:
    with pytest.raises(UsageError, match=f"^stream: expected a CUDA stream: .*; found {type(stream).__name__}$"):
        stream_handle(stream)


def test_memory_in_a_given_stream_makes_none(driver: Driver) -> None:
    given = driver.stream()
    memory = CudaMemory(0, SimpleNamespace(cuda_stream=given))
    memory.enter()
    assert memory.stream == given
    np.testing.assert_array_equal(memory.download(there(memory, numbers(3))), numbers(3))
    assert "cuStreamCreate" not in driver.calls
    assert CudaMemory().stream != CudaMemory().stream  # otherwise each memory creates its own stream


@pytest.mark.parametrize("default", [0, 1, 2])
def test_memory_in_a_default_stream_has_one_of_its_own_in_order_with_it(
    driver: Driver, memory: CudaMemory, default: int
) -> None:
    """ONNX Runtime takes 0 as "no stream", and DLPack forbids it.

    What the caller has submitted before `enter` is done before the run, and what it submits after
    `leave` is done after the run.
    """
    own, foreign = there(memory, numbers(2)), Foreign(there(memory, numbers(2)))
    memory.wait()
    done: list[str] = []
    joined = CudaMemory(0, SimpleNamespace(cuda_stream=default))
    assert joined.stream > 2
    driver.put(default, lambda: done.append("caller, before"))
    joined.enter()
    driver.put(joined.stream, lambda: done.append("run"))
    np.testing.assert_array_equal(joined.download(joined.hold(foreign)), numbers(2))
    assert foreign.streams == [joined.stream]
    driver.put(joined.stream, lambda: done.append("end of run"))
    joined.leave()
    driver.put(default, lambda: done.append("caller, after"))
    assert done == ["caller, before", "run"]
    call(driver, "cuStreamSynchronize", default)
    assert done == ["caller, before", "run", "end of run", "caller, after"]
    joined.enter()
    joined.copy(own, own)
    joined.wait()
    joined.leave()


def test_memory_in_another_stream_records_no_event(driver: Driver) -> None:
    """The caller's own stream is in order already."""
    for stream in (None, driver.stream()):
        memory = CudaMemory(0, stream)
        memory.enter()
        memory.leave()
    assert not [name for name in driver.calls if "Event" in name]


def test_memory_in_a_stream_of_another_gpu_is_refused(driver: Driver) -> None:
    driver.count = 2
    with pytest.raises(UsageError) as caught:
        CudaMemory(0, SimpleNamespace(cuda_stream=driver.stream(1)))
    assert str(caught.value) == (
        "stream: expected a CUDA stream of cuda:0, found one of cuda:1: load the pipeline with device='cuda:1'"
    )
    assert caught.value.exit_code == 2
    assert CudaMemory(1, driver.stream(1)).device == "cuda:1"


def test_memory_in_a_stream_that_does_not_exist_is_refused(driver: Driver) -> None:
    with pytest.raises(UsageError, match=r"^stream: expected a CUDA stream of cuda:0, found 0x77 \(.*INVALID_HANDLE"):
        CudaMemory(0, 0x77)


@pytest.mark.parametrize("before", [None, 1])
def test_memory_gives_the_thread_its_current_gpu_back(driver: Driver, before: int | None) -> None:
    driver.count = 2
    if before is not None:
        use_gpu(before)
    memory = CudaMemory(0)
    assert driver.current == before
    memory.enter()
    assert driver.current == 0
    array = memory.empty((3,), np.float32)
    memory.leave()
    assert driver.current == before
    assert (memory.empty((3,), np.float32).nbytes, memory.free_bytes()) == (12, driver.total - 12)
    del array
    assert driver.current == before
    with keep_current():
        use_gpu(0)
    assert driver.current == before


def test_memory_keeps_the_callers_stream_alive(driver: Driver) -> None:
    """Libraries destroy a stream together with its object."""

    class Stream:
        cuda_stream = driver.stream()

    given = Stream()
    alive = weakref.ref(given)
    memory = CudaMemory(0, given)
    del given
    assert alive() is not None
    del memory
    assert alive() is None


# Captured runs.


def test_capture_does_nothing_until_it_is_called(driver: Driver, memory: CudaMemory) -> None:
    source, middle, target = (there(memory, np.full(3, value, np.float32)) for value in (1, 2, 3))

    def work() -> None:
        memory.copy(middle, target)
        memory.copy(source, middle)

    replay = memory.capture(work)
    assert memory.download(target).tolist() == [3, 3, 3]
    copies = driver.calls.count("cuMemcpyDtoDAsync")
    for expected in (2, 1):
        replay()
        assert memory.download(target).tolist() == [expected] * 3
    memory.upload(np.full(3, 7, np.float32), source)  # the graph captures the addresses, not the values
    replay()
    replay()
    assert memory.download(target).tolist() == [7, 7, 7]
    assert driver.calls.count("cuMemcpyDtoDAsync") == copies
    assert not driver.graphs
    assert len(driver.executables) == 1
    del replay
    assert not driver.executables


def test_capture_of_work_that_fails_ends_it_and_leaves_nothing(driver: Driver, memory: CudaMemory) -> None:
    array = there(memory, numbers(3))

    def work() -> None:
        memory.copy(array, array)
        raise ValueError("no")

    with pytest.raises(ValueError, match=r"^no$"):
        memory.capture(work)
    assert memory.download(array).tolist() == [0, 1, 2]  # the stream is still usable
    assert not driver.graphs
    assert not driver.executables


@pytest.mark.parametrize("name", ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate"])
def test_capture_that_the_driver_refuses_says_so_and_leaves_nothing(
    driver: Driver, memory: CudaMemory, name: str
) -> None:
    driver.statuses[name] = CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
    with pytest.raises(DeviceError, match=f"{name} gave CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"):
        memory.capture(lambda: None)
    assert not driver.graphs
    assert not driver.executables


def test_capture_of_work_that_allocates_is_an_error(memory: CudaMemory) -> None:
    """The driver forbids allocations during a capture and invalidates the capture."""
    with pytest.raises(DeviceError, match="gave CUDA_ERROR_STREAM_CAPTURE_"):
        memory.capture(lambda: memory.empty((3,), np.float32) and None)
    assert memory.download(there(memory, numbers(2))).tolist() == [0, 1]


# A device that is lost.


def test_work_on_memory_that_is_nobodys_loses_the_device(driver: Driver, memory: CudaMemory) -> None:
    array = memory.empty((3,), np.float32)
    memory.copy(CudaArray(4096, (3,), np.float32, 0, None), array)
    for _ in range(2):
        with pytest.raises(DeviceError, match="gave CUDA_ERROR_ILLEGAL_ADDRESS; nvidia-smi may say more"):
            memory.wait()
    with pytest.raises(DeviceError, match="cuMemAlloc gave CUDA_ERROR_ILLEGAL_ADDRESS"):
        memory.empty((3,), np.float32)
