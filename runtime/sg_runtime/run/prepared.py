"""Inputs of a run's evaluations other than the latent: conditioning and kept tokens.

Both are computed before the sampling loop.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sg_runtime import philox
from sg_runtime.arrays import Array, Indices
from sg_runtime.devices.memory import DeviceArray
from sg_runtime.guidance import guidance_table, levels
from sg_runtime.manifest import GuidancePlan, Level, Manifest, NetworkName
from sg_runtime.sampling import Update, precondition

Condition = Callable[[NetworkName, Array, Indices], DeviceArray]
"""(network, t (S,), classes (S,)) → modulations (S, M)."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The images of a run. labels: (B,) int64 class indices. seeds: one per image."""

    labels: Indices
    seeds: Sequence[int]


@dataclass(frozen=True, slots=True)
class Rows:
    """A table of distinct rows and the row index of each image.

    values: (E, U, M) float32 on the device, U rows per evaluation.
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


def prepare(
    manifest: Manifest,
    condition: Condition,
    guidance: GuidancePlan,
    updates: Sequence[Update],
    batch: Batch,
    last_step: int | None = None,
) -> PreparedRun:
    """Compute the conditioning and kept tokens of a run.

    updates: updates of the evaluations to prepare. batch: images of the run.
    last_step: step at which sparsity and scale schedules end; default: the last step of `updates`.
    """
    model = manifest.model
    row = guidance.row
    table = guidance_table(guidance, updates, levels(manifest), levels(manifest, row.weak_network), last_step)
    t = np.array([precondition(model.prediction, update.time).t for update in updates], np.float32)

    def modulations(network: NetworkName, classes: Indices) -> DeviceArray:
        rows = condition(network, np.repeat(t, len(classes)), np.tile(classes, len(t)))
        found: DeviceArray = rows.reshape((len(t), len(classes), model.modulations))
        return found

    def branch(number: int, network: NetworkName, rows: Rows, chosen: tuple[Level | None, ...]) -> PreparedBranch:
        keep = _kept_tokens(model.tokens, chosen, batch.seeds, updates, number)
        return PreparedBranch(network, {"modulations": rows}, chosen, keep)

    classes = np.append(batch.labels, model.num_classes) if row.null_weak else batch.labels
    distinct, places = np.unique(classes, return_inverse=True)
    images = places[: len(batch.labels)]
    main = modulations("main", distinct)
    branches = [branch(philox.STRONG, "main", Rows(main, images), tuple(guided.strong for guided in table))]
    if row.branches == 2:
        values = main if row.weak_network == "main" else modulations(row.weak_network, distinct)
        weak = Rows(values, np.full_like(images, places[-1]) if row.null_weak else images)
        branches.append(branch(philox.WEAK, row.weak_network, weak, tuple(guided.weak for guided in table)))
    return PreparedRun(
        guidance,
        tuple(update.time for update in updates),
        tuple(guided.scale for guided in table),
        tuple(branches),
    )


def _kept_tokens(
    tokens: int, levels: Sequence[Level | None], seeds: Sequence[int], updates: Sequence[Update], branch: int
) -> tuple[Indices | None, ...]:
    """Return the kept tokens (B, K) of each evaluation; None where all are kept or none runs."""
    found: list[Indices | None] = [None] * len(levels)
    for level in {level for level in levels if level is not None and level.keep < tokens}:
        indices = [index for index, own in enumerate(levels) if own == level]
        places = [(updates[index].step, updates[index].evaluation) for index in indices]
        drawn = [philox.subsets(seed, tokens, level.keep, places, branch=branch) for seed in seeds]
        for index, keep in zip(indices, np.stack(drawn, axis=1), strict=True):
            found[index] = keep
    return tuple(found)
