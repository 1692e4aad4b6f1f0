"""Run the graphs of a bundle in one lane, one evaluation at a time."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sg_runtime.arrays import Indices
from sg_runtime.backends.base import Lane
from sg_runtime.devices.memory import DeviceArray
from sg_runtime.errors import UsageError
from sg_runtime.manifest import GraphFacts, Manifest
from sg_runtime.run.launches import Launch, launches
from sg_runtime.run.prepared import PreparedRun
from sg_runtime.vocabulary import HELD


class GraphRunner:
    """Runner of a bundle's graphs in one lane, with at most `batch` images per engine run.

    batches: the supported image counts of a run, None if any count is supported.
    """

    def __init__(self, manifest: Manifest, lane: Lane, batch: int, batches: tuple[int, ...] | None = None) -> None:
        self.manifest = manifest
        self.lane = lane
        self.batch = batch
        self.batches = batches

    def hoist(self, graph: GraphFacts, feeds: Mapping[str, NDArray[Any]]) -> dict[str, DeviceArray]:
        """Return the outputs of a hoisted graph, with as many rows as `feeds` have.

        Every run of the graph has the same fixed number of rows.
        """
        rows, count = self.manifest.hoisted_rows[graph.kind], len(next(iter(feeds.values())))
        starts = range(0, count, rows)
        tables: dict[str, DeviceArray] = {
            tensor.name: self.lane.memory.empty(
                (len(starts) * rows, *(int(size) for size in tensor.shape[1:])), tensor.storage
            )
            for tensor in graph.outputs
        }
        for start in starts:
            row = np.minimum(np.arange(start, start + rows), count - 1)
            outputs = {name: table[start : start + rows] for name, table in tables.items()}
            run_once(self.lane, graph, {name: values[row] for name, values in feeds.items()}, outputs)
        return {name: table[:count] for name, table in tables.items()}

    def prediction(self, x: DeviceArray, run: PreparedRun, index: int) -> DeviceArray:
        """Return the guided prediction of an evaluation.

        Uses the fused graph of both branches if the bundle has it, otherwise one graph per branch.
        """
        parts = launches(self.manifest, run, index, 0.0, 1.0, 0.0)
        if len(parts) == 1:
            return self._run(run, parts[0], x, "prediction")
        partial_sum = self._run(run, parts[0], x, "next", r=x)
        return self._run(run, parts[1], x, "next", r=partial_sum)

    def branches(self, x: DeviceArray, run: PreparedRun, index: int) -> tuple[DeviceArray, DeviceArray]:
        """Return the predictions of the strong and weak branches, from their single-branch graphs.

        Raises UsageError if the weak branch does not run in this evaluation.
        """
        if len(run.active(index)) == 1:
            raise UsageError("branches: expected guidance with two branches, found the strong one alone")
        strong, weak = launches(self.manifest, run, index, 0.0, 1.0, 0.0, fused=False)
        return self._run(run, strong, x, "prediction"), self._run(run, weak, x, "prediction")

    def groups(self, images: int) -> Iterator[Indices]:
        """Split the images into groups of equal size, one per engine run.

        The last group is padded with the last image. Yields the image indices of each group.
        """
        rows = wanted = min(self.batch, images)
        if self.batches is not None:
            rows = min((size for size in self.batches if size >= wanted), default=max(self.batches))
        for start in range(0, images, rows):
            yield np.minimum(np.arange(start, start + rows), images - 1)

    def _run(
        self, run: PreparedRun, launch: Launch, x: DeviceArray, output: str, r: DeviceArray | None = None
    ) -> DeviceArray:
        """Return the output of a launch for all images of x, computed group by group."""
        memory = self.lane.memory
        result = memory.empty(x.shape, np.float32)
        for group in self.groups(x.shape[0]):
            first, images = int(group[0]), len(np.unique(group))
            feeds = self.feeds(run, launch, x, x if r is None else r, group)
            part: DeviceArray = memory.empty((len(group), *x.shape[1:]), np.float32)
            run_once(self.lane, launch.graph, feeds, {output: part})
            memory.copy(part[:images], result[first : first + images])
        return result

    def feeds(
        self, run: PreparedRun, launch: Launch, x: DeviceArray, r: DeviceArray, group: Indices
    ) -> dict[str, DeviceArray]:
        """Return all inputs of a launch for the images `group` of x and r (B, C, H, W)."""
        memory = self.lane.memory
        feeds: dict[str, Any] = dict(launch.scalars(self.manifest.model.prediction))
        feeds |= {"x": self._rows(x, group), "r": self._rows(r, group)}
        for name, source in launch.inputs.items():
            if source.role == "held":
                rows = source.held(run)
                first = launch.index if HELD[source.name] == "evaluation" else 0
                values = rows.values[first : first + 1]
                packed = memory.empty((1, len(group) * values.shape[2]), values.dtype)
                memory.take(values, rows.rows[group], packed)
                feeds[name] = packed.reshape((len(group), *self.manifest.model.held[source.name]))
            else:
                feeds[name] = source.kept(run, [launch.index], self.manifest.model, group)[0]
        return feeds

    def _rows(self, array: DeviceArray, group: Indices) -> DeviceArray:
        """Return the images of a group: a copy if the group was padded, otherwise a view."""
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
    """Run a graph once into `outputs`. feeds: arrays on the lane's device, or NumPy arrays."""
    lane.bind(graph, {name: lane.memory.hold(value) for name, value in feeds.items()}, outputs)()
