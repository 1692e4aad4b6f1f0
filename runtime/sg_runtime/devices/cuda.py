"""Memory of an NVIDIA GPU and the CUDA stream of a run, through the CUDA driver API.

Driver functions have the names and signatures of cuda-bindings. A test checks them.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from sg_runtime.arrays import Indices
from sg_runtime.devices import dlpack
from sg_runtime.devices.gpus import call, load_driver
from sg_runtime.errors import DeviceError, DeviceMemoryError, UsageError

_DEFAULT_STREAMS = (0, 1, 2)
"""Handles of CUDA's default streams: 0 and 1 are per process, 2 is per thread."""


class CudaArray:
    """A C-contiguous array on a GPU; see `memory.DeviceArray`.

    It supports DLPack and the CUDA array interface.
    """

    def __init__(self, address: int, shape: Sequence[int], dtype: DTypeLike, device: int, owner: object) -> None:
        """Wrap the memory at `address`. owner: an object that keeps the memory alive."""
        self.address = address
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self.device = device
        self.owner = owner

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __getitem__(self, index: int | slice) -> "CudaArray":
        inner = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        if isinstance(index, slice):
            start, stop, step = index.indices(self.shape[0])
            if step != 1:
                raise IndexError(f"expected a slice with step 1, found {step}")
            shape: tuple[int, ...] = (max(stop - start, 0), *self.shape[1:])
        else:
            start, shape = range(self.shape[0])[index], self.shape[1:]
        return CudaArray(self.address + start * inner, shape, self.dtype, self.device, self.owner)

    def reshape(self, shape: Sequence[int]) -> "CudaArray":
        """Return a view with another shape. Raises ValueError if the number of values differs."""
        if np.prod(shape, dtype=np.int64) != np.prod(self.shape, dtype=np.int64):
            raise ValueError(f"expected a shape with the same number of values as {self.shape}, found {tuple(shape)}")
        return CudaArray(self.address, shape, self.dtype, self.device, self.owner)

    def view(self, dtype: DTypeLike) -> "CudaArray":
        """Return the same bytes (N,) as values (N / size,) of another dtype."""
        wanted = np.dtype(dtype)
        return CudaArray(self.address, (self.nbytes // wanted.itemsize,), wanted, self.device, self.owner)

    def __dlpack__(self, *, stream: Any = None, **_: Any) -> object:
        """Export a DLPack capsule.

        `stream` is ignored, because the producer of the array has waited for its values.
        """
        return dlpack.export(self.address, self.shape, self.dtype, self.__dlpack_device__(), self.owner)

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self.device

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        pointer = (self.address, False)
        return {"shape": self.shape, "typestr": self.dtype.str, "data": pointer, "strides": None, "version": 3}


class CudaMemory:
    """Memory of GPU `number`. Work is ordered by one stream: a new one, or the caller's.

    A CUDA default stream is replaced by a new stream. ONNX Runtime takes the handle 0 as "no stream
    given" and creates another stream, and default streams cannot be captured. Events keep the
    order: a run starts after the caller's work in the default stream, and the caller's later work
    there starts after the run.
    """

    def __init__(self, number: int = 0, stream: object | None = None) -> None:
        """Select the GPU and the stream. The calling thread's current GPU stays as it is.

        stream: a handle (int), or an object with `__cuda_stream__` or `cuda_stream`; see
        `stream_handle`. None creates a new stream. Raises UsageError for a stream of another
        device.
        """
        self.driver = load_driver()
        self.device = f"cuda:{number}"
        self._number = number
        self._context = primary_context(self.driver, number)
        self._given = stream  # keep a reference: libraries destroy a stream with its object
        self.stream = 0 if stream is None else stream_handle(stream)
        self._joined = None if stream is None or self.stream not in _DEFAULT_STREAMS else self.stream
        with _current(self.driver, self._context):
            if self.stream in _DEFAULT_STREAMS:
                flags = self.driver.CUstream_flags.CU_STREAM_NON_BLOCKING
                self.stream = int(call(self.driver, "cuStreamCreate", flags))
            else:
                self._check_stream()
            if self._joined is not None:
                untimed = self.driver.CUevent_flags.CU_EVENT_DISABLE_TIMING
                self._event = call(self.driver, "cuEventCreate", untimed)

    def enter(self) -> None:
        """Make this GPU current in the calling thread until `leave`.

        Work that follows starts after the caller's work in the default stream that was given.
        """
        call(self.driver, "cuCtxPushCurrent", self._context)
        if self._joined is not None:
            call(self.driver, "cuEventRecord", self._event, self._joined)
            call(self.driver, "cuStreamWaitEvent", self.stream, self._event, 0)

    def leave(self) -> None:
        """Make the GPU current that was so before `enter`.

        The caller's later work in the default stream that was given starts after the work so far.
        A device that was lost is no error here: the run has raised it.
        """
        if self._joined is not None:
            self.driver.cuEventRecord(self._event, self.stream)
            self.driver.cuStreamWaitEvent(self._joined, self._event, 0)
        self.driver.cuCtxPopCurrent()

    def _check_stream(self) -> None:
        """Raise UsageError unless the stream is one of this GPU."""
        expected = f"stream: expected a CUDA stream of {self.device}, found "
        try:
            with _current(self.driver, call(self.driver, "cuStreamGetCtx", self.stream)):
                found = int(call(self.driver, "cuCtxGetDevice"))
        except DeviceError as error:
            raise UsageError(f"{expected}{self.stream:#x} ({error})") from None
        if found != self._number:
            raise UsageError(f"{expected}one of cuda:{found}: load the pipeline with device='cuda:{found}'")

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> CudaArray:
        wanted = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * wanted.itemsize
        try:
            allocation = _Allocation(self.driver, self._context, size)
        except DeviceMemoryError as error:
            free = self.free_bytes() / 1e6
            raise DeviceMemoryError(
                f"{self.device}: an allocation needs {size / 1e6:,.0f} MB, found {free:,.0f} MB free: {error}"
            ) from None
        return CudaArray(allocation.address, shape, wanted, self._number, allocation)

    def upload(self, source: NDArray[Any], target: Any) -> None:
        if (source.shape, source.dtype) != (target.shape, target.dtype):
            raise ValueError(f"expected {target.dtype} of {target.shape}, found {source.dtype} of {source.shape}")
        data = np.asarray(source, order="C")
        call(self.driver, "cuMemcpyHtoDAsync", target.address, data.ctypes.data, data.nbytes, self.stream)

    def copy(self, source: Any, target: Any) -> None:
        call(self.driver, "cuMemcpyDtoDAsync", target.address, source.address, source.nbytes, self.stream)

    def take(self, source: Any, rows: Indices, target: Any) -> None:
        width, pitch = (array.shape[-1] * array.dtype.itemsize for array in (source, target))
        copy = self.driver.CUDA_MEMCPY2D()
        copy.srcMemoryType = copy.dstMemoryType = self.driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.srcPitch, copy.dstPitch = width * source.shape[1], pitch
        copy.WidthInBytes, copy.Height = width, source.shape[0]
        for image, row in enumerate(rows.tolist()):
            copy.srcDevice, copy.dstDevice = source.address + width * row, target.address + width * image
            call(self.driver, "cuMemcpy2DAsync", copy, self.stream)

    def download(self, source: Any) -> NDArray[Any]:
        target = np.empty(source.shape, source.dtype)
        call(self.driver, "cuMemcpyDtoHAsync", target.ctypes.data, source.address, source.nbytes, self.stream)
        self.wait()
        return target

    def hold(self, array: Any) -> CudaArray:
        if isinstance(array, CudaArray) and array.device == self._number:
            return array
        if isinstance(array, np.ndarray):
            copy = self.empty(array.shape, array.dtype)
            self.upload(array, copy)
            return copy
        kind = type(array).__name__
        if not hasattr(array, "__dlpack__"):
            raise UsageError(f"expected an array that supports DLPack, found {kind}")
        device = tuple(map(int, array.__dlpack_device__()))
        if device != (dlpack.CUDA, self._number):
            raise UsageError(f"expected a contiguous array on {self.device}, found {kind} on DLPack device {device}")
        try:
            found = dlpack.view(array, self.stream)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise UsageError(f"expected an array that DLPack can export, found {kind} ({error})") from None
        if not found.contiguous:
            raise UsageError(f"expected a contiguous array on {self.device}, found {kind} with gaps")
        return CudaArray(found.address, found.shape, found.dtype, self._number, found.owner)

    def address(self, array: Any) -> int:
        return int(array.address)

    def free_bytes(self) -> int:
        """Return the free memory in bytes, as reported by the driver."""
        with _current(self.driver, self._context):
            free, _ = call(self.driver, "cuMemGetInfo")
        return int(free)

    def wait(self) -> None:
        call(self.driver, "cuStreamSynchronize", self.stream)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture what `work` submits to the stream as a CUDA graph.

        Return a function that launches the graph in the stream.
        """
        driver = self.driver
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        call(driver, "cuStreamBeginCapture", self.stream, mode)
        try:
            work()
        except BaseException:
            self._discard_capture()
            raise
        graph = call(driver, "cuStreamEndCapture", self.stream)
        captured = _Captured(driver, self._context, graph)
        return lambda: call(driver, "cuGraphLaunch", captured.executable, self.stream)

    @property
    def captures(self) -> threading.Lock:
        """Lock to hold while a library may capture in CUDA's global mode, as ONNX Runtime does.

        In that mode an allocation or a free in any thread ends the capture. Allocations of all
        memories wait for the lock, and frees are put off.
        """
        return _Allocation.captures

    def end_capture(self) -> None:
        """End a capture that was left open in the stream, and discard it."""
        status = call(self.driver, "cuStreamIsCapturing", self.stream)
        if status != self.driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE:
            self._discard_capture()

    def _discard_capture(self) -> None:
        status, *graphs = self.driver.cuStreamEndCapture(self.stream)
        if status == self.driver.CUresult.CUDA_SUCCESS:
            self.driver.cuGraphDestroy(*graphs)


class _Allocation:
    """Device memory that is freed with its last reference.

    CUDA may refuse to free memory, for example while another library captures. Then the next
    allocation or free tries again.

    captures: held while no memory may be allocated or freed in any thread.
    """

    captures: ClassVar[threading.Lock] = threading.Lock()
    _unfreed: ClassVar[deque[tuple[Any, Any, Any]]] = deque()

    def __init__(self, driver: Any, context: Any, size: int) -> None:
        with self.captures:
            self._free()
            with _current(driver, context):
                self._pointer = call(driver, "cuMemAlloc", max(size, 1))
        self._driver, self._context = driver, context
        self.address = int(self._pointer)

    def __del__(self) -> None:
        if hasattr(self, "_context"):
            self._unfreed.append((self._driver, self._context, self._pointer))
            if self.captures.acquire(blocking=False):
                try:
                    self._free()
                finally:
                    self.captures.release()

    @classmethod
    def _free(cls) -> None:
        """Free what was not freed so far. The driver waits for work that uses it."""
        for _ in range(len(cls._unfreed)):
            driver, context, pointer = cls._unfreed.popleft()
            driver.cuCtxPushCurrent(context)
            (status,) = driver.cuMemFree(pointer)
            driver.cuCtxPopCurrent()
            if status != driver.CUresult.CUDA_SUCCESS:
                cls._unfreed.append((driver, context, pointer))


class _Captured:
    """An executable CUDA graph that is destroyed with its last reference."""

    def __init__(self, driver: Any, context: Any, graph: Any) -> None:
        self._driver, self._context = driver, context
        try:
            self.executable = call(driver, "cuGraphInstantiate", graph, 0)
        finally:
            driver.cuGraphDestroy(graph)

    def __del__(self) -> None:
        if hasattr(self, "executable"):
            self._driver.cuCtxPushCurrent(self._context)
            self._driver.cuGraphExecDestroy(self.executable)
            self._driver.cuCtxPopCurrent()


def primary_context(driver: Any, number: int) -> Any:
    """Return the primary context of GPU `number`, which PyTorch and CuPy share."""
    return call(driver, "cuDevicePrimaryCtxRetain", call(driver, "cuDeviceGet", number))


def use_gpu(number: int) -> None:
    """Make GPU `number` current in the calling thread."""
    driver = load_driver()
    call(driver, "cuCtxSetCurrent", primary_context(driver, number))


@contextmanager
def keep_current() -> Iterator[None]:
    """Give the calling thread its current GPU back after the block."""
    driver = load_driver()
    before = call(driver, "cuCtxGetCurrent")
    try:
        yield
    finally:
        call(driver, "cuCtxSetCurrent", before)


@contextmanager
def _current(driver: Any, context: Any) -> Iterator[None]:
    """Make a context current in the calling thread for the block."""
    call(driver, "cuCtxPushCurrent", context)
    try:
        yield
    finally:
        driver.cuCtxPopCurrent()


def stream_handle(stream: Any) -> int:
    """Return the handle of a CUDA stream.

    stream: the handle (int), or an object with `__cuda_stream__` (cuda.core, CuPy) or `cuda_stream`
    (torch). Raises UsageError for anything else.
    """
    if isinstance(stream, int) and not isinstance(stream, bool):
        return stream
    if hasattr(stream, "__cuda_stream__"):
        found = stream.__cuda_stream__
        return int((found() if callable(found) else found)[1])
    if hasattr(stream, "cuda_stream"):
        return int(stream.cuda_stream)
    raise UsageError(
        f"stream: expected a CUDA stream: a handle, or an object with __cuda_stream__ or cuda_stream; "
        f"found {type(stream).__name__}"
    )
