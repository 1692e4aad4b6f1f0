"""What the evaluations of a run need beside the latent: conditioning and token subsets, computed before the loop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sg_runtime import philox
from sg_runtime.arrays import Array, Indices
from sg_runtime.devices.memory import DeviceArray
from sg_runtime.guidance import guidance_table, levels
from sg_runtime.manifest import GuidancePlan, Level, Manifest, NetworkName
from sg_runtime.sampling import precondition

Condition = Callable[[NetworkName, Array, Indices], DeviceArray]
"""(network, t (S,), classes (S,)) → modulations (S, M)."""


@dataclass(frozen=True, slots=True)
class PreparedBranch:
    """One branch of E evaluations of B images.

    modulations: (E, U, M) float32 on the device, a row per evaluation and distinct class. rows: (B,) int64, each
    image's row among the U. levels: the sparsity of each evaluation, None where the branch does not run. keep: (B, K)
    int64 sorted for each evaluation, None where the branch keeps all tokens or does not run.
    """

    network: NetworkName
    modulations: DeviceArray
    rows: Indices
    levels: tuple[Level | None, ...]
    keep: tuple[Indices | None, ...]


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """All that E evaluations of B images need beside the latent.

    times: t, or sigma of an edm model. null_weak: whether the weak branch has no class. weak: None where none runs.
    """

    times: tuple[float, ...]
    scales: tuple[float, ...]
    null_weak: bool
    strong: PreparedBranch
    weak: PreparedBranch | None


def prepare(
    manifest: Manifest,
    condition: Condition,
    guidance: GuidancePlan,
    times: Sequence[float],
    labels: Indices,
    seeds: Sequence[int],
    counters: Sequence[tuple[int, int]],
    last_step: int,
) -> PreparedRun:
    """The plan of evaluations at `times` for classes `labels` (B,) and `seeds`, one of each per image.

    counters: (step, evaluation) of each, for its random subsets. last_step: where sparsities that change end.
    """
    model = manifest.model
    table = guidance_table(
        guidance,
        times,
        [step for step, _ in counters],
        last_step,
        levels(manifest),
        levels(manifest, guidance.weak_network),
    )
    t = np.array([precondition(model.prediction, time).t for time in times], np.float32)

    def modulations(network: NetworkName, classes: Indices) -> DeviceArray:
        rows = condition(network, np.repeat(t, len(classes)), np.tile(classes, len(t)))
        found: DeviceArray = rows.reshape((len(t), len(classes), model.modulations))
        return found

    def branch(
        number: int, network: NetworkName, rows: DeviceArray, own: Indices, chosen: tuple[Level | None, ...]
    ) -> PreparedBranch:
        keep = tuple(
            None if level is None else _subsets(model.tokens, level.keep, seeds, counter, number)
            for level, counter in zip(chosen, counters, strict=True)
        )
        return PreparedBranch(network, rows, own, chosen, keep)

    null, network = guidance.null_weak, guidance.weak_network
    distinct, rows = np.unique(np.append(labels, model.num_classes) if null else labels, return_inverse=True)
    own = rows[: len(labels)]
    main = modulations("main", distinct)
    strong = branch(philox.STRONG, "main", main, own, tuple(guided.strong for guided in table))
    weak = None
    if guidance.mode != "none":
        theirs = main if network == "main" else modulations(network, distinct)
        weak_rows = np.full_like(own, rows[-1]) if null else own
        weak = branch(philox.WEAK, network, theirs, weak_rows, tuple(guided.weak for guided in table))
    return PreparedRun(tuple(times), tuple(guided.scale for guided in table), null, strong, weak)


def _subsets(tokens: int, keep: int, seeds: Sequence[int], counter: tuple[int, int], branch: int) -> Indices | None:
    """Each image's subset (B, K) in the evaluation `counter`, or None for all tokens."""
    if keep == tokens:
        return None
    step, evaluation = counter
    return np.stack(
        [philox.subset(seed, tokens, keep, step=step, evaluation=evaluation, branch=branch) for seed in seeds]
    )
