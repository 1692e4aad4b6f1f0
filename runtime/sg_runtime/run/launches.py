"""The graph launches of one evaluation.

Both branches run in one fused graph, or each runs in a single-branch graph.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sg_runtime.arrays import Indices
from sg_runtime.build_command import model_command, number_text
from sg_runtime.errors import UsageError
from sg_runtime.manifest import GraphFacts, Manifest, ModelFacts, Prediction
from sg_runtime.run.kept import kept_input
from sg_runtime.run.prepared import PreparedBranch, PreparedRun, Rows
from sg_runtime.sampling import precondition
from sg_runtime.vocabulary import INPUTS, Role


@dataclass(frozen=True, slots=True)
class Source:
    """Where the values of an input are in a prepared run.

    branch: number of the branch. role: role of the input in its graph.
    name: conditioning that the input holds; for kept tokens, their number K.
    """

    branch: int
    role: Role
    name: str

    def held(self, run: PreparedRun) -> Rows:
        """Return the conditioning of all evaluations."""
        return run.branches[self.branch].held[self.name]

    def kept(
        self, run: PreparedRun, indices: Sequence[int], model: ModelFacts, images: Indices | slice = slice(None)
    ) -> Indices:
        """Return the input for kept tokens in these evaluations, (E, B, K) or (E, B, N) int64."""
        keeps = [run.branches[self.branch].keep[index] for index in indices]
        return kept_input(self.role, np.stack([keep[images] for keep in keeps if keep is not None]), model)


@dataclass(frozen=True, slots=True)
class Launch:
    """One run of a graph: next = a * x + b * D + e * r with the graph's prediction D.

    graph: the graph.
    index: index of the evaluation in the prepared run.
    inputs: sources of the inputs that belong to a branch, by name.
    time: t of a flow model, sigma of an edm model.
    a, b, e: coefficients of the update.
    scale: the guidance scale of a fused graph, None for a single-branch graph.
    adds: whether r is the output of the previous launch instead of the state at the step's start.
    """

    graph: GraphFacts
    index: int
    inputs: Mapping[str, Source]
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
        return (Launch(graph, index, _inputs(graph, run, branches), time, a, b, e, scale),)
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
    return Launch(graph, index, _inputs(graph, run, (branch,)), run.times[index], a, b, e, adds=adds)


def _guided_graph(manifest: Manifest, run: PreparedRun, index: int) -> GraphFacts | None:
    """Return the fused graph of both branches of an evaluation, None if the bundle has none."""
    row = run.guidance.row
    if not row.fusible:
        return None
    levels = [branch.levels[index] for branch in run.branches]
    return manifest.graph("guided", *(level.keep for level in levels if level), null_weak=row.null_weak)


def _inputs(graph: GraphFacts, run: PreparedRun, branches: tuple[PreparedBranch, ...]) -> dict[str, Source]:
    """Return the sources of a graph's inputs that belong to these branches, by name."""
    found: dict[str, Source] = {}
    for tensor in graph.inputs:
        facts = INPUTS.get(tensor.name)
        if facts is None or facts.branch is None or facts.branch >= len(branches):
            continue
        branch = branches[facts.branch]
        number = next(number for number, one in enumerate(run.branches) if one is branch)
        if facts.role == "held":
            name = tensor.name.removesuffix("_weak")
            owner = next(k for k, other in enumerate(run.branches) if other.held[name] is branch.held[name])
            found[tensor.name] = Source(owner, "held", name)
        else:
            level = graph.levels[facts.branch]
            found[tensor.name] = Source(number, facts.role, str(level.keep))
    return found
