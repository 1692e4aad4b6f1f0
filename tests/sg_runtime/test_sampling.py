"""The samplers, checked against equations with known solutions and the papers' algorithms.

flow: for data x ~ N(mu, s²) and noise z ~ N(0, 1), z_t = (1 - t) x + t z is normal with mean
(1 - t) mu and variance V(t) = (1 - t)² s² + t². The velocity is a conditional mean of normal
variables, so it is linear in z_t:

    v(z_t, t) = E[z - x | z_t] = -mu + cov(z - x, z_t) / V (z_t - (1 - t) mu)
    cov(z - x, z_t) = t - (1 - t) s²

As V'(t) = 2 cov(z - x, z_t), the flow from z_1 = c is z_t = (1 - t) mu + sqrt(V(t)) c. It ends in
z_0 = mu + s c.

x0: the same with D(z_t, t) = E[x | z_t] = z_t - t v(z_t, t).

edm: for the same data, D(x, sigma) = E[data | x] = mu + s² / (s² + sigma²) (x - mu). The equation
dx/dsigma = (x - D) / sigma is solved by x = mu + c sqrt(s² + sigma²).
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sg_runtime.errors import UsageError
from sg_runtime.manifest import EVEN, Karras, Prediction, SamplerName, Sampling, Shifted
from sg_runtime.sampling import (
    SAMPLERS,
    SIGMA_DATA,
    Churn,
    Update,
    integrate,
    precondition,
    run_times,
    trajectory,
    updates,
)

MU, S = 0.7, 0.4
EDM = Karras(0.002, 80.0, 7.0)
PREDICTIONS: tuple[Prediction, ...] = ("flow", "edm", "x0")
TIMES: dict[Prediction, Karras | Shifted] = {"flow": EVEN, "edm": EDM, "x0": Shifted(3.0, None)}

Array = NDArray[np.floating[Any]]
Predict = Callable[[Array, float], Array]

few = settings(max_examples=50)
karras = st.builds(Karras, st.floats(0.02, 0.5), st.floats(1, 80), st.floats(1, 10))
churns = st.builds(
    Churn, st.floats(0, 40), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([1.0, 5.0, math.inf]), st.floats(0, 1.1)
)


def solve(run: Sequence[Update], predict: Predict, x: Array, noise: Callable[[int], Array] | None = None) -> Array:
    """Integrate x along `run` with D = predict(x, time)."""

    def advance(index: int, x: Array, r: Array) -> Array:
        update = run[index]
        following: Array = update.a * x + update.b * predict(x, update.time) + update.e * r
        return following

    return integrate(run, advance, x, noise)


def noises(seed: int, like: Array) -> Callable[[int], Array]:
    """Return a function that gives normal numbers for a step."""
    return lambda step: np.random.default_rng([seed, step]).standard_normal(like.shape).astype(like.dtype)


# Known solutions


def gaussian(prediction: Prediction, x: Array, time: float) -> Array:
    """Return the exact prediction, derived above."""
    if prediction == "edm":
        return MU + S**2 / (S**2 + time**2) * (x - MU)
    variance = (1 - time) ** 2 * S**2 + time**2
    velocity = -MU + (time - (1 - time) * S**2) / variance * (x - (1 - time) * MU)
    return x - time * velocity if prediction == "x0" else velocity


def solution(prediction: Prediction, time: float) -> Array:
    """Return the exact states at `time` of nine runs, derived above."""
    c = np.linspace(-2, 2, 9)
    if prediction == "edm":
        return MU + c * math.sqrt(S**2 + time**2)
    return (1 - time) * MU + c * math.sqrt((1 - time) ** 2 * S**2 + time**2)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_gaussian_along_its_solution_is_the_derivative(prediction: Prediction) -> None:
    """A central difference confirms the derivations above.

    Its error is of order 1e-10 in float64.
    """
    h = 1e-5
    for time in (0.1, 0.5, 0.9):
        x = solution(prediction, time)
        slope = (solution(prediction, time + h) - solution(prediction, time - h)) / (2 * h)
        found = gaussian(prediction, x, time)
        np.testing.assert_allclose(found if prediction == "flow" else (x - found) / time, slope, atol=1e-8)


def error_of(prediction: Prediction, sampler: SamplerName, steps: int) -> float:
    """Return the largest distance to the exact solution, computed in float64.

    A flow run is compared at its end. An edm run is compared at sigma_min, where its last update
    starts: that update jumps to 0 for any number of steps, and it has its own error.
    """
    times = run_times(steps, TIMES[prediction])
    run, end = updates(sampler, prediction, times), 0.0
    if prediction == "edm":
        run, end = run[:-1], times[-2]
    found = solve(run, lambda x, time: gaussian(prediction, x, time), solution(prediction, times[0]))
    assert found.dtype == np.float64
    return float(np.abs(found - solution(prediction, end)).max())


@pytest.mark.parametrize(("sampler", "least", "most"), [("euler", 0.9, 1.1), ("heun", 1.8, 2.2)])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_updates_on_a_known_solution_converge_at_their_order(
    prediction: Prediction, sampler: SamplerName, least: float, most: float
) -> None:
    """Twice the steps halve Euler's error and quarter Heun's error.

    Heun's last step is an Euler step, but it does not lower the order. The bounds leave room for
    the next order, which is still a few percent of the error at these step counts.
    """
    errors = [error_of(prediction, sampler, steps) for steps in (100, 200, 400, 800)]
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert (orders > least).all(), orders
    assert (orders < most).all(), orders


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_updates_of_the_last_edm_step_end_near_the_solution(sampler: SamplerName) -> None:
    """One Euler step from sigma_min goes to D.

    Its error is (sigma_min / s)² / 2, relative to the spread of the exact end.
    """
    found = solve(
        updates(sampler, "edm", [EDM.sigma_min, 0.0]),
        lambda x, time: gaussian("edm", x, time),
        solution("edm", EDM.sigma_min),
    )
    # |c| <= 2, times s; the next order is smaller by a factor of about 1e5.
    np.testing.assert_allclose(found, solution("edm", 0.0), atol=1.01 * 2 * S * (EDM.sigma_min / S) ** 2 / 2)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_updates_of_more_steps_go_less_astray(prediction: Prediction, sampler: SamplerName) -> None:
    errors = [error_of(prediction, sampler, steps) for steps in (5, 10, 20, 40)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("amount", [10.0, 40.0])
def test_updates_with_churn_keep_the_distribution(amount: float) -> None:
    """Every step adds noise, but the end is still N(mu, s²).

    The check uses 20 000 runs from the exact start.
    """
    times = run_times(64, EDM)
    rng = np.random.default_rng(0)
    start = MU + math.sqrt(S**2 + EDM.sigma_max**2) * rng.standard_normal(20_000)
    quiet, noisy = (
        solve(updates("heun", "edm", times, churn), lambda x, time: gaussian("edm", x, time), start, noises(1, start))
        for churn in (None, Churn(amount))
    )
    assert abs(np.corrcoef(quiet, noisy)[0, 1]) < 0.5, "churn forgets much of the start"
    # Four standard errors of a mean, s / sqrt(n), and of a standard deviation, s / sqrt(2 n), plus
    # 4 % for coarse steps.
    assert abs(noisy.mean() - MU) < 4 * S / math.sqrt(20_000)
    assert abs(noisy.std() - S) < 4 * S / math.sqrt(40_000) + 0.04 * S


# The papers' algorithms, written out


def velocity(x: Array, time: float) -> Array:
    """Return a velocity that is neither linear nor constant in any argument."""
    slope: Array = np.sin(3 * x + time) - time * x
    return slope


def denoised(x: Array, time: float) -> Array:
    """Return a denoised value that is neither linear nor constant in any argument."""
    data: Array = 0.5 * np.tanh(x / (1 + time)) + 0.1 * time / (1 + time)
    return data


def classic(sampler: SamplerName, times: Sequence[float], x: Array, velocity: Predict = velocity) -> Array:
    """Apply Euler's or Heun's method to dx/dt = velocity.

    Heun's corrector is left out if it would evaluate at t = 0.
    """
    for t, t_next in pairwise(times):
        first = velocity(x, t)
        reached = x + (t_next - t) * first
        if sampler == "heun" and t_next > 0:
            second = velocity(reached, t_next)
            reached = x + (t_next - t) * 0.5 * (first + second)
        x = reached
    return x


def algorithm_2(
    sampler: SamplerName, sigmas: Sequence[float], x: Array, noise: Callable[[int], Array], churn: Churn
) -> Array:
    """Apply algorithm 2 of Karras et al. 2022, in the paper's letters.

    Without its lines 9 to 11 it is Euler's method.
    """
    n = len(sigmas) - 1
    for i in range(n):
        t_i, t_next = sigmas[i], sigmas[i + 1]
        within = churn.low <= t_i and t_i <= churn.high
        gamma_i = min(churn.amount / n, 2**0.5 - 1) if within else 0.0
        t_hat = (1 + gamma_i) * t_i
        x_hat = x + (t_hat**2 - t_i**2) ** 0.5 * churn.noise * noise(i)
        d_i = (x_hat - denoised(x_hat, t_hat)) / t_hat
        x = x_hat + (t_next - t_hat) * d_i
        if sampler == "heun" and t_next != 0:
            d_prime = (x - denoised(x, t_next)) / t_next
            x = x_hat + (t_next - t_hat) * (d_i / 2 + d_prime / 2)
    return x


@pytest.mark.parametrize("sampler", SAMPLERS)
@few
@given(st.integers(1, 40))
def test_updates_of_a_flow_agree_with_the_classic_method(sampler: SamplerName, steps: int) -> None:
    times, x = run_times(steps, EVEN), np.linspace(-2, 2, 9)
    found = solve(updates(sampler, "flow", times), velocity, x)
    # At most 80 evaluations of numbers of size 1, each rounded in float64. The flow spreads this by
    # at most e**4.
    np.testing.assert_allclose(found, classic(sampler, times, x), rtol=0, atol=80 * 2**-52 * math.e**4)


@pytest.mark.parametrize("sampler", SAMPLERS)
@few
@given(st.integers(1, 20), karras, churns, st.integers(0, 2**32))
def test_updates_of_an_edm_run_agree_with_algorithm_2(
    sampler: SamplerName, steps: int, levels: Karras, churn: Churn, seed: int
) -> None:
    """Runs have no churn, churn everywhere, or churn between two noise levels.

    The churn noise has any standard deviation.
    """
    times = run_times(steps, levels)
    x = levels.sigma_max * np.linspace(-2, 2, 9)
    noise = noises(seed, x)
    found = solve(updates(sampler, "edm", times, churn), denoised, x, noise)
    expected = algorithm_2(sampler, times, x, noise, churn)
    # A rounding of x, 160 * 2**-53, can grow by a factor of 4000 in a step from 80 to 0.02. If
    # there are few steps, x stays that large.
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-9)


def test_updates_with_upstreams_numbers_agree_with_algorithm_2() -> None:
    """The settings are those that NVlabs/edm publishes for ImageNet-64.

    They are 256 steps, S_churn 40, S_min 0.05, S_max 50 and S_noise 1.003.
    """
    churn = Churn(40, 0.05, 50, 1.003)
    times = run_times(256, EDM)
    x = 80 * np.linspace(-2, 2, 9)
    run = updates("heun", "edm", times, churn)
    found = solve(run, denoised, x, noises(3, x))
    np.testing.assert_allclose(found, algorithm_2("heun", times, x, noises(3, x), churn), rtol=1e-10, atol=1e-9)
    noisy = [u for u in run if u.noise]
    assert {u.step for u in noisy} == {step for step, time in enumerate(times) if 0.05 <= time <= 50}
    assert all(u.time == pytest.approx(times[u.step] * (1 + 40 / 256), rel=1e-15) for u in noisy)


def test_updates_with_much_churn_add_no_more_than_the_paper_allows() -> None:
    """gamma is at most sqrt(2) - 1.

    So the new noise has at most the variance of the existing noise.
    """
    (only,) = updates("euler", "edm", [3.0, 0.0], Churn(1e6))
    assert only.time == pytest.approx(3 * math.sqrt(2), rel=1e-15)
    assert only.noise == pytest.approx(3.0, rel=1e-14)


@pytest.mark.parametrize(("low", "high", "noisy"), [(1.0, 3.0, {1, 2, 3}), (1.5, 2.5, {2}), (5.0, 9.0, set())])
def test_updates_with_churn_between_levels_are_noisy_there_alone(low: float, high: float, noisy: set[int]) -> None:
    """Both levels are included."""
    run = updates("heun", "edm", [4.0, 3.0, 2.0, 1.0, 0.0], Churn(0.4, low, high))
    assert {update.step for update in run if update.noise} == noisy
    assert all(update.evaluation == 0 for update in run if update.noise)


@pytest.mark.parametrize(
    "arguments",
    [
        {"amount": -1.0},
        {"amount": math.inf},
        {"amount": math.nan},
        {"amount": 1.0, "low": -0.1},
        {"amount": 1.0, "low": 2.0, "high": 1.0},
        {"amount": 1.0, "high": math.nan},
        {"amount": 1.0, "noise": -1.0},
        {"amount": 1.0, "noise": math.inf},
        {"amount": 1.0, "noise": math.nan},
    ],
)
def test_churn_out_of_range_is_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"^churn: expected an amount and noise of at least 0 and low <= high, found "):
        Churn(**arguments)


def test_churn_out_of_range_names_what_was_found() -> None:
    with pytest.raises(UsageError) as caught:
        Churn(-1, 2, 1, 1.003)
    assert str(caught.value) == (
        "churn: expected an amount and noise of at least 0 and low <= high, found amount -1, noise 1.003, 2 to 1"
    )


# Invariants


@pytest.mark.parametrize("sampler", SAMPLERS)
@few
@given(st.integers(1, 60), st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=5))
def test_updates_of_a_straight_flow_are_exact(sampler: SamplerName, steps: int, slope: list[float]) -> None:
    straight = np.array(slope, dtype=np.float32)
    run = updates(sampler, "flow", run_times(steps, EVEN))
    end = solve(run, lambda x, time: straight, np.zeros_like(straight))
    assert end.dtype == np.float32
    # Each of up to 119 updates rounds a few numbers of at most 8 by half a unit in the last place,
    # 2**-22.
    np.testing.assert_allclose(end, -straight, rtol=0, atol=4 * 119 * 2**-22)


@pytest.mark.parametrize("sampler", SAMPLERS)
@few
@given(st.integers(1, 60), karras, st.lists(st.floats(-8, 8), min_size=1, max_size=5))
def test_updates_of_an_edm_run_to_one_image_end_there(
    sampler: SamplerName, steps: int, levels: Karras, image: list[float]
) -> None:
    """If D is the same image everywhere, every solution is a straight line in sigma.

    The line ends at the image.
    """
    target = np.array(image)
    run = updates(sampler, "edm", run_times(steps, levels))
    end = solve(run, lambda x, time: target, target + levels.sigma_max)
    # As in the comparison with algorithm 2: a step can multiply roundings of 88 * 2**-53 by 4000.
    np.testing.assert_allclose(end, target, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampler", SAMPLERS)
@few
@given(st.integers(1, 60), karras, st.floats(0, 40))
def test_updates_of_an_edm_run_leave_a_denoised_state_where_it_is(
    sampler: SamplerName, steps: int, levels: Karras, amount: float
) -> None:
    """D = x is a fixed point: with r = x, the weights of each update sum to 1."""
    run = updates(sampler, "edm", run_times(steps, levels), Churn(amount))
    for update in run:
        # a and b cancel. Each is at most sigma_max / sigma_min = 4000 and rounded in its last
        # place.
        assert update.a + update.b + update.e == pytest.approx(1, rel=0, abs=4000 * 2**-51)


@pytest.mark.parametrize("sampler", SAMPLERS)
@few
@given(st.integers(1, 60))
def test_updates_of_a_flow_leave_a_still_state_where_it_is(sampler: SamplerName, steps: int) -> None:
    """With v = 0, the weights of x and r sum to exactly 1, also for Heun's halves."""
    assert {update.a + update.e for update in updates(sampler, "flow", run_times(steps, EVEN))} == {1.0}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
@few
@given(st.integers(1, 60), st.floats(0, 40))
def test_updates_of_any_step_count_ask_at_the_expected_times(
    sampler: SamplerName, prediction: Prediction, steps: int, amount: float
) -> None:
    """The first evaluation of a step is at its start, raised by churn.

    The second is at the end of the step. The last step has no second evaluation.
    """
    times = run_times(steps, TIMES[prediction])
    churn = Churn(amount, 1.0, 20.0) if prediction == "edm" else None
    run = updates(sampler, prediction, times, churn)
    assert len(run) == {"euler": steps, "heun": 2 * steps - 1}[sampler]
    second = [(step, 1) for step in range(steps - 1)] if sampler == "heun" else []
    assert [(u.step, u.evaluation) for u in run] == sorted([(step, 0) for step in range(steps)] + second)
    for update in run:
        if update.evaluation:
            assert update.time == times[update.step + 1]
            assert update.noise == 0
        else:
            start = times[update.step]
            assert update.time == start or (churn is not None and 1 <= start <= 20)
            assert start <= update.time <= start * math.sqrt(2) * (1 + 2**-52)
            # The noise raises the variance from one sigma² to the other.
            assert start**2 + update.noise**2 == pytest.approx(update.time**2, rel=1e-12)
        assert update.time > 0, "no model was trained at 0"


@pytest.mark.parametrize("sampler", SAMPLERS)
@few
@given(st.integers(1, 40), st.floats(0, 1))
def test_updates_of_an_x0_model_agree_with_the_method_for_its_velocity(
    sampler: SamplerName, steps: int, floor: float
) -> None:
    """The velocity is (x - x0) / max(t, floor), as diffusers' PRXPixelPipeline computes it."""
    times, x = run_times(steps, Shifted(3.0, 0.003)), np.linspace(-2, 2, 9)

    def velocity(x: Array, t: float) -> Array:
        slope: Array = (x - gaussian("x0", x, t)) / max(t, floor)
        return slope

    found = solve(updates(sampler, "x0", times, time_floor=floor), lambda x, t: gaussian("x0", x, t), x)
    # As above; each of 80 roundings may grow by a factor of 1 / 0.003 in the last step.
    np.testing.assert_allclose(found, classic(sampler, times, x, velocity), rtol=0, atol=80 * 2**-52 * 1e4)


def test_updates_of_an_x0_model_without_a_floor_end_at_its_prediction() -> None:
    (only,) = updates("euler", "x0", [0.25, 0.0])
    assert (only.a, only.b, only.e) == (0, 1, 0)


def test_updates_of_an_x0_model_below_its_floor_go_part_of_the_way() -> None:
    (only,) = updates("euler", "x0", [0.01, 0.0], time_floor=0.05)
    assert (only.a, only.b, only.e) == pytest.approx((0.8, 0.2, 0), rel=1e-15)
    assert only.time == 0.01, "the network gets the time itself"


def test_trajectory_is_the_updates_along_the_times_of_its_sampling() -> None:
    sampling = Sampling("heun", 3, Shifted(3.0, 0.01), 2.0, 0.05)
    found = trajectory(sampling, "x0")
    assert found.updates == updates("heun", "x0", run_times(3, Shifted(3.0, 0.01)), time_floor=0.05)
    assert found.updates != updates("heun", "x0", run_times(3, Shifted(3.0, 0.01)))
    assert found.start == 2.0


def test_trajectory_of_an_edm_run_with_churn_starts_from_the_highest_sigma() -> None:
    found = trajectory(Sampling("euler", 3, EDM), "edm", Churn(1.0))
    assert found.updates == updates("euler", "edm", run_times(3, EDM), Churn(1.0))
    assert found.start == pytest.approx(80.0, rel=1e-12)


def test_integrate_of_two_heun_steps_hands_over_the_start_of_each() -> None:
    run = updates("heun", "flow", run_times(2, EVEN))
    seen: list[tuple[int, float, float]] = []

    def advance(index: int, x: Array, r: Array) -> Array:
        seen.append((index, float(x[0]), float(r[0])))
        return x + 1

    assert integrate(run, advance, np.zeros(1)).tolist() == [3]
    assert seen == [(0, 0, 0), (1, 1, 0), (2, 2, 2)]


def test_integrate_with_noise_starts_each_step_after_it() -> None:
    """Noise is requested only for the steps that add some."""
    run = updates("heun", "edm", [4.0, 2.0, 1.0, 0.0], Churn(1.2, 1.5, 2.5))
    asked: list[int] = []
    states: list[tuple[float, float]] = []

    def noise(step: int) -> Array:
        asked.append(step)
        return np.ones(1)

    def advance(index: int, x: Array, r: Array) -> Array:
        states.append((float(x[0]), float(r[0])))
        return x

    integrate(run, advance, np.zeros(1), noise)
    added = run[2].noise
    assert added == pytest.approx(2 * math.sqrt(1.4**2 - 1), rel=1e-15)
    assert asked == [1]
    assert states == [(0, 0), (0, 0), (added, added), (added, added), (added, added)]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_integrate_of_a_given_state_leaves_it_as_it_was(sampler: SamplerName, prediction: Prediction) -> None:
    start = np.ones(3, dtype=np.float32)
    run = updates(sampler, prediction, [2.0, 1.0, 0.0], Churn(1.0) if prediction == "edm" else None)
    end = solve(run, lambda x, time: 0.5 * x, start, noises(0, start))
    np.testing.assert_array_equal(start, 1)
    assert end.dtype == np.float32


# Times


@few
@given(st.integers(1, 1000))
def test_run_times_of_a_flow_fall_evenly_from_one_to_zero(steps: int) -> None:
    times = run_times(steps, EVEN)
    assert len(times) == steps + 1
    assert (times[0], times[-1]) == (1, 0)
    # Two times of at most 1, each rounded by half a unit in the last place.
    np.testing.assert_allclose(np.diff(times), -1 / steps, rtol=0, atol=2**-52)


@pytest.mark.parametrize("steps", [1, 2, 7, 28, 50])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 6.0])
def test_run_times_of_a_shift_are_shifted_even_times(shift: float, steps: int) -> None:
    """Photoroom/PRX (`schedulers/scheduler.py`, commit 1a052fd) shifts even times from 1 to 0.

    Each time is a few operations on numbers of at most 6.
    """
    u = np.linspace(1, 0, steps + 1)
    np.testing.assert_allclose(run_times(steps, Shifted(shift, None)), shift * u / (1 + (shift - 1) * u), atol=2**-48)


@pytest.mark.parametrize("steps", [2, 3, 28, 50])
@pytest.mark.parametrize("last", [0.3, 0.003])
def test_run_times_of_a_given_last_time_end_with_it(last: float, steps: int) -> None:
    times = run_times(steps, Shifted(3.0, last))
    assert times[0] == 1
    assert times[-2] == pytest.approx(3 * last / (1 + 2 * last), rel=1e-12)
    u = [time / (3 - 2 * time) for time in times[:-1]]  # the inverse of the shift
    np.testing.assert_allclose(np.diff(u), (last - 1) / (steps - 1), atol=1e-14)


def test_run_times_of_the_published_schedule_are_the_known_ones() -> None:
    """The end of 28 steps of diffusers' scheduler with shift 3, printed with five digits.

    Its smallest time is 1/1000, shifted once before the run.
    """
    times = run_times(28, Shifted(3.0, 0.003 / 1.002))
    assert times[-4:] == pytest.approx([0.19983, 0.11091, 0.00893, 0.0], abs=5e-6)


@pytest.mark.parametrize("times", [EVEN, Shifted(3.0, None), Shifted(3.0, 0.01)])
def test_run_times_of_one_step_go_from_noise_to_the_image(times: Shifted) -> None:
    assert run_times(1, times) == [1, 0]


@pytest.mark.parametrize(
    "times", [Shifted(2.0**-126, None), Shifted(3e38, None), Shifted(3e38, 2.0**-126), Shifted(2.0**-126, 2.0**-126)]
)
def test_run_times_of_extreme_shifts_fall_to_zero(times: Shifted) -> None:
    """For any shift that a manifest may hold, only the last time is 0 and none is above 1."""
    *found, last = run_times(7, times)
    assert all(0 < time <= 1 for time in found)
    assert last == 0


@few
@given(st.integers(2, 300), karras)
def test_run_times_of_noise_levels_are_the_papers(steps: int, levels: Karras) -> None:
    """The times follow Karras et al. 2022, eq. 5.

    They are linear in sigma**(1/rho), include both ends, and end with 0.
    """
    times = run_times(steps, levels)
    low, high = levels.sigma_min, levels.sigma_max
    i = np.arange(steps)
    root = 1 / levels.rho
    expected = (high**root + i / (steps - 1) * (low**root - high**root)) ** levels.rho
    # The sum is a difference of numbers up to 80. The power multiplies its rounding by rho.
    np.testing.assert_allclose(times, [*expected, 0], rtol=1e-12)
    assert times[0] == pytest.approx(high, rel=1e-13)
    assert times[-2] == pytest.approx(low, rel=1e-12)
    assert times == sorted(set(times), reverse=True)


def test_run_times_of_upstreams_defaults_are_the_known_ones() -> None:
    """The 18 steps of NVlabs/edm's `edm_sampler`, computed with a few digits."""
    times = run_times(18, EDM)
    assert len(times) == 19
    # (80**(1/7) + 9/17 (0.002**(1/7) - 80**(1/7)))**7 = (1.870133 - 9/17 * 1.458567)**7
    assert times[9] == pytest.approx((1.870133 - 9 / 17 * 1.458567) ** 7, rel=1e-4)
    assert [times[0], times[-2], times[-1]] == pytest.approx([80.0, 0.002, 0.0])


@pytest.mark.parametrize("rho", [1.0, 7.0, 1e3])
def test_run_times_of_one_step_go_from_the_highest_level_to_zero(rho: float) -> None:
    first, last = run_times(1, Karras(0.002, 80.0, rho))
    assert first == pytest.approx(80.0, rel=1e-12)
    assert last == 0


@pytest.mark.parametrize("levels", [Karras(2.0**-126, 3e38, 1.0), Karras(2.0**-126, 3e38, 3e38), EDM])
def test_run_times_of_extreme_levels_are_positive_numbers(levels: Karras) -> None:
    """For any levels that a manifest may hold, only the last time is 0 and none overflows."""
    *times, last = run_times(7, levels)
    assert all(0 < time < math.inf for time in times)
    assert last == 0


# Preconditioning


@few
@given(st.floats(-1, 2))
def test_precondition_of_a_flow_changes_nothing(time: float) -> None:
    scaling = precondition("flow", time)
    assert (scaling.t, scaling.c_in, scaling.c_skip, scaling.c_out) == (time, 1, 0, 1)


def test_precondition_at_the_datas_deviation_shares_evenly() -> None:
    scaling = precondition("edm", 0.5)
    assert scaling.t == math.log(0.5) / 4
    assert scaling.c_in == pytest.approx(math.sqrt(2), rel=1e-15)
    assert scaling.c_skip == 0.5
    assert scaling.c_out == pytest.approx(0.5 / math.sqrt(2), rel=1e-15)


def test_precondition_without_noise_returns_the_input() -> None:
    """For sigma → 0, D = x and the network gets data of unit variance."""
    scaling = precondition("edm", 1e-9)
    # Deviations are of the order of sigma²/sigma_data², below the resolution of float64.
    assert scaling.c_skip == 1
    assert scaling.c_in == 1 / SIGMA_DATA
    assert scaling.c_out == pytest.approx(1e-9, rel=1e-15)


def test_precondition_of_noise_alone_returns_the_network() -> None:
    """For sigma → ∞, D = sigma_data * F and the network gets noise of unit variance."""
    scaling = precondition("edm", 1e9)
    assert scaling.c_skip == pytest.approx(0.25e-18, rel=1e-15)
    assert scaling.c_in == pytest.approx(1e-9, rel=1e-15)
    assert scaling.c_out == pytest.approx(SIGMA_DATA, rel=1e-15)


sigmas = st.floats(1e-3, 1e3)


@few
@given(sigmas)
def test_precondition_at_any_sigma_gives_the_network_unit_variance(sigma: float) -> None:
    """The network's input and its training target both have unit variance.

    The input is c_in (data + sigma z). The target is (data - c_skip (data + sigma z)) / c_out.
    """
    scaling = precondition("edm", sigma)
    # A few roundings in float64. The target's first term, (1 - c_skip)², cancels if c_skip is near
    # 1.
    assert scaling.c_in**2 * (SIGMA_DATA**2 + sigma**2) == pytest.approx(1, rel=1e-14)
    target = (1 - scaling.c_skip) ** 2 * SIGMA_DATA**2 + scaling.c_skip**2 * sigma**2
    assert target / scaling.c_out**2 == pytest.approx(1, rel=1e-12)


@few
@given(sigmas, st.floats(-100, 100))
def test_precondition_of_a_silent_network_denoises_gaussian_data(sigma: float, x: float) -> None:
    """For data ~ N(0, sigma_data²) the best D is c_skip x.

    The network has nothing to add.
    """
    best = SIGMA_DATA**2 / (SIGMA_DATA**2 + sigma**2) * x
    assert precondition("edm", sigma).c_skip * x == pytest.approx(best, rel=1e-14)


@few
@given(sigmas, st.floats(-10, 10), st.floats(-10, 10))
def test_precondition_of_the_noise_as_output_finds_the_data(sigma: float, data: float, z: float) -> None:
    """If the network returns the target F = (data - c_skip x) / c_out, D = data."""
    scaling = precondition("edm", sigma)
    x = data + sigma * z
    output = (data - scaling.c_skip * x) / scaling.c_out
    # Rounding of numbers of at most |x| <= 10010.
    assert scaling.c_skip * x + scaling.c_out * output == pytest.approx(data, rel=0, abs=1e-11)
