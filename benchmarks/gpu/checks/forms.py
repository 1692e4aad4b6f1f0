"""Part `forms`: other forms of a step of DiT-XL/2 and of its patterns on ONNX Runtime."""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.gpu import timing
from benchmarks.gpu.child import Check, Context
from benchmarks.gpu.results import Figure, Finding

if TYPE_CHECKING:
    from benchmarks.gpu.sessions import Bound

FURTHEST = 0.02
"""Largest relative L2 distance of a step in FP16 to PyTorch in FP32; a fault is far above it."""
CAPTURED = "1"


def patterns(_: Context) -> Iterator[Finding]:
    """Patterns at the sizes of XL/2: kernels, and the time of a replay."""
    import torch

    from benchmarks.gpu.patterns import FP32, patterns
    from benchmarks.gpu.sessions import WITHOUT, Bound

    for pattern in patterns():
        try:
            given = {name: torch.from_numpy(value).cuda() for name, value in pattern.feeds().items()}
            name, kind, shape = pattern.output
            target = torch.empty(shape, device="cuda", dtype=torch.float32 if kind == FP32 else torch.float16)
            bound = Bound(pattern.model, given, name, target)
            figures, details = timing.kernels(partial(bound.run, WITHOUT))
            yield Finding(pattern.name, None, "", (*figures, replay(bound)), details)
        except Exception as error:  # a form that a release does not run is a finding
            yield Finding(pattern.name, None, f"does not run: {error}"[:300])


def steps(_: Context) -> Iterator[Finding]:
    """The complete step for one image, in FP16 with FP16 tokens, compared with PyTorch in FP32."""
    import torch

    from benchmarks.gpu import step_form
    from benchmarks.gpu.sessions import WITHOUT

    weights = step_form.random_weights(step_form.DEPTH)
    for pair, kept in step_form.KEPT.items():
        given = step_form.feeds(kept, step_form.DEPTH)
        wanted = step_form.reference(weights, given, kept, step_form.DEPTH, "cuda")
        change = (wanted - torch.from_numpy(given["x"]).cuda()).norm()
        for attention, norm in step_form.FORMS:
            setting = f"γ {pair}, attention {attention}, norm {norm}"
            try:
                bound, target = step_form.bound(attention, norm, kept, weights, given, step_form.DEPTH)
                figures, details = timing.kernels(partial(bound.run, WITHOUT))
                time = replay(bound)
                distance = float((target - wanted).norm() / change)
                figures = (*figures, time, Figure.of("relative L2", "", distance))
                yield Finding(setting, distance <= FURTHEST, "", figures, details)
            except Exception as error:  # as above
                yield Finding(setting, None, f"does not run: {error}"[:300])


def replay(bound: "Bound") -> Figure:
    """Capture a bound model and return the time of its replays."""
    bound.run(CAPTURED)
    times = timing.event_ms(partial(bound.run, CAPTURED), bound.stream, 50)
    return Figure.of("replay", "ms", *times)


CHECKS: tuple[Check, ...] = (patterns, steps)
