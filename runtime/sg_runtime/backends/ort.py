"""ONNX Runtime backend: one execution provider, with inputs and outputs bound to device arrays."""

import logging
import os
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

from sg_runtime.backends.base import Call, CallSequence
from sg_runtime.backends.ort_check import preload_libraries
from sg_runtime.backends.ort_weights import DeviceWeights
from sg_runtime.bundle import Bundle
from sg_runtime.devices.memory import DeviceArray, HostMemory
from sg_runtime.errors import BundleError, DeviceMemoryError, EngineError, SgError
from sg_runtime.extras import require
from sg_runtime.host import usable_cores
from sg_runtime.manifest import GraphFacts, PartFacts

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

LOG = logging.getLogger("sg_runtime")

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Provider:
    """An execution provider.

    name: ONNX Runtime's name of the provider.
    options: provider options.
    settings: configuration entries of a session.
    graph_option: option that captures runs as CUDA graphs, one per `gpu_graph_id`; None if the
        provider has none.
    disabled_optimizers: ONNX Runtime's names of graph optimizers to disable.
    """

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    graph_option: str | None = None
    disabled_optimizers: tuple[str, ...] = ()


PROVIDERS = {
    "onnxruntime-cpu": Provider("CPUExecutionProvider"),
    "onnxruntime-cuda": Provider(
        "CUDAExecutionProvider",
        # TF32 would make FP32 graphs a thousand times less accurate. By default the arena doubles
        # with each extension.
        {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"},
        # Weights that are not shared stay out of the arena, too.
        {"session.use_device_allocator_for_initializers": "1"},
        graph_option="enable_cuda_graph",
        # This optimizer fuses all slices of the modulations into one Split with parts of several
        # sizes. That Split needs pinned memory, 8 bytes for each modulation. For DiT-XL/2 the arena
        # allocates it during the capture, and CUDA forbids that.
        disabled_optimizers=("GatherSliceToSplitFusion",),
    ),
}
"""Execution provider of each ONNX Runtime backend, by the names in `BACKENDS`."""

CPU = PROVIDERS["onnxruntime-cpu"]

_ELEMENTS = {"bfloat16": 16}
"""Types that NumPy lacks, by name, as TensorProto.DataType."""

UNUSED_GRAPHS = 128
"""Maximum number of captured CUDA graphs of a session that no call can replay any more."""


@dataclass
class _Opened:
    """A session and its captured CUDA graphs.

    ONNX Runtime 1.31.1 frees them with the session alone: its CUDA provider inherits the
    `ReleaseCapturedGraph` that does nothing. A graph holds the addresses of its arrays, so runs
    with equal keys share a graph.

    ids: `gpu_graph_id` by name, address and shape of all arrays.
    captured: ids that have been captured.
    calls: the call that is bound to the arrays of a key, as long as it is used.
    """

    session: Any
    ids: dict[Hashable, int] = field(default_factory=dict)
    captured: set[int] = field(default_factory=set)
    calls: "WeakValueDictionary[Hashable, Any]" = field(default_factory=WeakValueDictionary)


class OrtBackend:
    """Sessions of ONNX Runtime, one per ONNX file, opened on first use.

    On a GPU all sessions share one stream and one lane, because a session runs in the stream that
    it was opened with. One thread opens and runs them, whoever asks: ONNX Runtime keeps captured
    CUDA graphs and the handles of CUDA's libraries for each thread. Weights are uploaded once and
    shared by the sessions.
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
        part: PartFacts | None = None,
    ) -> None:
        """Select the provider and the memory; on a GPU, upload the weights.

        name: name of the backend, as in `BACKENDS`.
        number: number of the GPU.
        stream: CUDA stream to run in; see `cuda.stream_handle`.
        capture: whether runs are captured as CUDA graphs if the provider supports it.
        threads: number of threads of a run on the CPU; see `open_session`.
        open_graph: replacement of `open_session` on the CPU.
        part: part whose graphs it runs; None for the denoiser.

        Raises DeviceMemoryError if the weights do not fit on the GPU.
        """
        require("onnxruntime")
        self.name = name
        self.lanes = None if name == "onnxruntime-cpu" else 1
        self.batches: tuple[int, ...] | None = None if bundle.manifest.batch is None else (bundle.manifest.batch,)
        self.captures = capture and PROVIDERS[name].graph_option is not None
        self._bundle, self._number, self._threads = bundle, number, threads
        self._memory: Any = HostMemory() if self.lanes is None else _cuda_memory(number, stream)
        self._open_graph = open_graph
        own = (bundle.manifest if part is None else part).all_graphs
        self._weights = [name for name in bundle.manifest.files if name.endswith(".bin")]
        self._sessions: dict[Path, _Opened] = {}
        self._lock = threading.Lock()
        self._own: OwnThread | None = None
        self._shared: DeviceWeights | None = None
        if self.lanes is not None:
            self._own = OwnThread("sg-export-onnxruntime")
            self._own.do(self._memory.enter)
            with bundle.reading(*self._weights):
                self._shared = self._own.do(lambda: DeviceWeights(self._memory, map(bundle.onnx, own)))

    def lane(self) -> "OrtLane":
        return OrtLane(self, self._memory, self._number)

    def at(self, bundle: Bundle) -> "OrtBackend":
        return self  # it opens the graphs of all sizes, over the same weights

    def keep(self) -> None:
        pass  # no provider compiles

    def do(self, work: "Callable[[], Result]") -> "Result":
        """Return work(), which uses sessions. On a GPU it runs in the thread of the sessions."""
        return work() if self._own is None else self._own.do(work)

    def start(self, work: Callable[[], None]) -> "Future[None]":
        """Start work(), which uses sessions on a GPU, in the thread of the sessions."""
        assert self._own is not None
        return self._own.start(work)

    def session(self, graph: GraphFacts) -> "InferenceSession":
        """Return the session of a graph's file; see `opened`."""
        return self.opened(graph).session

    def opened(self, graph: GraphFacts) -> _Opened:
        """Return the session of a graph's file and its captured graphs.

        Raises EngineError if the file cannot be opened, and BundleError if it was changed since the
        bundle was opened.
        """
        with self._lock:
            path = self._bundle.onnx(graph)
            opened = self._sessions.get(path)
            if opened is not None and len(opened.ids) - len(opened.calls) >= UNUSED_GRAPHS:
                opened = None  # it ends with the last call that is bound to it
            if opened is None:
                with self._bundle.reading(path.relative_to(self._bundle.root).as_posix(), *self._weights):
                    opened = _Opened(self.do(lambda: self._open(path)))
                self._sessions[path] = opened
            return opened

    def release(self) -> None:
        """Close the sessions that hold captured CUDA graphs, which frees the graphs."""

        def close() -> None:
            self._sessions = {path: opened for path, opened in self._sessions.items() if not opened.ids}

        with self._lock:
            self.do(close)

    def check_weights(self) -> None:
        """Raise BundleError if weights that sessions have mapped were written in place."""
        if self._sessions:
            self._bundle.check_unchanged(*self._weights, mapped=True)

    def _open(self, path: Path) -> "InferenceSession":
        if self._open_graph is not None:
            return self._open_graph(path)
        provider, options = PROVIDERS[self.name], {}
        if self._shared is None:
            return open_session(path, provider=provider, threads=self._threads)
        options = {**provider.options, "device_id": str(self._number), "user_compute_stream": str(self._memory.stream)}
        shared = self._shared.values(path)
        if not self.captures or provider.graph_option is None:
            return open_session(path, provider=provider, options=options, shared=shared)
        try:
            return open_session(path, provider=provider, options={**options, provider.graph_option: "1"}, shared=shared)
        except EngineError as error:
            session = open_session(path, provider=provider, options=options, shared=shared)
            self.stop_captures(error)
            return session

    def stop_captures(self, error: Exception) -> None:
        """Launch kernels one by one from now on, and warn once. Captured graphs stay in use."""
        if self.captures:
            self.captures = False
            LOG.warning("runs are not captured as CUDA graphs, each is launched kernel by kernel: %s", error)


class OrtLane:
    """A lane that runs the sessions of a backend in its memory."""

    def __init__(self, backend: OrtBackend, memory: Any, number: int) -> None:
        self.memory: Any = memory
        self._backend, self._number = backend, number

    def enter(self) -> None:
        self._backend.check_weights()
        self.memory.enter()

    def release(self) -> None:
        self._backend.release()

    def bind(
        self,
        graph: GraphFacts,
        inputs: Mapping[str, DeviceArray],
        outputs: Mapping[str, DeviceArray],
        *,
        fixed: bool = False,
    ) -> Call:
        opened = self._backend.opened(graph)
        kind = self.memory.device.partition(":")[0]
        arrays = [*inputs.items(), *outputs.items()]
        elements = {t.name: _ELEMENTS[t.dtype] for t in (*graph.inputs, *graph.outputs) if t.dtype in _ELEMENTS}
        try:
            binding = opened.session.io_binding()
            for index, (name, array) in enumerate(arrays):
                bind = binding.bind_input if index < len(inputs) else binding.bind_output
                element = elements.get(name, array.dtype.type)
                bind(name, kind, self._number, element, array.shape, self.memory.address(array))
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise _failed(graph, error) from error
        if self._backend.lanes is None:
            return _Call(self._backend, graph, opened, binding, arrays)
        call = _GpuCall(self._backend, graph, opened, binding, arrays, self.memory)
        if fixed and self._backend.captures:
            key = tuple((name, self.memory.address(array), array.shape) for name, array in arrays)
            call.number = opened.ids.setdefault(key, len(opened.ids))
            opened.calls[key] = call
        return call

    def sequence(self, calls: Sequence[Call]) -> CallSequence:
        return CallSequence(calls) if self._backend.lanes is None else _HandedSequence(calls, self._backend)


class _Call:
    """A bound run. It keeps its arrays alive, because ONNX Runtime holds only their addresses."""

    def __init__(
        self, backend: OrtBackend, graph: GraphFacts, opened: _Opened, binding: Any, arrays: Sequence[object]
    ) -> None:
        self._backend, self._graph, self._opened, self._binding = backend, graph, opened, binding
        self._arrays = arrays

    def __call__(self) -> None:
        self._run(None)

    def _run(self, options: Any) -> None:
        try:
            self._opened.session.run_with_iobinding(self._binding, options)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise _failed(self._graph, error) from error


class _GpuCall(_Call):
    """A run that is only submitted to the stream, in the thread of the sessions.

    number: the `gpu_graph_id` with which it is captured, None if it is not.
    """

    number: int | None = None

    def __init__(
        self,
        backend: OrtBackend,
        graph: GraphFacts,
        opened: _Opened,
        binding: Any,
        arrays: Sequence[object],
        memory: Any,
    ) -> None:
        super().__init__(backend, graph, opened, binding, arrays)
        self._memory = memory

    def __call__(self) -> None:
        self._backend.do(self._submit)

    def _submit(self) -> None:
        if self.number in self._opened.captured:
            self._run(_run_options(self.number))
        elif self.number is None or not self._backend.captures:
            self._run(_run_options(None))
        else:
            self._capture(self.number)

    def _capture(self, number: int) -> None:
        """Capture the run. If that fails, submit it without, and stop capturing.

        ONNX Runtime runs a graph plainly first, then captures it, then replays it, in one call.
        """
        try:
            with self._memory.captures:
                self._run(_run_options(number))
        except SgError as error:
            self._memory.end_capture()
            self._run(_run_options(None))
            self._backend.stop_captures(error)
        else:
            self._opened.captured.add(number)


class _HandedSequence(CallSequence):
    """Calls that the thread of the sessions makes in one go, while the caller is told of each."""

    def __init__(self, calls: Sequence[Call], backend: OrtBackend) -> None:
        super().__init__(calls)
        self._backend = backend

    def play(self, done: Callable[[int], None]) -> None:
        made: SimpleQueue[int | None] = SimpleQueue()
        ended = False

        def work() -> None:
            try:
                for number, call in enumerate(self.calls):
                    if ended:
                        return
                    call()
                    made.put(number)
            finally:
                made.put(None)

        playing = self._backend.start(work)
        try:
            for number in iter(made.get, None):
                done(number)
        finally:
            ended = True
            wait([playing])  # the caller may free the arrays after an error
        try:
            playing.result()
        finally:
            del playing  # its error holds this frame


class OwnThread:
    """A thread that does the work of all callers, one after another. It ends with this object."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, name)
        self._ident = self._pool.submit(threading.get_ident).result()

    def start(self, work: "Callable[[], Result]") -> "Future[Result]":
        return self._pool.submit(work)

    def do(self, work: "Callable[[], Result]") -> "Result":
        """Return work(), or raise its error. Work may do more work."""
        if threading.get_ident() == self._ident:
            return work()
        done = self.start(work)
        try:
            return done.result()
        finally:
            wait([done])  # an interrupted caller must not leave work behind
            del done  # its error holds this frame


def _run_options(graph_id: int | None) -> Any:
    """Return the options of a run that only submits its work to the stream.

    graph_id: `gpu_graph_id` of the run, None if it is neither captured nor replayed.
    """
    options = require("onnxruntime", "ort-gpu").RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    options.add_run_config_entry("gpu_graph_id", "-1" if graph_id is None else str(graph_id))
    return options


def open_session(
    path: Path,
    content: bytes | None = None,
    *,
    provider: Provider = CPU,
    options: Mapping[str, str] | None = None,
    threads: int | None = None,
    shared: Mapping[str, Any] | None = None,
) -> "InferenceSession":
    """Open a session of the graph at `path`, or of the model `content` with weights next to `path`.

    threads: number of threads of a run on the CPU. By default ONNX Runtime decides: one for each
    physical core. It knows of no limits, so if the process may not use all cores, the default is
    the number that it may use.
    shared: weights that are on the provider's device already, by name; see `ort_weights`.

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
    for name, value in (shared or {}).items():
        settings.add_initializer(name, value)
    if provider is not CPU:
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        preload_libraries()
    for name, value in provider.settings.items():
        settings.add_session_config_entry(name, value)
    try:
        session = ort.InferenceSession(
            str(path) if content is None else content,
            settings,
            providers=[(provider.name, dict(options or {}))],
            disabled_optimizers=provider.disabled_optimizers,
            enable_fallback=0,  # to the CPU, which it prints to standard output
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
