"""Options of engines, and the checks that reject a request before any work starts."""

from dataclasses import dataclass
from pathlib import Path

from sg_engines.targets import check_targets
from sg_runtime.errors import UsageError
from sg_runtime.manifest import EngineLibrary, Precision, QuantizedType


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What engines to build.

    libraries: the libraries that build them.
    batch: numbers of images in one graph run; an engine has a profile for each number.
    compute_capabilities: GPUs that TensorRT-RTX builds for, 86 for 8.6; if empty, the library
    chooses.
    workspace: upper limit of scratch memory in bytes; None for the library's default.
    timing_cache: file that TensorRT reads and extends; TensorRT-RTX has no timing cache.
    keep_onnx: also keep the ONNX graphs in the bundle.
    allow_unfused: accept engines in which attention has no fused kernel.
    cache: folder of engines from earlier builds; None for the user's cache folder.
    """

    libraries: tuple[EngineLibrary, ...] = ("tensorrt_rtx",)
    batch: tuple[int, ...] = (1,)
    compute_capabilities: tuple[int, ...] = ()
    workspace: int | None = None
    timing_cache: Path | None = None
    keep_onnx: bool = False
    allow_unfused: bool = False
    cache: Path | None = None

    def __post_init__(self) -> None:
        if not self.libraries or not self.batch:
            raise UsageError("engines: expected at least one library and one image count, found none")
        for value in self.batch:
            if value < 1:
                raise UsageError(f"batch: expected at least 1, found {value}")

    def half_only(self, precision: Precision) -> bool:
        """Whether no matmul may be in FP32, because one of the GPUs does not support it."""
        return precision == "fp16" and 75 in self.compute_capabilities

    def products(self, precision: Precision, quantized: QuantizedType | None) -> frozenset[str]:
        """Return the types of matrix products in graphs of these types."""
        base = {precision} if self.half_only(precision) else {precision, "fp32"}
        return frozenset(base if quantized is None else {*base, quantized})

    def check_types(self, precision: Precision, quantized: QuantizedType | None) -> None:
        """Raise UsageError unless the libraries build graphs of these types for these GPUs."""
        if "tensorrt" in self.libraries and "tensorrt_rtx" not in self.libraries:
            check_targets("tensorrt", self.compute_capabilities, ())
        if "tensorrt_rtx" in self.libraries:
            if quantized == "fp8" and not self.compute_capabilities:
                raise UsageError(
                    "`precision` fp8: expected `compute_capabilities` of 89 or above for TensorRT-RTX, found none: by "
                    "itself TensorRT-RTX also builds for GPUs without FP8"
                )
            check_targets("tensorrt_rtx", self.compute_capabilities, self.products(precision, quantized))
