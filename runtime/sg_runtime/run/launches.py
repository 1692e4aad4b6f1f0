"""One evaluation of a plan by the graphs of a bundle: both branches in one run, or each in a run of its own."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sg_runtime.backends.base import Lane
from sg_runtime.devices.memory import DeviceArray
from sg_runtime.errors import UsageError
from sg_runtime.manifest import GraphFacts, Manifest, NetworkName, Prediction
from sg_runtime.run.prepared import PreparedBranch, PreparedRun
from sg_runtime.sampling import precondition

Array = NDArray[np.float32]
Indices = NDArray[np.int64]


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
    weak, scale, time = _weak_of(plan, index), plan.scales[index], plan.times[index]
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


def _weak_of(plan: PreparedRun, index: int) -> PreparedBranch | None:
    """The weak branch, where it runs in an evaluation."""
    return None if plan.weak is None or plan.weak.levels[index] is None else plan.weak


class GraphRunner:
    """Runs the graphs of a bundle in one lane, on `batch` images at a time.

    batches: the image counts that a run can have, None for any.
    """

    def __init__(self, manifest: Manifest, lane: Lane, batch: int, batches: tuple[int, ...] | None = None) -> None:
        self.manifest = manifest
        self.lane = lane
        self.batch = batch
        self.batches = batches

    def condition(self, network: NetworkName, t: Array, classes: Indices) -> DeviceArray:
        """Rows of modulations (S, M) for t (S,) and classes (S,), by runs of one fixed row count."""
        rows, graph = self.manifest.condition_rows, self.manifest.condition(network)
        starts = range(0, len(t), rows)
        table = self.lane.memory.empty((len(starts) * rows, self.manifest.model.modulations), np.float32)
        for start in starts:
            row = np.minimum(np.arange(start, start + rows), len(t) - 1)
            feeds: dict[str, DeviceArray] = {"t": t[row], "class": classes[row]}
            run_once(self.lane, graph, feeds, {"modulations": table[start : start + rows]})
        found: DeviceArray = table[: len(t)]
        return found

    def prediction(self, x: DeviceArray, plan: PreparedRun, index: int) -> DeviceArray:
        """The guided prediction, by the graph that holds both branches where there is one."""
        runs = launches(self.manifest, plan, index, 0.0, 1.0, 0.0)
        if len(runs) == 1:
            return self._run(runs[0], x, index, "prediction")
        part = self._run(runs[0], x, index, "next", r=x)
        return self._run(runs[1], x, index, "next", r=part)

    def branches(self, x: DeviceArray, plan: PreparedRun, index: int) -> tuple[DeviceArray, DeviceArray]:
        """The predictions of the strong and the weak branch, each by its own graph."""
        if _weak_of(plan, index) is None:
            raise UsageError("return_branches: expected guidance with two branches, found the strong one alone")
        strong, weak = launches(self.manifest, plan, index, 0.0, 1.0, 0.0, fused=False)
        return self._run(strong, x, index, "prediction"), self._run(weak, x, index, "prediction")

    def groups(self, images: int) -> Iterator[Indices]:
        """Image indices of each engine run, all of one length; the last image fills up the last group."""
        rows = wanted = min(self.batch, images)
        if self.batches is not None:
            rows = min((size for size in self.batches if size >= wanted), default=max(self.batches))
        for start in range(0, images, rows):
            yield np.minimum(np.arange(start, start + rows), images - 1)

    def _run(
        self, launch: Launch, x: DeviceArray, index: int, output: str, r: DeviceArray | None = None
    ) -> DeviceArray:
        """The output of a launch for all images of x, in groups."""
        memory = self.lane.memory
        result = memory.empty(x.shape, np.float32)
        for group in self.groups(x.shape[0]):
            first, images = int(group[0]), len(np.unique(group))
            feeds = self.feeds(launch, x, x if r is None else r, index, group)
            part: DeviceArray = memory.empty((len(group), *x.shape[1:]), np.float32)
            run_once(self.lane, launch.graph, feeds, {output: part})
            memory.copy(part[:images], result[first : first + images])
        return result

    def feeds(
        self, launch: Launch, x: DeviceArray, r: DeviceArray, index: int, group: Indices
    ) -> dict[str, DeviceArray]:
        """All inputs of a launch for the images `group` of x and r (B, C, H, W)."""
        memory, facts = self.lane.memory, self.manifest.model
        feeds: dict[str, Any] = dict(launch.scalars(facts.prediction))
        feeds |= {"x": self._rows(x, group), "r": self._rows(r, group)}
        for name, branch in launch.modulations.items():
            feeds[name] = memory.empty((len(group), facts.modulations), np.float32)
            memory.take(branch.modulations[index], branch.rows[group], feeds[name])
        for name, branch in launch.keeps.items():
            keep = branch.keep[index]
            assert keep is not None
            feeds[name] = keep[group]
        return feeds

    def _rows(self, array: DeviceArray, group: Indices) -> DeviceArray:
        """The images of a group: a view, but for a group that was filled up."""
        if int(group[-1]) - int(group[0]) + 1 == len(group):
            view: DeviceArray = array[int(group[0]) : int(group[-1]) + 1]
            return view
        filled = self.lane.memory.empty((len(group), *array.shape[1:]), array.dtype)
        for place, image in enumerate(group.tolist()):
            self.lane.memory.copy(array[image : image + 1], filled[place : place + 1])
        return filled


def run_once(
    lane: Lane, graph: GraphFacts, feeds: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]
) -> None:
    """Run a graph into `outputs`. feeds: arrays on the lane's device, or NumPy's."""
    lane.bind(graph, {name: lane.memory.hold(value) for name, value in feeds.items()}, outputs)()
