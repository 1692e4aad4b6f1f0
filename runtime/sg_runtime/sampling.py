"""Schedules and samplers of rectified flow, as pure functions over float32 arrays.

z_t = (1 - t) x + t z with noise z: sampling goes from t = 1 to t = 0 along the velocity z - x that the model predicts
(Liu et al. 2022; the time convention is that of CompVis/tread, `rf.py`).
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sg_runtime.manifest import SamplerName

Array = NDArray[np.float32]
Velocity = Callable[[Array, int, int], Array]
"""(x, step, evaluation) → velocity. `evaluation` counts the model calls within a step."""


def flow_times(steps: int) -> Array:
    """`steps` + 1 times from 1 down to 0, evenly spaced."""
    return np.linspace(1, 0, steps + 1, dtype=np.float32)


def euler(velocity: Velocity, x: Array, times: Array) -> Array:
    """First order: one evaluation per step."""
    for step, (t, t_next) in enumerate(pairwise(times)):
        x = x + (t_next - t) * velocity(x, step, 0)
    return x


def heun(velocity: Velocity, x: Array, times: Array) -> Array:
    """Second order: two evaluations per step, one in the last, which ends at t = 0 where no model was trained."""
    for step, (t, t_next) in enumerate(pairwise(times)):
        slope = velocity(x, step, 0)
        ahead = x + (t_next - t) * slope
        if step + 2 < len(times):
            ahead = x + (t_next - t) * (0.5 * slope + 0.5 * velocity(ahead, step, 1))
        x = ahead
    return x


def evaluations(sampler: SamplerName, steps: int) -> list[tuple[int, int]]:
    """The (step, evaluation) pairs that a sampler asks for, in order. Evaluation e of step i is at time i + e."""
    if sampler == "euler":
        return [(step, 0) for step in range(steps)]
    return [(step, e) for step in range(steps) for e in (0, 1) if step + e < steps]


SAMPLERS: dict[SamplerName, Callable[[Velocity, Array, Array], Array]] = {"euler": euler, "heun": heun}
