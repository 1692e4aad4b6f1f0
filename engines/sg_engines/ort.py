"""ONNX Runtime: opens a graph as the runtime will, so that a graph it cannot run never gets into a bundle."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from sg_runtime.backends.ort import open_session
from sg_runtime.errors import EngineError


def run_once(graph: Path, feeds: Mapping[str, NDArray[Any]], content: bytes | None = None) -> list[NDArray[Any]]:
    """Open the graph at `graph`, run it on `feeds`, and return its outputs in order.

    content: a model to run in its place, with the weights beside it.
    Raises EngineError where ONNX Runtime cannot open or run it, MissingExtraError where it is not installed.
    """
    session = open_session(graph, content)
    try:
        outputs: list[NDArray[Any]] = session.run(None, dict(feeds))
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise EngineError(f"{graph.name}: ONNX Runtime failed: {error}") from error
    return outputs
