"""One evaluation of a plan by the graphs of a bundle: both branches in one run, or each in a run of its own."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sg_runtime.backends import Backend
from sg_runtime.errors import UsageError
from sg_runtime.guidance import guide
from sg_runtime.manifest import GraphFacts, Manifest, NetworkName
from sg_runtime.plan import BranchPlan, Plan
from sg_runtime.sampling import precondition

Array = NDArray[np.float32]
Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Tail:
    """The update next = a * x + b * D + e * r that a step graph computes with its prediction D. r: (B, C, H, W)."""

    a: float
    b: float
    e: float
    r: Array


class StepRunner:
    """Runs the graphs of a bundle on `batch` images at a time."""

    def __init__(self, manifest: Manifest, backend: Backend, batch: int) -> None:
        self.manifest = manifest
        self.backend = backend
        self.batch = batch

    def condition(self, network: NetworkName, t: Array, classes: Indices) -> Array:
        """Rows of modulations (S, M) for t (S,) and classes (S,), by runs of one fixed row count."""
        rows, graph = self.manifest.condition_rows, self.manifest.condition(network)
        parts = []
        for start in range(0, len(t), rows):
            row = np.minimum(np.arange(start, start + rows), len(t) - 1)
            parts.append(self.backend.run(graph, {"t": t[row], "class": classes[row]}, "modulations"))
        return np.concatenate(parts)[: len(t)]

    def advance(self, x: Array, plan: Plan, index: int, tail: Tail, fused: bool) -> Array:
        """next = a x + b D + e r with the guided prediction D, computed in the graphs alone.

        Where no graph holds both branches, two runs share out the sum: a x + b ω D_strong + e r, then that plus
        b (1 - ω) D_weak. `fused=False` always takes that way.
        """
        weak, scale = _weak_of(plan, index), plan.scales[index]
        if weak is None:
            return self._branch(x, plan, plan.strong, index, tail)
        if fused and (graph := self._guided_graph(plan, index)) is not None:
            return self._both(graph, x, plan, weak, index, tail)
        part = self._branch(x, plan, plan.strong, index, Tail(tail.a, tail.b * scale, tail.e, tail.r))
        return self._branch(x, plan, weak, index, Tail(0.0, tail.b * (1 - scale), 1.0, part))

    def prediction(self, x: Array, plan: Plan, index: int) -> Array:
        """The guided prediction, by the graph that holds both branches where there is one."""
        weak = _weak_of(plan, index)
        if weak is None:
            return self._branch(x, plan, plan.strong, index, None)
        if (graph := self._guided_graph(plan, index)) is not None:
            return self._both(graph, x, plan, weak, index, None)
        return guide(*self.branches(x, plan, index), plan.scales[index])

    def branches(self, x: Array, plan: Plan, index: int) -> tuple[Array, Array]:
        """The predictions of the strong and the weak branch, each by its own graph."""
        weak = _weak_of(plan, index)
        if weak is None:
            raise UsageError("return_branches: expected guidance with two branches, found the strong one alone")
        return self._branch(x, plan, plan.strong, index, None), self._branch(x, plan, weak, index, None)

    def groups(self, images: int) -> Iterator[Indices]:
        """Image indices of each engine run, all of one length; the last image fills up the last group."""
        rows = self.manifest.batch or min(self.batch, images)
        for start in range(0, images, rows):
            yield np.minimum(np.arange(start, start + rows), images - 1)

    def _guided_graph(self, plan: Plan, index: int) -> GraphFacts | None:
        """The graph that holds both branches of an evaluation, if there is one."""
        strong, weak = plan.strong, plan.weak
        if weak is None or weak.network != strong.network:
            return None
        levels = (strong.levels[index], weak.levels[index])
        return self.manifest.graph("guided", *(lv.keep for lv in levels if lv), null_weak=plan.null_weak)

    def _both(self, graph: GraphFacts, x: Array, plan: Plan, weak: BranchPlan, index: int, tail: Tail | None) -> Array:
        images = {
            "modulations": plan.strong.modulations[index][plan.strong.rows],
            "modulations_weak": weak.modulations[index][weak.rows] if graph.null_weak else None,
            "keep_strong": plan.strong.keep[index],
            "keep_weak": weak.keep[index],
        }
        return self._run(graph, x, plan.times[index], tail, images, {"scale": plan.scales[index]})

    def _branch(self, x: Array, plan: Plan, branch: BranchPlan, index: int, tail: Tail | None) -> Array:
        level, keep = branch.levels[index], branch.keep[index]
        assert level is not None
        graph = self.manifest.graph("dense" if keep is None else "sparse", level.keep, network=branch.network)
        if graph is None:
            how = " --weak-checkpoint PATH" * (branch.network == "weak")
            option = "--strong-sparsity" if branch is plan.strong else "--sparsity"
            raise UsageError(
                f"sparsity {level.sparsity:g} has no graph of its own in this bundle; "
                f"build it with: sg-export build {self.manifest.source.name}{how} {option} {level.sparsity:g}"
            )
        images = {"modulations": branch.modulations[index][branch.rows], "keep": keep}
        return self._run(graph, x, plan.times[index], tail, images, {})

    def _run(
        self,
        graph: GraphFacts,
        x: Array,
        time: float,
        tail: Tail | None,
        images: dict[str, NDArray[Any] | None],
        scalars: dict[str, float],
    ) -> Array:
        """`next` of all images by the update `tail`, or their prediction without one, in groups.

        images: arrays with a leading B, None for an input that the graph has not.
        """
        scaling, update = precondition(self.manifest.model.prediction, time), tail or Tail(0.0, 0.0, 0.0, x)
        scalars = scalars | {"c_in": scaling.c_in, "c_skip": scaling.c_skip, "c_out": scaling.c_out}
        scalars |= {"a": update.a, "b": update.b, "e": update.e}
        shared = {name: np.array(value, np.float32) for name, value in scalars.items()}
        given = {name: value for name, value in (images | {"x": x, "r": update.r}).items() if value is not None}
        parts = [
            self.backend.run(
                graph,
                {name: value[group] for name, value in given.items()} | shared,
                "prediction" if tail is None else "next",
            )
            for group in self.groups(len(x))
        ]
        return np.concatenate(parts)[: len(x)]


def _weak_of(plan: Plan, index: int) -> BranchPlan | None:
    """The weak branch, where it runs in an evaluation."""
    return None if plan.weak is None or plan.weak.levels[index] is None else plan.weak
