"""Costs of a guided step, compared with explicit sums over the graphs."""

from dataclasses import replace
from pathlib import Path

import pytest

from sg_export.cost.step import StepCost, step_costs, step_table
from sg_runtime.bundle import Bundle
from sg_runtime.manifest import Cost, Level, Manifest, Route


def opened(bundle: Path) -> Manifest:
    return Bundle.open(bundle).manifest


def graph_cost(manifest: Manifest, name: str) -> Cost:
    (found,) = (graph.cost for graph in manifest.graphs if graph.name == name)
    return found


def ways(manifest: Manifest) -> dict[str, StepCost]:
    return {cost.way: cost for cost in step_costs(manifest)}


def test_step_costs_of_sg_are_sums_over_the_graphs(tiny_bundle: Path) -> None:
    manifest = opened(tiny_bundle)
    condition, dense = graph_cost(manifest, "condition"), graph_cost(manifest, "dense")
    sparse, guided = graph_cost(manifest, "sparse-8"), graph_cost(manifest, "guided-16-8")
    found = ways(manifest)
    assert list(found) == ["unguided", "CFG", "two passes", "this bundle"]
    assert found["unguided"] == StepCost(
        "unguided",
        dense.linear_macs,
        dense.attention_macs,
        condition.linear_macs,
        dense.weight_bytes,
        condition.weight_bytes,
        dense.activation_bytes,
        None,
    )
    cfg = found["CFG"]
    assert (cfg.linear_macs, cfg.condition_macs) == (2 * dense.linear_macs, 2 * condition.linear_macs)
    assert (cfg.weight_bytes, cfg.condition_bytes) == (2 * dense.weight_bytes, 2 * condition.weight_bytes)
    two = found["two passes"]
    assert two.linear_macs == dense.linear_macs + sparse.linear_macs
    assert two.attention_macs == dense.attention_macs + sparse.attention_macs
    assert two.activation_bytes == max(dense.activation_bytes, sparse.activation_bytes)
    ours = found["this bundle"]
    assert ours.linear_macs == guided.linear_macs < two.linear_macs
    assert ours.weight_bytes == guided.weight_bytes
    # 40 rows of one class are one run of `condition`: its weights are read once in 40 steps.
    assert (ours.condition_macs, ours.condition_bytes) == (condition.linear_macs, condition.weight_bytes / 40)


def test_step_costs_of_no_guidance_have_no_second_branch(tiny_bundle: Path) -> None:
    manifest = opened(tiny_bundle)
    level = manifest.guidance.strong
    found = ways(replace(manifest, guidance=replace(manifest.guidance, mode="none", weak=level)))
    assert list(found) == ["unguided", "this bundle"]
    assert found["this bundle"].linear_macs == found["unguided"].linear_macs


@pytest.mark.parametrize("bundle", ["tiny_cfg_bundle", "tiny_cfg_sg_bundle"])
def test_step_costs_of_a_null_branch_have_two_rows_of_condition(bundle: str, request: pytest.FixtureRequest) -> None:
    manifest = opened(request.getfixturevalue(bundle))
    plan, found = manifest.guidance, ways(manifest)
    guided = manifest.graph("guided", plan.strong.keep, plan.weak.keep, null_weak=True)
    assert guided is not None
    condition = manifest.hoisted("main")[0].cost
    assert found["this bundle"].linear_macs == guided.cost.linear_macs
    assert found["this bundle"].condition_macs == 2 * condition.linear_macs
    assert ("two passes" in found) == (plan.mode == "cfg+sg")


def test_step_costs_of_autoguidance_read_both_networks(tiny_autoguidance_bundle: Path) -> None:
    manifest = opened(tiny_autoguidance_bundle)
    found = ways(manifest)
    both = [manifest.hoisted("main")[0].cost, manifest.hoisted("weak")[0].cost]
    assert found["this bundle"].linear_macs == found["two passes"].linear_macs
    assert found["this bundle"].condition_macs == sum(cost.linear_macs for cost in both)


def test_step_costs_outside_the_interval_are_the_strong_branch_alone(tiny_bundle: Path) -> None:
    manifest = opened(tiny_bundle)
    plan = replace(manifest.guidance, interval=(0.24, 0.76))
    found = ways(replace(manifest, guidance=plan, sampling=replace(manifest.sampling, steps=4)))
    dense, guided = graph_cost(manifest, "dense"), graph_cost(manifest, "guided-16-8")
    # Of the times 1, 0.75, 0.5 and 0.25, the first is outside the interval.
    assert found["this bundle"].linear_macs == (dense.linear_macs + 3 * guided.linear_macs) / 4


def test_step_table_of_a_heun_run_has_a_row_for_each_evaluation(tiny_edm_bundle: Path) -> None:
    manifest = opened(tiny_edm_bundle)
    assert manifest.sampling.sampler == "heun"
    assert len(step_table(manifest)) == 2 * manifest.sampling.steps - 1


@pytest.mark.parametrize(
    ("strong", "weak", "expected"),
    [
        (Level(0.0, 16), Level(0.5, 8), {"unguided": 114.42, "CFG": 228.84, "two passes": None}),
        (Level(0.25, 12), Level(0.5, 8), {"unguided": None, "CFG": None, "two passes": None}),
    ],
)
def test_step_costs_of_the_published_network_show_its_figures(
    strong: Level, weak: Level, expected: dict[str, float | None], tiny_bundle: Path
) -> None:
    manifest = opened(tiny_bundle)
    shape = {"depth": 28, "width": 1152, "tokens": 256, "latent": (4, 32, 32), "patch": 2}
    model = replace(manifest.model, route=Route(2, 24), **shape)
    plan = replace(manifest.guidance, strong=strong, weak=weak)
    graphs = tuple(replace(graph, inputs=()) for graph in manifest.graphs)
    found = ways(replace(manifest, model=model, guidance=plan, graphs=graphs))
    assert {way: found[way].published for way in expected} == expected
    assert all(cost.published is None for cost in step_costs(manifest))
