"""ONNX Runtime on the CPU."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from sg_runtime.bundle import Bundle
from sg_runtime.errors import EngineError
from sg_runtime.extras import require
from sg_runtime.manifest import GraphFacts

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

PROVIDERS = ["CPUExecutionProvider"]


class OrtBackend:
    """Sessions of ONNX Runtime, one per graph, opened when first run."""

    def __init__(self, bundle: Bundle) -> None:
        require("onnxruntime", "ort")
        self.name = "onnxruntime-cpu"
        self._bundle = bundle
        self._sessions: dict[str, InferenceSession] = {}
        self._lock = threading.Lock()

    def run(self, graph: GraphFacts, feeds: Mapping[str, NDArray[Any]], output: str) -> NDArray[Any]:
        """The graph's `output`. Raises EngineError where ONNX Runtime cannot open or run the graph."""
        with self._lock:
            session = self._sessions.get(graph.file)
            if session is None:
                session = open_session(self._bundle.file(graph.file))
                self._sessions[graph.file] = session
        try:
            result: NDArray[Any] = session.run([output], dict(feeds))[0]
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise EngineError(f"{graph.file}: ONNX Runtime failed: {error}") from error
        return result


def open_session(path: Path) -> "InferenceSession":
    """A session over the graph at `path`. Raises EngineError where ONNX Runtime does not take it."""
    ort = require("onnxruntime", "ort")
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors alone
    try:
        return ort.InferenceSession(str(path), options, providers=PROVIDERS)
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise EngineError(f"{path.name}: ONNX Runtime {ort.__version__} cannot open it: {error}") from error
