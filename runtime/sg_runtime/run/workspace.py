"""Device buffers of a run: tables with the inputs of all evaluations, and bound launches."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sg_runtime.arrays import Array
from sg_runtime.backends.base import Call, CallSequence, Lane
from sg_runtime.devices.memory import DeviceArray, Table
from sg_runtime.manifest import Manifest
from sg_runtime.run.launches import Launch, Source, launches
from sg_runtime.run.prepared import PreparedRun
from sg_runtime.sampling import Update
from sg_runtime.vocabulary import HELD, SCALARS

Noise = Callable[[int], Array]
"""step → standard normal noise in the shape of the state."""

Key = tuple[object, ...]
"""Identity of a bound launch: graph, tables, table rows, latent buffers it reads and writes."""

PROGRAMS = 8
"""Maximum number of programs that a workspace keeps."""

LATENTS = 4
"""Number of latent buffers: state, state at the step's start, partial sum of two graphs, output."""

LAUNCHES = 2
"""Maximum number of launches in one evaluation."""


@dataclass(frozen=True, slots=True)
class _Noise:
    """Noise that is added to the buffer `state` before the evaluation of `update`."""

    state: DeviceArray
    update: Update


@dataclass
class _Program:
    """The launches of a run, without the values that they read.

    parts: for each sequence of launches, the noise to add before it, its calls, and for each call
    whether it ends an evaluation.
    sources: sources of the tables, with the evaluations that read them.
    scalars: values by their row in the table of scalars.
    state, start: latent buffers of the state and of the last step's start, after the run.
    """

    parts: list[tuple[_Noise | None, CallSequence, tuple[bool, ...]]] = field(default_factory=list)
    sources: dict[Source, set[int]] = field(default_factory=dict)
    scalars: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    state: int = 0
    start: int = 0


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
        self._tables: dict[Source, Table] = {}
        self._calls: dict[Key, Call] = {}
        self._sequences: dict[tuple[Key, ...], CallSequence] = {}
        self._programs: dict[Hashable, _Program] = {}
        self._uploaded: _Program | None = None
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
        program = self._program(run, updates, fused)
        self._fill(program, run)
        for added, calls, ends in program.parts:
            if added is not None:
                x = self._lane.memory.download(added.state)
                x = x + np.float32(added.update.noise) * noise(added.update.step)
                self._lane.memory.upload(x, added.state)
            calls.play(lambda number, ends=ends: done() if ends[number] else None)  # type: ignore[misc]
        self._state, self._start = program.state, program.start

    @property
    def state(self) -> DeviceArray:
        """Current state (B, C, H, W) of the run."""
        return self._latents[self._state]

    def _program(self, run: PreparedRun, updates: Sequence[Update], fused: bool) -> "_Program":
        """Return the program of a run; make it on its first use.

        The same run with other images, classes or seeds is the same program.
        """
        key = (run.structure, tuple(updates), fused, self._state, self._start)
        program = self._programs.pop(key, None) or self._made(run, updates, fused)
        self._programs[key] = program  # as the last one
        if len(self._programs) > PROGRAMS:
            del self._programs[next(iter(self._programs))]
        return program

    def _made(self, run: PreparedRun, updates: Sequence[Update], fused: bool) -> "_Program":
        program = _Program()
        keys: list[Key] = []
        ends: list[bool] = []
        noise, state, start = None, self._state, self._start

        def finish() -> None:
            program.parts.append((noise, self._sequence(tuple(keys)), tuple(ends)))
            keys.clear()
            ends.clear()

        for index, update in enumerate(updates):
            if update.noise:
                if index:
                    finish()
                noise = _Noise(self._latents[state], update)
            if update.evaluation == 0:
                start = state
            partial_sum = start
            parts = launches(self._manifest, run, index, update.a, update.b, update.e, fused=fused)
            for number, launch in enumerate(parts):
                r = partial_sum if launch.adds else start
                partial_sum = min({*range(LATENTS)} - {state, start, partial_sum})
                for source in launch.inputs.values():
                    program.sources.setdefault(source, set()).add(index)
                for name, value in launch.scalars(self._manifest.model.prediction).items():
                    program.scalars[self._scalar(index, number, name)] = value
                keys.append(self._bound(launch, number, (state, r, partial_sum), run))
                ends.append(launch is parts[-1])
            state = partial_sum
        finish()
        program.state, program.start = state, start
        return program

    def _fill(self, program: "_Program", run: PreparedRun) -> None:
        """Fill the tables with the conditioning, the kept tokens and the scalars of a run."""
        for source, indices in program.sources.items():
            if source.role == "held":
                rows = source.held(run)
                self._tables[source].take(rows.values, rows.rows)
            else:
                places = sorted(indices)
                self._tables[source].upload(places, source.kept(run, places, self._manifest.model))
        if program is not self._uploaded:
            self._scalars.upload([*program.scalars], np.stack([*program.scalars.values()]))
            self._uploaded = program

    def _bound(self, launch: Launch, number: int, latents: tuple[int, int, int], run: PreparedRun) -> Key:
        """Return the key of a launch over these buffers; bind the launch on its first use.

        number: number of the launch in its evaluation. latents: the buffers of x, r and next.
        """
        key = (launch.graph.name, tuple(launch.inputs.values()), launch.index, number, latents)
        if key not in self._calls:
            x, r, target = (self._latents[latent] for latent in latents)
            inputs = {"x": x, "r": r}
            for tensor in launch.graph.inputs:
                if (source := launch.inputs.get(tensor.name)) is not None:
                    if source not in self._tables:
                        shape = (run.images, *(int(size) for size in tensor.shape[1:]))
                        count = 1 if _per_image(source) else self._evaluations
                        self._tables[source] = Table(self._lane.memory, count, shape, tensor.storage)
                    inputs[tensor.name] = self._tables[source][0 if _per_image(source) else launch.index]
            for name in launch.scalars(self._manifest.model.prediction):
                inputs[name] = self._scalars[self._scalar(launch.index, number, name)]
            self._calls[key] = self._lane.bind(launch.graph, inputs, {"next": target}, fixed=True)
        return key

    def _sequence(self, keys: tuple[Key, ...]) -> CallSequence:
        """Return the call sequence of these keys; create it on its first use."""
        if keys not in self._sequences:
            self._sequences[keys] = self._lane.sequence([self._calls[key] for key in keys])
        return self._sequences[keys]

    def _scalar(self, index: int, number: int, name: str) -> int:
        return (index * LAUNCHES + number) * len(SCALARS) + SCALARS.index(name)


def _per_image(source: Source) -> bool:
    """Whether all evaluations of a run read the same values."""
    return source.role == "held" and HELD[source.name] == "image"
