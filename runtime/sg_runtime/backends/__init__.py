"""Backends: each runs the graphs of a bundle with one library."""

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from sg_runtime.bundle import Bundle
from sg_runtime.errors import UsageError
from sg_runtime.manifest import GraphFacts

__all__ = ["Backend", "open_backend"]


class Backend(Protocol):
    """Runs graphs of one bundle; safe to call from several threads."""

    name: str

    def run(self, graph: GraphFacts, feeds: Mapping[str, NDArray[Any]], output: str) -> NDArray[Any]:
        """The graph's `output` for `feeds`, one array per graph input with the dtype and shape of its facts."""
        ...


def open_backend(bundle: Bundle, device: str) -> Backend:
    """The backend for `device`: "auto" or "cpu". Raises UsageError for another, MissingExtraError without a library."""
    if device not in ("auto", "cpu"):
        raise UsageError(f"device {device!r}: expected auto or cpu, the devices that this version runs on")
    from sg_runtime.backends.ort import OrtBackend

    return OrtBackend(bundle)
