"""ONNX Runtime backend: one execution provider, with inputs and outputs bound to device arrays."""

import itertools
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sg_runtime.backends.base import Call, CallSequence
from sg_runtime.bundle import Bundle
from sg_runtime.devices.memory import DeviceArray, HostMemory
from sg_runtime.errors import BundleError, DeviceMemoryError, EngineError, SgError
from sg_runtime.extras import require
from sg_runtime.files import cache_folder
from sg_runtime.host import usable_cores
from sg_runtime.manifest import GraphFacts

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

LOG = logging.getLogger("sg_runtime")


@dataclass(frozen=True, slots=True)
class Provider:
    """An execution provider.

    name: ONNX Runtime's name of the provider.
    options: provider options.
    graph_option: option that captures runs as CUDA graphs, one per `gpu_graph_id`; None if the
        provider has no such option or supports only a single graph.
    cache_option: option for the folder of compiled files; None if there is none.
    disabled_optimizers: ONNX Runtime's names of graph optimizers to disable.
    """

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    graph_option: str | None = None
    cache_option: str | None = None
    disabled_optimizers: tuple[str, ...] = ()


PROVIDERS = {
    "onnxruntime-cpu": Provider("CPUExecutionProvider"),
    "onnxruntime-cuda": Provider(
        "CUDAExecutionProvider",
        # TF32 would make FP32 graphs a thousand times less accurate.
        {"use_tf32": "0"},
        graph_option="enable_cuda_graph",
        # This optimizer fuses all slices of the modulations into one Split with parts of several
        # sizes. That Split needs pinned memory, 8 bytes for each modulation. For DiT-XL/2 the arena
        # allocates it during the capture, and CUDA forbids that.
        disabled_optimizers=("GatherSliceToSplitFusion",),
    ),
    "onnxruntime-tensorrt": Provider(
        "TensorrtExecutionProvider", {"trt_engine_cache_enable": "1"}, cache_option="trt_engine_cache_path"
    ),
    "onnxruntime-tensorrt-rtx": Provider("NvTensorRTRTXExecutionProvider", cache_option="nv_runtime_cache_path"),
}
"""Execution provider of each ONNX Runtime backend, by the names in `BACKENDS`."""

CPU = PROVIDERS["onnxruntime-cpu"]

_NOT_CAPTURED = "-1"
"""The `gpu_graph_id` of a run that is neither captured nor replayed."""


class OrtBackend:
    """Sessions of ONNX Runtime, one per ONNX file, opened on first use.

    On a GPU all sessions share one stream and one lane, because a session runs in the stream that
    it was opened with.
    """

    def __init__(
        self,
        bundle: Bundle,
        name: str = "onnxruntime-cpu",
        number: int = 0,
        stream: object | None = None,
        *,
        capture: bool = True,
        threads: int | None = None,
        open_graph: "Callable[[Path], InferenceSession] | None" = None,
    ) -> None:
        """Select the provider and the memory.

        name: name of the backend, as in `BACKENDS`.
        number: number of the GPU.
        stream: CUDA stream to run in; see `cuda.stream_handle`.
        capture: whether runs are captured as CUDA graphs if the provider supports it.
        threads: number of threads of a run on the CPU; see `open_session`.
        open_graph: replacement of `open_session` on the CPU.
        """
        require("onnxruntime")
        self.name = name
        self.lanes = None if name == "onnxruntime-cpu" else 1
        self.batches: tuple[int, ...] | None = None if bundle.manifest.batch is None else (bundle.manifest.batch,)
        self.captures = capture and PROVIDERS[name].graph_option is not None
        self._bundle, self._number, self._threads = bundle, number, threads
        self._memory: Any = HostMemory() if self.lanes is None else _cuda_memory(number, stream)
        self._open = open_graph or self._open_session
        graphs = {graph.file for graph in bundle.manifest.graphs}
        engines = {engine.file for engine in bundle.manifest.engines}
        self._weights = [name for name in bundle.manifest.files if name not in graphs | engines]
        self._sessions: dict[Path, InferenceSession] = {}
        self._lock = threading.Lock()

    def lane(self) -> "OrtLane":
        return OrtLane(self, self._memory, self._number)

    def keep(self) -> None:
        pass  # providers that compile write their caches themselves

    def session(self, graph: GraphFacts) -> "InferenceSession":
        """Return the session of a graph's file.

        Raises EngineError if the file cannot be opened, and BundleError if it was changed since the
        bundle was opened.
        """
        with self._lock:
            path = self._bundle.onnx(graph)
            session = self._sessions.get(path)
            if session is None:
                with self._bundle.reading(path.relative_to(self._bundle.root).as_posix(), *self._weights):
                    session = self._open(path)
                self._sessions[path] = session
            return session

    def check_weights(self) -> None:
        """Raise BundleError if weights that sessions have mapped were written in place."""
        if self._sessions:
            self._bundle.check_unchanged(*self._weights, mapped=True)

    def _open_session(self, path: Path) -> "InferenceSession":
        provider, options = PROVIDERS[self.name], {}
        if self.lanes is not None:
            options = {**provider.options, "device_id": str(self._number)}
            options["user_compute_stream"] = str(self._memory.stream)
        if provider.cache_option is not None:
            try:
                folder = cache_folder() / "onnxruntime"
                folder.mkdir(parents=True, exist_ok=True)
                options[provider.cache_option] = str(folder)
            except OSError as error:
                LOG.warning("cache %s: not used (%s)", error.filename, error.strerror)
                options.pop("trt_engine_cache_enable", None)  # it would write to the current folder
        if not self.captures or provider.graph_option is None:
            return open_session(path, provider=provider, options=options, threads=self._threads)
        try:
            return open_session(path, provider=provider, options={**options, provider.graph_option: "1"})
        except EngineError as error:
            session = open_session(path, provider=provider, options=options)
            self.captures = False
            LOG.warning("runs are not captured as CUDA graphs, each is launched kernel by kernel: %s", error)
            return session


class OrtLane:
    """A lane that runs the sessions of a backend in its memory."""

    def __init__(self, backend: OrtBackend, memory: Any, number: int) -> None:
        self.memory: Any = memory
        self._backend, self._number = backend, number
        self._ids = itertools.count()

    def enter(self) -> None:
        self._backend.check_weights()
        if self._backend.lanes is not None:
            self.memory.enter()

    def bind(
        self,
        graph: GraphFacts,
        inputs: Mapping[str, DeviceArray],
        outputs: Mapping[str, DeviceArray],
        *,
        fixed: bool = False,
    ) -> Call:
        session = self._backend.session(graph)
        kind = self.memory.device.partition(":")[0]
        try:
            binding = session.io_binding()
            for name, array in inputs.items():
                place = (kind, self._number, array.dtype.type, array.shape, self.memory.address(array))
                binding.bind_input(name, *place)
            for name, array in outputs.items():
                place = (kind, self._number, array.dtype.type, array.shape, self.memory.address(array))
                binding.bind_output(name, *place)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise _failed(graph, error) from error
        options = self._run_options(fixed)
        kept = (dict(inputs), dict(outputs))  # ONNX Runtime holds addresses, not arrays

        def call() -> None:
            assert kept
            try:
                session.run_with_iobinding(binding, options)
            except Exception as error:  # as above
                raise _failed(graph, error) from error

        return call

    def sequence(self, calls: Sequence[Call]) -> CallSequence:
        return CallSequence(calls)

    def _run_options(self, fixed: bool) -> Any:
        """Return the run options; None on the CPU.

        On a GPU a run only submits its work to the stream. It is captured if its arrays are fixed.
        """
        if self._backend.lanes is None:
            return None
        options = require("onnxruntime", "ort-gpu").RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self._backend.captures:
            options.add_run_config_entry("gpu_graph_id", str(next(self._ids)) if fixed else _NOT_CAPTURED)
        return options


def open_session(
    path: Path,
    content: bytes | None = None,
    *,
    provider: Provider = CPU,
    options: Mapping[str, str] | None = None,
    threads: int | None = None,
) -> "InferenceSession":
    """Open a session of the graph at `path`, or of the model `content` with weights next to `path`.

    threads: number of threads of a run on the CPU. By default ONNX Runtime decides: one for each
    physical core. It knows of no limits, so if the process may not use all cores, the default is
    the number that it may use.

    Warns about nodes that the provider does not run. Raises EngineError if ONNX Runtime cannot open
    the graph or cannot load the provider, and BundleError if the weights are a link that it does
    not follow.
    """
    ort = require("onnxruntime")
    settings = ort.SessionOptions()
    settings.log_severity_level = 3  # log errors only
    usable = usable_cores()
    if threads is None and usable < (os.cpu_count() or 1):
        threads = usable
    if threads is not None:
        settings.intra_op_num_threads = threads
    if content is not None:
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    if provider is not CPU:
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        ort.preload_dlls()  # load CUDA and cuDNN from NVIDIA's Python packages
    try:
        session = ort.InferenceSession(
            str(path) if content is None else content,
            settings,
            providers=[(provider.name, dict(options or {}))],
            disabled_optimizers=provider.disabled_optimizers,
        )
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        if "escapes model directory" in str(error):
            raise BundleError(
                f"{path}: its weights are a link out of their folder, which ONNX Runtime does not follow: copy the "
                f"bundle with the files that its links lead to (cp -rL, or snapshot_download with local_dir=)"
            ) from error
        raise EngineError(f"{path.name}: ONNX Runtime {ort.__version__} cannot open it: {error}") from error
    if provider.name not in session.get_providers():
        raise EngineError(
            f"{path.name}: expected ONNX Runtime to run it with {provider.name}, found {session.get_providers()}: it "
            f"could not load that provider's libraries; see its log messages"
        )
    if provider is not CPU and (strays := strays_of(session, provider.name)):
        LOG.warning(
            "%s: %d nodes are not run by %s: %s; build with a `batch`, so that shapes are known",
            path.name,
            len(strays),
            provider.name,
            ", ".join(strays),
        )
    return session


def strays_of(session: "InferenceSession", provider: str) -> list[str]:
    """Return the nodes that a session runs outside `provider`, as "name (operator) in provider".

    The session must record the assignment (option `session.record_ep_graph_assignment_info`).
    """
    parts: Sequence[Any] = session.get_provider_graph_assignment_info()
    return [
        f"{node.name} ({node.op_type}) in {part.ep_name}"
        for part in parts
        if part.ep_name != provider
        for node in part.get_nodes()
    ]


def _cuda_memory(number: int, stream: object | None) -> Any:
    from sg_runtime.devices.cuda import CudaMemory

    return CudaMemory(number, stream)


def _failed(graph: GraphFacts, error: Exception) -> SgError:
    """Convert ONNX Runtime's exception to an SgError.

    Only its text shows whether memory did not suffice.
    """
    text = f"{graph.file}: ONNX Runtime failed: {error}"
    lacking = ("Failed to allocate memory", "out of memory", "bad allocation", "CUBLAS_STATUS_ALLOC_FAILED")
    return DeviceMemoryError(text) if any(sign in str(error) for sign in lacking) else EngineError(text)
