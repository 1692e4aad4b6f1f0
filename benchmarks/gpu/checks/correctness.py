"""Part `correctness`: the tests for a GPU, `verify`, and runs of ONNX Runtime's CUDA provider."""

import gc
import json
import logging
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu import timing
from benchmarks.gpu.bundles import glyphs
from benchmarks.gpu.child import Check, Context
from benchmarks.gpu.machine import ROOT, environment
from benchmarks.gpu.results import Figure, Finding

if TYPE_CHECKING:
    from sg_runtime import Pipeline
    from sg_runtime.arrays import Array
    from sg_runtime.manifest import Precision

CLASSES, SEEDS, STEPS = [0, 1], [5, 6], 8
BUNDLES: Mapping[str, tuple["Precision", int | None]] = {
    "FP32, any batch": ("fp32", None),
    "FP16, batch 2": ("fp16", 2),
}
"""Precision and batch size of the bundles of `glyphs`."""


def pytest_gpu(_: Context) -> Iterator[Finding]:
    """The tests that need a GPU. Skipped tests are named and are no failure, unless all are."""
    done = _process("-m", "pytest", "-m", "gpu", "-q", "-rsf", "-p", "no:cacheprovider", "tests/sg_runtime/test_gpu.py")
    lines = done.stdout.strip().splitlines()
    told = tuple(line for line in lines if line.startswith(("SKIPPED", "FAILED", "ERROR")))
    said = (lines or [done.stderr.strip()[-300:]])[-1].strip("= ")
    yield Finding("", done.returncode == 0 and " passed" in said, said, (), told)


def verify(context: Context) -> Iterator[Finding]:
    """`sg-export verify` of `glyphs` on the GPU: all graphs and complete runs against PyTorch."""
    for name, (precision, batch) in BUNDLES.items():
        bundle, output = glyphs(context.scratch, precision, batch), context.scratch / "verify.json"
        output.unlink(missing_ok=True)
        where = ("--device", context.device, "--backend", context.backend, "-o", str(output), "-q")
        done = _process("-m", "sg_export", "verify", str(bundle), *where)
        if not output.exists():
            yield Finding(name, False, done.stderr.strip()[-400:] or f"exit code {done.returncode}")
            continue
        figures = figures_of(output)
        yield Finding(name, done.returncode == 0, done.stderr.strip()[-400:], figures)


def figures_of(path: Path) -> tuple[Figure, ...]:
    """Return the largest distance and the number of comparisons in the file of `verify`."""
    comparisons = json.loads(path.read_text(encoding="utf-8"))["comparisons"]
    distances = [math.inf if row["relative_l2"] is None else row["relative_l2"] for row in comparisons]
    return Figure.of("largest relative L2", "", max(distances)), Figure.of("comparisons", "", len(distances))


def nodes_and_captures(context: Context) -> Iterator[Finding]:
    """All nodes run on the GPU and all runs are captured: the runtime warns of nothing."""
    for name, (precision, batch) in BUNDLES.items():
        with warnings_of_runtime() as warned:
            pipe = load(context, glyphs(context.scratch, precision, batch))
            for fused in (True, False):
                pipe.sample(CLASSES, SEEDS, steps=2, fused=fused)
        yield Finding(name, not warned, "; ".join(dict.fromkeys(warned)))


def results(context: Context) -> Iterator[Finding]:
    """Samples equal those of FP32 on the CPU, in each of four runs with another run between.

    The gate is that of `verify` for complete runs. With CUDA graphs, the first run captures.
    """
    from sg_export.options.types import BASES

    for name, (precision, batch) in BUNDLES.items():
        bundle, gate = glyphs(context.scratch, precision, batch), BASES[precision].gates.run
        for sampler in ("euler", "heun"):
            wanted = reference(context, sampler)
            for capture in (True, False):
                pipe = load(context, bundle, capture=capture)
                found = [pipe.sample(CLASSES, SEEDS, steps=STEPS, sampler=sampler) for _ in range(3)]
                disturb(pipe)
                found.append(pipe.sample(CLASSES, SEEDS, steps=STEPS, sampler=sampler))
                setting = f"{name}, {sampler}, {'CUDA graphs' if capture else 'no CUDA graphs'}"
                yield distance(setting, found, wanted, gate)


def torch_streams(context: Context) -> Iterator[Finding]:
    """Samples are right in PyTorch's current stream, whose handle is 0, and in another one."""
    import torch

    from sg_export.options.types import BASES

    bundle, wanted = glyphs(context.scratch, "fp32", None), reference(context, "euler")
    streams = {"current stream": torch.cuda.current_stream(), "other stream": torch.cuda.Stream()}
    for name, stream in streams.items():
        for capture in (True, False):
            pipe = load(context, bundle, stream=stream, capture=capture)
            found = [pipe.sample(CLASSES, SEEDS, steps=STEPS) for _ in range(3)]
            setting = f"{name}, {'CUDA graphs' if capture else 'no CUDA graphs'}"
            yield distance(setting, found, wanted, BASES["fp32"].gates.run)


def threads(context: Context) -> Iterator[Finding]:
    """A first run of a new thread takes no longer than a run, and keeps no memory.

    After `warmup` in one thread, eight threads run once, one after another. The criterion is the
    median of the memory that they keep: at most 1 MB.
    """
    pipe = load(context, glyphs(context.scratch, "fp32", None))
    pipe.warmup(2, steps=40)
    main = [_timed(pipe) for _ in range(3)]
    fresh, free = [], [timing.free_bytes()]
    for _ in range(8):
        thread = threading.Thread(target=lambda: fresh.append(_timed(pipe)))
        thread.start()
        thread.join()
        free.append(timing.free_bytes())
    kept = [(before - after) / 1e6 for before, after in pairwise(free)]
    figures = (
        Figure.of("run in the thread of warmup", "ms", *main),
        Figure.of("first run in a new thread", "ms", *fresh),
        Figure.of("memory kept by a thread", "MB", *kept),
    )
    typical = figures[2].median
    yield Finding("", typical <= 1, "" if typical <= 1 else f"a thread keeps {typical:.1f} MB", figures)


def end_of_a_process(context: Context) -> Iterator[Finding]:
    """A process that dropped three pipelines after replays ends cleanly, with right samples."""
    bundle = glyphs(context.scratch, "fp32", None)
    for mode in ("no CUDA graphs", "dropped", "released"):
        where = (context.device, context.backend, str(context.scratch))
        done = _process("-m", "benchmarks.gpu.checks.correctness", mode, str(bundle), *where, timeout=60)
        said = done.stderr.strip().splitlines()[-1:] if done.returncode else done.stdout.strip().splitlines()[-1:]
        yield Finding(mode, done.returncode == 0, f"exit code {done.returncode}: {' '.join(said)}"[:400])


def disturbed_capture(context: Context) -> Iterator[Finding]:
    """Another thread allocates with PyTorch while runs are captured.

    The sampling of that time must be right, and so must the next one.
    """
    import torch

    from sg_export.options.types import BASES

    wanted, gate = reference(context, "euler"), BASES["fp32"].gates.run
    stop, errors = threading.Event(), list[str]()

    def allocate() -> None:
        while not stop.is_set():
            try:
                torch.empty(64 << 20, dtype=torch.uint8, device=context.device)
                torch.cuda.empty_cache()
            except RuntimeError as error:  # PyTorch's allocation may fail, too
                errors.append(str(error).splitlines()[0])

    with warnings_of_runtime() as warned:
        pipe = load(context, glyphs(context.scratch, "fp32", None))
        thread = threading.Thread(target=allocate)
        thread.start()
        try:
            yield distance("while disturbed", [pipe.sample(CLASSES, SEEDS, steps=STEPS)], wanted, gate)
        except Exception as error:  # any error of a library is the finding
            yield Finding("while disturbed", False, f"{type(error).__name__}: {error}"[:400])
        finally:
            stop.set()
            thread.join()
        yield distance("afterwards", [pipe.sample(CLASSES, SEEDS, steps=STEPS) for _ in range(2)], wanted, gate)
    told = dict.fromkeys([*warned, *errors])
    yield Finding("warnings and errors of PyTorch", said="; ".join(told)[:600] or "none")


def load(context: Context, bundle: Path, **options: Any) -> "Pipeline":
    """Load a bundle on the device that is checked."""
    from sg_runtime import Pipeline

    return Pipeline.load(bundle, context.device, backend=context.backend, **options)


def reference(context: Context, sampler: Any) -> "Array":
    """Return samples of the FP32 bundle without a target on the CPU."""
    from sg_runtime import Pipeline

    pipe = Pipeline.load(glyphs(context.scratch, "fp32", None, plain=True), "cpu")
    return pipe.sample(CLASSES, SEEDS, steps=STEPS, sampler=sampler)


def disturb(pipe: "Pipeline") -> None:
    """Run a single evaluation, which may reuse buffers that a captured graph still reads."""
    pipe.guided(pipe.initial_noise([1, 2]), pipe.prepare_once(0.5, CLASSES))


def distance(setting: str, found: "list[Array]", wanted: "Array", gate: float) -> Finding:
    """Compare samples with the wanted ones by the largest relative L2 distance."""
    from sg_export.parity.distances import relative_l2

    distances = [relative_l2(one, wanted) for one in found]
    passed = all(one <= gate for one in distances)  # false for NaN
    said = "" if passed else f"expected at most {gate:g}, found {', '.join(f'{one:.2g}' for one in distances)}"
    return Finding(setting, passed, said, (Figure.of("relative L2", "", *distances),))


@contextmanager
def warnings_of_runtime() -> Iterator[list[str]]:
    """Collect the warnings that the runtime logs."""
    collected: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            collected.append(record.getMessage())

    handler, logger = Collect(logging.WARNING), logging.getLogger("sg_runtime")
    logger.addHandler(handler)
    try:
        yield collected
    finally:
        logger.removeHandler(handler)


def _timed(pipe: "Pipeline") -> float:
    began = time.perf_counter()
    pipe.sample(CLASSES, SEEDS, steps=40)
    return (time.perf_counter() - began) * 1e3


def _process(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments. A timeout raises."""
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


def drop_pipelines(mode: str, bundle: Path, context: Context) -> None:
    """Capture, replay and drop three pipelines. Runs in a process of its own."""
    wanted, found = reference(context, "euler"), []
    for _ in range(3):
        pipe = load(context, bundle, capture=mode != "no CUDA graphs")
        for turn in range(4):
            found.append(pipe.sample(CLASSES, SEEDS, steps=STEPS))
            if turn == 2:
                disturb(pipe)
        if mode == "released":
            pipe.release()
        del pipe
        gc.collect()
        time.sleep(0.3)  # an error in a thread of CUDA may come later
    compared = distance(mode, found, wanted, 1e-4)
    if not compared.passed:
        sys.exit(compared.said)
    print(f"relative L2 at most {compared.figures[0].high:.1e}")


CHECKS: tuple[Check, ...] = (
    results,
    torch_streams,
    nodes_and_captures,
    verify,
    pytest_gpu,
    end_of_a_process,
    threads,
    disturbed_capture,
)

if __name__ == "__main__":
    mode_, bundle_, device_, backend_, scratch_ = sys.argv[1:]
    drop_pipelines(mode_, Path(bundle_), Context(Path(scratch_), Path(), device_, backend_))
