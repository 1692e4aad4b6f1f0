"""Parts `eager` and `compiled`: `sg-export bench` of DiT-XL/2, in turn with PyTorch."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from benchmarks.gpu.bundles import SETTINGS, xl_bundle
from benchmarks.gpu.child import Check, Context
from benchmarks.gpu.results import Figure, Finding

if TYPE_CHECKING:
    from sg_export.bench.measure import Baseline

RUNS = 7


def eager(context: Context) -> Iterator[Finding]:
    """Complete runs of 40 steps for one image, in turn with PyTorch's loop of two passes."""
    yield from compared(context, "pytorch")


def compiled(context: Context) -> Iterator[Finding]:
    """The same with networks under torch.compile, mode "max-autotune"."""
    yield from compared(context, "pytorch-compiled")


def compared(context: Context, baseline: "Baseline", steps: int = 40, runs: int = RUNS) -> Iterator[Finding]:
    """Run `bench` with one baseline and yield a finding for each side."""
    from sg_export.bench.measure import bench

    result = bench(
        xl_bundle(context.xl, 1),
        device=context.device,
        backend=context.backend,
        images=1,
        steps=steps,
        runs=runs,
        baselines=[baseline],
        checkpoint=context.xl / "random.pt",
    )
    for side in result.sides:
        figures = [
            Figure.of("step", "ms", side.step.p50),
            Figure.of("step, 90th percentile", "ms", side.step.p90),
            Figure.of("throughput", "images/s", side.images_per_second),
            Figure.of("time / ours", "", side.ratio),
        ]
        if side.peak_bytes is not None:
            figures.append(Figure.of("memory", "MB", side.peak_bytes / 1e6))
        yield Finding(f"{next(iter(SETTINGS))}, {side.name}, {side.precision}", None, f"{runs} runs", tuple(figures))
    if result.roofline is not None:
        limits = (
            Figure.of("large matmul", "TMAC/s", result.roofline.macs_per_second / 1e12),
            Figure.of("large copy", "GB/s", result.roofline.bytes_per_second / 1e9),
            Figure.of("share of these limits that a step reaches", "", result.roofline.share),
        )
        yield Finding("limits of the card", None, "", limits)


EAGER: tuple[Check, ...] = (eager,)
COMPILED: tuple[Check, ...] = (compiled,)
