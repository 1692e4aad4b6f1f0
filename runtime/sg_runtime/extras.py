"""The libraries that sg-export uses: the purpose of each, and the extra that installs it."""

import re
from dataclasses import dataclass
from importlib import import_module, metadata
from types import ModuleType

from sg_runtime.errors import MissingExtraError


@dataclass(frozen=True, slots=True)
class Library:
    """A library that sg-export uses.

    module: import name.
    distribution: name for pip.
    use: the part of sg-export that needs it.
    extra: extra of sg-export that installs it; None if sg-export always installs it.
    """

    module: str
    distribution: str
    use: str
    extra: str | None


LIBRARIES = (
    Library("numpy", "numpy", "runtime", None),
    Library("PIL", "pillow", "images", None),
    Library("onnxruntime", "onnxruntime", "backend onnxruntime-cpu", "ort"),
    Library("onnxruntime", "onnxruntime-gpu", "backend onnxruntime-cuda", "ort-gpu"),
    Library("tensorrt_rtx", "tensorrt-rtx", "TensorRT-RTX engines", "tensorrt-rtx"),
    Library("tensorrt", "tensorrt", "TensorRT engines", "tensorrt"),
    Library("cuda", "cuda-bindings", "engines", "tensorrt-rtx"),
    Library("tokenizers", "tokenizers", "prompts", "text"),
    Library("ftfy", "ftfy", "prompts", "text"),
    Library("ray", "ray", "sampling on several machines", "ray"),
    Library("torch", "torch", "building", "export"),
    Library("onnx", "onnx", "building", "export"),
    Library("onnxscript", "onnxscript", "building", "export"),
    Library("onnx_ir", "onnx-ir", "building", "export"),
    Library("ml_dtypes", "ml-dtypes", "building", "export"),
    Library("safetensors", "safetensors", "building", "export"),
    Library("sympy", "sympy", "building", "export"),
    Library("diffusers", "diffusers", "building text encoders and decoders", "diffusers"),
    Library("transformers", "transformers", "building text encoders", "diffusers"),
    Library("polygraphy", "polygraphy", "verify", "verify"),
    Library("ray", "ray", "serving", "serve"),
    Library("starlette", "starlette", "serving", "serve"),
    Library("uvicorn", "uvicorn", "serving", "serve"),
    Library("prometheus_client", "prometheus-client", "serving", "serve"),
)
"""All libraries, in the order of `sg-export doctor`."""


def install_extra(extra: str) -> str:
    """Return how to install an extra of sg-export. sg-export is on no registry."""
    return f"pip install -e '.[{extra}]' in a checkout of sg-export"


def install_command(module: str, extra: str | None = None) -> str | None:
    """Return how to install `module`, see `install_extra`, or None if no extra installs it.

    extra: extra to install; by default the first one in LIBRARIES that contains `module`.
    """
    extras = [library.extra for library in LIBRARIES if library.module == module.partition(".")[0]]
    chosen = extra or next(iter(extras), None)
    return None if chosen is None else install_extra(chosen)


def outdated(distribution: str | None = None) -> list[str]:
    """Return a message for each installed library that is older than sg-export's metadata allows.

    distribution: the only library to look at; None for all. A message names the version found and
    the one to install.
    """
    try:
        claims = metadata.requires("sg-export") or []
    except metadata.PackageNotFoundError:  # run from a folder
        return []
    messages = []
    for claim in claims:
        bound = re.match(r"([\w.-]+)(?:\[.*?\])? *>= *([\d.]+)", claim)
        if bound is None or "dev" in claim.partition(";")[2]:
            continue
        name, least = bound.groups()
        if distribution not in (None, name):
            continue
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if older(found, least):
            messages.append(
                f"{name} {found} is older than {least}, which sg-export needs: pip install '{name}>={least}'"
            )
    return messages


def older(found: str, least: str) -> bool:
    """Return whether version `found` is before version `least`."""
    return _numbers(found) < _numbers(least)


def _numbers(version: str) -> list[int]:
    """Return the release numbers of a version, without zeros at the end."""
    numbers = [int(number) for number in re.match(r"[\d.]*", version)[0].split(".") if number]  # type: ignore[index]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return numbers


def require(module: str, extra: str | None = None) -> ModuleType:
    """Import and return `module`, which an extra of sg-export installs.

    extra: extra to name in the error; by default the first one in LIBRARIES that contains `module`.
    Raises MissingExtraError with the pip command if the module or its package is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise MissingExtraError(f"{error.name} is not installed: {install_command(module, extra)}") from None
