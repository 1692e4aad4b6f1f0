"""Part `driver`: driver calls, DLPack, what ends a capture, and lower bounds of XL/2's time."""

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from benchmarks.gpu.child import Check, Context
from benchmarks.gpu.results import Figure, Finding
from benchmarks.gpu.timing import graph_ms

SHAPES = ((1152, 3456), (1152, 1152), (1152, 4608), (4608, 1152))
"""Weights of a block of DiT-XL/2: qkv, proj, fc1, fc2."""
DEPTH = 28


def products_ms(rows: list[int]) -> list[float]:
    """Return the milliseconds of a step's products with weights, in FP16, as one CUDA graph.

    rows: number of rows in each block. Every product has a weight of its own.
    """
    import torch

    half: dict[str, Any] = {"device": "cuda", "dtype": torch.half}
    inputs = {(count, k): torch.randn(count, k, **half) for count in set(rows) for k, _ in SHAPES}
    pairs = [(inputs[count, k], torch.randn(k, n, **half) * 0.02) for count in rows for k, n in SHAPES]
    return graph_ms(lambda: [x @ weight for x, weight in pairs])


def dlpack_both_ways(_: Context) -> Iterator[Finding]:
    """An array of PyTorch comes after the work of its stream, and goes back without a copy."""
    import torch
    from torch.utils.dlpack import from_dlpack

    from sg_runtime.devices.cuda import CudaMemory

    memory, side = CudaMemory(), torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # delays the values in torch's stream
        tensor = torch.arange(1 << 20, device="cuda", dtype=torch.float32)
        held = memory.hold(tensor)  # must make our stream wait for `side`
    found = memory.download(held)
    ordered = bool((found == np.arange(1 << 20)).all())
    yield Finding("order of streams", ordered, "" if ordered else "values were read before they were written")
    same = from_dlpack(held).data_ptr() == tensor.data_ptr()
    yield Finding("same memory", same, "" if same else "PyTorch received a copy")


def pageable_upload_may_be_overwritten(_: Context) -> Iterator[Finding]:
    """The host may overwrite its memory as soon as cuMemcpyHtoDAsync returns.

    The stream still has earlier work to do at that time.
    """
    import torch

    from sg_runtime.devices.cuda import CudaMemory

    own = torch.cuda.Stream()
    memory, turns = CudaMemory(0, own), 60
    for size in (28, 1 << 12, 1 << 16, 1 << 17, 1 << 22):
        wrong = 0
        for turn in range(turns):
            target = memory.empty((size,), np.uint8)
            source = np.full(size, turn % 250, np.uint8)
            with torch.cuda.stream(own):
                torch.cuda._sleep(3_000_000)
            memory.upload(source, target)
            source[:] = 255
            wrong += int((memory.download(target) != turn % 250).any())
        yield Finding(f"{size} bytes", wrong == 0, f"{wrong} of {turns} uploads wrong" if wrong else "")


def floor_of_products_and_attention(_: Context) -> Iterator[Finding]:
    """Matmuls, attention and launches alone, each as one CUDA graph."""
    import torch
    import torch.nn.functional as F

    for rows in (154, 256, 384):
        yield Finding(f"products of 28 blocks, {rows} rows", figures=(_ms(products_ms([rows] * DEPTH)),))
    weights = torch.empty(DEPTH * sum(k * n for k, n in SHAPES), device="cuda", dtype=torch.half)
    yield Finding("read all weights once", figures=(_ms(graph_ms(weights.sum)),))
    for tokens in (256, 128, 26):
        q = torch.randn(1, 16, tokens, 72, device="cuda", dtype=torch.half)
        times = graph_ms(partial(_each_time, DEPTH, partial(F.scaled_dot_product_attention, q, q, q)))
        yield Finding(f"28 attentions of {tokens} tokens", figures=(_ms(times),))
    x = torch.randn(384, 1152, device="cuda")
    yield Finding("100 tiny dependent kernels", figures=(_ms(graph_ms(partial(_each_time, 100, partial(x.add_, 1)))),))


def what_ends_a_capture(_: Context) -> Iterator[Finding]:
    """cuMemFree and cudaMalloc during a capture, of this thread and of another.

    The runtime captures in the mode thread-local, ONNX Runtime in the mode global. Another thread
    must not end a capture of the runtime.
    """
    import cuda.bindings.driver as driver
    import torch

    stream = torch.cuda.Stream()
    a, b = (torch.empty(1 << 20, dtype=torch.uint8, device="cuda") for _ in range(2))
    _, context = driver.cuCtxGetCurrent()

    def free(pointer: Any) -> None:
        driver.cuCtxSetCurrent(context)
        driver.cuMemFree(pointer)

    def allocate(_: Any) -> None:
        torch.empty(300 << 20, dtype=torch.uint8, device="cuda")

    def copy() -> None:
        driver.cuMemcpyDtoDAsync(b.data_ptr(), a.data_ptr(), 1 << 20, stream.cuda_stream)

    actions = {
        "nothing": None,
        "cuMemFree in another thread": free,
        "cudaMalloc of PyTorch in another thread": allocate,
        "cuMemFree in the same thread": free,
    }
    for mode in (
        driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL,
        driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
    ):
        for name, action in actions.items():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            _, pointer = driver.cuMemAlloc(1 << 20)
            driver.cuStreamBeginCapture(stream.cuda_stream, mode)
            copy()
            if action is not None and "same" in name:
                action(pointer)
            elif action is not None:
                thread = threading.Thread(target=action, args=(pointer,))
                thread.start()
                thread.join()
            status, *_graph = driver.cuStreamEndCapture(stream.cuda_stream)
            local = mode == driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
            judged = local and "same" not in name
            short = "thread-local" if local else "global"
            yield Finding(f"{short}, {name}", status.name == "CUDA_SUCCESS" if judged else None, status.name)


def _each_time(count: int, work: Callable[[], object]) -> None:
    for _ in range(count):
        work()


def _ms(times: list[float]) -> Figure:
    return Figure.of("time", "ms", *times)


CHECKS: tuple[Check, ...] = (
    dlpack_both_ways,
    pageable_upload_may_be_overwritten,
    floor_of_products_and_attention,
    what_ends_a_capture,
)
