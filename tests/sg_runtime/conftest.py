"""Fixtures of the runtime's tests: pipelines, bundles with altered manifests, and recorders."""

import json
import shutil
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cuda_stand_in import Driver
from numpy.typing import NDArray

from sg_runtime.backends import Backend, Call, CallSequence, Lane, open_backend
from sg_runtime.backends.ort import OrtBackend, OrtLane
from sg_runtime.bundle import Bundle
from sg_runtime.devices.memory import HostMemory
from sg_runtime.manifest import GraphFacts
from sg_runtime.pipeline import Pipeline


def alter(bundle: Path, copy: Path, change: Callable[[Any], object]) -> Path:
    """Copy a bundle and pass its manifest, as parsed JSON, through a function. Returns the copy."""
    shutil.copytree(bundle, copy)
    content = json.loads((copy / "manifest.json").read_bytes())
    change(content)
    (copy / "manifest.json").write_text(json.dumps(content))
    return copy


@pytest.fixture
def edited(tmp_path: Path, tiny_bundle: Path) -> Callable[[Callable[[Any], object]], Path]:
    """Return a function that copies the tiny bundle with an altered manifest."""
    return lambda change: alter(tiny_bundle, tmp_path / "edited", change)


@pytest.fixture(scope="session")
def pixel_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny bundle with a manifest of a pixel model with five class names.

    The graphs have a symbolic batch.
    """
    facts = {"space": "pixel", "pixels_per_latent": 1, "conditions": {"count": 5, "names": ["A", "B", "C", "0", "9"]}}
    copy = tmp_path_factory.mktemp("bundles") / "pixels"
    return alter(tiny_bundle, copy, lambda content: content["model"].update(facts))


@pytest.fixture(scope="session")
def pipe(pixel_bundle: Path) -> Pipeline:
    """Return a pipeline with class names and pixels, for up to five images per engine run."""
    return Pipeline.load(pixel_bundle, batch=5)


@dataclass
class Run:
    """One engine run."""

    graph: GraphFacts
    feeds: Mapping[str, NDArray[Any]]
    output: str
    result: NDArray[Any]

    @property
    def name(self) -> str:
        """File name of the graph without suffix."""
        return self.graph.name


@dataclass
class Recorder:
    """A backend on the CPU that records every run of another backend."""

    backend: Backend
    name: str = "onnxruntime-cpu"
    lanes: int | None = None
    runs: list[Run] = field(default_factory=list)

    @property
    def batches(self) -> tuple[int, ...] | None:
        return self.backend.batches

    def lane(self) -> "RecordingLane":
        return RecordingLane(self.backend.lane(), self.runs)

    def keep(self) -> None:
        self.backend.keep()

    @property
    def names(self) -> list[str]:
        """Names of the graphs that ran, in order."""
        return [run.name for run in self.runs]


class RecordingLane:
    """A lane that records each run when it is executed."""

    def __init__(self, lane: Lane, runs: list[Run]) -> None:
        self.memory, self.enter, self.sequence, self.release = lane.memory, lane.enter, lane.sequence, lane.release
        self._lane, self._runs = lane, runs

    def bind(
        self,
        graph: GraphFacts,
        inputs: Mapping[str, NDArray[Any]],
        outputs: Mapping[str, NDArray[Any]],
        *,
        fixed: bool = False,
    ) -> Callable[[], None]:
        call = self._lane.bind(graph, inputs, outputs, fixed=fixed)

        def noted() -> None:
            feeds = {name: array.copy() for name, array in inputs.items()}
            call()
            ((output, result),) = outputs.items()
            self._runs.append(Run(graph, feeds, output, result.copy()))

        return noted


@pytest.fixture(scope="session")
def record() -> Callable[[Path], Recorder]:
    """Return a function that makes a recorder for a bundle. Sessions are opened once per bundle."""
    opened = cache(lambda path: open_backend(Bundle.open(path), "cpu"))
    return lambda path: Recorder(opened(path))


@dataclass(frozen=True)
class Event:
    """One call to a lane or to its memory.

    kind: "bind" or "run" of a graph, "sequence", or a method of the memory. inputs, outputs:
    addresses of the graph's arrays. fixed: the value that the call was bound with.
    """

    kind: str
    graph: str = ""
    inputs: Mapping[str, int] = field(default_factory=dict)
    outputs: Mapping[str, int] = field(default_factory=dict)
    fixed: bool = False


class WatchedMemory(HostMemory):
    """CPU memory that records every call, and counts the live bytes and their peak."""

    def __init__(self, events: list[Event]) -> None:
        self.live = self.peak = 0
        self._events = events

    def empty(self, shape: Any, dtype: Any) -> NDArray[Any]:
        array = super().empty(shape, dtype)
        self._events.append(Event("empty"))
        self._count(array.nbytes)
        weakref.finalize(array.base, self._count, -array.nbytes)
        return array

    def upload(self, source: NDArray[Any], target: Any) -> None:
        self._events.append(Event("upload"))
        super().upload(source, target)

    def copy(self, source: Any, target: Any) -> None:
        self._events.append(Event("copy"))
        super().copy(source, target)

    def take(self, source: Any, rows: NDArray[Any], target: Any) -> None:
        self._events.append(Event("take"))
        super().take(source, rows, target)

    def download(self, source: Any) -> NDArray[Any]:
        self._events.append(Event("download"))
        return super().download(source)

    def _count(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


@dataclass
class Watched:
    """A backend of ONNX Runtime on the CPU with its own memory, which records every call."""

    backend: OrtBackend
    name: str = "onnxruntime-cpu"
    lanes: int | None = None
    batches: tuple[int, ...] | None = None
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.batches = self.backend.batches
        self.memory = WatchedMemory(self.events)

    def lane(self) -> "WatchedLane":
        return WatchedLane(OrtLane(self.backend, self.memory, 0), self.events)

    def keep(self) -> None:
        self.backend.keep()

    @property
    def steps(self) -> list[Event]:
        """Runs of step graphs, in order."""
        return [event for event in self.events if event.kind == "run" and event.fixed]

    @property
    def kinds(self) -> list[str]:
        """Kinds of the recorded calls, in order."""
        return [event.kind for event in self.events]


class WatchedLane:
    """A lane that records binds, sequences and runs."""

    def __init__(self, lane: OrtLane, events: list[Event]) -> None:
        self.memory, self.enter, self.release = lane.memory, lane.enter, lane.release
        self._lane, self._events = lane, events

    def sequence(self, calls: Sequence[Call]) -> CallSequence:
        self._events.append(Event("sequence"))
        return self._lane.sequence(calls)

    def bind(
        self, graph: GraphFacts, inputs: Mapping[str, Any], outputs: Mapping[str, Any], *, fixed: bool = False
    ) -> Callable[[], None]:
        call = self._lane.bind(graph, inputs, outputs, fixed=fixed)
        read, written = (
            {name: self.memory.address(array) for name, array in arrays.items()} for arrays in (inputs, outputs)
        )
        self._events.append(Event("bind", graph.name, read, written, fixed))

        def noted() -> None:
            self._events.append(Event("run", graph.name, read, written, fixed))
            call()

        return noted


@pytest.fixture(scope="session")
def watch() -> Callable[[Path], Watched]:
    """Return a function that makes a watched backend for a bundle.

    Sessions are opened once per bundle.
    """
    opened = cache(lambda path: OrtBackend(Bundle.open(path)))
    return lambda path: Watched(opened(path))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Replace the CUDA driver by a stand-in and return it."""
    stand_in = Driver()
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", stand_in)
    return stand_in
