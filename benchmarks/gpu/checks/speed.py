"""Part `speed`: DiT-XL/2 in FP16 on ONNX Runtime, next to its products in cuBLAS."""

import time
from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.gpu import timing
from benchmarks.gpu.bundles import SETTINGS, xl_bundle
from benchmarks.gpu.checks.correctness import load, warnings_of_runtime
from benchmarks.gpu.checks.driver import products_ms
from benchmarks.gpu.child import Check, Context
from benchmarks.gpu.results import Figure, Finding

if TYPE_CHECKING:
    from sg_runtime import GuidancePlan, Manifest, Pipeline

IMAGES = (1, 4, 16)
STEPS = 40
RUNS = {True: 7, False: 3}
"""Number of timed runs with CUDA graphs and without."""


def guided_step_and_loop(context: Context) -> Iterator[Finding]:
    """Complete runs of 40 Euler steps. The time of a step is the time of a run divided by 40.

    The time to submit a step is the host's; if it equals the time of a step, the host is the limit.
    Memory is what the pipeline has taken of the GPU so far; it runs both settings. The products are
    those of the same rows with weights of their own, as one CUDA graph.
    """
    for images in IMAGES:
        products: dict[str, float] = {}
        for capture in (True, False):
            before = timing.free_bytes()
            with warnings_of_runtime() as warned:
                pipe = load(context, xl_bundle(context.xl, images), batch=images, capture=capture, verify_hashes=False)
                for name in SETTINGS:
                    plan = plan_of(pipe, name)
                    figures = times(pipe, plan, images, RUNS[capture])
                    taken = before - timing.free_bytes()
                    if name not in products:
                        products[name] = median(products_ms(rows_of(pipe.bundle.manifest, plan, images)))
                    figures += (
                        Figure.of("products in cuBLAS", "ms", products[name]),
                        Figure.of("products / step", "", products[name] / figures[0].median),
                        Figure.of("memory", "MB", taken / 1e6),
                    )
                    graphs = "CUDA graphs" if capture else "no CUDA graphs"
                    yield Finding(
                        f"{name}, {images} image{'s' if images > 1 else ''}, {graphs}", None, "; ".join(warned), figures
                    )
            del pipe


def kernels_of_a_step(context: Context) -> Iterator[Finding]:
    """Kernels of one guided step for one image.

    They are those of a run of three steps without those of a run of two, both without CUDA graphs.
    """
    pipe = load(context, xl_bundle(context.xl, 1), batch=1, capture=False, verify_hashes=False)
    for name in SETTINGS:
        plan = plan_of(pipe, name)
        run = partial(pipe.sample, [1], [1], guidance=plan)
        fewer, _ = timing.kernels(partial(run, steps=2))
        more, details = timing.kernels(partial(run, steps=3))
        step = (Figure.of(b.name, b.unit, b.median - a.median) for a, b in zip(fewer, more, strict=True))
        yield Finding(name, None, "", tuple(step), ("a run of three steps:", *details))


def times(pipe: "Pipeline", plan: "GuidancePlan", images: int, runs: int) -> tuple[Figure, ...]:
    """Time runs after two that are not counted.

    Returns the time of a step, of a run, to submit a step, and of the first run.
    """
    classes, seeds = [number % 1000 for number in range(images)], range(images)

    def run() -> tuple[float, float]:
        """Return the milliseconds of a run, and those between its first and last submitted step."""
        marks: list[float] = []
        began = time.perf_counter()
        pipe.sample(classes, seeds, steps=STEPS, guidance=plan, progress=lambda *_: marks.append(time.perf_counter()))
        return (time.perf_counter() - began) * 1e3, (marks[-1] - marks[0]) * 1e3 / (len(marks) - 1)

    first, _ = run()
    run()
    measured = [run() for _ in range(runs)]
    return (
        Figure.of("step", "ms", *(loop / STEPS for loop, _ in measured)),
        Figure.of("loop of 40", "ms", *(loop for loop, _ in measured)),
        Figure.of("to submit a step", "ms", *(submit for _, submit in measured)),
        Figure.of("first run", "ms", first),
    )


def plan_of(pipe: "Pipeline", name: str) -> "GuidancePlan":
    """Return the guidance plan of a setting in SETTINGS."""
    strong, weak = SETTINGS[name]
    return pipe.guidance("sg", strong_sparsity=strong, sparsity=weak)


def rows_of(manifest: "Manifest", plan: "GuidancePlan", images: int) -> list[int]:
    """Return the number of rows of each block of a guided step.

    Both branches share the blocks before the route. In the route each has its kept tokens, and
    after it each has all tokens.
    """
    model = manifest.model
    route, tokens = model.route, model.tokens
    assert route is not None
    assert plan.weak is not None
    kept = plan.strong.keep + plan.weak.keep
    inside = route.end - route.start + 1
    after = model.depth - route.end - 1
    return [images * rows for rows in [tokens] * route.start + [kept] * inside + [2 * tokens] * after]


CHECKS: tuple[Check, ...] = (guided_step_and_loop, kernels_of_a_step)
