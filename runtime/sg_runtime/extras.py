"""The libraries that sg-export uses: what each is for, and which extra installs it."""

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from sg_runtime.errors import MissingExtraError


@dataclass(frozen=True, slots=True)
class Library:
    """A library.

    module: its name when it is imported.
    distribution: its name for pip.
    use: what needs it.
    extra: the extra of sg-export that installs it, None if sg-export always does.
    """

    module: str
    distribution: str
    use: str
    extra: str | None


LIBRARIES = (
    Library("numpy", "numpy", "runtime", None),
    Library("PIL", "pillow", "images", None),
    Library("onnxruntime", "onnxruntime", "backend onnxruntime-cpu", "ort"),
    Library("onnxruntime", "onnxruntime-gpu", "backends onnxruntime-cuda and others", "ort-gpu"),
    Library("tensorrt_rtx", "tensorrt-rtx", "engines of TensorRT-RTX", "tensorrt-rtx"),
    Library("tensorrt", "tensorrt", "engines of TensorRT", "tensorrt"),
    Library("cuda", "cuda-bindings", "engines", "tensorrt-rtx"),
    Library("torch", "torch", "building", "export"),
    Library("onnx", "onnx", "building", "export"),
    Library("onnxscript", "onnxscript", "building", "export"),
    Library("onnx_ir", "onnx-ir", "building", "export"),
    Library("ml_dtypes", "ml-dtypes", "building", "export"),
    Library("safetensors", "safetensors", "building", "export"),
    Library("sympy", "sympy", "building", "export"),
    Library("polygraphy", "polygraphy", "verify", "verify"),
)
"""All libraries, in the order in which `sg-export doctor` lists them."""


def install_command(module: str, extra: str | None = None) -> str | None:
    """The pip command that installs `module`, by the first extra that has it unless `extra` is given; else None."""
    extras = [library.extra for library in LIBRARIES if library.module == module.partition(".")[0]]
    chosen = extra or next(iter(extras), None)
    return None if chosen is None else f"pip install 'sg-export[{chosen}]'"


def require(module: str, extra: str | None = None) -> ModuleType:
    """Import `module`, which an extra of sg-export installs: the first in LIBRARIES that has it, or `extra`.

    Raises MissingExtraError with the pip command if the module, or a package that it is in, is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise MissingExtraError(f"{error.name} is not installed: {install_command(module, extra)}") from None
