"""TensorRT and TensorRT-RTX backend: engines, execution contexts and CUDA graphs of their runs.

Both libraries share this code. It was written without a GPU and has not run on one. A test checks
the names used here against the libraries' bindings.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from sg_runtime.backends.base import Call, CallSequence
from sg_runtime.build_command import build_command
from sg_runtime.bundle import Bundle
from sg_runtime.devices.cuda import CudaArray, CudaMemory, use_gpu
from sg_runtime.devices.memory import DeviceArray
from sg_runtime.errors import BundleError, DeviceError, EngineError
from sg_runtime.files import cache_folder, replacing
from sg_runtime.manifest import ENGINE_NAMES, ENGINE_TARGETS, EngineFacts, EngineLibrary, GraphFacts

LOG = logging.getLogger("sg_runtime")


class TrtBackend:
    """Engines of a bundle for one library. They are deserialised once and shared by all lanes."""

    def __init__(
        self,
        bundle: Bundle,
        library: EngineLibrary,
        number: int = 0,
        stream: object | None = None,
        capture: bool = True,
    ) -> None:
        """Deserialise the engines.

        number: number of the GPU.
        stream: CUDA stream to run in; see `cuda.stream_handle`.
        capture: whether runs are captured as CUDA graphs.

        Raises EngineError if the library cannot open an engine.
        """
        self.name = ENGINE_TARGETS[library]
        self.lanes: int | None = None if stream is None else 1
        self.batches: tuple[int, ...] | None = bundle.manifest.engine_batches(library)
        self.bundle, self.library, self.captures = bundle, library, capture
        self._number, self._stream = number, stream
        self._trt = import_module(library)
        use_gpu(number)  # TensorRT loads engines into the current GPU
        self._log = self._trt.Logger(self._trt.Logger.ERROR)
        self._runtime = self._trt.Runtime(self._log)
        facts = [engine for engine in bundle.manifest.engines if engine.library == library]
        self._engines = {engine.file: self._deserialize(engine) for engine in facts}
        self._configs = {engine.file: self._config(engine) for engine in facts}
        self._lock = threading.Lock()

    @property
    def scratch_bytes(self) -> int:
        """Scratch memory of a lane in bytes: the maximum of all engines.

        A lane runs one engine at a time.
        """
        return max(int(engine.device_memory_size_v2) for engine in self._engines.values())

    def lane(self) -> "TrtLane":
        return TrtLane(self, CudaMemory(self._number, self._stream))

    def context(self, engine: EngineFacts, profile: int, memory: CudaMemory, scratch: CudaArray) -> Any:
        """Return a context for one profile with shared scratch memory and the profile's shapes set.

        Raises EngineError if the library cannot create it.
        """
        opened, config = self._engines[engine.file], self._configs[engine.file]
        with self._lock:
            context = opened.create_execution_context(config or self._user_managed)
        if context is None or not context.set_optimization_profile_async(profile, memory.stream):
            raise EngineError(
                f"{engine.file}: {ENGINE_NAMES[self.library]} cannot create a context for profile {profile}"
            )
        context.set_device_memory(scratch.address, scratch.nbytes)
        for number in range(opened.num_io_tensors):
            name = opened.get_tensor_name(number)
            if opened.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT:
                shape = opened.get_tensor_profile_shape(name, profile)[0]  # min, opt and max are equal
                context.set_input_shape(name, tuple(shape))
        return context

    def keep(self) -> None:
        """Write the kernels that TensorRT-RTX compiled for this GPU to the user's cache folder."""
        for file, config in self._configs.items():
            if config is None:
                continue
            with contextlib.suppress(OSError):  # a cache that cannot be written must not end a run
                path = self._cache_file(file)
                path.parent.mkdir(parents=True, exist_ok=True)
                content = bytes(config.get_runtime_cache().serialize())
                if not path.exists() or path.stat().st_size != len(content):
                    with replacing(path) as temporary:
                        temporary.write_bytes(content)

    @property
    def _user_managed(self) -> Any:
        return self._trt.ExecutionContextAllocationStrategy.USER_MANAGED

    def _cache_file(self, file: str) -> Path:
        return cache_folder() / "tensorrt-rtx" / f"{self.bundle.manifest.files[file].sha256}.cache"

    def _deserialize(self, engine: EngineFacts) -> Any:
        with self.bundle.reading(engine.file):
            content = self.bundle.file(engine.file).read_bytes()
        found = self._runtime.deserialize_cuda_engine(content)
        if found is None:
            raise EngineError(
                f"{self.bundle.path}: {engine.file}: {ENGINE_NAMES[self.library]} cannot open it; see its log "
                f"messages, then build it again: {build_command(self.bundle.manifest, str(self.bundle.path))}"
            )
        return found

    def _config(self, engine: EngineFacts) -> Any:
        """Return TensorRT-RTX's runtime config of an engine, None for TensorRT.

        It includes the kernels that earlier processes cached.
        """
        if not hasattr(self._trt, "IRuntimeCache"):
            return None
        config = self._engines[engine.file].create_runtime_config()
        config.set_execution_context_allocation_strategy(self._user_managed)
        cache = config.create_runtime_cache()
        with contextlib.suppress(OSError):
            path = self._cache_file(engine.file)
            if not cache.deserialize(path.read_bytes()):
                LOG.info("%s: made for another driver or GPU; kernels are compiled again", path)
        config.set_runtime_cache(cache)
        return config


class TrtLane:
    """Contexts of the engines, one per profile, with one scratch allocation and one stream."""

    def __init__(self, backend: TrtBackend, memory: CudaMemory) -> None:
        self.memory: Any = memory
        self._backend = backend
        self._scratch = memory.empty((backend.scratch_bytes,), "uint8")
        self._contexts: dict[tuple[str, int], Any] = {}
        self._unused: dict[tuple[int, ...], CudaArray] = {}

    def enter(self) -> None:
        self.memory.enter()

    def release(self) -> None:
        pass  # CUDA graphs are destroyed with the sequences that hold them

    def bind(
        self,
        graph: GraphFacts,
        inputs: Mapping[str, DeviceArray],
        outputs: Mapping[str, DeviceArray],
        *,
        fixed: bool = False,
    ) -> Call:
        batch = inputs["t" if graph.kind == "condition" else "x"].shape[0]
        found = self._backend.bundle.manifest.engine(graph, batch, self._backend.library)
        if found is None:
            raise BundleError(
                f"{self._backend.bundle.path}: {graph.name} has no engine of {ENGINE_NAMES[self._backend.library]} for "
                f"batches of {batch}; build it again: "
                f"{build_command(self._backend.bundle.manifest, str(self._backend.bundle.path), batch=batch)}"
            )
        engine, profile = found
        context = self._context(engine, profile)
        arrays: dict[str, Any] = {**inputs, **outputs}
        for tensor in graph.outputs:  # every output needs an address, requested or not
            if tensor.name not in arrays:
                shape = tuple(context.get_tensor_shape(tensor.name))
                arrays[tensor.name] = self._discard(shape, tensor.dtype)

        def call() -> None:
            for name, array in arrays.items():
                context.set_tensor_address(name, array.address)
            if not context.execute_async_v3(self.memory.stream):
                raise EngineError(f"{engine.file}: {ENGINE_NAMES[self._backend.library]} failed; see its log messages")

        return call

    def sequence(self, calls: Sequence[Call]) -> CallSequence:
        return CapturedSequence(calls, self.memory) if self._backend.captures else CallSequence(calls)

    def _context(self, engine: EngineFacts, profile: int) -> Any:
        key = engine.file, profile
        if key not in self._contexts:
            self._contexts[key] = self._backend.context(engine, profile, self.memory, self._scratch)
        return self._contexts[key]

    def _discard(self, shape: tuple[int, ...], dtype: str) -> CudaArray:
        """Return memory for outputs that are not read, one allocation per shape."""
        if shape not in self._unused:
            self._unused[shape] = self.memory.empty(shape, dtype)
        return self._unused[shape]


class CapturedSequence(CallSequence):
    """Calls that are captured as one CUDA graph on the second play, if capture is possible.

    On the first play TensorRT may allocate memory and compile kernels. A graph can contain neither.
    """

    def __init__(self, calls: Sequence[Call], memory: CudaMemory) -> None:
        super().__init__(calls)
        self._memory = memory
        self._played = False
        self._graph: Call | None = None

    def play(self, done: Callable[[int], None]) -> None:
        if self._played and self._graph is None and self.calls:
            self._graph = self._capture()
        self._played = True
        if self._graph is None:
            super().play(done)
            return
        self._graph()
        for number in range(len(self.calls)):
            done(number)

    def _capture(self) -> Call:
        def plainly() -> None:
            super(CapturedSequence, self).play(lambda _: None)

        try:
            return self._memory.capture(plainly)
        except (DeviceError, EngineError) as error:
            LOG.warning("runs are not captured as a CUDA graph, each is launched kernel by kernel: %s", error)
            return plainly
