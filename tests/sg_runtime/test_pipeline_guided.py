"""Guided predictions for custom samplers: `Pipeline.prepare` and `Pipeline.guided`."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sg_runtime import philox
from sg_runtime.errors import UsageError
from sg_runtime.guidance import guide
from sg_runtime.manifest import EVEN, GuidancePlan
from sg_runtime.pipeline import Pipeline
from sg_runtime.run.prepared import PreparedRun
from sg_runtime.sampling import Churn, run_times, updates

CLASSES, SEEDS = ["B", None, 1], [5, 6, 7]
TOKENS = 16

# Two graphs sum the prediction in another order than the formula: a rounding of float32.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


def branches_of(
    pipe: Pipeline, x: NDArray[np.float32], run: PreparedRun, index: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Return (guided, strong, weak), computed from the single-branch graphs."""
    strong, weak = pipe.branches(x, run, index)
    return guide(strong, weak, run.scales[index]), strong, weak


@pytest.fixture(scope="module")
def x(pipe: Pipeline) -> NDArray[np.float32]:
    """Return a state for three images."""
    return pipe.initial_noise(SEEDS)


@pytest.fixture(scope="module")
def sparse(pipe: Pipeline) -> GuidancePlan:
    """Return guidance in which both branches drop tokens."""
    return pipe.guidance(strong_sparsity=0.25, sparsity=0.5)


@pytest.fixture(scope="module")
def plan(pipe: Pipeline, sparse: GuidancePlan) -> PreparedRun:
    """Return a prepared run of three evaluations of three images."""
    return pipe.prepare([1.0, 0.6, 0.2], CLASSES, SEEDS, guidance=sparse)


@pytest.fixture(scope="module")
def edm(tiny_edm_bundle: Path) -> Pipeline:
    return Pipeline.load(tiny_edm_bundle)


# Prepared runs. Their contents are tested in `run/test_prepared.py`.


def test_prepare_of_a_run_has_the_documented_shapes(pipe: Pipeline, plan: PreparedRun) -> None:
    assert plan.weak is not None
    for branch, count in ((plan.strong, 12), (plan.weak, 8)):
        # "B" is class 1, so there are two distinct classes.
        assert branch.held["modulations"].values.shape == (3, 2, pipe.bundle.manifest.model.held["modulations"][0])
        assert branch.held["modulations"].values.dtype == np.float32
        assert branch.held["modulations"].rows.tolist() == [0, 1, 0]
        for keep in branch.keep:
            assert keep is not None
            assert keep.shape == (3, count)
            assert keep.dtype == np.int64


def test_prepare_of_a_run_numbers_its_evaluations(plan: PreparedRun) -> None:
    """By default each evaluation is its own step."""
    assert plan.weak is not None
    for branch, number in ((plan.strong, philox.STRONG), (plan.weak, philox.WEAK)):
        for step, keep in enumerate(branch.keep):
            assert keep is not None
            for row, seed in zip(keep, SEEDS, strict=True):
                expected = philox.subset(seed, TOKENS, keep.shape[1], step=step, evaluation=0, branch=number)
                np.testing.assert_array_equal(row, expected)


def test_prepare_of_a_schedule_ends_it_in_the_last_step(pipe: Pipeline) -> None:
    guidance = pipe.guidance(sparsity=(0.5, 0.25), scale=(3.0, 1.0))
    plan = pipe.prepare([1.0, 0.6, 0.2], CLASSES, SEEDS, guidance=guidance)
    assert plan.weak is not None
    assert [level and level.sparsity for level in plan.weak.levels] == [0.5, 0.25, 0.25]
    assert plan.scales == pytest.approx((3, 2, 1), rel=1e-15)
    plan = pipe.prepare([1.0, 0.6, 0.6], CLASSES, SEEDS, guidance=guidance, counters=[(0, 0), (0, 1), (4, 0)])
    assert plan.scales == pytest.approx((3, 3, 1), rel=1e-15)


def test_prepare_of_a_scale_replaces_that_of_the_guidance(pipe: Pipeline) -> None:
    guidance = pipe.guidance(scale=(3.0, 1.0))
    assert pipe.prepare([1.0, 0.5], CLASSES, SEEDS, guidance=guidance, scale=4).scales == (4.0, 4.0)
    assert pipe.prepare([1.0, 0.5], CLASSES, SEEDS, scale=(2.0, 1.0)).scales == (2.0, 1.0)


def test_prepare_of_numpy_times_is_that_of_pythons(pipe: Pipeline, plan: PreparedRun, sparse: GuidancePlan) -> None:
    """The times have the precision of the array."""
    other = pipe.prepare(np.array([1.0, 0.6, 0.2], np.float32), CLASSES, SEEDS, guidance=sparse)
    assert all(type(time) is float for time in other.times)
    np.testing.assert_array_equal(other.strong.held["modulations"].values, plan.strong.held["modulations"].values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"times": []}, "times: expected at least one, found none"),
        ({"times": [1.0, math.nan]}, "time nan: expected a finite float32 number"),
        ({"times": [1.0, math.inf]}, "time inf: expected a finite float32 number"),
        ({"times": [1.0, 1e39]}, r"time 1e\+39: expected a finite float32 number"),
        ({"times": [999.0, 500.0]}, r"time 999: expected 0 \(image\) to 1 \(noise\) for a model of flow"),
        ({"times": [1.0, -0.1]}, r"time -0\.1: expected 0 \(image\)"),
        ({"times": 0.5}, r"times: expected a sequence of numbers, found 0\.5"),
        ({"times": "1.0"}, "times: expected a sequence of numbers, found '1.0'"),
        ({"times": [1.0, "0.5"]}, "times: expected a number, found '0.5'"),
        ({"counters": 3}, r"counters: expected a sequence of \(step, evaluation\), found 3"),
        ({"counters": [0, 1]}, r"counters: expected \(step, evaluation\), found 0"),
        (
            {"counters": [(0, 0), (1, 0, 0)]},
            r"counters: expected .* both at least 0, found \(1, 0, 0\)",
        ),
        ({"guidance": "cfg"}, "guidance: expected a GuidancePlan, which .* returns, found 'cfg'"),
        ({"counters": [(0, 0)]}, "counters: expected one for each of the 2 times, found 1"),
        ({"counters": [(0, 0), (-1, 0)]}, r"counters: expected \(step, evaluation\), both at least 0, found \(-1, 0\)"),
        ({"counters": [(0, 0), (0.5, 0)]}, r"counter: expected a whole number, found 0\.5"),
        ({"seeds": [0]}, "seeds: expected 3, one per image, found 1"),
        ({"classes": [0, 0, 99]}, "class 99: expected 0 to 4"),
        ({"classes": []}, "classes: expected at least one, found none"),
        ({"scale": float("nan")}, "scale: expected a finite float32 number"),
    ],
)
def test_prepare_of_a_wrong_request_is_refused(pipe: Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pipe.prepare(**{"times": [1.0, 0.5], "classes": CLASSES, "seeds": SEEDS, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"t": 999.0}, "time 999: expected 0"),
        ({"t": -1.0}, "time -1: expected 0"),
        ({"t": "0.5"}, "t: expected a number, found '0.5'"),
        ({"t": [0.5]}, r"t: expected a number, found \[0\.5\]"),
        ({"classes": 7}, "classes: expected a sequence with a class for each image, found 7"),
        ({"step": "1"}, "step: expected a whole number, found '1'"),
        ({"keep_weak": [[0, 1]]}, "keep_weak: expected an int64 array of shape "),
    ],
)
def test_prepare_once_of_a_wrong_request_is_refused(
    pipe: Pipeline, sparse: GuidancePlan, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        pipe.prepare_once(**{"t": 0.5, "classes": CLASSES, "guidance": sparse, **arguments})


@pytest.mark.parametrize("run", [0.5, None, ["A"]])
def test_guided_of_no_prepared_run_is_refused(pipe: Pipeline, run: Any) -> None:
    x = pipe.initial_noise([0])
    with pytest.raises(UsageError, match="run: expected a PreparedRun, as prepare"):
        pipe.guided(x, run)
    with pytest.raises(UsageError, match="run: expected a PreparedRun"):
        pipe.branches(x, run)


@pytest.mark.parametrize("time", [0.0, -1.0, -0.0])
def test_prepare_of_an_edm_model_where_there_is_no_noise_is_refused(edm: Pipeline, time: float) -> None:
    with pytest.raises(UsageError) as caught:
        edm.prepare([1.0, time], [0], [0])
    assert str(caught.value) == f"time {time:g}: expected a sigma above 0 for an edm model"


@pytest.mark.parametrize("time", [math.nan, math.inf, 1e200])
def test_guided_of_an_edm_model_beyond_all_noise_is_refused(edm: Pipeline, time: float) -> None:
    with pytest.raises(UsageError) as caught:
        edm.guided(edm.initial_noise([0]), edm.prepare_once(time, [0]))
    assert str(caught.value) == f"time {time:g}: expected a finite float32 number"


# Predictions


# x + h D outside of the graphs rounds once more than a x + b D + e r inside them.
BY_HAND = 1e-5


def test_guided_of_a_plan_stepped_by_hand_is_sample(pipe: Pipeline, sparse: GuidancePlan) -> None:
    times = run_times(4, EVEN)
    plan = pipe.prepare(times[:-1], CLASSES, SEEDS, guidance=sparse, scale=1.5)
    x = pipe.initial_noise(SEEDS)
    for i, (t, t_next) in enumerate(pairwise(times)):
        x = x + np.float32(t_next - t) * pipe.guided(x, plan, i)
    expected = pipe.sample(CLASSES, SEEDS, steps=4, guidance=sparse, scale=1.5)
    np.testing.assert_allclose(x, expected, rtol=BY_HAND, atol=BY_HAND)


def test_guided_of_a_plan_in_heuns_order_is_sample(pipe: Pipeline, sparse: GuidancePlan) -> None:
    times = run_times(3, EVEN)
    run = updates("heun", "flow", times)
    plan = pipe.prepare(
        [update.time for update in run],
        CLASSES,
        SEEDS,
        counters=[(update.step, update.evaluation) for update in run],
        guidance=sparse,
    )
    x = pipe.initial_noise(SEEDS)
    third = np.float32(1 / 3)
    for index in (0, 2):
        first = pipe.guided(x, plan, index)
        second = pipe.guided(x - third * first, plan, index + 1)
        x = x - third * np.float32(0.5) * (first + second)
    x = x - third * pipe.guided(x, plan, 4)
    expected = pipe.sample(CLASSES, SEEDS, steps=3, sampler="heun", guidance=sparse)
    np.testing.assert_allclose(x, expected, rtol=BY_HAND, atol=BY_HAND)


@pytest.mark.parametrize("churn", [None, Churn(0.9, high=30.0)])
def test_guided_of_an_edm_plan_stepped_by_hand_is_sample(edm: Pipeline, churn: Churn | None) -> None:
    """The custom sampler is Euler's method of Karras et al. 2022, with the runtime's noise."""
    times = run_times(4, edm.bundle.manifest.sampling.times)
    raised = [1 + 0.9 / 4 if churn is not None and time <= 30 else 1.0 for time in times]
    plan = edm.prepare([raised[i] * times[i] for i in range(4)], [0, 1, None], SEEDS)
    x = np.float32(times[0]) * edm.initial_noise(SEEDS)
    for i in range(4):
        sigma = raised[i] * times[i]
        noise = np.stack([philox.normal(seed, philox.CHURN, x.shape[1:], step=i) for seed in SEEDS])
        x = x + np.float32(math.sqrt(sigma**2 - times[i] ** 2)) * noise
        x = x + np.float32(times[i + 1] - sigma) * (x - edm.guided(x, plan, i)) / np.float32(sigma)
    found = edm.sample([0, 1, None], SEEDS, steps=4, sampler="euler", churn=churn)
    # Sums of numbers up to 200 lose 1e-5 in FP32. Later steps, towards sigma 0, remove most of it.
    np.testing.assert_allclose(x, found, rtol=1e-4, atol=1e-4)


def test_guided_of_an_edm_model_is_the_denoised_image(edm: Pipeline) -> None:
    """At a sigma near 0 the prediction is the input itself.

    In D = c_skip x + c_out F, c_skip is 1 and c_out is sigma.
    """
    x = 0.5 * edm.initial_noise(SEEDS)
    found = edm.guided(x, edm.prepare_once(1e-4, [0, 1, None], seeds=SEEDS))
    assert found.dtype == np.float32
    # The guided F has size 1.
    np.testing.assert_allclose(found, x, atol=1e-3)
    assert not np.array_equal(found, x)


def test_guided_once_is_that_of_a_plan(
    pipe: Pipeline, x: NDArray[np.float32], plan: PreparedRun, sparse: GuidancePlan
) -> None:
    for i, t in enumerate([1.0, 0.6, 0.2]):
        found = pipe.guided(x, pipe.prepare_once(t, CLASSES, seeds=SEEDS, step=i, guidance=sparse))
        np.testing.assert_array_equal(found, pipe.guided(x, plan, i))


def test_guided_once_with_the_drawn_subsets_given_is_the_same(
    pipe: Pipeline, x: NDArray[np.float32], plan: PreparedRun, sparse: GuidancePlan
) -> None:
    assert plan.weak is not None
    found = pipe.guided(
        x,
        pipe.prepare_once(0.6, CLASSES, guidance=sparse, keep_strong=plan.strong.keep[1], keep_weak=plan.weak.keep[1]),
    )  # seeds and step differ but have no effect
    np.testing.assert_array_equal(found, pipe.guided(x, plan, 1))


def test_guided_once_is_at_its_step_of_a_schedule(pipe: Pipeline, x: NDArray[np.float32]) -> None:
    """The schedule spans the bundle's 40 default steps. Later steps are at its end."""
    ramp = pipe.guidance(sparsity=(0.5, 0.25), scale=(3.0, 1.0))
    for step, sparsity, scale in ((0, 0.5, 3.0), (39, 0.25, 1.0), (200, 0.25, 1.0)):
        constant = pipe.guidance(sparsity=sparsity, scale=scale)
        found, expected = (
            pipe.guided(x, pipe.prepare_once(0.5, CLASSES, step=step, guidance=plan)) for plan in (ramp, constant)
        )
        np.testing.assert_array_equal(found, expected)


def test_guided_once_outside_of_the_interval_is_the_strong_branch(pipe: Pipeline, x: NDArray[np.float32]) -> None:
    within = pipe.guidance(interval=(0.3, 0.6))
    for time in (0.7, 0.2):
        alone = pipe.guided(x, pipe.prepare_once(time, CLASSES, guidance=pipe.guidance("none")))
        np.testing.assert_array_equal(pipe.guided(x, pipe.prepare_once(time, CLASSES, guidance=within)), alone)
    np.testing.assert_array_equal(
        pipe.guided(x, pipe.prepare_once(0.5, CLASSES, guidance=within)),
        pipe.guided(x, pipe.prepare_once(0.5, CLASSES)),
    )


def test_guided_once_without_seeds_counts_them_from_zero(pipe: Pipeline, x: NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(
        pipe.guided(x, pipe.prepare_once(0.5, CLASSES)),
        pipe.guided(x, pipe.prepare_once(0.5, CLASSES, seeds=[0, 1, 2], step=0)),
    )
    assert not np.array_equal(
        pipe.guided(x, pipe.prepare_once(0.5, CLASSES)), pipe.guided(x, pipe.prepare_once(0.5, CLASSES, step=1))
    )


@pytest.mark.parametrize("mode", ["cfg", "sg", "cfg+sg"])
def test_guided_with_branches_combines_them(pipe: Pipeline, x: NDArray[np.float32], mode: Any) -> None:
    plan = pipe.guidance(mode, scale=1.8)
    guided, strong, weak = branches_of(pipe, x, pipe.prepare_once(0.5, CLASSES, guidance=plan))
    np.testing.assert_array_equal(guided, guide(strong, weak, 1.8))
    assert not np.array_equal(strong, weak)
    fused = pipe.guided(x, pipe.prepare_once(0.5, CLASSES, guidance=plan))
    # The guided graph combines before the head, so its FP32 sums have another order.
    np.testing.assert_allclose(fused, guided, atol=1e-5 * np.abs(guided).max())


def test_guided_without_guidance_is_the_strong_branch(pipe: Pipeline, x: NDArray[np.float32]) -> None:
    for sparsity in (0.0, 0.25):
        sg = pipe.guidance(strong_sparsity=sparsity)
        _, strong, _ = branches_of(pipe, x, pipe.prepare_once(0.5, CLASSES, seeds=SEEDS, guidance=sg))
        none = pipe.guidance("none", strong_sparsity=sparsity)
        np.testing.assert_array_equal(
            pipe.guided(x, pipe.prepare_once(0.5, CLASSES, seeds=SEEDS, guidance=none)), strong
        )


def test_guided_with_branches_of_a_plan_is_that_of_one_call(
    pipe: Pipeline, x: NDArray[np.float32], plan: PreparedRun, sparse: GuidancePlan
) -> None:
    found = branches_of(pipe, x, pipe.prepare_once(0.6, CLASSES, seeds=SEEDS, step=1, guidance=sparse))
    of_plan: Any = branches_of(pipe, x, plan, 1)  # type: ignore[call-overload]
    for a, b in zip(found, of_plan, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_guided_by_cfg_combines_the_class_with_no_class(
    pipe: Pipeline, x: NDArray[np.float32], sparsity: float
) -> None:
    """Two runs by hand use the kept tokens that the prepared run drew."""
    cfg, none = (pipe.guidance(mode, strong_sparsity=sparsity, scale=3.0) for mode in ("cfg", "none"))
    plan = pipe.prepare([0.5], CLASSES, SEEDS, guidance=cfg)
    assert plan.weak is not None
    with_class = pipe.guided(x, pipe.prepare_once(0.5, CLASSES, guidance=none, keep_strong=plan.strong.keep[0]))
    without = pipe.guided(x, pipe.prepare_once(0.5, [None] * 3, guidance=none, keep_strong=plan.weak.keep[0]))
    np.testing.assert_allclose(pipe.guided(x, plan, 0), guide(with_class, without, 3.0), **ROUNDING)
    if sparsity == 0:
        np.testing.assert_array_equal(with_class[1], without[1])  # the image without a class


@pytest.mark.parametrize("strong", [0.0, 0.25])
def test_guided_by_cfg_with_sg_combines_the_class_with_no_class_and_fewer_tokens(
    pipe: Pipeline, x: NDArray[np.float32], strong: float
) -> None:
    both = pipe.guidance("cfg+sg", strong_sparsity=strong, sparsity=0.5, scale=2.5)
    plan = pipe.prepare([0.5], CLASSES, SEEDS, guidance=both)
    assert plan.weak is not None
    dense, half = (pipe.guidance("none", strong_sparsity=sparsity) for sparsity in (strong, 0.5))
    with_class = pipe.guided(x, pipe.prepare_once(0.5, CLASSES, guidance=dense, keep_strong=plan.strong.keep[0]))
    without = pipe.guided(x, pipe.prepare_once(0.5, [None] * 3, guidance=half, keep_strong=plan.weak.keep[0]))
    np.testing.assert_allclose(pipe.guided(x, plan, 0), guide(with_class, without, 2.5), **ROUNDING)


def test_guided_by_another_network_takes_its_subset_where_it_has_one(tiny_autoguidance_bundle: Path) -> None:
    pipe = Pipeline.load(tiny_autoguidance_bundle)
    x = pipe.initial_noise(SEEDS)
    plan = pipe.prepare([0.5], [1, None, 1], SEEDS)
    assert plan.weak is not None
    guided, strong, weak = branches_of(pipe, x, pipe.prepare_once(0.5, [1, None, 1], keep_weak=plan.weak.keep[0]))
    np.testing.assert_allclose(guided, pipe.guided(x, plan, 0), **ROUNDING)
    np.testing.assert_array_equal(
        strong, pipe.guided(x, pipe.prepare_once(0.5, [1, None, 1], guidance=pipe.guidance("none")))
    )
    assert not np.allclose(strong, weak)


def test_guided_of_a_state_that_is_a_view_is_the_same(
    pipe: Pipeline, x: NDArray[np.float32], plan: PreparedRun
) -> None:
    """One view has rows and columns swapped in memory.

    The other takes every second image of a longer array.
    """
    turned = np.asfortranarray(x)
    spaced = np.repeat(x, 2, axis=0)[::2]
    for view in (turned, spaced):
        np.testing.assert_array_equal(pipe.guided(view, plan, 0), pipe.guided(x, plan, 0))


def test_guided_of_more_images_than_a_batch_is_that_of_each(pipe: Pipeline) -> None:
    classes, seeds = [1, 2, 3, 4, 0, 1, 2], range(7)
    x = pipe.initial_noise(seeds)
    found = pipe.guided(x, pipe.prepare_once(0.5, classes, seeds=seeds))
    assert found.shape == x.shape
    for k in (0, 4, 5, 6):
        alone = pipe.guided(x[k : k + 1], pipe.prepare_once(0.5, classes[k : k + 1], seeds=seeds[k : k + 1]))
        # A batch of one may sum in another order than a batch of five.
        np.testing.assert_allclose(found[k : k + 1], alone, atol=1e-5 * np.abs(alone).max())


# Refused requests


def rows(*indices: int) -> NDArray[np.int64]:
    """Return a row of 8 indices for each of three images: the given ones, then the next ones."""
    row = [*indices, *range(indices[-1] + 1, indices[-1] + 9 - len(indices))]
    return np.array([row] * 3, dtype=np.int64)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (rows(1, 0), "expected sorted distinct token indices below 16 in each row"),
        (rows(0, 0), "expected sorted distinct token indices below 16"),
        (rows(-1), "expected sorted distinct token indices below 16"),
        (rows(9), "expected sorted distinct token indices below 16"),
        (rows(0).astype(np.int32), r"expected int64 of shape \(3, 8\), found int32 of \(3, 8\)"),
        (rows(0).astype(np.float64), r"expected int64 of shape \(3, 8\), found float64"),
        (rows(0)[:, :7], r"expected int64 of shape \(3, 8\), found int64 of \(3, 7\)"),
        (rows(0)[:2], r"expected int64 of shape \(3, 8\), found int64 of \(2, 8\)"),
        (rows(0)[0], r"expected int64 of shape \(3, 8\), found int64 of \(8,\)"),
    ],
    ids=["unsorted", "twice", "negative", "too-high", "int32", "float", "short", "images", "flat"],
)
def test_guided_of_a_wrong_subset_is_refused(
    pipe: Pipeline, x: NDArray[np.float32], keep: NDArray[Any], message: str
) -> None:
    with pytest.raises(UsageError, match=f"^keep_weak: {message}"):
        pipe.guided(x, pipe.prepare_once(0.5, CLASSES, keep_weak=keep))


def test_guided_of_one_wrong_row_among_good_ones_is_refused(pipe: Pipeline, x: NDArray[np.float32]) -> None:
    keep = rows(0)
    keep[2, 7] = 6
    with pytest.raises(UsageError, match="keep_weak: expected sorted distinct"):
        pipe.guided(x, pipe.prepare_once(0.5, CLASSES, keep_weak=keep))


@pytest.mark.parametrize(("name", "mode"), [("keep_strong", "sg"), ("keep_weak", "none"), ("keep_weak", "cfg")])
def test_guided_of_a_subset_for_a_branch_without_one_is_refused(
    pipe: Pipeline, x: NDArray[np.float32], name: str, mode: Any
) -> None:
    subset: dict[str, Any] = {name: rows(0)}
    with pytest.raises(UsageError, match=f"^{name}: the branch keeps all 16 tokens or does not run: expected None"):
        pipe.guided(x, pipe.prepare_once(0.5, CLASSES, guidance=pipe.guidance(mode), **subset))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((3, 2, 8, 8), np.float64),
        ((3, 2, 8, 8), np.float16),
        ((2, 2, 8, 8), np.float32),
        ((3, 3, 8, 8), np.float32),
        ((3, 8, 8), np.float32),
        ((3, 2, 8, 9), np.float32),
        ((0, 2, 8, 8), np.float32),
    ],
)
def test_guided_of_another_state_is_refused(
    pipe: Pipeline, plan: PreparedRun, shape: tuple[int, ...], dtype: type[np.floating[Any]]
) -> None:
    with pytest.raises(UsageError) as caught:
        pipe.guided(np.zeros(shape, dtype=dtype), plan, 0)
    assert str(caught.value) == (f"x: expected float32 of shape (3, 2, 8, 8), found {np.dtype(dtype)} of shape {shape}")


@pytest.mark.parametrize("index", [2.0, "1", None])
def test_guided_of_an_evaluation_that_is_no_number_is_refused(
    pipe: Pipeline, x: NDArray[np.float32], plan: PreparedRun, index: Any
) -> None:
    with pytest.raises(UsageError, match=f"^evaluation: expected a whole number, found {index!r}$"):
        pipe.guided(x, plan, index)


def test_guided_once_at_a_step_below_zero_is_refused(pipe: Pipeline, x: NDArray[np.float32]) -> None:
    with pytest.raises(UsageError, match=r"^step: expected at least 0, found -1$"):
        pipe.guided(x, pipe.prepare_once(0.5, CLASSES, step=-1))


@pytest.mark.parametrize("index", [3, -1])
def test_guided_of_an_evaluation_beyond_the_plan_is_refused(
    pipe: Pipeline, x: NDArray[np.float32], plan: PreparedRun, index: int
) -> None:
    with pytest.raises(UsageError, match=f"^evaluation {index}: expected 0 to 2 in the prepared run$"):
        pipe.guided(x, plan, index)


def test_guided_with_branches_of_one_branch_is_refused(pipe: Pipeline, x: NDArray[np.float32]) -> None:
    with pytest.raises(UsageError, match="branches: expected guidance with two branches, found the strong one alone"):
        branches_of(pipe, x, pipe.prepare_once(0.5, CLASSES, guidance=pipe.guidance("none")))
