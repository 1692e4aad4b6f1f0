"""Schedules and samplers as pure functions: where to evaluate the network, how to update the state.

A sampler is a list of updates. Each update evaluates the network once and moves the state linearly:

    next = a * x + b * D + e * r

x is the state, D the prediction at x (velocity for flow, denoised image for edm and x0), and r the
state at the start of the step. A step graph computes `next` itself, so an update is one launch of
it.

flow: z_t = (1 - t) x + t z with noise z. Sampling goes from t = 1 to 0 along the velocity z - x
(Liu et al. 2022; time convention as in CompVis/tread, `rf.py`).
x0: the same with a network that predicts x. Its velocity is (z_t - x) / t. t is not taken as less
than a floor, which keeps the velocity finite (Li and He 2025, arXiv 2511.13720).
edm: x + sigma z. Sampling goes from the highest sigma to 0 (Karras et al. 2022).
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from sg_runtime.errors import UsageError
from sg_runtime.manifest import Karras, Prediction, SamplerName, Sampling, Shifted
from sg_runtime.manifest.base import number

Array = NDArray[np.floating[Any]]

SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)
SIGMA_DATA = 0.5
"""Standard deviation of the training data of edm models, the same in both supported families."""


@dataclass(frozen=True, slots=True)
class Preconditioning:
    """Scalars of the prediction D(x) = c_skip * x + c_out * F(c_in * x; t) of the network F."""

    t: float
    c_in: float
    c_skip: float
    c_out: float


@dataclass(frozen=True, slots=True)
class Update:
    """One evaluation of the network, followed by next = a * x + b * D + e * r.

    step: index of the step in the run.
    evaluation: index of the evaluation in its step; 0 for the first.
    time: t, or sigma of an edm model.
    a: coefficient of the state x.
    b: coefficient of the prediction D.
    e: coefficient of r, the state at the start of the step.
    noise: standard deviation of the fresh noise added to x before the evaluation.
    """

    step: int
    evaluation: int
    time: float
    a: float
    b: float
    e: float
    noise: float = 0.0

    def next(self, x: Array, prediction: Array, r: Array) -> Array:
        """Return the state after the update, in the dtype of `x`."""
        a, b, e = (x.dtype.type(value) for value in (self.a, self.b, self.e))
        following: Array = a * x + b * prediction + e * r
        return following


@dataclass(frozen=True, slots=True)
class Churn:
    """Noise that an edm sampler adds in every step whose sigma is in [low, high].

    amount, low, high and noise are `S_churn`, `S_min`, `S_max` and `S_noise` in upstream code.
    """

    amount: float
    low: float = 0.0
    high: float = math.inf
    noise: float = 1.0

    def __post_init__(self) -> None:
        for name in ("amount", "low", "high", "noise"):
            number(f"churn: {name}", getattr(self, name))
        if not (0 <= self.amount < math.inf and 0 <= self.noise < math.inf and 0 <= self.low <= self.high):
            raise UsageError(
                f"churn: expected an amount and noise of at least 0 and low <= high, found amount {self.amount:g}, "
                f"noise {self.noise:g}, {self.low:g} to {self.high:g}"
            )


def precondition(prediction: Prediction, time: float) -> Preconditioning:
    """Return the scalars and the time input of the network at `time`.

    Source: Karras et al. 2022, table 1, column EDM.
    """
    if prediction != "edm":
        return Preconditioning(time, 1.0, 0.0, 1.0)
    variance = time**2 + SIGMA_DATA**2
    return Preconditioning(
        t=math.log(time) / 4,
        c_in=variance**-0.5,
        c_skip=SIGMA_DATA**2 / variance,
        c_out=time * SIGMA_DATA * variance**-0.5,
    )


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A run without its conditioning.

    start: standard deviation of the state at the start, which is noise alone.
    updates: all updates from there to time 0.
    """

    start: float
    updates: tuple[Update, ...]


def trajectory(sampling: Sampling, prediction: Prediction, churn: Churn | None = None) -> Trajectory:
    """Return the start and the updates of a run."""
    times = run_times(sampling.steps, sampling.times)
    run = updates(sampling.sampler, prediction, times, churn, sampling.time_floor)
    return Trajectory(sampling.noise_scale * times[0], run)


def run_times(steps: int, times: Karras | Shifted) -> list[float]:
    """Return `steps` + 1 times that fall to 0.

    Noise levels are those of Karras et al. 2022, eq. 5.
    """
    places = [step / max(steps - 1, 1) for step in range(steps)]
    if isinstance(times, Shifted):
        even = [1 - step / steps for step in range(steps)]
        if times.last is not None:
            even = [1 - place + place * times.last for place in places]
        return [times.shift * u / (times.shift * u + (1 - u)) for u in even] + [0.0]
    high, low = times.sigma_max ** (1 / times.rho), times.sigma_min ** (1 / times.rho)
    return [((1 - place) * high + place * low) ** times.rho for place in places] + [0.0]


def updates(
    sampler: SamplerName,
    prediction: Prediction,
    times: Sequence[float],
    churn: Churn | None = None,
    time_floor: float = 0.0,
) -> tuple[Update, ...]:
    """Return the updates of a run along `times`, which fall to 0.

    euler: one evaluation per step.
    heun: two evaluations per step, except one in the last step: it ends at time 0, for which no
    model was trained.
    Source: Karras et al. 2022, algorithm 2, for any straight-line ODE dx/dt = p x + q D. The second
    half of a Heun step averages slopes: r + (x - r) / 2 + h (p x + q D) / 2, with x the state after
    the first half.
    """
    return _updates(sampler, prediction, tuple(times), churn or Churn(0.0), time_floor)


@functools.lru_cache(maxsize=16)  # many runs have the same updates
def _updates(
    sampler: SamplerName, prediction: Prediction, times: tuple[float, ...], churn: Churn, time_floor: float
) -> tuple[Update, ...]:
    return tuple(_each_update(sampler, prediction, times, churn, time_floor))


def _each_update(
    sampler: SamplerName, prediction: Prediction, times: Sequence[float], churn: Churn, time_floor: float
) -> Iterator[Update]:
    for step, (t, t_next) in enumerate(pairwise(times)):
        gamma = min(churn.amount / (len(times) - 1), math.sqrt(2) - 1) if churn.low <= t <= churn.high else 0.0
        t_hat = t + gamma * t
        noise = churn.noise * math.sqrt(t_hat**2 - t**2)
        h = t_next - t_hat
        p, q = _slope(prediction, max(t_hat, time_floor))
        yield Update(step, 0, t_hat, 1 + h * p, h * q, 0.0, noise)
        if sampler == "heun" and t_next > 0:
            p, q = _slope(prediction, max(t_next, time_floor))
            yield Update(step, 1, t_next, (1 + h * p) / 2, h * q / 2, 0.5)


def _slope(prediction: Prediction, time: float) -> tuple[float, float]:
    """Return p and q of dx/dt = p x + q D: velocity for flow, (x - denoised) / time otherwise."""
    return (0.0, 1.0) if prediction == "flow" else (1 / time, -1 / time)


def integrate(
    run: Sequence[Update],
    advance: Callable[[int, Array, Array], Array],
    x: Array,
    noise: Callable[[int], Array] | None = None,
) -> Array:
    """Apply the updates of `run` to `x` and return the final state.

    advance: (index of the update, x, r) → next.
    noise: step → standard normal numbers of the shape of x; required if an update adds noise.
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
