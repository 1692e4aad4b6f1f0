"""Prepared runs: which conditioning is computed, how often, and which tokens are kept.

Kept tokens depend on the branch and on the evaluation.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sg_runtime import philox
from sg_runtime.conditions import of_classes
from sg_runtime.guidance import choose
from sg_runtime.manifest import GuidancePlan, Level, Manifest, NetworkName, read_manifest
from sg_runtime.run.evaluate import GraphRunner
from sg_runtime.run.prepared import Batch, PreparedBranch, PreparedRun, prepare
from sg_runtime.sampling import Update

TOKENS, NO_CLASS = 16, 5
LABELS, SEEDS = np.array([3, NO_CLASS, 0, 3]), [7, 8, 9, 2**64 - 1]
TIMES = [1.0, 0.7, 0.4, 0.1]
COUNTERS = [(0, 0), (0, 1), (1, 0), (2, 0)]

DENSE, QUARTER, HALF = Level(0.0, 16), Level(0.25, 12), Level(0.5, 8)


class Setup:
    """A bundle's manifest, and its `condition` graphs behind a recorder."""

    def __init__(self, bundle: Path, record: Any) -> None:
        self.manifest: Manifest = read_manifest(bundle / "manifest.json")
        self.recorder = record(bundle)
        self.hoist = GraphRunner(self.manifest, self.recorder.lane(), 3).hoist

    def plan(
        self,
        guidance: GuidancePlan | None = None,
        times: Sequence[float] = TIMES,
        labels: NDArray[np.int64] = LABELS,
        seeds: Sequence[int] = SEEDS,
        counters: Sequence[tuple[int, int]] = COUNTERS,
        last_step: int = 2,
    ) -> PreparedRun:
        return prepare(
            self.manifest,
            self.hoist,
            guidance or self.manifest.guidance,
            [Update(*counter, time, 0.0, 1.0, 0.0) for counter, time in zip(counters, times, strict=True)],
            Batch(of_classes(self.manifest.model.labels, labels.tolist()), seeds),
            last_step,
        )

    def rows(self, network: NetworkName, times: Sequence[float], classes: Sequence[int]) -> NDArray[np.float32]:
        """Return modulations (E, U, M), with each pair computed alone."""
        (graph,) = self.manifest.hoisted(network)
        alone = [
            [
                self.hoist(graph, {"t": np.array([t], np.float32), "class": np.array([c])})["modulations"]
                for c in classes
            ]
            for t in times
        ]
        return np.array(alone)[:, :, 0]


@pytest.fixture
def setup(record: Any) -> Callable[[Path], Setup]:
    return lambda bundle: Setup(bundle, record)


def subsets(keep: int, branch: int, counter: tuple[int, int]) -> NDArray[np.int64]:
    """Return the documented kept tokens of all images."""
    step, evaluation = counter
    return np.stack(
        [philox.subset(seed, TOKENS, keep, step=step, evaluation=evaluation, branch=branch) for seed in SEEDS]
    )


def check_subsets(plan: PreparedBranch, branch: int) -> None:
    """Assert that a branch's kept tokens are the documented ones for its levels."""
    for level, keep, counter in zip(plan.levels, plan.keep, COUNTERS, strict=True):
        if level is None or level == DENSE:
            assert keep is None
        else:
            assert keep is not None
            assert keep.dtype == np.int64
            np.testing.assert_array_equal(keep, subsets(level.keep, branch, counter))


# Modes


def test_prepare_of_sg_shares_the_conditioning(setup: Callable[[Path], Setup], tiny_bundle: Path) -> None:
    """There is one row for each time and distinct class: 0, 3 and no class."""
    own = setup(tiny_bundle)
    plan = own.plan()
    assert plan.weak is not None
    assert plan.weak.held["modulations"].values is plan.strong.held["modulations"].values
    assert plan.strong.held["modulations"].values.dtype == np.float32
    assert plan.strong.held["modulations"].rows.tolist() == plan.weak.held["modulations"].rows.tolist() == [1, 2, 0, 1]
    assert own.recorder.names == ["condition"]
    np.testing.assert_array_equal(plan.strong.held["modulations"].values, own.rows("main", TIMES, [0, 3, NO_CLASS]))
    assert (plan.times, plan.scales, plan.guidance) == (tuple(TIMES), (2.0,) * 4, own.manifest.guidance)
    assert (plan.strong.network, plan.weak.network) == ("main", "main")
    assert (plan.strong.levels, plan.weak.levels) == ((DENSE,) * 4, (HALF,) * 4)
    check_subsets(plan.strong, philox.STRONG)
    check_subsets(plan.weak, philox.WEAK)


def test_prepare_of_no_guidance_has_no_weak_branch(setup: Callable[[Path], Setup], tiny_bundle: Path) -> None:
    own = setup(tiny_bundle)
    plan = own.plan(choose(own.manifest, mode="none", strong_sparsity=0.25))
    assert plan.weak is None
    assert plan.strong.held["modulations"].values.shape == (4, 3, own.manifest.model.held["modulations"][0])
    assert plan.strong.levels == (QUARTER,) * 4
    check_subsets(plan.strong, philox.STRONG)


@pytest.mark.parametrize("name", ["tiny_cfg_bundle", "tiny_cfg_sg_bundle"])
def test_prepare_of_a_weak_branch_without_a_class_adds_its_row(
    setup: Callable[[Path], Setup], request: pytest.FixtureRequest, name: str
) -> None:
    """One row serves all images and comes from the same run of `condition`."""
    own = setup(request.getfixturevalue(name))
    plan = own.plan(labels=np.array([3, 4, 0, 3]))
    assert plan.weak is not None
    assert plan.weak.held["modulations"].values is plan.strong.held["modulations"].values
    assert plan.strong.held["modulations"].rows.tolist() == [1, 2, 0, 1]
    assert plan.weak.held["modulations"].rows.tolist() == [3] * 4
    assert own.recorder.names == ["condition"]
    np.testing.assert_array_equal(plan.strong.held["modulations"].values, own.rows("main", TIMES, [0, 3, 4, NO_CLASS]))
    check_subsets(plan.strong, philox.STRONG)
    check_subsets(plan.weak, philox.WEAK)


def test_prepare_of_images_without_a_class_shares_the_row_of_the_weak_branch(
    setup: Callable[[Path], Setup], tiny_cfg_bundle: Path
) -> None:
    plan = setup(tiny_cfg_bundle).plan()
    assert plan.weak is not None
    assert plan.strong.held["modulations"].values.shape[1] == 3
    assert plan.strong.held["modulations"].rows.tolist() == [1, 2, 0, 1]
    assert plan.weak.held["modulations"].rows.tolist() == [2] * 4


def test_prepare_of_cfg_draws_each_branch_a_subset_of_its_own(
    setup: Callable[[Path], Setup], tiny_cfg_bundle: Path
) -> None:
    """Both branches keep the same number of tokens, but other tokens."""
    own = setup(tiny_cfg_bundle)
    plan = own.plan(choose(own.manifest, strong_sparsity=0.25))
    assert plan.weak is not None
    for strong, weak in zip(plan.strong.keep, plan.weak.keep, strict=True):
        assert strong is not None
        assert weak is not None
        assert strong.shape == weak.shape == (4, 12)
        assert not np.array_equal(strong, weak)
    check_subsets(plan.strong, philox.STRONG)
    check_subsets(plan.weak, philox.WEAK)


def test_prepare_of_two_networks_computes_the_rows_of_each(
    setup: Callable[[Path], Setup], tiny_autoguidance_bundle: Path
) -> None:
    own = setup(tiny_autoguidance_bundle)
    plan = own.plan()
    assert plan.weak is not None
    assert (plan.strong.network, plan.weak.network) == ("main", "weak")
    assert own.recorder.names == ["condition", "weak-condition"]
    for branch in (plan.strong, plan.weak):
        assert branch.held["modulations"].rows.tolist() == [1, 2, 0, 1]
        np.testing.assert_array_equal(
            branch.held["modulations"].values, own.rows(branch.network, TIMES, [0, 3, NO_CLASS])
        )
    assert not np.allclose(plan.strong.held["modulations"].values, plan.weak.held["modulations"].values)
    check_subsets(plan.weak, philox.WEAK)


def test_prepare_of_an_edm_model_asks_at_a_quarter_of_the_logarithm(
    setup: Callable[[Path], Setup], tiny_edm_bundle: Path
) -> None:
    own = setup(tiny_edm_bundle)
    sigmas = [80.0, 1.0, 0.5, 0.002]
    plan = own.plan(times=sigmas)
    assert plan.times == tuple(sigmas)
    (run,) = own.recorder.runs
    t = np.array([math.log(sigma) / 4 for sigma in sigmas], np.float32)
    assert run.feeds["t"].dtype == np.float32
    np.testing.assert_array_equal(run.feeds["t"][:12], np.repeat(t, 3))
    np.testing.assert_array_equal(run.feeds["class"][:12], [0, 3, NO_CLASS] * 4)
    check_subsets(plan.strong, philox.STRONG)


# What changes over a run


def test_prepare_of_changing_sparsities_draws_subsets_of_changing_sizes(
    setup: Callable[[Path], Setup], tiny_cosine_bundle: Path
) -> None:
    """A branch that keeps all tokens or does not run has no array of kept tokens."""
    plan = setup(tiny_cosine_bundle).plan()
    assert plan.weak is not None
    # The steps are 0, 0, 1 and 2 of 2. The first and the last evaluation are outside of the
    # interval from 0.15 to 0.9.
    assert plan.strong.levels == (DENSE, DENSE, DENSE, QUARTER)
    assert plan.weak.levels == (None, HALF, QUARTER, None)
    assert [None if keep is None else keep.shape for keep in plan.strong.keep] == [None, None, None, (4, 12)]
    assert [None if keep is None else keep.shape for keep in plan.weak.keep] == [None, (4, 8), (4, 12), None]
    check_subsets(plan.strong, philox.STRONG)
    check_subsets(plan.weak, philox.WEAK)
    assert plan.scales == pytest.approx((3.0, 3.0, 2.25, 1.5), rel=1e-15)


def test_prepare_of_a_weak_branch_that_comes_to_keep_all_has_no_subset_then(
    setup: Callable[[Path], Setup], tiny_autoguidance_bundle: Path
) -> None:
    """The sparsity passes the weak network's levels, 0.5 and 0.

    The main network's levels have no effect.
    """
    own = setup(tiny_autoguidance_bundle)
    plan = own.plan(choose(own.manifest, sparsity=(0.5, 0.0)))
    assert plan.weak is not None
    assert plan.weak.levels == (HALF, HALF, DENSE, DENSE)
    check_subsets(plan.weak, philox.WEAK)


def test_prepare_of_two_networks_goes_by_way_of_the_levels_of_each(
    setup: Callable[[Path], Setup], tiny_autoguidance_bundle: Path
) -> None:
    """A sparsity of the main network's graphs is not used for the weak network."""
    own = setup(tiny_autoguidance_bundle)
    dense = own.manifest.graph("dense", 16)
    assert dense is not None
    quarter = replace(dense, kind="sparse", levels=(QUARTER,))
    own.manifest = replace(own.manifest, graphs=(*own.manifest.graphs, quarter))
    plan = own.plan(choose(own.manifest, strong_sparsity=(0.0, 0.25), sparsity=(0.5, 0.0)))
    assert plan.weak is not None
    assert set(plan.strong.levels) == {DENSE, QUARTER}
    assert set(plan.weak.levels) == {DENSE, HALF}


def test_prepare_of_a_longer_run_is_at_its_place_in_it(
    setup: Callable[[Path], Setup], tiny_cosine_bundle: Path
) -> None:
    plan = setup(tiny_cosine_bundle).plan(last_step=1000)
    assert plan.weak is not None
    assert plan.strong.levels == (DENSE,) * 4
    assert plan.weak.levels == (None, HALF, HALF, None)
    assert plan.scales == pytest.approx((3.0,) * 4, rel=1e-4)  # two thousandths of a cosine


# An image's part of a prepared run


@settings(max_examples=15)
@given(
    company=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2**64 - 1)), max_size=11),
    place=st.integers(0, 11),
    times=st.lists(st.floats(0, 1, width=32), max_size=5),
)
def test_prepare_of_an_image_in_any_company_computes_the_same_bits(
    tiny_cfg_sg_bundle: Path,
    record: Any,
    company: list[tuple[int, int]],
    place: int,
    times: list[float],
) -> None:
    """Neither rows nor kept tokens depend on the other images and times."""
    own = Setup(tiny_cfg_sg_bundle, record)
    place = min(place, len(company))
    everyone = [*company[:place], (2, 77), *company[place:]]
    counters = [(step, 0) for step in range(len(times) + 1)]
    labels, seeds = np.array([label for label, _ in everyone]), [seed for _, seed in everyone]
    plan = own.plan(times=[*times, 0.5], labels=labels, seeds=seeds, counters=counters)
    alone = own.plan(times=[0.5], labels=np.array([2]), seeds=[77], counters=counters[-1:])
    for branch, single in ((plan.strong, alone.strong), (plan.weak, alone.weak)):
        assert branch is not None
        assert single is not None
        np.testing.assert_array_equal(
            branch.held["modulations"].values[-1, branch.held["modulations"].rows[place]],
            single.held["modulations"].values[0, single.held["modulations"].rows[0]],
        )
        keep, only = branch.keep[-1], single.keep[0]
        assert keep is not None
        assert only is not None
        np.testing.assert_array_equal(keep[place], only[0])
