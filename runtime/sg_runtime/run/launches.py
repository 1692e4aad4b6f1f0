"""One evaluation of a plan by the graphs of a bundle: both branches in one run, or each in a run of its own."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sg_runtime.errors import UsageError
from sg_runtime.manifest import GraphFacts, Manifest, Prediction
from sg_runtime.run.prepared import PreparedBranch, PreparedRun
from sg_runtime.sampling import precondition


@dataclass(frozen=True, slots=True)
class Launch:
    """One run of a graph, for next = a * x + b * D + e * r with its prediction D.

    branches: those that the graph computes, the strong one first. scale: of a graph that combines two. adds: whether r
    is what the launch before it gave, not the state at the step's start.
    """

    graph: GraphFacts
    branches: tuple[PreparedBranch, ...]
    time: float
    a: float
    b: float
    e: float
    scale: float | None = None
    adds: bool = False

    @property
    def modulations(self) -> dict[str, PreparedBranch]:
        """The branch that gives each input of modulations."""
        names = ("modulations", "modulations_weak") if self.graph.null_weak else ("modulations",)
        return dict(zip(names, self.branches, strict=False))

    @property
    def keeps(self) -> dict[str, PreparedBranch]:
        """The branch that gives each input of kept tokens."""
        names = ("keep_strong", "keep_weak") if self.graph.kind == "guided" else ("keep",)
        present = {tensor.name for tensor in self.graph.inputs}
        return {name: branch for name, branch in zip(names, self.branches, strict=True) if name in present}

    def scalars(self, prediction: Prediction) -> dict[str, NDArray[np.float32]]:
        """All inputs of rank 0; infinite where float32 is too small."""
        scaling = precondition(prediction, self.time)
        values = {"c_in": scaling.c_in, "c_skip": scaling.c_skip, "c_out": scaling.c_out}
        values |= {"a": self.a, "b": self.b, "e": self.e}
        values |= {} if self.scale is None else {"scale": self.scale}
        with np.errstate(over="ignore"):  # the samples tell
            return {name: np.array(value, np.float32) for name, value in values.items()}


def launches(
    manifest: Manifest, plan: PreparedRun, index: int, a: float, b: float, e: float, *, fused: bool = True
) -> tuple[Launch, ...]:
    """The runs that give next = a x + b D + e r with the guided prediction D of evaluation `index`.

    Where no graph holds both branches, two runs share out the sum: a x + b ω D_strong + e r, then that plus
    b (1 - ω) D_weak. `fused=False` always takes that way. Raises UsageError where the bundle lacks a graph.
    """
    weak, scale, time = weak_branch(plan, index), plan.scales[index], plan.times[index]
    if weak is None:
        return (_single(manifest, plan, plan.strong, index, a, b, e),)
    if fused and (graph := _guided_graph(manifest, plan, index)) is not None:
        return (Launch(graph, (plan.strong, weak), time, a, b, e, scale),)
    return (
        _single(manifest, plan, plan.strong, index, a, b * scale, e),
        _single(manifest, plan, weak, index, 0.0, b * (1 - scale), 1.0, adds=True),
    )


def _single(
    manifest: Manifest,
    plan: PreparedRun,
    branch: PreparedBranch,
    index: int,
    a: float,
    b: float,
    e: float,
    adds: bool = False,
) -> Launch:
    """The run of one branch by its own graph."""
    level, keep = branch.levels[index], branch.keep[index]
    assert level is not None
    graph = manifest.graph("dense" if keep is None else "sparse", level.keep, network=branch.network)
    if graph is None:
        how = " --weak-checkpoint PATH" * (branch.network == "weak")
        option = "--strong-sparsity" if branch is plan.strong else "--sparsity"
        raise UsageError(
            f"sparsity {level.sparsity:g} has no graph of its own in this bundle; "
            f"build it with: sg-export build {manifest.source.name}{how} {option} {level.sparsity:g}"
        )
    return Launch(graph, (branch,), plan.times[index], a, b, e, adds=adds)


def _guided_graph(manifest: Manifest, plan: PreparedRun, index: int) -> GraphFacts | None:
    """The graph that holds both branches of an evaluation, if there is one."""
    strong, weak = plan.strong, plan.weak
    if weak is None or weak.network != strong.network:
        return None
    levels = (strong.levels[index], weak.levels[index])
    return manifest.graph("guided", *(level.keep for level in levels if level), null_weak=plan.null_weak)


def weak_branch(plan: PreparedRun, index: int) -> PreparedBranch | None:
    """The weak branch, where it runs in an evaluation."""
    return None if plan.weak is None or plan.weak.levels[index] is None else plan.weak
