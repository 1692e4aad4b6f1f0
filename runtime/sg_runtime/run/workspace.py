"""Device buffers of a run: tables with the inputs of all evaluations, and bound launches."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import DTypeLike, NDArray

from sg_runtime.arrays import Array
from sg_runtime.backends.base import Call, CallSequence, Lane
from sg_runtime.devices.memory import DeviceArray, Table
from sg_runtime.manifest import Manifest
from sg_runtime.run.launches import Held, Kept, Launch, launches
from sg_runtime.run.prepared import PreparedRun
from sg_runtime.sampling import Update
from sg_runtime.vocabulary import SCALARS

Noise = Callable[[int], Array]
"""step → standard normal noise in the shape of the state."""

Key = tuple[object, ...]
"""Identity of a bound launch: graph, tables, table rows, latent buffers it reads and writes."""

LATENTS = 4
"""Number of latent buffers: state, state at the step's start, partial sum of two graphs, output."""

LAUNCHES = 2
"""Maximum number of launches in one evaluation."""


class Workspace:
    """Buffers at fixed addresses for runs of `batch` images.

    They hold the conditioning of `evaluations` evaluations at a time. Each evaluation has one
    row in the tables. Each graph run writes the buffer that the next one reads. Addresses never
    change, so a launch is bound once and replayed in every later run.
    """

    def __init__(self, lane: Lane, manifest: Manifest, batch: int, evaluations: int) -> None:
        """Allocate the buffers. Raises DeviceMemoryError if the memory does not suffice."""
        latent = (batch, *manifest.model.latent)
        self._lane, self._manifest, self._evaluations = lane, manifest, evaluations
        self._latents: list[DeviceArray] = [lane.memory.empty(latent, np.float32) for _ in range(LATENTS)]
        self._scalars = Table(lane.memory, evaluations * LAUNCHES * len(SCALARS), (), np.float32)
        self._tables: dict[str, Table] = {}
        self._calls: dict[Key, Call] = {}
        self._sequences: dict[tuple[Key, ...], CallSequence] = {}
        self._state = self._start = 0

    def start(self, x: Array) -> None:
        """Start a run from the state x (B, C, H, W)."""
        self._state = self._start = 0
        self._lane.memory.upload(x, self._latents[0])

    def advance(
        self, run: PreparedRun, updates: Sequence[Update], done: Callable[[], None], noise: Noise, fused: bool = True
    ) -> None:
        """Advance the state by `updates`, one per evaluation of `run`; do not wait for the device.

        done: called after each evaluation is submitted. The state is copied to the CPU only if an
        update adds noise. Raises DeviceMemoryError if the memory does not suffice.
        """
        evaluations = [
            launches(self._manifest, run, index, update.a, update.b, update.e, fused=fused)
            for index, update in enumerate(updates)
        ]
        self._fill(evaluations)
        keys: list[Key] = []
        last: list[bool] = []

        def play() -> None:
            ends = tuple(last)
            self._sequence(tuple(keys)).play(lambda number: done() if ends[number] else None)
            keys.clear()
            last.clear()

        for index, (update, parts) in enumerate(zip(updates, evaluations, strict=True)):
            if update.noise:
                play()
                x = self._lane.memory.download(self._latents[self._state])
                x = x + np.float32(update.noise) * noise(update.step)
                self._lane.memory.upload(x, self._latents[self._state])
            if update.evaluation == 0:
                self._start = self._state
            partial_sum = self._start
            for number, launch in enumerate(parts):
                r = partial_sum if launch.adds else self._start
                partial_sum = min({*range(LATENTS)} - {self._state, self._start, partial_sum})
                keys.append(self._bound(launch, index, number, r, partial_sum))
                last.append(launch is parts[-1])
            self._state = partial_sum
        play()

    @property
    def state(self) -> DeviceArray:
        """Current state (B, C, H, W) of the run."""
        return self._latents[self._state]

    def _fill(self, evaluations: Sequence[Sequence[Launch]]) -> None:
        """Fill the tables.

        Conditioning rows are gathered on the device. All other inputs take one upload per table.
        """
        uploads: dict[str, dict[int, NDArray[np.int64]]] = {}
        gathered: dict[tuple[str, int], Held] = {}
        scalars: dict[int, NDArray[np.float32]] = {}
        for index, parts in enumerate(evaluations):
            for number, launch in enumerate(parts):
                for source in launch.inputs.values():
                    if isinstance(source, Kept):
                        uploads.setdefault(source.table, {})[index] = source.keep
                    else:
                        gathered[source.table, index] = source
                for name, value in launch.scalars(self._manifest.model.prediction).items():
                    scalars[self._scalar(index, number, name)] = value
        for (table, index), held in gathered.items():
            shape = (len(held.rows), *held.values.shape[1:])
            self._lane.memory.take(held.values, held.rows, self._table(table, shape, np.float32)[index])
        for table, rows in uploads.items():
            self._table(table, next(iter(rows.values())).shape, np.int64).upload(rows)
        self._scalars.upload(scalars)

    def _table(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> Table:
        """Return the table of this name. A new one gets a row of `shape` per evaluation."""
        if name not in self._tables:
            self._tables[name] = Table(self._lane.memory, self._evaluations, shape, dtype)
        return self._tables[name]

    def _bound(self, launch: Launch, index: int, number: int, r: int, target: int) -> Key:
        """Return the key of the launch over these buffers; bind the launch on its first use."""
        tables = tuple(source.table for source in launch.inputs.values())
        key = (launch.graph.name, tables, index, number, self._state, r, target)
        if key not in self._calls:
            inputs: dict[str, DeviceArray] = {"x": self._latents[self._state], "r": self._latents[r]}
            for name, source in launch.inputs.items():
                inputs[name] = self._tables[source.table][index]
            for name in launch.scalars(self._manifest.model.prediction):
                inputs[name] = self._scalars[self._scalar(index, number, name)]
            outputs = {"next": self._latents[target]}
            self._calls[key] = self._lane.bind(launch.graph, inputs, outputs, fixed=True)
        return key

    def _sequence(self, keys: tuple[Key, ...]) -> CallSequence:
        """Return the call sequence of these keys; create it on its first use."""
        if keys not in self._sequences:
            self._sequences[keys] = self._lane.sequence([self._calls[key] for key in keys])
        return self._sequences[keys]

    def _scalar(self, index: int, number: int, name: str) -> int:
        return (index * LAUNCHES + number) * len(SCALARS) + SCALARS.index(name)
