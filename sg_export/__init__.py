"""Compiler from token-sparse diffusion transformers to ONNX graphs and bundles for `sg_runtime`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import sg_runtime  # noqa: F401  # turns the telemetry of ONNX Runtime off

if TYPE_CHECKING:
    from sg_export.checkpoint import Overrides
    from sg_export.compiler import compile
    from sg_export.loading import LoadedModel, load_model
    from sg_export.options.compile import CompileOptions

__all__ = ["CompileOptions", "LoadedModel", "Overrides", "compile", "load_model"]

_HOMES = {
    "CompileOptions": "sg_export.options.compile",
    "LoadedModel": "sg_export.loading",
    "Overrides": "sg_export.checkpoint",
    "compile": "sg_export.compiler",
    "load_model": "sg_export.loading",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, and torch with it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sg_export' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
