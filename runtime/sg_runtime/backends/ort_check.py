"""Checks whether ONNX Runtime's CUDA provider works on this machine, before a graph is opened."""

import contextlib
import io
import threading
from importlib import import_module, metadata
from types import ModuleType
from typing import Any

import numpy as np

from sg_runtime.devices.gpus import driver_cuda, find_gpus
from sg_runtime.errors import BundleError, DeviceError, EngineError
from sg_runtime.extras import install_extra, older, require

CUDA = "CUDAExecutionProvider"

LEAST = "1.31.1"
"""Least release of onnxruntime-gpu, as in pyproject.toml.

Before it, a captured GatherND reads freed memory
(https://github.com/microsoft/onnxruntime/pull/32120).
"""

_DRIVERS = {12: "525", 13: "580"}
"""First driver of each major CUDA version, on Linux.

https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
"""

_WHEELS = ("onnxruntime", "onnxruntime-gpu")
"""Distributions that install the module `onnxruntime`, each over the other."""


def check_cuda_provider(number: int) -> None:
    """Raise unless ONNX Runtime's CUDA provider works on GPU `number`.

    The last check loads the provider's library and allocates 4 bytes on the GPU. Raises EngineError
    if the provider is missing, too old or cannot be loaded, BundleError if the GPU does not exist,
    and DeviceError if the driver is too old or fails.
    """
    try:
        ort: Any = import_module("onnxruntime")
        available = ort.get_available_providers()
    except ImportError:
        available = []
    if CUDA not in available:
        raise EngineError(f"ONNX Runtime here has no {CUDA}; for an NVIDIA GPU: {two_wheels() or install_gpu_wheel()}")
    if older(ort.__version__, LEAST):
        raise EngineError(
            f"onnxruntime-gpu {ort.__version__} is older than {LEAST}, before which captured CUDA graphs compute wrong "
            f"samples: pip install 'onnxruntime-gpu[cuda]>={LEAST}'"
        )
    if number >= (gpus := len(find_gpus("ort-gpu"))):
        raise BundleError(f"cuda:{number}: expected a GPU of this number, found {gpus}")
    _check_driver(ort)
    if (fault := _load_fault(ort, number)) is not None:
        raise EngineError(f"{CUDA} cannot be loaded: {fault}; {install_extra('ort-gpu')}")


def two_wheels() -> str | None:
    """Return what to do about two wheels that have overwritten each other's files.

    None if there is at most one.
    """
    found = {}
    for name in _WHEELS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    if len(found) < len(_WHEELS):
        return None
    both = " and ".join(f"{name} {version}" for name, version in found.items())
    return f"{both} are both installed and share their files, so neither works reliably: {install_gpu_wheel()}"


def install_gpu_wheel() -> str:
    """Return the commands that replace any ONNX Runtime by the one for NVIDIA's GPUs."""
    return f"pip uninstall -y {' '.join(_WHEELS)}, then {install_extra('ort-gpu')}"


def preload_libraries() -> list[str]:
    """Load CUDA from NVIDIA's Python packages or the system, as the provider's library needs it.

    Returns why libraries cannot be loaded. ONNX Runtime prints that to standard output, which
    belongs to the caller's results.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        require("onnxruntime").preload_dlls()
    # Failed to load FILE: REASON
    return [line.partition(": ")[2] for line in printed.getvalue().splitlines() if line.startswith("Failed to load ")]


def _check_driver(ort: ModuleType) -> None:
    """Raise DeviceError if the driver is too old for the CUDA that ONNX Runtime was built for."""
    built = getattr(ort, "cuda_version", "")
    major = int(built.partition(".")[0] or 0)
    newest = driver_cuda()
    if newest[0] < major:
        least = f" {_DRIVERS[major]} or later" if major in _DRIVERS else ""
        raise DeviceError(
            f"the CUDA driver supports CUDA {newest[0]}.{newest[1]}, and onnxruntime-gpu {ort.__version__} is built "
            f"for CUDA {built}: install NVIDIA's driver{least}"
        )


def _load_fault(ort: Any, number: int) -> str | None:
    """Return why the provider's library cannot be loaded and used on a GPU, None if it can."""
    if missing := preload_libraries():
        return "; ".join(missing)
    fault: list[str] = []

    def load() -> None:
        try:
            ort.OrtValue.ortvalue_from_shape_and_type([1], np.float32, "cuda", number)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            fault.append(str(error).strip())

    thread = threading.Thread(target=load)  # it makes the GPU current in its thread
    thread.start()
    thread.join()
    return fault[0] if fault else None
