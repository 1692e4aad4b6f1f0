"""Times and kernels of work on the GPU, by PyTorch."""

import gc
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.results import Figure

Work = Callable[[], object]


def graph_ms(work: Work, turns: int = 30) -> list[float]:
    """Capture `work` as a CUDA graph and return the milliseconds of `turns` replays.

    `work` uses PyTorch's current stream.
    """
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work(), work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return event_ms(graph.replay, torch.cuda.current_stream(), turns)


def event_ms(work: Work, stream: Any, turns: int) -> list[float]:
    """Return the milliseconds between events before and after `work` in a PyTorch stream."""
    import torch

    times = []
    for _ in range(turns):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            start.record()
            work()
            end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return times


def kernels(work: Work) -> tuple[tuple[Figure, ...], tuple[str, ...]]:
    """Profile `work`. Return the number of kernels and their time, and the most expensive by name.

    Copies and memory sets of the GPU count as kernels.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        work()
        torch.cuda.synchronize()
    rows = [(e.key, e.count, e.self_device_time_total) for e in profiled.key_averages() if e.self_device_time_total > 0]
    rows.sort(key=lambda row: -row[2])
    figures = (
        Figure.of("kernels", "", sum(row[1] for row in rows)),
        Figure.of("kernel time", "ms", sum(row[2] for row in rows) / 1e3),
    )
    return figures, tuple(f"{name[:110]}: {count} times, {us:.0f} µs" for name, count, us in rows[:40])


def free_bytes() -> int:
    """Return the free memory of the GPU in bytes, without what PyTorch keeps for later."""
    import torch

    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return int(free)
