"""Fixtures of the runtime's tests: a pipeline, bundles with an altered manifest, and what engines are asked."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from numpy.typing import NDArray

from sg_runtime.backends import Backend, Lane, open_backend
from sg_runtime.bundle import Bundle
from sg_runtime.manifest import GraphFacts
from sg_runtime.pipeline import Pipeline


def alter(bundle: Path, copy: Path, change: Callable[[Any], object]) -> Path:
    """A copy of a bundle whose manifest, as parsed JSON, went through a function."""
    shutil.copytree(bundle, copy)
    content = json.loads((copy / "manifest.json").read_bytes())
    change(content)
    (copy / "manifest.json").write_text(json.dumps(content))
    return copy


@pytest.fixture
def edited(tmp_path: Path, tiny_bundle: Path) -> Callable[[Callable[[Any], object]], Path]:
    """Makes a copy of the tiny bundle with an altered manifest."""
    return lambda change: alter(tiny_bundle, tmp_path / "edited", change)


@pytest.fixture(scope="session")
def pixel_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle, by its manifest one of pixels, with names for its five classes; graphs of a symbolic batch."""
    facts = {"space": "pixel", "class_names": ["A", "B", "C", "0", "9"]}
    copy = tmp_path_factory.mktemp("bundles") / "pixels"
    return alter(tiny_bundle, copy, lambda content: content["model"].update(facts))


@pytest.fixture(scope="session")
def pipe(pixel_bundle: Path) -> Pipeline:
    """Named classes of pixels, with up to five images in one run of a graph."""
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
        """The graph's file name without suffix."""
        return self.graph.name


@dataclass
class Recorder:
    """A backend that notes every run of another, on the CPU."""

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
        """The graphs that ran, in order."""
        return [run.name for run in self.runs]


class RecordingLane:
    """A lane whose runs are noted when they are made."""

    def __init__(self, lane: Lane, runs: list[Run]) -> None:
        self.memory, self.enter, self.play = lane.memory, lane.enter, lane.play
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
    """Makes a recorder around the backend of a bundle; the sessions of one bundle are opened once."""
    opened = cache(lambda path: open_backend(Bundle.open(path), "cpu"))
    return lambda path: Recorder(opened(path))
