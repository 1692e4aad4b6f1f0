"""Guided predictions for samplers of one's own: `Pipeline.prepare` and `Pipeline.guided`."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sg_runtime import random
from sg_runtime.backends import Backend
from sg_runtime.errors import UsageError
from sg_runtime.guidance import guide
from sg_runtime.manifest import GraphFacts, GuidancePlan
from sg_runtime.pipeline import Pipeline, Plan
from sg_runtime.sampling import evaluations, flow_times, heun

CLASSES, SEEDS = ["a", None, 26], [5, 6, 7]
TOKENS = 64


@pytest.fixture(scope="module")
def x(pipe: Pipeline) -> NDArray[np.float32]:
    """A state for three images."""
    return pipe.initial_noise(SEEDS)


@pytest.fixture(scope="module")
def sparse(pipe: Pipeline) -> GuidancePlan:
    """Both branches drop tokens."""
    return pipe.guidance(strong_sparsity=0.25, sparsity=0.5)


@pytest.fixture(scope="module")
def plan(pipe: Pipeline, sparse: GuidancePlan) -> Plan:
    """Three evaluations of three images."""
    return pipe.prepare([1.0, 0.6, 0.2], CLASSES, SEEDS, guidance=sparse)


# Plans


def test_prepare_of_a_run_has_the_documented_shapes(pipe: Pipeline, plan: Plan) -> None:
    # "a" is class 26: two distinct classes.
    assert plan.modulations.shape == (3, 2, pipe.bundle.manifest.model.modulations)
    assert plan.modulations.dtype == np.float32
    assert plan.strong_rows.tolist() == plan.weak_rows.tolist() == [0, 1, 0]
    for keep, count in ((plan.keep_strong, 48), (plan.keep_weak, 32)):
        assert keep is not None
        assert keep.shape == (3, 3, count)
        assert keep.dtype == np.int64


def test_prepare_of_a_run_draws_the_documented_subsets(plan: Plan) -> None:
    for branch, keep in ((random.STRONG, plan.keep_strong), (random.WEAK, plan.keep_weak)):
        assert keep is not None
        for step in range(3):
            for row, seed in zip(keep[step], SEEDS, strict=True):
                expected = random.subset(seed, TOKENS, keep.shape[2], step=step, evaluation=0, branch=branch)
                np.testing.assert_array_equal(row, expected)


@pytest.mark.parametrize("mode", ["none", "cfg", "sg"])
def test_prepare_of_a_dense_strong_branch_draws_no_subset_for_it(pipe: Pipeline, mode: Any) -> None:
    plan = pipe.prepare([1.0], CLASSES, SEEDS, guidance=pipe.guidance(mode))
    assert plan.keep_strong is None
    assert (plan.keep_weak is None) == (mode != "sg")


def test_prepare_of_a_class_alone_computes_the_same_bits(pipe: Pipeline, sparse: GuidancePlan) -> None:
    """The conditioning of an image does not depend on the other times and classes, nor on the row it falls into."""
    times, classes = np.linspace(1, 0.1, 7), list(range(11))  # 77 rows, over two full runs of `condition`
    plan = pipe.prepare(times, classes, classes, guidance=sparse)
    for i, c in ((0, 0), (3, 7), (6, 10)):
        alone = pipe.prepare([times[i]], [c], [c], counters=[(i, 0)], guidance=sparse)
        np.testing.assert_array_equal(alone.modulations[0, 0], plan.modulations[i, plan.strong_rows[c]])
        assert alone.keep_weak is not None
        assert plan.keep_weak is not None
        np.testing.assert_array_equal(alone.keep_weak[0, 0], plan.keep_weak[i, c])


class Watched:
    """A backend that notes the graph and the rows of every run."""

    def __init__(self, backend: Backend) -> None:
        self.name = backend.name
        self.backend = backend
        self.runs: list[tuple[str, int]] = []

    def run(self, graph: GraphFacts, feeds: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        self.runs.append((graph.kind, len(next(iter(feeds.values())))))
        return self.backend.run(graph, feeds)


@pytest.mark.parametrize("evaluations_and_classes", [(1, 1), (16, 2), (7, 11)])
def test_prepare_of_any_run_computes_conditioning_in_runs_of_one_length(
    pipe: Pipeline, evaluations_and_classes: tuple[int, int]
) -> None:
    """So that no other row count makes another machine, or another kernel, round it differently."""
    evaluations, classes = evaluations_and_classes
    backend = Watched(pipe.backend)
    Pipeline(pipe.bundle, backend, 5).prepare([0.5] * evaluations, range(classes), range(classes))
    assert backend.runs == [("condition", 32)] * -(-evaluations * classes // 32)


def test_guided_of_many_images_runs_full_batches(pipe: Pipeline) -> None:
    backend = Watched(pipe.backend)
    watched = Pipeline(pipe.bundle, backend, 3)
    watched.guided(watched.initial_noise(range(7)), 0.5, range(7))
    assert backend.runs == [("condition", 32), ("guided", 3), ("guided", 3), ("guided", 3)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"times": []}, "times: expected at least one, found none"),
        ({"counters": [(0, 0)]}, "counters: expected one for each of the 2 times, found 1"),
        ({"counters": [(0, 0), (-1, 0)]}, r"counters: expected \(step, evaluation\), none below 0, found \(-1, 0\)"),
        ({"counters": [(0, 0), (0.5, 0)]}, r"counter: expected a whole number, found 0\.5"),
        ({"seeds": [0]}, "seeds: expected one per class, 3, found 1"),
        ({"classes": [0, 0, 99]}, "class 99: expected 0 to 61"),
        ({"scale": float("nan")}, "scale: expected a finite float32 number"),
    ],
)
def test_prepare_of_a_wrong_request_is_refused(pipe: Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pipe.prepare(**{"times": [1.0, 0.5], "classes": CLASSES, "seeds": SEEDS, **arguments})


# Predictions


def test_guided_of_a_plan_stepped_by_hand_is_sample(pipe: Pipeline, sparse: GuidancePlan) -> None:
    times = flow_times(4)
    plan = pipe.prepare(times[:-1], CLASSES, SEEDS, guidance=sparse, scale=1.5)
    x = pipe.initial_noise(SEEDS)
    for i, (t, t_next) in enumerate(pairwise(times)):
        x = x + (t_next - t) * pipe.guided(x, plan, i)
    np.testing.assert_array_equal(x, pipe.sample(CLASSES, SEEDS, steps=4, guidance=sparse, scale=1.5))


def test_guided_of_a_plan_in_heuns_order_is_sample(pipe: Pipeline, sparse: GuidancePlan) -> None:
    times, calls = flow_times(3), evaluations("heun", 3)
    plan = pipe.prepare([times[step + e] for step, e in calls], CLASSES, SEEDS, counters=calls, guidance=sparse)
    found = heun(
        lambda x, step, e: pipe.guided(x, plan, calls.index((step, e))), pipe.initial_noise(SEEDS), flow_times(3)
    )
    np.testing.assert_array_equal(found, pipe.sample(CLASSES, SEEDS, steps=3, sampler="heun", guidance=sparse))


def test_guided_once_is_that_of_a_plan(
    pipe: Pipeline, x: NDArray[np.float32], plan: Plan, sparse: GuidancePlan
) -> None:
    for i, t in enumerate([1.0, 0.6, 0.2]):
        found = pipe.guided(x, t, CLASSES, seeds=SEEDS, step=i, guidance=sparse)
        np.testing.assert_array_equal(found, pipe.guided(x, plan, i))


def test_guided_once_with_the_drawn_subsets_given_is_the_same(
    pipe: Pipeline, x: NDArray[np.float32], plan: Plan, sparse: GuidancePlan
) -> None:
    assert plan.keep_strong is not None
    assert plan.keep_weak is not None
    found = pipe.guided(
        x, 0.6, CLASSES, guidance=sparse, keep_strong=plan.keep_strong[1], keep_weak=plan.keep_weak[1]
    )  # seeds and step are others, and have nothing left to decide
    np.testing.assert_array_equal(found, pipe.guided(x, plan, 1))


def test_guided_once_without_seeds_counts_them_from_zero(pipe: Pipeline, x: NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(pipe.guided(x, 0.5, CLASSES), pipe.guided(x, 0.5, CLASSES, seeds=[0, 1, 2], step=0))
    assert not np.array_equal(pipe.guided(x, 0.5, CLASSES), pipe.guided(x, 0.5, CLASSES, step=1))


@pytest.mark.parametrize("mode", ["cfg", "sg"])
def test_guided_with_branches_combines_them(pipe: Pipeline, x: NDArray[np.float32], mode: Any) -> None:
    plan = pipe.guidance(mode, scale=1.8)
    guided, strong, weak = pipe.guided(x, 0.5, CLASSES, guidance=plan, return_branches=True)
    np.testing.assert_array_equal(guided, guide(strong, weak, 1.8))
    assert not np.array_equal(strong, weak)
    fused = pipe.guided(x, 0.5, CLASSES, guidance=plan)
    # The guided graph combines before the head, in another order of FP32 sums.
    np.testing.assert_allclose(fused, guided, atol=1e-5 * np.abs(guided).max())


def test_guided_without_guidance_is_the_strong_branch(pipe: Pipeline, x: NDArray[np.float32]) -> None:
    for sparsity in (0.0, 0.25):
        sg = pipe.guidance(strong_sparsity=sparsity)
        _, strong, _ = pipe.guided(x, 0.5, CLASSES, seeds=SEEDS, guidance=sg, return_branches=True)
        none = pipe.guidance("none", strong_sparsity=sparsity)
        np.testing.assert_array_equal(pipe.guided(x, 0.5, CLASSES, seeds=SEEDS, guidance=none), strong)


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_guided_by_cfg_combines_the_class_with_no_class(
    pipe: Pipeline, x: NDArray[np.float32], sparsity: float
) -> None:
    """Two runs by hand, on the subsets that the plan drew for its branches."""
    cfg, none = (pipe.guidance(mode, strong_sparsity=sparsity, scale=3.0) for mode in ("cfg", "none"))
    plan = pipe.prepare([0.5], CLASSES, SEEDS, guidance=cfg)
    strong_keep, weak_keep = (None if keep is None else keep[0] for keep in (plan.keep_strong, plan.keep_weak))
    with_class = pipe.guided(x, 0.5, CLASSES, guidance=none, keep_strong=strong_keep)
    without = pipe.guided(x, 0.5, [None] * 3, guidance=none, keep_strong=weak_keep)
    np.testing.assert_array_equal(pipe.guided(x, plan, 0), guide(with_class, without, 3.0))
    if sparsity == 0:
        np.testing.assert_array_equal(with_class[1], without[1])  # the image that has no class


def test_guided_of_a_state_that_is_a_view_is_the_same(pipe: Pipeline, x: NDArray[np.float32], plan: Plan) -> None:
    """Rows and columns exchanged in memory, and every second image of a longer array."""
    turned = np.asfortranarray(x)
    spaced = np.repeat(x, 2, axis=0)[::2]
    for view in (turned, spaced):
        np.testing.assert_array_equal(pipe.guided(view, plan, 0), pipe.guided(x, plan, 0))


def test_guided_of_more_images_than_a_batch_is_that_of_each(pipe: Pipeline) -> None:
    classes, seeds = [1, 2, 3, 4, 5, 6, 7], range(7)
    x = pipe.initial_noise(seeds)
    found = pipe.guided(x, 0.5, classes, seeds=seeds)
    assert found.shape == x.shape
    for k in (0, 4, 5, 6):
        alone = pipe.guided(x[k : k + 1], 0.5, classes[k : k + 1], seeds=seeds[k : k + 1])
        # A batch of one may sum in another order than one of five.
        np.testing.assert_allclose(found[k : k + 1], alone, atol=1e-5 * np.abs(alone).max())


# What is refused


def rows(*indices: int) -> NDArray[np.int64]:
    """One row of 32 indices for each image: those given, then the next ones."""
    row = [*indices, *range(indices[-1] + 1, indices[-1] + 33 - len(indices))]
    return np.array([row] * 3, dtype=np.int64)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (rows(1, 0), "expected sorted distinct token indices below 64 in each row"),
        (rows(0, 0), "expected sorted distinct token indices below 64"),
        (rows(-1), "expected sorted distinct token indices below 64"),
        (rows(33), "expected sorted distinct token indices below 64"),
        (rows(0).astype(np.int32), r"expected int64 of shape \(3, 32\), found int32 of \(3, 32\)"),
        (rows(0).astype(np.float64), r"expected int64 of shape \(3, 32\), found float64"),
        (rows(0)[:, :31], r"expected int64 of shape \(3, 32\), found int64 of \(3, 31\)"),
        (rows(0)[:2], r"expected int64 of shape \(3, 32\), found int64 of \(2, 32\)"),
        (rows(0)[0], r"expected int64 of shape \(3, 32\), found int64 of \(32,\)"),
    ],
    ids=["unsorted", "twice", "negative", "too-high", "int32", "float", "short", "images", "flat"],
)
def test_guided_of_a_wrong_subset_is_refused(
    pipe: Pipeline, x: NDArray[np.float32], keep: NDArray[Any], message: str
) -> None:
    with pytest.raises(UsageError, match=f"^keep_weak: {message}"):
        pipe.guided(x, 0.5, CLASSES, keep_weak=keep)


def test_guided_of_one_wrong_row_among_good_ones_is_refused(pipe: Pipeline, x: NDArray[np.float32]) -> None:
    keep = rows(0)
    keep[2, 31] = 30
    with pytest.raises(UsageError, match="keep_weak: expected sorted distinct"):
        pipe.guided(x, 0.5, CLASSES, keep_weak=keep)


@pytest.mark.parametrize(("name", "mode"), [("keep_strong", "sg"), ("keep_weak", "none"), ("keep_weak", "cfg")])
def test_guided_of_a_subset_for_a_branch_without_one_is_refused(
    pipe: Pipeline, x: NDArray[np.float32], name: str, mode: Any
) -> None:
    subset: dict[str, Any] = {name: rows(0)}
    with pytest.raises(UsageError, match=f"^{name}: the branch keeps all 64 tokens or is not run: expected None"):
        pipe.guided(x, 0.5, CLASSES, guidance=pipe.guidance(mode), **subset)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((3, 1, 16, 16), np.float64),
        ((3, 1, 16, 16), np.float16),
        ((2, 1, 16, 16), np.float32),
        ((3, 3, 16, 16), np.float32),
        ((3, 16, 16), np.float32),
        ((3, 1, 16, 17), np.float32),
        ((0, 1, 16, 16), np.float32),
    ],
)
def test_guided_of_another_state_is_refused(
    pipe: Pipeline, plan: Plan, shape: tuple[int, ...], dtype: type[np.floating[Any]]
) -> None:
    with pytest.raises(UsageError) as caught:
        pipe.guided(np.zeros(shape, dtype=dtype), plan, 0)
    assert str(caught.value) == (
        f"x: expected float32 of shape (3, 1, 16, 16), found {np.dtype(dtype)} of shape {shape}"
    )


@pytest.mark.parametrize("index", [3, -1])
def test_guided_of_an_evaluation_beyond_the_plan_is_refused(
    pipe: Pipeline, x: NDArray[np.float32], plan: Plan, index: int
) -> None:
    with pytest.raises(UsageError, match=f"^evaluation {index}: the plan has 0 to 2$"):
        pipe.guided(x, plan, index)


@pytest.mark.parametrize("argument", [{"scale": 3.0}, {"seeds": SEEDS}, {"step": 1}, {"keep_weak": rows(0)}])
def test_guided_of_a_plan_takes_nothing_that_the_plan_settles(
    pipe: Pipeline, x: NDArray[np.float32], plan: Plan, argument: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match="a plan settles seeds, step, scale, guidance and subsets: give these to"):
        pipe.guided(x, plan, 0, **argument)


def test_guided_with_branches_of_one_branch_is_refused(pipe: Pipeline, x: NDArray[np.float32]) -> None:
    with pytest.raises(UsageError, match="return_branches: expected guidance with two branches, found mode none"):
        pipe.guided(x, 0.5, CLASSES, guidance=pipe.guidance("none"), return_branches=True)
