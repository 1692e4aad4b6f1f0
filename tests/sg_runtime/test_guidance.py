"""The guidance update, and choosing its branches among those that a bundle has."""

from pathlib import Path

import numpy as np
import pytest

from sg_runtime.errors import UsageError
from sg_runtime.guidance import choose, guide, levels
from sg_runtime.manifest import GuidancePlan, Level, Manifest, read_manifest

DENSE, QUARTER, HALF, THREE_QUARTERS = Level(0.0, 64), Level(0.25, 48), Level(0.5, 32), Level(0.75, 16)


@pytest.fixture(scope="module")
def manifest(glyphs_bundle: Path) -> Manifest:
    return read_manifest(glyphs_bundle / "manifest.json")


def test_guide_of_small_numbers_is_the_formula() -> None:
    strong, weak = np.array([3, -1], dtype=np.float32), np.array([1, 1], dtype=np.float32)
    # Small integers: exact.
    assert guide(strong, weak, 2.0).tolist() == [5, -3]
    assert guide(strong, weak, 1.0).tolist() == strong.tolist()
    assert guide(strong, weak, 0.0).tolist() == weak.tolist()


def test_guide_of_float32_stays_float32() -> None:
    x = np.ones((1, 1, 2, 2), dtype=np.float32)
    assert guide(x, x, 1.7).dtype == np.float32


def test_levels_of_a_bundle_are_distinct_and_densest_first(manifest: Manifest) -> None:
    assert levels(manifest) == [DENSE, QUARTER, HALF, THREE_QUARTERS]


def test_choose_of_nothing_is_the_plan_of_the_bundle(manifest: Manifest) -> None:
    assert choose(manifest) == manifest.guidance == GuidancePlan("sg", DENSE, HALF, 2.0)


def test_choose_of_parts_replaces_these_alone(manifest: Manifest) -> None:
    assert choose(manifest, scale=3) == GuidancePlan("sg", DENSE, HALF, 3.0)
    assert choose(manifest, sparsity=0.75) == GuidancePlan("sg", DENSE, THREE_QUARTERS, 2.0)
    assert choose(manifest, strong_sparsity=0.25) == GuidancePlan("sg", QUARTER, HALF, 2.0)


@pytest.mark.parametrize("mode", ["none", "cfg"])
def test_choose_of_one_sparsity_gives_it_to_both_branches(manifest: Manifest, mode: str) -> None:
    assert choose(manifest, mode=mode) == GuidancePlan(mode, DENSE, DENSE, 2.0)
    assert choose(manifest, mode=mode, strong_sparsity=0.5) == GuidancePlan(mode, HALF, HALF, 2.0)


def test_choose_of_a_sparsity_with_rounding_in_it_finds_the_level(manifest: Manifest) -> None:
    assert choose(manifest, sparsity=0.1 + 0.4 + 1e-12).weak == HALF


def test_choose_of_a_weak_sparsity_not_built_names_the_build(manifest: Manifest) -> None:
    with pytest.raises(UsageError) as caught:
        choose(manifest, sparsity=0.6)
    assert str(caught.value) == (
        "sparsity 0.6 is not in this bundle, which has 0, 0.25, 0.5, 0.75; "
        "build it with: sg-export build glyphs --sparsity 0.6"
    )


def test_choose_of_a_strong_sparsity_not_built_names_the_build(manifest: Manifest) -> None:
    with pytest.raises(UsageError, match=r"sg-export build glyphs --strong-sparsity 0\.1$"):
        choose(manifest, strong_sparsity=0.1)


def test_choose_of_a_weak_branch_as_dense_as_the_strong_one_is_refused(manifest: Manifest) -> None:
    with pytest.raises(UsageError, match="expected a weak branch sparser than the strong one"):
        choose(manifest, strong_sparsity=0.5)


@pytest.mark.parametrize("mode", ["none", "cfg"])
def test_choose_of_a_weak_sparsity_for_one_sparsity_is_refused(manifest: Manifest, mode: str) -> None:
    with pytest.raises(UsageError, match=f"{mode} guidance has one sparsity: give strong_sparsity"):
        choose(manifest, mode=mode, sparsity=0.5)


def test_choose_of_an_unknown_mode_is_refused(manifest: Manifest) -> None:
    with pytest.raises(UsageError, match="guidance: expected one of none, cfg, sg, found 'pag'"):
        choose(manifest, mode="pag")


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_choose_of_a_scale_that_is_no_number_is_refused(manifest: Manifest, scale: float) -> None:
    with pytest.raises(UsageError, match="scale: expected a finite float32 number"):
        choose(manifest, scale=scale)


def test_choose_of_sg_where_it_is_not_the_default_needs_a_sparsity(manifest: Manifest) -> None:
    from dataclasses import replace

    plain = replace(manifest, guidance=GuidancePlan("none", DENSE, DENSE, 2.0))
    with pytest.raises(UsageError, match=r"sg guidance: give sparsity, one of 0, 0\.25, 0\.5, 0\.75"):
        choose(plain, mode="sg")
    assert choose(plain, mode="sg", sparsity=0.5) == GuidancePlan("sg", DENSE, HALF, 2.0)
