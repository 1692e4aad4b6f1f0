"""ONNX Runtime on the CPU."""

import threading
from collections.abc import Callable, Mapping
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
    """Sessions of ONNX Runtime, one per ONNX file, opened when first run."""

    def __init__(self, bundle: Bundle, open_graph: "Callable[[Path], InferenceSession] | None" = None) -> None:
        """open_graph: in place of `open_session`."""
        require("onnxruntime", "ort")
        self.name = "onnxruntime-cpu"
        self._bundle = bundle
        self._open = open_graph or open_session
        self._sessions: dict[Path, InferenceSession] = {}
        self._lock = threading.Lock()

    def run(self, graph: GraphFacts, feeds: Mapping[str, NDArray[Any]], output: str) -> NDArray[Any]:
        """The graph's `output`. Raises EngineError where ONNX Runtime cannot open or run the graph."""
        with self._lock:
            path = self._bundle.onnx(graph)
            session = self._sessions.get(path)
            if session is None:
                session = self._sessions[path] = self._open(path)
        try:
            result: NDArray[Any] = session.run([output], dict(feeds))[0]
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise EngineError(f"{graph.file}: ONNX Runtime failed: {error}") from error
        return result


def open_session(path: Path, content: bytes | None = None) -> "InferenceSession":
    """A session over the graph at `path`, or over the model `content` with the weights beside `path`.

    Raises EngineError where ONNX Runtime does not take it.
    """
    ort = require("onnxruntime", "ort")
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors alone
    if content is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        return ort.InferenceSession(str(path) if content is None else content, options, providers=PROVIDERS)
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise EngineError(f"{path.name}: ONNX Runtime {ort.__version__} cannot open it: {error}") from error
