"""What is open of a bundle: its denoiser at each size, its text encoder and its decoder."""

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sg_runtime.backends.base import Backend, Lane
from sg_runtime.bundle import Bundle
from sg_runtime.errors import DeviceMemoryError
from sg_runtime.manifest import GraphFacts, Part
from sg_runtime.run.budget import part_bytes
from sg_runtime.run.encode import Encoded, PromptEncoder
from sg_runtime.run.evaluate import run_once
from sg_runtime.run.lanes import LanePool

Keep = Literal["all", "step", "one"]

Opener = Callable[[Part], Backend]
"""Opens the backend of a part."""

Opened = tuple[Backend, LanePool]


class OpenParts:
    """Backend and lanes of each part of a bundle that is in use, shared by its pipelines.

    The denoiser has a backend for each size. Text encoder and decoder run one row at a time, and
    one thread at a time. All are backends of one `name`.
    """

    def __init__(self, bundle: Bundle, backend: Backend, opener: Opener | None, keep: Keep) -> None:
        """Take over the denoiser's backend at the size of `bundle`.

        opener: opens the other parts, and the denoiser again; None if only the denoiser is used.
        keep: "all" to leave parts open, "step" to close text encoder and decoder after every use,
        "one" to have one part open at a time.
        """
        self.bundle, self.name = bundle, backend.name
        self._opener, self._keep = opener, keep
        self._sizes: dict[tuple[int, int], Opened] = {self._first: (backend, LanePool(bundle.manifest, backend))}
        self._parts: dict[Part, Opened] = {}
        self._encoder: PromptEncoder | None = None
        self._lock, self._in_part = threading.Lock(), threading.Lock()

    def step(self, bundle: Bundle) -> Opened:
        """Return backend and lanes of a size of the bundle. Open them on first use."""
        size = bundle.manifest.model.size
        with self._lock:
            if self._first not in self._sizes:
                with telling_needs(self.bundle):
                    self._sizes[self._first] = self._open("step")
            if size not in self._sizes:
                first, lanes = self._sizes[self._first]
                backend = first.at(bundle)
                self._sizes[size] = backend, LanePool(bundle.manifest, backend, lanes)
            return self._sizes[size]

    def run(self, part: Part, graph: GraphFacts, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Return the outputs of a part's graph, joined over the rows of `feeds`, in order.

        Every input has as many rows, and the graph takes one. Raises DeviceMemoryError if the part
        does not fit next to those that are open; the message says what each part needs.
        """
        with self._in_part:
            if self._keep == "one":
                with self._lock:
                    self._sizes.clear()
            try:
                with telling_needs(self.bundle):
                    if part not in self._parts:
                        self._parts[part] = self._open(part)
                    with self._parts[part][1].lease() as leased:
                        return _rows(leased.lane, graph, feeds)
            finally:
                if self._keep != "all":
                    self._parts.clear()

    def encode(self, prompts: Sequence[str]) -> Encoded:
        """Return embeddings and mask of prompts; see `PromptEncoder`."""
        with self._lock:
            if self._encoder is None:
                self._encoder = PromptEncoder(self.bundle)
            encoder = self._encoder
        return encoder(prompts, functools.partial(self.run, "text"))

    def release(self, bundle: Bundle) -> None:
        """Free the buffers of a size's idle lanes, and close text encoder and decoder."""
        with self._lock:
            if bundle.manifest.model.size in self._sizes:
                self._sizes[bundle.manifest.model.size][1].release()
        with self._in_part:
            self._parts.clear()

    @property
    def _first(self) -> tuple[int, int]:
        return self.bundle.manifest.model.size

    def _open(self, part: Part) -> Opened:
        assert self._opener is not None
        backend = self._opener(part)
        return backend, LanePool(self.bundle.manifest, backend)


@contextmanager
def telling_needs(bundle: Bundle) -> Iterator[None]:
    """Add to a DeviceMemoryError of the block what each part of the bundle needs."""
    try:
        yield
    except DeviceMemoryError as error:
        manifest = bundle.manifest
        if not manifest.parts:
            raise
        names: tuple[Part, ...] = ("step", *manifest.parts)
        sizes = {name: part_bytes(manifest, name) / 1e6 for name in names}
        listed = ", ".join(f"{name} {size:,.0f} MB" for name, size in sizes.items())
        raise DeviceMemoryError(
            f'{error}; weights and activations of one image: {listed}; Pipeline.load(…, keep="one") has one part '
            f"open at a time, at most {max(sizes.values()):,.0f} MB"
        ) from error


def _rows(lane: Lane, graph: GraphFacts, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """Run a graph of one row for every row of `feeds`; return its outputs, joined, in order."""
    memory, found = lane.memory, []
    for row in range(len(next(iter(feeds.values())))):
        outputs = {t.name: memory.empty([int(size) for size in t.shape], t.storage) for t in graph.outputs}
        run_once(lane, graph, {name: np.ascontiguousarray(values[[row]]) for name, values in feeds.items()}, outputs)
        found.append([memory.download(output) for output in outputs.values()])
    return [np.concatenate(column) for column in zip(*found, strict=True)]
