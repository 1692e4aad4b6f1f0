"""The guidance update, the guidance of each step, and the choice of branches in a bundle."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sg_runtime.errors import UsageError
from sg_runtime.guidance import (
    StepGuidance,
    built_guidances,
    choose,
    cosine_ramp,
    guidance_table,
    guide,
    levels,
    ramp_ends,
    with_scale,
)
from sg_runtime.manifest import GuidanceMode, GuidancePlan, Level, Manifest, read_manifest
from sg_runtime.sampling import Update

DENSE, QUARTER, HALF, MOST = Level(0.0, 16), Level(0.25, 12), Level(0.5, 8), Level(0.75, 4)
BUILT = [DENSE, QUARTER, HALF]

few = settings(max_examples=50)


# The update


def test_guide_of_small_numbers_is_the_formula() -> None:
    strong, weak = np.array([3, -1], dtype=np.float32), np.array([1, 1], dtype=np.float32)
    # Small integers, so the result is exact.
    assert guide(strong, weak, 2.0).tolist() == [5, -3]
    assert guide(strong, weak, 1.0).tolist() == strong.tolist()
    assert guide(strong, weak, 0.0).tolist() == weak.tolist()


def test_guide_of_float32_stays_float32() -> None:
    x = np.ones((1, 1, 2, 2), dtype=np.float32)
    assert guide(x, x, 1.7).dtype == np.float32


# Guidance of each step


def table(
    plan: GuidancePlan,
    times: Sequence[float],
    steps: Sequence[int] | None = None,
    last_step: int | None = None,
    built: Sequence[Level] = BUILT,
    built_weak: Sequence[Level] = BUILT,
) -> tuple[StepGuidance, ...]:
    """Return the guidance table.

    By default each step has one evaluation, and the run ends with the last one.
    """
    steps = range(len(times)) if steps is None else steps
    last_step = len(times) - 1 if last_step is None else last_step
    updates = [Update(step, 0, time, 0.0, 1.0, 0.0) for step, time in zip(steps, times, strict=True)]
    return guidance_table(plan, updates, built, built_weak, last_step)


FIVE = [1.0, 0.8, 0.6, 0.4, 0.2]


@pytest.mark.parametrize("mode", ["cfg", "sg", "cfg+sg", "autoguidance"])
def test_guidance_table_of_a_constant_plan_repeats_it(mode: GuidanceMode) -> None:
    """The table does not depend on the other levels that were built."""
    plan = GuidancePlan(mode, DENSE, DENSE if mode == "cfg" else HALF, 1.7)
    assert table(plan, FIVE, built=[QUARTER]) == (StepGuidance(plan.strong, plan.weak, 1.7),) * 5


def test_guidance_table_without_guidance_has_the_strong_branch_alone() -> None:
    plan = GuidancePlan("none", DENSE, DENSE, 1.7, HALF, HALF)
    assert [(row.strong, row.weak) for row in table(plan, FIVE)] == [
        (level, None) for level in (DENSE, DENSE, QUARTER, HALF, HALF)
    ]


def test_guidance_table_of_changing_sparsities_goes_by_way_of_those_built() -> None:
    """Half a cosine from 0 to 0.5 passes 0, 0.07, 0.25, 0.43 and 0.5.

    The way back passes the same values in reverse.
    """
    plan = GuidancePlan("sg", DENSE, HALF, 2.0, HALF, DENSE)
    rows = table(plan, FIVE)
    assert [row.strong for row in rows] == [DENSE, DENSE, QUARTER, HALF, HALF]
    assert [row.weak for row in rows] == [HALF, HALF, QUARTER, DENSE, DENSE]
    assert {row.scale for row in rows} == {2.0}


def test_guidance_table_of_two_networks_goes_by_way_of_the_levels_of_each() -> None:
    plan = GuidancePlan("autoguidance", DENSE, HALF, 2.0, HALF, DENSE)
    rows = table(plan, FIVE, built=[DENSE, HALF], built_weak=BUILT)
    assert [row.strong for row in rows] == [DENSE, DENSE, DENSE, HALF, HALF]
    assert [row.weak for row in rows] == [HALF, HALF, QUARTER, DENSE, DENSE]


@pytest.mark.parametrize("built", [[DENSE, HALF], [HALF, DENSE], []])
def test_guidance_table_between_two_levels_as_near_takes_the_lower(built: list[Level]) -> None:
    """The tie is at 0.25, in the middle of a run from 0 to 0.5.

    The end levels need not be in the list of built levels.
    """
    plan = GuidancePlan("sg", DENSE, HALF, 2.0, HALF, DENSE)
    middle = table(plan, FIVE, built=built, built_weak=built)[2]
    assert (middle.strong, middle.weak) == (DENSE, DENSE)


def test_guidance_table_of_a_changing_scale_follows_the_cosine() -> None:
    plan = GuidancePlan("sg", DENSE, HALF, 3.0, scale_last=1.0)
    scales = [row.scale for row in table(plan, FIVE)]
    # 2 + cos(k π / 4), in float64.
    assert scales == pytest.approx([2 + math.cos(k * math.pi / 4) for k in range(5)], rel=1e-15)


def test_guidance_table_of_two_evaluations_a_step_gives_both_the_same_place() -> None:
    plan = GuidancePlan("sg", DENSE, HALF, 3.0, HALF, DENSE, 1.0)
    one, two = (
        table(plan, FIVE),
        table(plan, [1.0, 0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2], [0, 0, 1, 1, 2, 2, 3, 3, 4], 4),
    )
    assert two == tuple(one[step] for step in (0, 0, 1, 1, 2, 2, 3, 3, 4))


def test_guidance_table_of_one_step_is_at_the_start() -> None:
    plan = GuidancePlan("sg", DENSE, HALF, 3.0, HALF, DENSE, 1.0)
    assert table(plan, [1.0]) == (StepGuidance(DENSE, HALF, 3.0),)


def test_guidance_table_of_part_of_a_run_is_at_its_place() -> None:
    """This is a call at one step of a longer run."""
    plan = GuidancePlan("sg", DENSE, HALF, 3.0, HALF, DENSE, 1.0)
    assert table(plan, [0.2], [4], 4) == (StepGuidance(HALF, DENSE, 1.0),)


def test_guidance_table_of_an_interval_guides_between_its_ends() -> None:
    """Both ends are included.

    The time of the evaluation decides, so the two halves of a Heun step may differ.
    """
    plan = GuidancePlan("sg", DENSE, HALF, 2.0, interval=(0.4, 0.8))
    assert [row.weak for row in table(plan, FIVE)] == [None, HALF, HALF, HALF, None]
    assert [row.strong for row in table(plan, FIVE)] == [DENSE] * 5
    both = table(plan, [1.0, 0.8], [0, 0], 4)
    assert [row.weak for row in both] == [None, HALF]


def test_guidance_table_of_an_interval_in_sigma_guides_between_its_ends() -> None:
    plan = GuidancePlan("sg", DENSE, HALF, 2.0, interval=(0.28, 2.9))
    assert [row.weak for row in table(plan, [80.0, 2.9, 1.0, 0.28, 0.002])] == [None, HALF, HALF, HALF, None]


@few
@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_cosine_between_any_two_is_monotone_and_keeps_the_ends(first: float, last: float, places: list[float]) -> None:
    found = [cosine_ramp(first, last, place) for place in sorted(places)]
    slack = 1e-9  # rounding of numbers up to 1e6
    assert all(min(first, last) - slack <= value <= max(first, last) + slack for value in found)
    direction = 1 if last >= first else -1
    assert all(direction * (b - a) >= -slack for a, b in pairwise(found))
    assert cosine_ramp(first, last, 0) == pytest.approx(first, abs=slack)
    assert cosine_ramp(first, last, 1) == last


@few
@given(st.data())
def test_guidance_table_of_any_ramp_takes_a_level_that_none_is_nearer_than(data: st.DataObject) -> None:
    built = [Level(sparsity / 16, 16 - sparsity) for sparsity in data.draw(st.sets(st.integers(0, 15), min_size=2))]
    first, last = data.draw(st.sampled_from(built)), data.draw(st.sampled_from(built))
    steps = data.draw(st.integers(1, 20))
    plan = GuidancePlan("autoguidance", first, last, 2.0, last, first)
    rows = table(plan, [1.0] * steps, built=built, built_weak=built)
    assert (rows[0].strong, rows[0].weak) == (first, last)
    if steps > 1:
        assert (rows[-1].strong, rows[-1].weak) == (last, first)
    for step, row in enumerate(rows):
        wanted = cosine_ramp(first.sparsity, last.sparsity, step / max(steps - 1, 1))
        nearest = min(abs(level.sparsity - wanted) for level in built)
        assert abs(row.strong.sparsity - wanted) == nearest


# Choosing


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> Manifest:
    """Return a manifest of SG at strong sparsities 0 and 0.25 and weak sparsity 0.5.

    Its source is set to a reference model.
    """
    found = read_manifest(tiny_bundle / "manifest.json")
    return replace(found, source=replace(found.source, reference="glyphs"))


@pytest.fixture(scope="module")
def two_networks(tiny_autoguidance_bundle: Path) -> Manifest:
    return read_manifest(tiny_autoguidance_bundle / "manifest.json")


def test_levels_of_a_bundle_are_distinct_and_densest_first(manifest: Manifest) -> None:
    assert levels(manifest) == [DENSE, QUARTER, HALF]


def test_levels_of_two_networks_are_those_of_each(two_networks: Manifest) -> None:
    assert levels(two_networks) == [DENSE]
    assert levels(two_networks, "weak") == [DENSE, HALF]


def test_built_guidances_are_all_pairs_at_the_largest_scale(manifest: Manifest, tiny_cosine_bundle: Path) -> None:
    plans = built_guidances(manifest)
    assert [(plan.mode, plan.strong, plan.weak) for plan in plans] == [("sg", DENSE, HALF), ("sg", QUARTER, HALF)]
    falling = read_manifest(tiny_cosine_bundle / "manifest.json")
    rising = replace(falling, guidance=replace(falling.guidance, scale=1.5, scale_last=3.0))
    for ramped in (falling, rising):
        assert {plan.scale for plan in built_guidances(ramped)} == {3.0}


def test_built_guidances_without_guided_graphs_are_all_levels(manifest: Manifest, two_networks: Manifest) -> None:
    assert [(p.mode, p.strong, p.weak) for p in built_guidances(two_networks)] == [
        ("autoguidance", DENSE, level) for level in levels(two_networks, "weak")
    ]
    singles = tuple(graph for graph in manifest.graphs if graph.kind != "guided")
    alone = replace(manifest, graphs=singles, guidance=GuidancePlan("none", DENSE, DENSE, 1.0))
    assert [(p.mode, p.strong, p.weak) for p in built_guidances(alone)] == [
        ("none", level, level) for level in (DENSE, QUARTER, HALF)
    ]


def test_choose_of_nothing_is_the_plan_of_the_bundle(manifest: Manifest) -> None:
    assert choose(manifest) == manifest.guidance == GuidancePlan("sg", DENSE, HALF, 2.0)


def test_choose_of_nothing_where_all_changes_is_the_plan_of_the_bundle(tiny_cosine_bundle: Path) -> None:
    changing = read_manifest(tiny_cosine_bundle / "manifest.json")
    expected = GuidancePlan("sg", DENSE, HALF, 3.0, QUARTER, DENSE, 1.5, (0.15, 0.9))
    assert choose(changing) == changing.guidance == expected


def test_choose_of_parts_replaces_these_alone(manifest: Manifest) -> None:
    assert choose(manifest, scale=3) == GuidancePlan("sg", DENSE, HALF, 3.0)
    assert choose(manifest, sparsity=0.25) == GuidancePlan("sg", DENSE, QUARTER, 2.0)
    assert choose(manifest, strong_sparsity=0.25) == GuidancePlan("sg", QUARTER, HALF, 2.0)
    assert choose(manifest, interval=(0.1, 0.5)) == GuidancePlan("sg", DENSE, HALF, 2.0, interval=(0.1, 0.5))


def test_choose_of_pairs_goes_from_one_to_the_other(manifest: Manifest) -> None:
    plan = choose(manifest, strong_sparsity=(0.0, 0.5), sparsity=(0.5, 0.25), scale=(3, 1))
    assert plan == GuidancePlan("sg", DENSE, HALF, 3.0, HALF, QUARTER, 1.0)


def test_choose_of_a_number_ends_a_change(tiny_cosine_bundle: Path) -> None:
    changing = read_manifest(tiny_cosine_bundle / "manifest.json")
    plan = choose(changing, strong_sparsity=0.25, sparsity=0.5, scale=2, interval=(0, 1))
    assert plan == GuidancePlan("sg", QUARTER, HALF, 2.0, interval=(0, 1))
    part = choose(changing, sparsity=0.5)
    assert part == GuidancePlan("sg", DENSE, HALF, 3.0, QUARTER, None, 1.5, (0.15, 0.9))


@pytest.mark.parametrize("mode", ["none", "cfg"])
def test_choose_of_one_sparsity_gives_it_to_both_branches(manifest: Manifest, mode: GuidanceMode) -> None:
    assert choose(manifest, mode=mode) == GuidancePlan(mode, DENSE, DENSE, 2.0)
    assert choose(manifest, mode=mode, strong_sparsity=0.5) == GuidancePlan(mode, HALF, HALF, 2.0)
    ramp = choose(manifest, mode=mode, strong_sparsity=(0.5, 0.0))
    assert ramp == GuidancePlan(mode, HALF, HALF, 2.0, DENSE, DENSE)


def test_choose_of_cfg_with_sg_keeps_the_sparsities_of_sg(manifest: Manifest) -> None:
    assert choose(manifest, mode="cfg+sg") == GuidancePlan("cfg+sg", DENSE, HALF, 2.0)


def test_choose_of_autoguidance_finds_levels_of_either_network(two_networks: Manifest) -> None:
    assert choose(two_networks) == GuidancePlan("autoguidance", DENSE, HALF, 2.0)
    assert choose(two_networks, sparsity=0.0) == GuidancePlan("autoguidance", DENSE, DENSE, 2.0)
    ramp = choose(two_networks, sparsity=(0.5, 0.0))
    assert ramp == GuidancePlan("autoguidance", DENSE, HALF, 2.0, None, DENSE)


def test_choose_of_a_sparsity_with_rounding_in_it_finds_the_level(manifest: Manifest) -> None:
    assert choose(manifest, sparsity=0.1 + 0.4 + 1e-12).weak == HALF


@pytest.mark.parametrize(("family", "count"), [("tread", 11), ("maskdit", 10)])
def test_choose_of_a_third_finds_the_level_by_the_tokens_it_keeps(
    two_networks: Manifest, family: str, count: int
) -> None:
    """However many digits are given, they keep the same tokens: of 16 two thirds, rounded."""
    third = Level(1 / 3, count)
    graph = next(graph for graph in two_networks.graphs if graph.kind == "sparse" and graph.network == "weak")
    graphs = (*(other for other in two_networks.graphs if other != graph), replace(graph, levels=(third,), inputs=()))
    manifest = replace(two_networks, graphs=graphs, model=replace(two_networks.model, family=family))
    for sparsity in (0.333, 0.3333333, 1 / 3):
        assert choose(manifest, sparsity=sparsity).weak == third
    with pytest.raises(UsageError) as caught:
        choose(manifest, sparsity=0.4)
    assert "sparsity 0.4 is not in this bundle, which has 0, 0.3333333333333333; " in str(caught.value)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_choose_of_a_sparsity_out_of_range_names_no_build(manifest: Manifest, sparsity: float) -> None:
    with pytest.raises(UsageError, match=r"sparsity .*: expected at least 0 and less than 1$"):
        choose(manifest, sparsity=sparsity)


BUILD = "build it with: sg-export build glyphs"


def test_choose_of_sg_where_it_is_not_the_default_needs_a_sparsity(manifest: Manifest) -> None:
    for mode in ("none", "cfg"):
        plain = replace(manifest, guidance=GuidancePlan(mode, DENSE, DENSE, 2.0))
        for wanted in ("sg", "cfg+sg"):
            with pytest.raises(UsageError) as caught:
                choose(plain, mode=wanted)
            assert str(caught.value) == f"{wanted}: give the weak sparsity, one of 0.25, 0.5"
        assert choose(plain, mode="sg", sparsity=0.5) == GuidancePlan("sg", DENSE, HALF, 2.0)


def test_choose_of_sg_where_the_weak_branch_is_another_network_needs_a_sparsity(two_networks: Manifest) -> None:
    """The weak sparsity of the plan belongs to the other network."""
    with pytest.raises(UsageError) as caught:
        choose(two_networks, mode="sg")
    assert str(caught.value) == (
        "sg: expected a branch sparser than 0, found none in this bundle; "
        "build it with: sg-export build tiny.safetensors --route 1-1 --prediction flow --heads 2 --sparsity 0.5"
    )
    with pytest.raises(UsageError) as caught:
        choose(two_networks, mode="cfg+sg")
    assert str(caught.value).endswith("--heads 2 --guidance cfg+sg --sparsity 0.5")


def test_choose_of_autoguidance_where_it_is_not_the_default_needs_a_sparsity(two_networks: Manifest) -> None:
    plain = replace(two_networks, guidance=GuidancePlan("none", DENSE, DENSE, 2.0))
    with pytest.raises(UsageError) as caught:
        choose(plain, mode="autoguidance")
    assert str(caught.value) == "autoguidance: give the weak sparsity, one of 0, 0.5"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0.6}, f"sparsity 0.6 is not in this bundle, which has 0, 0.25, 0.5; {BUILD} --sparsity 0.6"),
        (
            {"sparsity": (0.5, 0.6)},
            f"sparsity 0.6 is not in this bundle, which has 0, 0.25, 0.5; {BUILD} --sparsity 0.6",
        ),
        (
            {"strong_sparsity": 0.1},
            f"sparsity 0.1 is not in this bundle, which has 0, 0.25, 0.5; {BUILD} --strong-sparsity 0.1",
        ),
        (
            {"mode": "cfg", "strong_sparsity": (0.6, 0.0)},
            f"sparsity 0.6 is not in this bundle, which has 0, 0.25, 0.5; {BUILD} --guidance cfg --strong-sparsity 0.6",
        ),
        (
            {"mode": "cfg+sg", "sparsity": 0.6},
            f"sparsity 0.6 is not in this bundle, which has 0, 0.25, 0.5; {BUILD} --guidance cfg+sg --sparsity 0.6",
        ),
        (
            {"mode": "autoguidance"},
            f"autoguidance: this bundle has no weak checkpoint; {BUILD} --weak-checkpoint PATH",
        ),
        ({"mode": "none", "sparsity": 0.5}, "none guidance has one sparsity: give the strong one, not the weak one"),
        ({"mode": "cfg", "sparsity": 0.5}, "cfg guidance has one sparsity: give the strong one, not the weak one"),
        (
            {"strong_sparsity": 0.5},
            "sg guidance: expected a weak branch sparser than the strong one, found sparsity 0.5 (weak, 8 tokens) and "
            "0.5 (strong, 8 tokens); raise `sparsity` or lower `strong_sparsity`",
        ),
        (
            {"mode": "cfg+sg", "sparsity": 0.0},
            "cfg+sg guidance: expected a weak branch sparser than the strong one, found sparsity 0 (weak, 16 tokens) "
            "and 0 (strong, 16 tokens); raise `sparsity` or lower `strong_sparsity`",
        ),
        ({"scale": math.nan}, "scale: expected a finite float32 number, found nan"),
        ({"scale": (2.0, math.inf)}, "scale: expected a finite float32 number, found inf"),
        ({"interval": (0.5, 0.1)}, "interval: expected 0 <= lowest time <= highest time, found 0.5 to 0.1"),
        ({"interval": (-1.0, 0.1)}, "interval: expected 0 <= lowest time <= highest time, found -1 to 0.1"),
        ({"mode": "pag"}, "guidance: expected one of none, cfg, sg, cfg+sg, autoguidance, found 'pag'"),
    ],
)
def test_choose_of_what_cannot_be_says_what_would_serve(
    manifest: Manifest, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        choose(manifest, **arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0.25}, "which has 0, 0.5; {} --weak-checkpoint PATH --sparsity 0.25"),
        ({"strong_sparsity": 0.25}, "which has 0; {} --weak-checkpoint PATH --strong-sparsity 0.25"),
        ({"mode": "sg", "sparsity": 0.25}, "which has 0; {} --sparsity 0.25"),
        ({"mode": "none", "strong_sparsity": 0.25}, "which has 0; {} --guidance none --strong-sparsity 0.25"),
    ],
)
def test_choose_of_a_sparsity_that_a_network_was_not_built_for_names_the_build(
    two_networks: Manifest, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        choose(two_networks, **arguments)
    build = "build it with: sg-export build tiny.safetensors --route 1-1 --prediction flow --heads 2"
    assert str(caught.value) == f"sparsity 0.25 is not in this bundle, {message.format(build)}"


def test_with_scale_of_a_plan_replaces_the_scale_alone() -> None:
    plan = GuidancePlan("sg", DENSE, HALF, 3.0, QUARTER, MOST, 1.5, (0.1, 0.9))
    assert with_scale(plan, 2) == replace(plan, scale=2.0, scale_last=None)
    assert with_scale(plan, (2, 1)) == replace(plan, scale=2.0, scale_last=1.0)
    with pytest.raises(UsageError, match="scale: expected a finite float32 number, found -inf"):
        with_scale(plan, (2, -math.inf))


def test_ramp_ends_of_any_numbers_are_floats() -> None:
    """This includes NumPy numbers and integers, which a manifest could not hold."""
    pair: Any = (np.float32(1.5), 3)
    for found, expected in ((ramp_ends("scale", 2), (2.0, None)), (ramp_ends("scale", pair), (1.5, 3.0))):
        assert found == expected
        assert all(type(end) is float for end in found if end is not None)
