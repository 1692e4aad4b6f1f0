"""Inputs of a run's evaluations other than the latent: conditioning and kept tokens.

Both are computed before the sampling loop.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sg_runtime import philox
from sg_runtime.arrays import Indices
from sg_runtime.conditions import Conditions
from sg_runtime.devices.memory import DeviceArray
from sg_runtime.errors import UsageError
from sg_runtime.guidance import guidance_table, levels
from sg_runtime.manifest import GraphFacts, GuidancePlan, Level, Manifest, NetworkName
from sg_runtime.sampling import Update, precondition

Hoist = Callable[[GraphFacts, Mapping[str, NDArray[Any]]], dict[str, DeviceArray]]
"""(hoisted graph, its inputs with S rows) → its outputs with S rows, by name."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The images of a run, and their seeds."""

    conditions: Conditions
    seeds: Sequence[int]


@dataclass(frozen=True, slots=True)
class Hoisted:
    """An output of a hoisted graph.

    values: (E, U, W) on the device: for E evaluations and U conditions, the W values of a row. E is
    1 if it does not depend on time, U is 1 if it does not depend on the condition.
    """

    values: DeviceArray
    conditional: bool


HoistedByNetwork = Mapping[NetworkName, Mapping[str, Hoisted]]


@dataclass(frozen=True, slots=True)
class Rows:
    """A table of distinct rows and the row index of each image.

    values: (E, U, W) on the device, U rows per evaluation; E is 1 if all evaluations have the same.
    rows: (B,) int64, row of each image.
    """

    values: DeviceArray
    rows: Indices


@dataclass(frozen=True, slots=True)
class PreparedBranch:
    """One branch in E evaluations of B images.

    network: network that the branch runs.
    held: conditioning of the branch, by the names in `vocabulary.HELD`.
    levels: sparsity in each evaluation, None in evaluations without this branch.
    keep: kept tokens in each evaluation, (B, K) int64, sorted; None if the branch keeps all tokens
        or does not run.
    """

    network: NetworkName
    held: Mapping[str, Rows]
    levels: tuple[Level | None, ...]
    keep: tuple[Indices | None, ...]


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """All inputs of E evaluations of B images other than the latent.

    guidance: guidance of the run.
    times: t of each evaluation, or sigma for an edm model.
    scales: the guidance scale of each evaluation.
    branches: the strong branch, and the weak one if the guidance has one.
    """

    guidance: GuidancePlan
    times: tuple[float, ...]
    scales: tuple[float, ...]
    branches: tuple[PreparedBranch, ...]

    @property
    def strong(self) -> PreparedBranch:
        """The strong branch."""
        return self.branches[0]

    @property
    def weak(self) -> PreparedBranch | None:
        """The weak branch, if there is one."""
        return self.branches[1] if len(self.branches) > 1 else None

    @property
    def images(self) -> int:
        """Number of images B."""
        return len(next(iter(self.strong.held.values())).rows)

    @property
    def structure(self) -> Hashable:
        """What the launches of the run depend on, besides its updates.

        It is the same for other conditioning and other kept tokens.
        """
        branches = tuple((branch.network, branch.levels) for branch in self.branches)
        return self.guidance, self.scales, self.images, branches

    def active(self, index: int) -> tuple[PreparedBranch, ...]:
        """Return the branches that run in an evaluation."""
        return tuple(branch for branch in self.branches if branch.levels[index] is not None)


def per_image(manifest: Manifest, hoist: Hoist, guidance: GuidancePlan, conditions: Conditions) -> HoistedByNetwork:
    """Run the hoisted graphs that do not depend on time, for all evaluations of a run."""
    return _hoisted(manifest, hoist, guidance, _of_run(guidance, conditions), None)


def prepare(
    manifest: Manifest,
    hoist: Hoist,
    guidance: GuidancePlan,
    updates: Sequence[Update],
    batch: Batch,
    last_step: int | None = None,
    shared: HoistedByNetwork | None = None,
) -> PreparedRun:
    """Compute the conditioning and kept tokens of a run.

    updates: updates of the evaluations to prepare. batch: images of the run.
    last_step: step at which sparsity and scale schedules end; default: the last step of `updates`.
    shared: result of `per_image`, if it is known.
    Raises UsageError if the weak branch needs negative prompts and there are none.
    """
    row, conditions = guidance.row, _of_run(guidance, batch.conditions)
    table = guidance_table(guidance, updates, levels(manifest), levels(manifest, row.weak_network), last_step)
    t = np.array([precondition(manifest.model.prediction, update.time).t for update in updates], np.float32)
    timed = _hoisted(manifest, hoist, guidance, conditions, t)
    shared = per_image(manifest, hoist, guidance, conditions) if shared is None else shared

    outputs = {network: {**timed[network], **shared[network]} for network in timed}
    made: dict[tuple[NetworkName, str, bool], Rows] = {}  # each once: branches share what is the same

    def rows_of(network: NetworkName, name: str, own: bool) -> Rows:
        """Return the rows of an output. own: whether the weak branch has a condition of its own."""
        output = outputs[network][name]
        own = own and output.conditional
        if (network, name, own) not in made:
            rows = conditions.weak if own else conditions.strong
            assert rows is not None
            made[network, name, own] = Rows(output.values, rows if output.conditional else np.zeros_like(rows))
        return made[network, name, own]

    def branch(number: int, network: NetworkName, own: bool, chosen: tuple[Level | None, ...]) -> PreparedBranch:
        held = {name: rows_of(network, name, own) for name in manifest.model.held}
        keep = _kept_tokens(manifest.model.tokens, chosen, batch.seeds, guidance, updates, number)
        return PreparedBranch(network, held, chosen, keep)

    branches = [branch(philox.STRONG, "main", False, tuple(guided.strong for guided in table))]
    if row.branches == 2:
        levels_of_weak = tuple(guided.weak for guided in table)
        branches.append(branch(philox.WEAK, row.weak_network, row.null_weak, levels_of_weak))
    return PreparedRun(
        guidance,
        tuple(update.time for update in updates),
        tuple(guided.scale for guided in table),
        tuple(branches),
    )


def _of_run(guidance: GuidancePlan, conditions: Conditions) -> Conditions:
    """Return the conditions of a run, those of the weak branch only if it has its own."""
    if guidance.row.null_weak and conditions.weak is None:
        raise UsageError(
            f"{guidance.mode} guidance: expected a negative prompt for the weak branch: give negative_embeds, such "
            f"as the encoding of an empty prompt, or choose guidance sg, which needs none"
        )
    return conditions if guidance.row.null_weak or conditions.weak is None else conditions.of(weak=False)


def _hoisted(
    manifest: Manifest, hoist: Hoist, guidance: GuidancePlan, conditions: Conditions, t: NDArray[np.float32] | None
) -> HoistedByNetwork:
    """Run the hoisted graphs of the run's networks.

    t: time of each evaluation, for the graphs that depend on time; None for the others.
    """
    networks: list[NetworkName] = ["main", guidance.row.weak_network]
    found: dict[NetworkName, dict[str, Hoisted]] = {network: {} for network in networks}
    for network, outputs in found.items():
        for graph in manifest.hoisted(network):
            names = [tensor.name for tensor in graph.inputs]
            if ("t" in names) != (t is not None):
                continue
            columns = {name: conditions.columns[name] for name in names if name != "t"}
            rows = len(next(iter(columns.values()))) if columns else 1
            evaluations = 1 if t is None else len(t)
            feeds = {name: np.concatenate([values] * evaluations) for name, values in columns.items()}
            feeds |= {} if t is None else {"t": np.repeat(t, rows)}
            for name, values in hoist(graph, feeds).items():
                flat = values.reshape((evaluations, rows, math.prod(manifest.model.held[name])))
                outputs[name] = Hoisted(flat, conditional=bool(columns))
    return found


def _kept_tokens(
    tokens: int,
    levels: Sequence[Level | None],
    seeds: Sequence[int],
    guidance: GuidancePlan,
    updates: Sequence[Update],
    branch: int,
) -> tuple[Indices | None, ...]:
    """Return the kept tokens (B, K) of each evaluation; None where all are kept or none runs."""
    found: list[Indices | None] = [None] * len(levels)
    for level in {level for level in levels if level is not None and level.keep < tokens}:
        indices = [index for index, own in enumerate(levels) if own == level]
        places = [guidance.draw(updates[index].step, updates[index].evaluation) for index in indices]
        drawn = [philox.subsets(seed, tokens, level.keep, places, branch=branch) for seed in seeds]
        for index, keep in zip(indices, np.stack(drawn, axis=1), strict=True):
            found[index] = keep
    return tuple(found)
