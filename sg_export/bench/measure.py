"""Speed of a bundle, compared with a loop in PyTorch and with the limits of the machine.

Implements `sg-export bench`.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from sg_export.cost.step import step_costs
from sg_export.progress import Report, silent
from sg_runtime.backends import Choice, choose_backend
from sg_runtime.bundle import Bundle
from sg_runtime.conditions import Conditions, examples
from sg_runtime.errors import UsageError
from sg_runtime.host import peak_memory
from sg_runtime.manifest import Part
from sg_runtime.pipeline import Pipeline

Baseline = Literal["pytorch", "pytorch-compiled"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)

PAUSE_BEFORE_RUN = 0.05
"""Seconds of pause before each timed run. On a CPU, threads of the previous run still spin."""


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Percentiles of measured times, in milliseconds."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Percentiles":
        """Compute the percentiles of times in seconds.

        Values are interpolated between the two nearest times. With few times, p99 is close to the
        longest.
        """
        p50, p90, p99 = np.percentile(np.asarray(seconds) * 1e3, [50, 90, 99]).tolist()
        return cls(p50, p90, p99)


@dataclass(frozen=True, slots=True)
class Side:
    """Measurements of the bundle or of a baseline, with the bundle's default guidance.

    name: name of the backend or of the baseline.
    precision: precision of the computation.
    step: time of one evaluation of one engine batch. On a GPU and for baselines single steps are
        not timed: run time / number of evaluations.
    image: run time / number of images.
    images_per_second: number of images / median run time.
    ratio: median over the rounds of run time / run time of the bundle.
    peak_bytes: peak memory of the process (CPU) or memory taken on the device (GPU); None for
        baselines, which share the process.
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
    """Measured limits of this machine, and the share of them that a step reaches.

    macs_per_second: multiply-adds per second of a large matmul.
    bytes_per_second: bytes read and written per second by a large copy.
    share: time that the limits imply / median time of a step. The time is the longer of two: of the
        step's multiply-adds, and of reading its weights.
    """

    macs_per_second: float
    bytes_per_second: float
    share: float


@dataclass(frozen=True, slots=True)
class PartTime:
    """Time of text encoder or decoder.

    part: the part.
    run: time of one prompt or one image.
    share: median time / time of an image with a prompt of its own, all parts together.
    """

    part: Part
    run: Percentiles
    share: float


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Result of `bench`.

    bundle: path of the bundle.
    backend: name of the backend that ran it.
    rejected: reasons why backends of higher priority were not chosen.
    device: "cpu", or the GPU as "cuda:0".
    images: number of images in a run.
    steps: number of sampling steps.
    sampler: name of the sampler.
    runs: number of timed runs.
    sides: measurements of the bundle, then of the baselines.
    roofline: limits of the machine; None on a GPU without PyTorch.
    parts: times of text encoder and decoder, which `sides` do not contain.
    """

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
    parts: tuple[PartTime, ...] = ()


def bench(
    bundle: str | Path,
    *,
    device: str = "auto",
    backend: str | None = None,
    size: tuple[int, int] | None = None,
    images: int | None = None,
    steps: int | None = None,
    runs: int = 10,
    capture: bool = True,
    threads: int | None = None,
    baselines: Sequence[Baseline] = (),
    checkpoint: str | Path | None = None,
    weak_checkpoint: str | Path | None = None,
    report: Report = silent,
) -> BenchResult:
    """Time `runs` complete runs of the bundle, in turn with every baseline.

    A first run of each is not counted.
    size: height and width of the picture, see `ModelFacts.size`; by default the bundle's first.
    images: number of images in a run; by default the largest batch of an engine run, or 1 on a CPU.
    steps: number of sampling steps; by default the bundle's.
    capture, threads: see `Pipeline.load`; the baselines have threads of their own.
    checkpoint, weak_checkpoint: checkpoints that the baselines load, see `verify`.
    Raises UsageError if `images`, `steps` or `runs` is below 1.
    """
    for name, value in {"images": images, "steps": steps, "runs": runs}.items():
        if value is not None and value < 1:
            raise UsageError(f"{name}: expected at least 1, found {value}")
    opened = Bundle.open(bundle)
    if size is not None:
        opened = opened.at(*size)
    choice = choose_backend(opened, device, backend=backend)
    on_cpu = choice.name == "onnxruntime-cpu"
    before = None if on_cpu else _free_gpu_bytes(choice.number)
    batch = _batch(opened, images, on_cpu)
    pipe = Pipeline.load(opened, device, backend=backend, batch=batch, capture=capture, threads=threads)
    count = images or pipe.batch
    manifest = opened.manifest
    steps = steps or manifest.sampling.steps
    conditions = examples(manifest.model, count)
    report("warming up", 0, None)
    pipe.warmup(count, steps=steps)
    peak = peak_memory() if before is None else before - _free_gpu_bytes(choice.number)

    ours = _Ours(pipe, conditions, steps)
    makers: dict[str, Callable[[], float]] = {"ours": ours}
    precisions: dict[str, str] = {"ours": manifest.precision_name}
    for name in baselines:
        from sg_export.bench.torch_loop import TorchLoop

        report(f"loading {name}", 0, None)
        loop = TorchLoop(
            opened, checkpoint, weak_checkpoint, conditions, steps, name == "pytorch-compiled", _torch_device(choice)
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
        _part_times(pipe, runs, sides[0].image.p50, report),
    )


def _part_times(pipe: Pipeline, runs: int, image_ms: float, report: Report) -> tuple[PartTime, ...]:
    """Time text encoder and decoder, each on one input at a time. A first run is not counted.

    image_ms: time of the denoiser for an image.
    """
    noise = pipe.initial_noise([0])
    work: dict[Part, Callable[[int], object]] = {
        "text": lambda number: pipe.encode([f"{number} apples on a table"]),  # another each time
        "decode": lambda _: pipe.decode(noise),
    }
    found: dict[Part, Percentiles] = {}
    for part in pipe.bundle.manifest.parts:
        report(f"timing {part}", 0, None)
        times = [_seconds(partial(work[part], number)) for number in range(runs + 1)]
        found[part] = Percentiles.of(times[1:])
    total = image_ms + sum(run.p50 for run in found.values())
    return tuple(PartTime(part, run, run.p50 / total) for part, run in found.items())


class _Ours:
    """A callable that runs the bundle once and returns the seconds it took.

    steps: seconds between consecutive evaluations, of all counted runs. evaluations: number of
    evaluations in a run.
    """

    def __init__(self, pipe: Pipeline, conditions: Conditions, steps: int) -> None:
        self._pipe, self._conditions, self._count = pipe, conditions, steps
        self.steps: list[float] = []
        self.evaluations = 0

    def __call__(self) -> float:
        marks: list[float] = []

        def mark(done: int, total: int) -> None:
            marks.append(time.perf_counter())
            self.evaluations = total

        began = time.perf_counter()
        self._pipe.sample(self._conditions, range(len(self._conditions)), steps=self._count, progress=mark)
        ended = time.perf_counter()
        # The first evaluation is left out: conditioning of the entire run precedes it.
        self.steps += [later - earlier for earlier, later in pairwise(marks)]
        return ended - began

    def forget(self) -> None:
        """Drop the step times measured so far."""
        self.steps.clear()


def _times(makers: dict[str, Callable[[], float]], runs: int, report: Report) -> dict[str, list[float]]:
    """Time all sides in turn and return their run times in seconds.

    The first round is not counted.
    """
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
    """Return the batch size to load the bundle with; None for the default of `Pipeline.load`.

    A bundle with a fixed batch or with engines fixes the batch itself.
    """
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
    """Measure a large matmul in the bundle's precision and a large copy.

    Returns None on a GPU without PyTorch.
    """
    report("measuring the machine", 0, None)
    try:
        macs, moved = _host_limits() if choice.name == "onnxruntime-cpu" else _gpu_limits(bundle, choice)
    except ModuleNotFoundError:
        return None
    cost = step_costs(bundle.manifest)[-1]
    needed = max((cost.linear_macs + cost.attention_macs) * images / macs, cost.weight_bytes / moved)
    return Roofline(macs, moved, needed / (step_ms / 1e3))


def _host_limits() -> tuple[float, float]:
    """Return multiply-adds and bytes per second of NumPy on the CPU.

    Measures an FP32 matmul of 2048 × 2048 matrices and a copy of 256 MB; the best of five.
    """
    left, right = np.random.default_rng(0).standard_normal((2, 2048, 2048), np.float32)
    source = np.zeros(1 << 28, np.uint8)
    target = np.empty_like(source)
    product = min(_seconds(lambda: left @ right) for _ in range(5))
    copy = min(_seconds(lambda: np.copyto(target, source)) for _ in range(5))
    return 2048**3 / product, 2 * source.nbytes / copy


def _gpu_limits(bundle: Bundle, choice: Choice) -> tuple[float, float]:
    """Return multiply-adds and bytes per second of PyTorch on the GPU.

    Measures a matmul of 8192 × 8192 matrices and a copy of 1 GB; the best of five.
    """
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
