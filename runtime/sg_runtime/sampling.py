"""Schedules and samplers, as pure functions: what to ask the network for, and what to make of the answer.

A sampler is a list of updates. Each evaluates the network once and moves the state linearly,

    next = a * x + b * D + e * r

with x the state, D the prediction at x (velocity for flow, denoised for edm) and r the state at the step's start: one
run of a step graph, which computes `next` itself.

flow: z_t = (1 - t) x + t z with noise z; sampling goes from t = 1 to 0 along the velocity z - x (Liu et al. 2022; the
time convention is that of CompVis/tread, `rf.py`). edm: x + sigma z, from the highest sigma to 0 (Karras et al. 2022).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from sg_runtime.errors import UsageError
from sg_runtime.manifest import Karras, Prediction, SamplerName

Array = NDArray[np.floating[Any]]

SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)
SIGMA_DATA = 0.5
"""Standard deviation of the data that edm models are trained for, in both supported families."""


@dataclass(frozen=True, slots=True)
class Preconditioning:
    """How the network F makes a prediction: D(x) = c_skip * x + c_out * F(c_in * x; t)."""

    t: float
    c_in: float
    c_skip: float
    c_out: float


@dataclass(frozen=True, slots=True)
class Update:
    """One evaluation at `time` (t, or sigma), and next = a * x + b * D + e * r.

    noise: standard deviation of the fresh noise that is added to x before. evaluation: 0 for the first of a step.
    """

    step: int
    evaluation: int
    time: float
    a: float
    b: float
    e: float
    noise: float = 0.0

    def next(self, x: Array, prediction: Array, r: Array) -> Array:
        """The state after the update, in the type of `x`."""
        a, b, e = (x.dtype.type(value) for value in (self.a, self.b, self.e))
        following: Array = a * x + b * prediction + e * r
        return following


@dataclass(frozen=True, slots=True)
class Churn:
    """Noise that an edm sampler adds in every step whose sigma is in [low, high]; `S_churn` and kin upstream."""

    amount: float
    low: float = 0.0
    high: float = math.inf
    noise: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.amount < math.inf and 0 <= self.noise < math.inf and 0 <= self.low <= self.high):
            raise UsageError(
                f"churn: expected an amount and noise of at least 0 and low <= high, found amount {self.amount:g}, "
                f"noise {self.noise:g}, {self.low:g} to {self.high:g}"
            )


def precondition(prediction: Prediction, time: float) -> Preconditioning:
    """Scalings and the time input of the network at `time`. Source: Karras et al. 2022, table 1, column EDM."""
    if prediction == "flow":
        return Preconditioning(time, 1.0, 0.0, 1.0)
    variance = time**2 + SIGMA_DATA**2
    return Preconditioning(
        t=math.log(time) / 4,
        c_in=variance**-0.5,
        c_skip=SIGMA_DATA**2 / variance,
        c_out=time * SIGMA_DATA * variance**-0.5,
    )


def run_times(steps: int, karras: Karras | None) -> list[float]:
    """`steps` + 1 times down to 0: from 1 in even steps, or noise levels of `karras` (Karras et al. 2022, eq. 5)."""
    if karras is None:
        return [1 - step / steps for step in range(steps)] + [0.0]
    high, low = karras.sigma_max ** (1 / karras.rho), karras.sigma_min ** (1 / karras.rho)
    places = [step / max(steps - 1, 1) for step in range(steps)]
    return [((1 - place) * high + place * low) ** karras.rho for place in places] + [0.0]


def updates(
    sampler: SamplerName, prediction: Prediction, times: Sequence[float], churn: Churn | None = None
) -> tuple[Update, ...]:
    """The updates of a run along `times`, which fall to 0.

    euler: one evaluation a step. heun: two, but one in the last step, which ends at 0 where no model was trained.
    Source: Karras et al. 2022, algorithm 2, with any straight-line ODE dx/dt = p x + q D. Heun's second half averages
    slopes: with x the state that the first half reached, r + (x - r) / 2 + h (p x + q D) / 2.
    """
    return tuple(_updates(sampler, prediction, times, churn or Churn(0.0)))


def _updates(sampler: SamplerName, prediction: Prediction, times: Sequence[float], churn: Churn) -> Iterator[Update]:
    for step, (t, t_next) in enumerate(pairwise(times)):
        gamma = min(churn.amount / (len(times) - 1), math.sqrt(2) - 1) if churn.low <= t <= churn.high else 0.0
        t_hat = t + gamma * t
        noise = churn.noise * math.sqrt(t_hat**2 - t**2)
        h = t_next - t_hat
        p, q = _slope(prediction, t_hat)
        yield Update(step, 0, t_hat, 1 + h * p, h * q, 0.0, noise)
        if sampler == "heun" and t_next > 0:
            p, q = _slope(prediction, t_next)
            yield Update(step, 1, t_next, (1 + h * p) / 2, h * q / 2, 0.5)


def _slope(prediction: Prediction, time: float) -> tuple[float, float]:
    """p and q of dx/dt = p x + q D: the velocity itself, or (x - denoised) / sigma."""
    return (0.0, 1.0) if prediction == "flow" else (1 / time, -1 / time)


def integrate(
    run: Sequence[Update],
    advance: Callable[[int, Array, Array], Array],
    x: Array,
    noise: Callable[[int], Array] | None = None,
) -> Array:
    """Take `x` along the updates of `run`.

    advance: (index of the update, x, r) → next. noise: step → standard normal numbers like x, where updates add noise.
    """
    start = x
    for index, update in enumerate(run):
        if update.noise:
            assert noise is not None
            x = x + x.dtype.type(update.noise) * noise(update.step)
        if update.evaluation == 0:
            start = x
        x = advance(index, x, start)
    return x
