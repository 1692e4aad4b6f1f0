"""Cost of a guided step of a bundle, compared with the same guidance without this compiler.

All costs are counted from the graphs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sg_runtime.guidance import StepGuidance, guidance_table, levels
from sg_runtime.manifest import PARTS, Cost, GraphFacts, Level, Manifest, NetworkName, Part, Route
from sg_runtime.sampling import trajectory

PUBLISHED = {
    ("unguided", 0.0, 0.0): 114.42,
    ("CFG", 0.0, 0.0): 228.84,
    ("two passes", 0.5, 0.9): 97.67,
}
"""Published linear GMAC per step of SiT-XL/2, by (way, strong sparsity, weak sparsity).

Source: arXiv 2601.01608, which calls them GFLOPs.
"""


@dataclass(frozen=True, slots=True)
class StepCost:
    """Mean cost of one evaluation of one image, for one way of computing it.

    The bundle runs the hoisted graphs once, before the loop. The other ways run them in every pass.

    way: "this bundle", "unguided", "CFG" or "two passes".
    linear_macs: multiply-adds of products with a weight, without hoisted graphs.
    attention_macs: multiply-adds of products of two computed tensors.
    condition_macs: linear multiply-adds of hoisted graphs.
    weight_bytes: bytes of weights read, without hoisted graphs.
    condition_bytes: bytes of weights read by hoisted graphs.
    activation_bytes: estimated peak bytes of activations.
    published: published linear GMAC for this network and setting; None if there is no figure.
    """

    way: str
    linear_macs: float
    attention_macs: float
    condition_macs: float
    weight_bytes: float
    condition_bytes: float
    activation_bytes: float
    published: float | None


def step_costs(manifest: Manifest) -> list[StepCost]:
    """Return the costs of a default run: the other ways of computing it, then the bundle itself.

    The other ways are the strong branch alone, CFG, and two separate passes. They are without this
    compiler, so every pass computes its conditioning again. They are counted from the graphs of
    single branches. If the manifest has no costs of these, they are left out.
    """
    table = step_table(manifest)
    plan = manifest.guidance
    bundle = _bundle(manifest, table)
    if not manifest.passes and not any(graph.kind in ("dense", "sparse") for graph in manifest.graphs):
        return [bundle]
    strong = [step.strong for step in table]
    unguided = _passes(manifest, "unguided", [[("main", level)] for level in strong])
    if plan.row.branches == 1:
        return [unguided, bundle]
    costs = [unguided, _passes(manifest, "CFG", [[("main", level)] * 2 for level in strong])]
    both = [
        [("main", step.strong), *([(plan.row.weak_network, step.weak)] if step.weak is not None else [])]
        for step in table
    ]
    if plan.row.weak_level != "same":
        costs.append(_passes(manifest, "two passes", both))
    return [*costs, bundle]


@dataclass(frozen=True, slots=True)
class PartCost:
    """Cost of a part for one image of a default run.

    part: the part.
    runs: number of runs of its graph: evaluations of the denoiser, or 1.
    linear_macs: multiply-adds of products with a weight, in all runs and hoisted graphs.
    attention_macs: multiply-adds of products of two computed tensors.
    weight_bytes: bytes of weights read.
    share: share of the multiply-adds of all parts.
    """

    part: Part
    runs: int
    linear_macs: float
    attention_macs: float
    weight_bytes: float
    share: float


def part_costs(manifest: Manifest) -> list[PartCost]:
    """Return the cost of each part of a bundle for one image with a prompt of its own.

    An encoded prompt serves all its images: the text encoder counts once for each prompt.
    """
    step, evaluations = step_costs(manifest)[-1], len(step_table(manifest))
    rows: list[tuple[Part, int, float, float, float]] = [
        (
            "step",
            evaluations,
            (step.linear_macs + step.condition_macs) * evaluations,
            step.attention_macs * evaluations,
            (step.weight_bytes + step.condition_bytes) * evaluations,
        )
    ]
    for part in manifest.parts:
        if (graph := manifest.part_graph(part)) is not None:
            rows.append((part, 1, graph.cost.linear_macs, graph.cost.attention_macs, graph.cost.weight_bytes))
    total = sum(linear + attention for _, _, linear, attention, _ in rows)
    ordered = sorted(rows, key=lambda row: PARTS.index(row[0]))
    return [PartCost(*row, share=(row[2] + row[3]) / total) for row in ordered]


def step_table(manifest: Manifest) -> tuple[StepGuidance, ...]:
    """Return the guidance of each evaluation of a default run."""
    run = trajectory(manifest.sampling, manifest.model.prediction).updates
    return guidance_table(
        manifest.guidance, run, levels(manifest), levels(manifest, manifest.guidance.row.weak_network)
    )


def _passes(manifest: Manifest, way: str, steps: Sequence[Sequence[tuple[NetworkName, Level]]]) -> StepCost:
    """Return the cost of separate passes, each with its own conditioning."""
    passes = [(network, _single(manifest, network, level)) for step in steps for network, level in step]
    conditions = [graph.cost for network, _ in passes for graph in manifest.hoisted(network)]
    count = len(steps)
    first = steps[0]
    return StepCost(
        way,
        linear_macs=sum(cost.linear_macs for _, cost in passes) / count,
        attention_macs=sum(cost.attention_macs for _, cost in passes) / count,
        condition_macs=sum(cost.linear_macs for cost in conditions) / count,
        weight_bytes=sum(cost.weight_bytes for _, cost in passes) / count,
        condition_bytes=sum(cost.weight_bytes for cost in conditions) / count,
        activation_bytes=max(cost.activation_bytes for _, cost in passes),
        published=_published(manifest, way, first[0][1], first[-1][1]),
    )


def _bundle(manifest: Manifest, table: Sequence[StepGuidance]) -> StepCost:
    """Return the cost of the bundle's graphs.

    Hoisted graphs run in blocks of rows, before the loop.
    """
    plan = manifest.guidance
    costs: list[Cost] = []
    for step in table:
        keep = [level.keep for level in (step.strong, step.weak) if level is not None]
        guided = (
            manifest.graph("guided", *keep, null_weak=plan.row.null_weak) if plan.row.weak_network == "main" else None
        )
        if step.weak is None or guided is None:
            costs.append(_single(manifest, "main", step.strong))
            costs += [] if step.weak is None else [_single(manifest, plan.row.weak_network, step.weak)]
        else:
            costs.append(guided.cost)
    count, networks = len(table), list[NetworkName](["main"])
    networks += ["weak"] if plan.row.weak_network == "weak" else []
    hoisted = [graph for network in networks for graph in manifest.hoisted(network)]
    runs = [(graph, _runs(graph, count, plan.row.null_weak)) for graph in hoisted]
    return StepCost(
        "this bundle",
        linear_macs=sum(cost.linear_macs for cost in costs) / count,
        attention_macs=sum(cost.attention_macs for cost in costs) / count,
        condition_macs=sum(graph.cost.linear_macs * rows for graph, rows in runs) / count,
        weight_bytes=sum(cost.weight_bytes for cost in costs) / count,
        condition_bytes=sum(
            graph.cost.weight_bytes * math.ceil(rows / manifest.hoisted_rows[graph.kind]) for graph, rows in runs
        )
        / count,
        activation_bytes=max(cost.activation_bytes for cost in costs),
        published=None,
    )


def _runs(graph: GraphFacts, evaluations: int, null_weak: bool) -> int:
    """Return the rows of a hoisted graph in a run of one image."""
    names = {tensor.name for tensor in graph.inputs}
    return (evaluations if "t" in names else 1) * (2 if null_weak and names != {"t"} else 1)


def _single(manifest: Manifest, network: NetworkName, level: Level) -> Cost:
    """Return the cost of the single-branch graph of a network at this level."""
    singles = [g for g in manifest.graphs if g.kind in ("dense", "sparse")]
    costs = {(graph.network, *graph.levels): graph.cost for graph in singles}
    costs |= {(single.network, single.level): single.cost for single in manifest.passes}
    return costs[network, level]


def _published(manifest: Manifest, way: str, strong: Level, weak: Level) -> float | None:
    model = manifest.model
    shape = (model.depth, model.width, model.tokens, model.latent, model.patch)
    if shape != (28, 1152, 256, (4, 32, 32), 2) or model.route != Route(2, 24):
        return None
    return PUBLISHED.get((way, strong.sparsity, weak.sparsity))
