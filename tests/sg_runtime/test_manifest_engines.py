"""Engines in the manifest, and which engine runs a graph."""

from dataclasses import replace
from pathlib import Path

import pytest

from sg_runtime.bundle import Bundle
from sg_runtime.errors import UsageError
from sg_runtime.manifest import EngineFacts, GraphFacts, Level, Manifest, Profile


@pytest.fixture
def manifest(engine_bundle: Path) -> Manifest:
    return Bundle.open(engine_bundle).manifest


def guided(manifest: Manifest) -> GraphFacts:
    graph = manifest.graph("guided", 16, 8)
    assert graph is not None
    return graph


@pytest.mark.parametrize(
    ("profile", "text"),
    [
        (Profile(40, ()), "batch 40"),
        (Profile(1, (8,)), "batch 1 keeping 8 tokens"),
        (Profile(4, (16, 8)), "batch 4 keeping 16/8 tokens"),
    ],
)
def test_profile_as_text_has_its_sizes(profile: Profile, text: str) -> None:
    assert str(profile) == text


@pytest.mark.parametrize("batch", [0, -1])
def test_profile_of_no_image_is_refused(batch: int) -> None:
    with pytest.raises(UsageError, match=f"^batch: expected at least 1, found {batch}$"):
        Profile(batch, ())


@pytest.mark.parametrize("part", ["profiles", "compute_capabilities"])
def test_engine_without_a_profile_or_gpu_is_refused(manifest: Manifest, part: str) -> None:
    engine = manifest.engines[0]
    with pytest.raises(UsageError) as caught:
        replace(engine, **{part: ()})
    assert str(caught.value) == (
        f"engine {engine.file}: expected at least one profile and compute capability, found none"
    )


def test_engine_of_a_graph_is_the_one_with_a_profile_for_it(manifest: Manifest) -> None:
    condition, pair = manifest.engines
    assert manifest.engine(guided(manifest), 1) == (pair, 0)
    assert manifest.engine(manifest.hoisted("main")[0], manifest.hoisted_rows["condition"]) == (condition, 0)


def test_engine_of_a_graph_is_found_among_several_profiles(manifest: Manifest) -> None:
    profiles = tuple(Profile(batch, keep) for batch in (1, 4) for keep in ((16, 4), (16, 8)))
    condition, pair = manifest.engines
    several = replace(manifest, engines=(condition, replace(pair, profiles=profiles)))
    found = several.engine(guided(manifest), 4)
    assert found is not None
    assert found[1] == 3
    other = replace(guided(manifest), levels=(Level(0.0, 16), Level(0.75, 4)))
    found = several.engine(other, 1)
    assert found is not None
    assert found[1] == 0


def test_engine_of_a_batch_or_sparsity_without_a_profile_is_none(manifest: Manifest) -> None:
    graph = guided(manifest)
    assert manifest.engine(graph, 2) is None
    assert manifest.engine(replace(graph, levels=(Level(0.0, 16), Level(0.25, 12))), 1) is None
    assert manifest.engine(replace(graph, network="weak"), 1) is None


@pytest.mark.parametrize("change", [{"kind": "sparse"}, {"network": "weak"}, {"null_weak": True}])
def test_engine_of_another_kind_network_or_condition_is_passed_over(manifest: Manifest, change: dict[str, str]) -> None:
    condition, pair = manifest.engines
    other: EngineFacts = replace(pair, **change)
    assert replace(manifest, engines=(other,)).engine(guided(manifest), 1) is None
    assert replace(manifest, engines=(other, condition, pair)).engine(guided(manifest), 1) == (pair, 0)
