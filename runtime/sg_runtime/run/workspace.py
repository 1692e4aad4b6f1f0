"""A run that stays on its device: tables of all that its evaluations need, and launches bound to them."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from sg_runtime.arrays import Array
from sg_runtime.backends.base import Call, CallSequence, Lane
from sg_runtime.devices.memory import DeviceArray, Table
from sg_runtime.manifest import Manifest
from sg_runtime.run.launches import Launch, launches
from sg_runtime.run.prepared import PreparedBranch, PreparedRun
from sg_runtime.sampling import Update

Noise = Callable[[int], Array]
"""step → standard normal numbers like the state."""

Key = tuple[str | int | bool, ...]
"""What a launch is bound to: graph, place in the tables, and states."""

LATENTS = 4
"""Buffers for states: that of now, that at the step's start, a half-made sum, and the one that is being written."""

SCALARS = ("scale", "c_in", "c_skip", "c_out", "a", "b", "e")
LAUNCHES = 2
"""Most runs of graphs in one evaluation."""


class Workspace:
    """Buffers at fixed addresses for runs of `batch` images, the conditioning of `evaluations` of them at a time.

    Every evaluation reads its modulations, kept tokens and scalars at a place of its own in tables; the state goes
    from buffer to buffer, each run of a graph writing where the next one reads. So launches are bound once, and made
    again in every run. separate: whether the weak branch has modulations of its own.
    """

    def __init__(self, lane: Lane, manifest: Manifest, batch: int, evaluations: int, separate: bool) -> None:
        """Raises DeviceMemoryError where the memory does not suffice."""
        model = manifest.model
        self._lane, self._manifest, self._batch = lane, manifest, batch
        self._evaluations, self._separate = evaluations, separate
        latent = (batch, *model.latent)
        memory = lane.memory
        self._latents: list[DeviceArray] = [memory.empty(latent, np.float32) for _ in range(LATENTS)]
        rows = (batch, model.modulations)
        self._modulations = [Table(memory, evaluations, rows, np.float32) for _ in range(1 + separate)]
        self._keeps: dict[tuple[bool, int], Table] = {}
        self._scalars = Table(memory, evaluations * LAUNCHES * len(SCALARS), (), np.float32)
        self._calls: dict[Key, Call] = {}
        self._sequences: dict[tuple[Key, ...], CallSequence] = {}
        self._state = self._start = 0

    def start(self, x: Array) -> None:
        """Begin a run at the state x (B, C, H, W)."""
        self._state = self._start = 0
        self._lane.memory.upload(x, self._latents[0])

    def advance(
        self, plan: PreparedRun, updates: Sequence[Update], done: Callable[[], None], noise: Noise, fused: bool = True
    ) -> None:
        """Take the state along the next updates, one for each evaluation of the plan, without waiting for the device.

        done: called when an evaluation has been asked for. Only where an update adds noise the state comes to the CPU.
        """
        sequence = [
            launches(self._manifest, plan, index, update.a, update.b, update.e, fused=fused)
            for index, update in enumerate(updates)
        ]
        self._fill(plan, sequence)
        keys: list[Key] = []
        last: list[bool] = []

        def play() -> None:
            ends = tuple(last)
            self._sequence(tuple(keys)).play(lambda number: done() if ends[number] else None)
            keys.clear()
            last.clear()

        for index, (update, runs) in enumerate(zip(updates, sequence, strict=True)):
            if update.noise:
                play()
                x = self._lane.memory.download(self._latents[self._state])
                x = x + np.float32(update.noise) * noise(update.step)
                self._lane.memory.upload(x, self._latents[self._state])
            if update.evaluation == 0:
                self._start = self._state
            part = self._start
            for number, launch in enumerate(runs):
                r = part if launch.adds else self._start
                part = min({*range(LATENTS)} - {self._state, self._start, part})
                keys.append(self._bound(plan, launch, index, number, r, part))
                last.append(launch is runs[-1])
            self._state = part
        play()

    @property
    def state(self) -> DeviceArray:
        """The state (B, C, H, W) that the run has come to."""
        return self._latents[self._state]

    def _fill(self, plan: PreparedRun, sequence: Sequence[tuple[Launch, ...]]) -> None:
        """Set the tables: modulations copied on the device, all else in one upload for each table."""
        memory = self._lane.memory
        for index, runs in enumerate(sequence):
            for branch in {id(b): b for launch in runs for b in launch.branches}.values():
                if branch is plan.strong or self._separate:
                    memory.take(branch.modulations[index], branch.rows, self._table(plan, branch)[index])
        chosen: dict[tuple[bool, int], dict[int, NDArray[np.int64]]] = {}
        scalars: dict[int, NDArray[np.float32]] = {}
        for index, runs in enumerate(sequence):
            for number, launch in enumerate(runs):
                for branch in launch.keeps.values():
                    keep = branch.keep[index]
                    assert keep is not None
                    chosen.setdefault((branch is plan.weak, keep.shape[1]), {})[index] = keep
                for name, value in launch.scalars(self._manifest.model.prediction).items():
                    scalars[self._scalar(index, number, name)] = value
        for key, rows in chosen.items():
            if key not in self._keeps:
                self._keeps[key] = Table(memory, self._evaluations, (self._batch, key[1]), np.int64)
            self._keeps[key].upload(rows)
        self._scalars.upload(scalars)

    def _bound(self, plan: PreparedRun, launch: Launch, index: int, number: int, r: int, target: int) -> Key:
        """The key of the launch over the buffers, which is bound when first met."""
        key = (launch.graph.name, index, number, launch.branches[0] is plan.weak, self._state, r, target)
        if key not in self._calls:
            inputs: dict[str, DeviceArray] = {"x": self._latents[self._state], "r": self._latents[r]}
            for name, branch in launch.modulations.items():
                inputs[name] = self._table(plan, branch)[index]
            for name, branch in launch.keeps.items():
                keep = branch.keep[index]
                assert keep is not None
                inputs[name] = self._keeps[branch is plan.weak, keep.shape[1]][index]
            for name in launch.scalars(self._manifest.model.prediction):
                inputs[name] = self._scalars[self._scalar(index, number, name)]
            outputs = {"next": self._latents[target]}
            self._calls[key] = self._lane.bind(launch.graph, inputs, outputs, fixed=True)
        return key

    def _sequence(self, keys: tuple[Key, ...]) -> CallSequence:
        """The calls of these keys."""
        if keys not in self._sequences:
            self._sequences[keys] = self._lane.sequence([self._calls[key] for key in keys])
        return self._sequences[keys]

    def _table(self, plan: PreparedRun, branch: PreparedBranch) -> Table:
        return self._modulations[-1 if branch is plan.weak else 0]

    def _scalar(self, index: int, number: int, name: str) -> int:
        return (index * LAUNCHES + number) * len(SCALARS) + SCALARS.index(name)
