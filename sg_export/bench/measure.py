"""How fast a bundle runs here, beside the machine's limits and a loop in PyTorch. Behind `sg-export bench`."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from sg_export.cost.step import step_costs
from sg_export.progress import Report, silent
from sg_runtime.backends import Choice, choose_backend
from sg_runtime.bundle import Bundle
from sg_runtime.errors import UsageError
from sg_runtime.host import peak_memory
from sg_runtime.pipeline import Pipeline

Baseline = Literal["pytorch", "pytorch-compiled"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)

PAUSE_BEFORE_RUN = 0.05
"""Seconds before a run is timed: on a CPU the threads of the one before it still spin for a while."""


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of measured times, in milliseconds."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Percentiles":
        """Interpolated between the two nearest; of few times, p99 is close to the longest."""
        p50, p90, p99 = np.percentile(np.asarray(seconds) * 1e3, [50, 90, 99]).tolist()
        return cls(p50, p90, p99)


@dataclass(frozen=True, slots=True)
class Side:
    """One way to run the bundle's default guidance.

    step: an evaluation of one engine batch; on a GPU, where nobody waits for single ones, a run's time over their
    count. image: a run's time over its images. ratio: the median of its times over those of the bundle, round by
    round. peak_bytes: what it took at most, of the process on a CPU, of the GPU else; None where that cannot be told
    from what others took.
    """

    name: str
    precision: str
    step: Percentiles
    image: Percentiles
    images_per_second: float
    ratio: float
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class Roofline:
    """What this machine reached here: multiply-adds and bytes per second; and the share of that which a step reaches.

    share: the time that the step's multiply-adds or its weights would take, the longer one, over its median.
    """

    macs_per_second: float
    bytes_per_second: float
    share: float


@dataclass(frozen=True, slots=True)
class BenchResult:
    """All that was measured. sides: the bundle first, then the baselines. roofline: None where it was not measured."""

    bundle: str
    backend: str
    rejected: tuple[str, ...]
    device: str
    images: int
    steps: int
    sampler: str
    runs: int
    sides: tuple[Side, ...]
    roofline: Roofline | None


def bench(
    bundle: str | Path,
    *,
    device: str = "auto",
    backend: str | None = None,
    images: int | None = None,
    steps: int | None = None,
    runs: int = 10,
    capture: bool = True,
    baselines: Sequence[Baseline] = (),
    checkpoint: str | Path | None = None,
    weak_checkpoint: str | Path | None = None,
    report: Report = silent,
) -> BenchResult:
    """Time `runs` whole runs of the bundle, in turn with every baseline; a first one of each is not counted.

    images: at once; by default the most in one engine run, 1 on a CPU. capture: see `Pipeline.load`. checkpoint,
    weak_checkpoint: what the baselines load, see `verify`. Raises UsageError for counts below 1.
    """
    for name, value in {"images": images, "steps": steps, "runs": runs}.items():
        if value is not None and value < 1:
            raise UsageError(f"{name}: expected at least 1, found {value}")
    opened = Bundle.open(bundle)
    choice = choose_backend(opened, device, backend=backend)
    on_cpu = choice.name == "onnxruntime-cpu"
    before = None if on_cpu else _free_gpu_bytes(choice.number)
    pipe = Pipeline.load(
        bundle,
        device,
        backend=backend,
        batch=_batch(opened, images, on_cpu),
        capture=capture,
        verify_hashes=False,
    )
    count = images or pipe.batch
    manifest = opened.manifest
    steps = steps or manifest.sampling.steps
    classes = [number % manifest.model.num_classes for number in range(count)]
    report("warming up", 0, None)
    pipe.warmup(count, steps=steps)
    peak = peak_memory() if before is None else before - _free_gpu_bytes(choice.number)

    ours = _Ours(pipe, classes, steps)
    makers: dict[str, Callable[[], float]] = {"ours": ours}
    precisions: dict[str, str] = {"ours": manifest.precision_name}
    for name in baselines:
        from sg_export.bench.torch_loop import TorchLoop

        report(f"loading {name}", 0, None)
        loop = TorchLoop(
            opened, checkpoint, weak_checkpoint, classes, steps, name == "pytorch-compiled", _torch_device(choice)
        )
        makers[name], precisions[name] = loop, loop.precision
    seconds = _times(makers, runs, report)
    evaluations = ours.evaluations
    sides = []
    for name, measured in seconds.items():
        of_runs = [value / evaluations for value in measured]
        of_steps = (ours.steps or of_runs) if name == "ours" and on_cpu else of_runs
        ratios = [theirs / own for theirs, own in zip(measured, seconds["ours"], strict=True)]
        sides.append(
            Side(
                pipe.backend.name if name == "ours" else name,
                precisions[name],
                Percentiles.of(of_steps),
                Percentiles.of([value / count for value in measured]),
                count / statistics.median(measured),
                statistics.median(ratios),
                peak if name == "ours" else None,
            )
        )
    return BenchResult(
        str(bundle),
        choice.name,
        choice.rejected,
        _torch_device(choice),
        count,
        steps,
        manifest.sampling.sampler,
        runs,
        tuple(sides),
        _roofline(opened, choice, count, sides[0].step.p50, report),
    )


class _Ours:
    """One run of the bundle: its seconds. steps: those between the evaluations of the counted runs."""

    def __init__(self, pipe: Pipeline, classes: Sequence[int], steps: int) -> None:
        self._pipe, self._classes, self._count = pipe, classes, steps
        self.steps: list[float] = []
        self.evaluations = 0

    def __call__(self) -> float:
        marks: list[float] = []

        def mark(done: int, total: int) -> None:
            marks.append(time.perf_counter())
            self.evaluations = total

        began = time.perf_counter()
        self._pipe.sample(self._classes, range(len(self._classes)), steps=self._count, progress=mark)
        ended = time.perf_counter()
        # The first evaluation follows the conditioning of the whole run, which is none of a step.
        self.steps += [later - earlier for earlier, later in pairwise(marks)]
        return ended - began

    def forget(self) -> None:
        """Count from here on."""
        self.steps.clear()


def _times(makers: dict[str, Callable[[], float]], runs: int, report: Report) -> dict[str, list[float]]:
    """Seconds of all sides in turn; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in makers}
    for number in range(runs + 1):
        for name, run in makers.items():
            report(f"timing {name}", number, runs + 1)
            time.sleep(PAUSE_BEFORE_RUN)
            seconds = run()
            if number:
                times[name].append(seconds)
            elif isinstance(run, _Ours):
                run.forget()
    return times


def _batch(bundle: Bundle, images: int | None, on_cpu: bool) -> int | None:
    """Images in one engine run: as many as are asked for, where that is up to us."""
    manifest = bundle.manifest
    if manifest.batch is not None or manifest.engines:
        return None
    return images or (1 if on_cpu else None)


def _free_gpu_bytes(number: int) -> int:
    from sg_runtime.devices.cuda import CudaMemory

    return CudaMemory(number).free_bytes()


def _torch_device(choice: Choice) -> str:
    return "cpu" if choice.name == "onnxruntime-cpu" else f"cuda:{choice.number}"


def _roofline(bundle: Bundle, choice: Choice, images: int, step_ms: float, report: Report) -> Roofline | None:
    """A large product in the bundle's precision, and a large copy; None on a GPU without PyTorch."""
    report("measuring the machine", 0, None)
    try:
        macs, moved = _host_limits() if choice.name == "onnxruntime-cpu" else _gpu_limits(bundle, choice)
    except ModuleNotFoundError:
        return None
    cost = step_costs(bundle.manifest)[-1]
    needed = max((cost.linear_macs + cost.attention_macs) * images / macs, cost.weight_bytes / moved)
    return Roofline(macs, moved, needed / (step_ms / 1e3))


def _host_limits() -> tuple[float, float]:
    """Of NumPy: an FP32 product of 2048 rows and columns, a copy of 256 MB; the best of five."""
    left, right = np.random.default_rng(0).standard_normal((2, 2048, 2048), np.float32)
    source = np.zeros(1 << 28, np.uint8)
    target = np.empty_like(source)
    product = min(_seconds(lambda: left @ right) for _ in range(5))
    copy = min(_seconds(lambda: np.copyto(target, source)) for _ in range(5))
    return 2048**3 / product, 2 * source.nbytes / copy


def _gpu_limits(bundle: Bundle, choice: Choice) -> tuple[float, float]:
    """Of PyTorch: a product of 8192 rows and columns, a copy of 1 GB; the best of five."""
    import torch

    device, kinds = _torch_device(choice), {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    left = torch.randn(8192, 8192, device=device, dtype=kinds[bundle.manifest.precision])
    source = torch.zeros(1 << 30, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)

    def timed(work: Callable[[], Any]) -> float:
        def run() -> None:
            work()
            torch.cuda.synchronize(device)

        run()
        return min(_seconds(run) for _ in range(5))

    return 8192**3 / timed(lambda: left @ left), 2 * source.nbytes / timed(lambda: target.copy_(source))


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
