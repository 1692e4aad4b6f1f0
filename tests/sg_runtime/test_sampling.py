"""The samplers on an equation whose solution is known: rectified flow from noise to a normal distribution.

For data x ~ N(mu, s²) and noise z ~ N(0, 1), z_t = (1 - t) x + t z is normal with mean (1 - t) mu and variance
V(t) = (1 - t)² s² + t². The velocity is a conditional mean of normal variables, linear in z_t:

    v(z_t, t) = E[z - x | z_t] = -mu + cov(z - x, z_t) / V (z_t - (1 - t) mu),  cov(z - x, z_t) = t - (1 - t) s²

As V'(t) = 2 cov(z - x, z_t), the flow from z_1 = c is z_t = (1 - t) mu + sqrt(V(t)) c: it ends in z_0 = mu + s c.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sg_runtime.manifest import SamplerName
from sg_runtime.sampling import SAMPLERS, evaluations, flow_times

MU, S = 0.7, 0.4
Float64 = NDArray[np.float64]

few = settings(deadline=None, max_examples=50)


def exact_velocity(z: Float64, t: float) -> Float64:
    """v(z_t, t), derived above."""
    variance = (1 - t) ** 2 * S**2 + t**2
    return -MU + (t - (1 - t) * S**2) / variance * (z - (1 - t) * MU)


def error_of(sampler: SamplerName, steps: int) -> float:
    """Largest distance to the exact end of the flow, in float64 throughout."""
    times = np.linspace(1, 0, steps + 1)
    start = np.linspace(-2, 2, 9)
    end = SAMPLERS[sampler](lambda z, step, e: exact_velocity(z, times[step + e]), start, times)
    assert end.dtype == np.float64
    return float(np.abs(end - (MU + S * start)).max())


def test_exact_velocity_along_the_flow_is_its_derivative() -> None:
    """The derivation above holds: a central difference of the flow, whose error is of order 1e-10 in float64."""
    c, h = np.linspace(-2, 2, 9), 1e-5

    def flow(t: float) -> Float64:
        return (1 - t) * MU + np.sqrt((1 - t) ** 2 * S**2 + t**2) * c

    for t in (0.1, 0.5, 0.9):
        slope = (flow(t + h) - flow(t - h)) / (2 * h)
        np.testing.assert_allclose(exact_velocity(flow(t), t), slope, atol=1e-8)


@pytest.mark.parametrize(("sampler", "least", "most"), [("euler", 0.9, 1.1), ("heun", 1.8, 2.2)])
def test_sampler_on_a_known_flow_converges_at_its_order(sampler: SamplerName, least: float, most: float) -> None:
    """Twice the steps halve Euler's error and quarter Heun's, whose last step, one of Euler's, costs no order.

    The bounds leave room for the next order, which is still some percent of the error at these step counts.
    """
    errors = [error_of(sampler, steps) for steps in (100, 200, 400, 800)]
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert (orders > least).all(), orders
    assert (orders < most).all(), orders


@pytest.mark.parametrize("sampler", SAMPLERS)
@few
@given(st.integers(1, 60), st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=5))
def test_sampler_on_a_straight_flow_is_exact(sampler: SamplerName, steps: int, slope: list[float]) -> None:
    velocity = np.array(slope, dtype=np.float32)
    end = SAMPLERS[sampler](lambda x, step, e: velocity, np.zeros_like(velocity), flow_times(steps))
    assert end.dtype == np.float32
    # Each of up to 60 additions rounds a value of at most 8 by half a unit in the last place, 2**-22.
    np.testing.assert_allclose(end, -velocity, atol=60 * 2**-22)


@pytest.mark.parametrize("sampler", SAMPLERS)
@few
@given(st.integers(1, 60))
def test_evaluations_of_any_step_count_are_the_calls_made(sampler: SamplerName, steps: int) -> None:
    calls: list[tuple[int, int]] = []

    def velocity(x: Float64, step: int, evaluation: int) -> Float64:
        calls.append((step, evaluation))
        return x

    SAMPLERS[sampler](velocity, np.ones(1, dtype=np.float32), flow_times(steps))
    assert calls == evaluations(sampler, steps)
    assert len(calls) == {"euler": steps, "heun": 2 * steps - 1}[sampler]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_evaluations_at_their_times_see_the_state_of_that_time(sampler: SamplerName) -> None:
    """Evaluation e of step i is at time i + e: on z_t = t the state is the time itself."""
    times = np.linspace(1, 0, 5)

    def velocity(x: Float64, step: int, evaluation: int) -> Float64:
        # Sums of quarters are exact.
        np.testing.assert_array_equal(x, times[step + evaluation])
        return np.ones(1)

    np.testing.assert_array_equal(SAMPLERS[sampler](velocity, np.ones(1), times), 0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampler_of_a_given_state_leaves_it_as_it_was(sampler: SamplerName) -> None:
    start = np.ones(3, dtype=np.float32)
    SAMPLERS[sampler](lambda x, step, e: x, start, flow_times(3))
    np.testing.assert_array_equal(start, 1)


@few
@given(st.integers(1, 1000))
def test_flow_times_of_any_step_count_fall_evenly_from_one_to_zero(steps: int) -> None:
    times = flow_times(steps)
    assert times.dtype == np.float32
    assert times.shape == (steps + 1,)
    assert times[0] == 1
    assert times[-1] == 0
    # Each time is rounded to float32 by at most 2**-25.
    np.testing.assert_allclose(np.diff(times.astype(np.float64)), -1 / steps, atol=2**-24)
