"""The graph launches of one evaluation.

Both branches run in one fused graph, or each runs in a single-branch graph.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sg_runtime.arrays import Indices
from sg_runtime.build_command import model_command, number_text
from sg_runtime.devices.memory import DeviceArray
from sg_runtime.errors import UsageError
from sg_runtime.manifest import GraphFacts, Manifest, Prediction
from sg_runtime.run.prepared import PreparedBranch, PreparedRun
from sg_runtime.sampling import precondition
from sg_runtime.vocabulary import BRANCHES, INPUTS


@dataclass(frozen=True, slots=True)
class Held:
    """Rows of a table on the device: input[b] = values[rows[b]].

    table: name of the workspace table for the rows. values: (U, M) float32. rows: (B,) int64.
    """

    table: str
    values: DeviceArray
    rows: Indices


@dataclass(frozen=True, slots=True)
class Kept:
    """Kept tokens. table: as in `Held`. keep: (B, K) int64."""

    table: str
    keep: Indices


@dataclass(frozen=True, slots=True)
class Launch:
    """One run of a graph: next = a * x + b * D + e * r with the graph's prediction D.

    graph: the graph.
    inputs: the inputs that belong to a branch, by name.
    time: t of a flow model, sigma of an edm model.
    a, b, e: coefficients of the update.
    scale: the guidance scale of a fused graph, None for a single-branch graph.
    adds: whether r is the output of the previous launch instead of the state at the step's start.
    """

    graph: GraphFacts
    inputs: Mapping[str, Held | Kept]
    time: float
    a: float
    b: float
    e: float
    scale: float | None = None
    adds: bool = False

    def scalars(self, prediction: Prediction) -> dict[str, NDArray[np.float32]]:
        """Return all inputs of rank 0. A value that overflows float32 becomes infinite."""
        scaling = precondition(prediction, self.time)
        values = {"c_in": scaling.c_in, "c_skip": scaling.c_skip, "c_out": scaling.c_out}
        values |= {"a": self.a, "b": self.b, "e": self.e}
        values |= {} if self.scale is None else {"scale": self.scale}
        with np.errstate(over="ignore"):  # check_finite reports it in the samples
            return {name: np.array(value, np.float32) for name, value in values.items()}


def launches(
    manifest: Manifest, run: PreparedRun, index: int, a: float, b: float, e: float, *, fused: bool = True
) -> tuple[Launch, ...]:
    """Return the launches for next = a x + b D + e r of evaluation `index`.

    D is the guided prediction. If the bundle has no fused graph of both branches, two launches
    compute the sum: the first gives a x + b ω D_strong + e r, the second adds b (1 - ω) D_weak.
    fused=False always uses two launches. Raises UsageError if the bundle lacks a graph.
    """
    scale, time = run.scales[index], run.times[index]
    branches = run.active(index)
    if len(branches) == 1:
        return (_single(manifest, run, branches[0], index, a, b, e),)
    if fused and (graph := _guided_graph(manifest, run, index)) is not None:
        return (Launch(graph, _inputs(graph, run, branches, index), time, a, b, e, scale),)
    return (
        _single(manifest, run, branches[0], index, a, b * scale, e),
        _single(manifest, run, branches[1], index, 0.0, b * (1 - scale), 1.0, adds=True),
    )


def _single(
    manifest: Manifest,
    run: PreparedRun,
    branch: PreparedBranch,
    index: int,
    a: float,
    b: float,
    e: float,
    adds: bool = False,
) -> Launch:
    """Return the launch of one branch. Raises UsageError if it has no single-branch graph."""
    level, keep = branch.levels[index], branch.keep[index]
    assert level is not None
    graph = manifest.graph("dense" if keep is None else "sparse", level.keep, network=branch.network)
    if graph is None:
        how = ("--weak-checkpoint", "PATH") if branch.network == "weak" else ()
        option, text = "--strong-sparsity" if branch is run.strong else "--sparsity", number_text(level.sparsity)
        raise UsageError(
            f"sparsity {text} has no single-branch graph in this bundle; "
            f"build it with: {model_command(manifest, *how, option, text)}"
        )
    return Launch(graph, _inputs(graph, run, (branch,), index), run.times[index], a, b, e, adds=adds)


def _guided_graph(manifest: Manifest, run: PreparedRun, index: int) -> GraphFacts | None:
    """Return the fused graph of both branches of an evaluation, None if the bundle has none."""
    row = run.guidance.row
    if not row.fusible:
        return None
    levels = [branch.levels[index] for branch in run.branches]
    return manifest.graph("guided", *(level.keep for level in levels if level), null_weak=row.null_weak)


def _inputs(
    graph: GraphFacts, run: PreparedRun, branches: tuple[PreparedBranch, ...], index: int
) -> dict[str, Held | Kept]:
    """Return the inputs of a graph that belong to its branches in an evaluation, by name."""
    found: dict[str, Held | Kept] = {}
    for tensor in graph.inputs:
        facts = INPUTS.get(tensor.name)
        if facts is None or facts.branch is None or facts.branch >= len(branches):
            continue
        branch = branches[facts.branch]
        name = BRANCHES[[one is branch for one in run.branches].index(True)]
        if facts.role == "held":
            what = tensor.name.removesuffix("_weak")
            rows = branch.held[what]
            owner = name if run.guidance.row.separate else BRANCHES[0]
            found[tensor.name] = Held(f"{what} of {owner}", rows.values[index], rows.rows)
        else:
            keep = branch.keep[index]
            assert keep is not None
            found[tensor.name] = Kept(f"{keep.shape[1]} kept of {name}", keep)
    return found
