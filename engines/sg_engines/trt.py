"""TensorRT and TensorRT-RTX: one code path from a typed ONNX graph to an engine.

The caller passes in the library's module. An engine computes in the types of its graph: no function
here chooses a precision. TensorRT 11 and TensorRT-RTX compute so always, TensorRT 10 if the network
is strongly typed; the others accept that flag. If the libraries differ, the code checks which names
the module has, not its version.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sg_runtime.errors import EngineError
from sg_runtime.files import replacing

LOG = logging.getLogger("sg_engines")

Shape = tuple[int, ...]
Progress = Callable[[str, int, int], None]
"""Callback with (phase, steps done, steps in total)."""

FLAGS: Mapping[str, bool] = {"TF32": False, "REQUIRE_USER_ALLOCATION": True}
"""Builder flags that are set (True) or cleared (False) if the library has them.

TF32: set by default, it rounds the factors of FP32 products to 10 bits. REQUIRE_USER_ALLOCATION: of
TensorRT-RTX alone; the engine allocates nothing when it runs, so a CUDA graph can contain its runs.
"""

PHASE_DEPTH = 1
"""Depth of the reported phases: children of the root, not the hundreds of phases below them."""


@dataclass(frozen=True, slots=True)
class EngineRecipe:
    """How to build an engine.

    profiles: for each profile, the shape of every input that has symbolic sizes; min = opt = max.
    compute_capabilities: GPUs to build for, 86 for 8.6; empty for the library's choice. TensorRT
        chooses the GPU of this machine.
    workspace: limit of scratch memory in bytes; None for the library's choice.
    timing_cache: file that TensorRT reads and extends.
    """

    profiles: tuple[Mapping[str, Shape], ...]
    compute_capabilities: tuple[int, ...] = ()
    workspace: int | None = None
    timing_cache: Path | None = None


def build_engine(trt: Any, graph: Path, plan: EngineRecipe, output: Path, progress: Progress) -> None:
    """Build the engine of the ONNX graph at `graph` and write it to `output`.

    trt: the library's module. `output` is replaced atomically. Raises EngineError if the library
    cannot parse the graph, with the node's name. Raises EngineError if the library cannot build the
    engine, with the library's reasons. A timing cache that cannot be written is a warning.
    """
    log = _log(trt)
    log.errors.clear()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        causes = "; ".join(f"node {e.node_name() or '?'} ({e.node_operator() or '?'}): {e.desc()}" for e in errors)
        raise EngineError(f"{graph.name}: {_name(trt)} cannot parse it: {causes}")
    config = builder.create_builder_config()
    config.progress_monitor = _monitor(trt, progress)
    for name, wanted in builder_flags(trt).items():
        flag = getattr(trt.BuilderFlag, name)
        config.set_flag(flag) if wanted else config.clear_flag(flag)
    if plan.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, plan.workspace)
    if plan.compute_capabilities:
        config.num_compute_capabilities = len(plan.compute_capabilities)
        for index, number in enumerate(plan.compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{number}"), index)
    for shapes in plan.profiles:
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            profile.set_shape(name, shape, shape, shape)
        if config.add_optimization_profile(profile) < 0:
            raise EngineError(f"{graph.name}: {_name(trt)} refuses the profile {dict(shapes)}: {_reasons(log)}")
    cache = _timing_cache(config, plan.timing_cache)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise EngineError(f"{graph.name}: {_name(trt)} cannot build it: {_reasons(log)}")
    with replacing(output) as temporary:
        temporary.write_bytes(serialized)
    if cache is not None and plan.timing_cache is not None:
        try:
            with replacing(plan.timing_cache) as temporary:
                temporary.write_bytes(config.get_timing_cache().serialize())
        except OSError as error:  # a cache is not worth a build
            LOG.warning("timing cache %s: not written (%s)", plan.timing_cache, error.strerror or error)


def builder_flags(trt: Any) -> dict[str, bool]:
    """Return the flags of FLAGS that the library has."""
    return {name: wanted for name, wanted in FLAGS.items() if hasattr(trt.BuilderFlag, name)}


def has_timing_cache(trt: Any) -> bool:
    """Whether the library uses a timing cache.

    TensorRT-RTX ignores it, as it times kernels when an engine runs.
    """
    return not hasattr(trt, "IRuntimeCache")


def _timing_cache(config: Any, path: Path | None) -> Any:
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if not config.set_timing_cache(cache, False):
        raise EngineError(f"{path}: expected a timing cache of this TensorRT and this GPU: give another, or delete it")
    return cache


def _name(trt: Any) -> str:
    return f"{'TensorRT-RTX' if 'rtx' in trt.__name__ else 'TensorRT'} {trt.__version__}"


def _reasons(log: Any) -> str:
    return "; ".join(log.errors) or "it gives no reason"


@functools.cache
def _log(trt: Any) -> Any:
    """Return this process's logger, which collects error messages.

    TensorRT keeps the first logger that it receives, so there is one per process.
    """

    class Log(trt.ILogger):  # type: ignore[misc]  # the base class is known only at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message.strip())

    return Log()


def _monitor(trt: Any, progress: Progress) -> Any:
    """Return a progress monitor that reports the phases at PHASE_DEPTH to `progress`."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the base class is known only at run time
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[int, int]] = {}  # steps and depth

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phases[name] = steps, self.phases[parent][1] + 1 if parent in self.phases else 0
            self._report(name, 0)

        def step_complete(self, name: str, step: int) -> bool:
            self._report(name, step + 1)
            return True

        def phase_finish(self, name: str) -> None:
            pass

        def _report(self, name: str, done: int) -> None:
            steps, depth = self.phases[name]
            if depth == PHASE_DEPTH:
                progress(name, done, steps)

    return Monitor()
