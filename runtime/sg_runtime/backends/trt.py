"""TensorRT and TensorRT-RTX backend: engines, execution contexts and CUDA graphs of their runs.

Both libraries share this code. It was written without a GPU and has not run on one. A test checks
the names used here against the libraries' bindings.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from numpy.typing import DTypeLike

from sg_runtime.backends.base import Call, CallSequence
from sg_runtime.build_command import build_command
from sg_runtime.bundle import Bundle
from sg_runtime.devices.cuda import CudaArray, CudaMemory, keep_current, use_gpu
from sg_runtime.devices.memory import DeviceArray
from sg_runtime.errors import BundleError, DeviceError, EngineError
from sg_runtime.files import cache_folder, replacing
from sg_runtime.manifest import ENGINE_NAMES, ENGINE_TARGETS, EngineFacts, EngineLibrary, GraphFacts, PartFacts

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
        part: PartFacts | None = None,
    ) -> None:
        """Deserialise the engines.

        number: number of the GPU.
        stream: CUDA stream to run in; see `cuda.stream_handle`.
        capture: whether runs are captured as CUDA graphs.
        part: part whose engines it runs; None for the denoiser, at the size of `bundle`.

        Raises EngineError if the library cannot open an engine.
        """
        self.name = ENGINE_TARGETS[library]
        self.lanes: int | None = None if stream is None else 1
        self.batches: tuple[int, ...] | None = bundle.manifest.engine_batches(library)
        self.bundle, self.library, self.captures = bundle, library, capture
        self.holder = bundle.manifest if part is None else part
        self._number, self._stream = number, stream
        self._trt = import_module(library)
        use_gpu(number)  # TensorRT loads engines into the current GPU
        self._log = self._trt.Logger(self._trt.Logger.ERROR)
        self._runtime = self._trt.Runtime(self._log)
        engines = bundle.manifest.engines if part is None else part.all_engines
        facts = [engine for engine in engines if engine.library == library]
        self._engines = {engine.file: self._deserialize(engine) for engine in facts}
        self._configs = {engine.file: self._config(engine) for engine in facts}
        self._compiled: set[str] = set()  # engines that have new kernels
        self._lock = threading.Lock()

    @property
    def scratch_bytes(self) -> int:
        """Scratch memory of a lane in bytes: the maximum of all engines.

        A lane runs one engine at a time.
        """
        return max(int(engine.device_memory_size_v2) for engine in self._engines.values())

    def lane(self) -> "TrtLane":
        return TrtLane(self, CudaMemory(self._number, self._stream))

    def at(self, bundle: Bundle) -> "TrtBackend":
        """Return a backend of the engines of another size, which hold weights of their own."""
        with keep_current():
            return TrtBackend(bundle, self.library, self._number, self._stream, self.captures)

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

    def compiled(self, file: str) -> None:
        """Note that a context of the engine `file` made its first run, which compiles kernels."""
        if self._configs[file] is not None:
            with self._lock:
                self._compiled.add(file)

    def keep(self) -> None:
        """Write the kernels that TensorRT-RTX compiled for this GPU to the user's cache folder."""
        with self._lock:
            files, self._compiled = self._compiled, set()
        for file in files:
            with contextlib.suppress(OSError):  # a cache that cannot be written must not end a run
                path = self._cache_file(file)
                path.parent.mkdir(parents=True, exist_ok=True)
                content = bytes(self._configs[file].get_runtime_cache().serialize())
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

        It includes the kernels that earlier processes cached. Kernels for the shapes of a profile
        are compiled in the first run of a context. By default they are compiled in the background,
        and a CUDA graph that is captured meanwhile keeps the slower kernels for any shape.
        """
        if not hasattr(self._trt, "IRuntimeCache"):
            return None
        config = self._engines[engine.file].create_runtime_config()
        config.set_execution_context_allocation_strategy(self._user_managed)
        strategies = self._trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
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
        self.library = ENGINE_NAMES[backend.library]
        self._backend = backend
        self._scratch = memory.empty((backend.scratch_bytes,), "uint8")
        self._contexts: dict[tuple[str, int], Any] = {}
        self._ran: set[tuple[str, int]] = set()
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
        batch = inputs[graph.inputs[0].name].shape[0]
        found = self._backend.holder.engine(graph, batch, self._backend.library)
        if found is None:
            raise BundleError(
                f"{self._backend.bundle.path}: {graph.name} has no engine of {self.library} for "
                f"batches of {batch}; build it again: "
                f"{build_command(self._backend.bundle.manifest, str(self._backend.bundle.path), batch=batch)}"
            )
        engine, profile = found
        context = self._context(engine, profile)
        arrays: dict[str, Any] = {**inputs, **outputs}
        for tensor in graph.outputs:  # every output needs an address, requested or not
            if tensor.name not in arrays:
                shape = tuple(context.get_tensor_shape(tensor.name))
                arrays[tensor.name] = self._discard(shape, tensor.storage)
        return TrtCall(self, engine.file, profile, context, arrays)

    def sequence(self, calls: Sequence[Call]) -> CallSequence:
        if not self._backend.captures:
            return CallSequence(calls)
        return CapturedSequence(cast("Sequence[TrtCall]", calls), self.memory)

    def ran(self, file: str, profile: int) -> None:
        """Note that a context ran. Its first run compiles kernels."""
        if (file, profile) not in self._ran:
            self._ran.add((file, profile))
            self._backend.compiled(file)

    def _context(self, engine: EngineFacts, profile: int) -> Any:
        key = engine.file, profile
        if key not in self._contexts:
            self._contexts[key] = self._backend.context(engine, profile, self.memory, self._scratch)
        return self._contexts[key]

    def _discard(self, shape: tuple[int, ...], dtype: DTypeLike) -> CudaArray:
        """Return memory for outputs that are not read, one allocation per shape."""
        if shape not in self._unused:
            self._unused[shape] = self.memory.empty(shape, dtype)
        return self._unused[shape]


@dataclass(frozen=True, slots=True, eq=False)
class TrtCall:
    """A run of the engine in `file` with one profile over given arrays, by the tensor's name."""

    lane: TrtLane
    file: str
    profile: int
    context: Any
    arrays: Mapping[str, Any]

    def __call__(self) -> None:
        context = self.context
        for name, array in self.arrays.items():
            context.set_tensor_address(name, array.address)
        if not context.execute_async_v3(self.lane.memory.stream):
            raise EngineError(f"{self.file}: {self.lane.library} failed; see its log messages")
        self.lane.ran(self.file, self.profile)

    def check_capturable(self) -> None:
        """Raise EngineError if the library knows that a CUDA graph cannot contain this run.

        TensorRT-RTX says so; TensorRT lets the capture fail.
        """
        context = self.context
        if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(self.lane.memory.stream):
            raise EngineError(f"{self.file}: {self.lane.library} says that it cannot be captured")


class CapturedSequence(CallSequence):
    """Calls that are captured as one CUDA graph on the second play, if capture is possible.

    On the first play TensorRT may allocate memory and compile kernels. A graph can contain neither.
    """

    def __init__(self, calls: Sequence[TrtCall], memory: CudaMemory) -> None:
        super().__init__(calls)
        self._runs, self._memory = calls, memory
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
            for run in self._runs:
                run.check_capturable()
            return self._memory.capture(plainly)
        except (DeviceError, EngineError) as error:
            LOG.warning("runs are not captured as a CUDA graph, each is launched kernel by kernel: %s", error)
            return plainly
