"""Backends: each runs the graphs of a bundle with one library."""

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from sg_runtime.bundle import Bundle
from sg_runtime.errors import BundleError, UsageError
from sg_runtime.manifest import GraphFacts
from sg_runtime.rebuild import build_command

__all__ = ["Backend", "open_backend"]


class Backend(Protocol):
    """Runs graphs of one bundle; safe to call from several threads."""

    name: str

    def run(self, graph: GraphFacts, feeds: Mapping[str, NDArray[Any]], output: str) -> NDArray[Any]:
        """The graph's `output` for `feeds`, one array per graph input with the dtype and shape of its facts."""
        ...


def open_backend(bundle: Bundle, device: str, batch: int | None = None) -> Backend:
    """The backend for `device`: "auto" or "cpu". batch: images that engines must have a profile for, if given.

    Raises UsageError for another device or batch, MissingExtraError without a library, BundleError for a bundle that
    cannot run here.
    """
    if device not in ("auto", "cpu"):
        raise UsageError(f"device {device!r}: expected auto or cpu, the devices that this version runs on")
    manifest = bundle.manifest
    if any(graph.file is None for graph in manifest.graphs):
        if device == "auto":
            from sg_runtime.backends.trt import check_engines

            check_engines(bundle, batch)
        raise BundleError(
            f"{bundle.path}: holds engines, which this version builds and checks, but does not run yet; "
            f"build with --keep-onnx, or for the CPU: "
            f"{build_command(manifest, str(bundle.path), target='onnxruntime')}"
        )
    if manifest.precision == "bf16":
        raise BundleError(
            f"{bundle.path}: its graphs are in BF16, which ONNX Runtime's CPU provider does not run; build with "
            f"--precision fp32, or for a GPU with --target tensorrt-rtx"
        )
    from sg_runtime.backends.ort import OrtBackend

    return OrtBackend(bundle)
