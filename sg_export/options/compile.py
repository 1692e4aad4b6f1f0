"""What to build of a checkpoint, and which requests are refused before any work."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from sg_engines.targets import check_targets
from sg_export.checkpoint import Overrides, Weights
from sg_export.graph.trace import DEFAULT_OPSET, OPSETS
from sg_export.options.quantize import QuantizeOptions
from sg_runtime.errors import UsageError
from sg_runtime.guidance import Ramp
from sg_runtime.manifest import ENGINE_TARGETS, MODES, EngineLibrary, GuidanceMode, Precision

DEFAULT_SPARSITY = 0.5

Schedule = Literal["constant", "cosine"]
Target = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]

DEFAULT_ENGINE_BATCH = 1


@dataclass(frozen=True, slots=True)
class CompileOptions:
    """What to build.

    output: the bundle's folder. sparsity, strong_sparsity: the rates of the weak and the strong branch, each in [0, 1);
    the first of each is the default of runs. guidance: the default mode; without one "sg", or "autoguidance" where
    weak_checkpoint, an earlier checkpoint of the same run, gives the weak branch. The modes with a weak sparsity (0.5
    where none is given) build guided graphs for the pairs that they allow. schedule: "cosine" makes the default
    sparsities go from the first given to the last, by way of all. scale: one, or that of the first and the last step.
    interval: the times between which guidance applies. steps: default sampling steps. weights, overrides: see
    `load_model`. force: replace an existing bundle.

    precision: the type of the matrix products, see `sg_export.graph.half`; quantize: which of them are in INT8 or FP8
    over that. targets: "onnxruntime" for ONNX graphs,
    "tensorrt-rtx" and "tensorrt" for engines; keep_onnx leaves the graphs of these in the bundle, too. batch: image
    counts; of ONNX graphs at most one, which they are then fixed to; engines have a profile for each, 1 by default.

    compute_capabilities: the GPUs that TensorRT-RTX builds for, 86 for 8.6, by default its own choice. workspace: most
    bytes of scratch memory of an engine. timing_cache: a file that TensorRT reads and extends. allow_unfused: build
    engines in which attention has no fused kernel. cache: a folder of engines built before, by default the user's.
    """

    output: Path
    sparsity: tuple[float, ...] = ()
    strong_sparsity: tuple[float, ...] = (0.0,)
    scale: Ramp = 2.0
    guidance: GuidanceMode | None = None
    weak_checkpoint: str | Path | None = None
    schedule: Schedule = "constant"
    interval: tuple[float, float] | None = None
    steps: int = 40
    precision: Precision = "fp32"
    targets: tuple[Target, ...] = ("onnxruntime",)
    batch: tuple[int, ...] = ()
    compute_capabilities: tuple[int, ...] = ()
    workspace: int | None = None
    timing_cache: Path | None = None
    keep_onnx: bool = False
    allow_unfused: bool = False
    cache: Path | None = None
    quantize: QuantizeOptions | None = None
    opset: int = DEFAULT_OPSET
    weights: Weights | None = None
    overrides: Overrides = field(default_factory=Overrides)
    force: bool = False

    def __post_init__(self) -> None:
        for name, values in (("batch", self.batch), ("steps", (self.steps,))):
            for value in values:
                if value < 1:
                    raise UsageError(f"{name}: expected at least 1, found {value}")
        if self.opset not in OPSETS:
            raise UsageError(f"opset: expected {OPSETS[0]} to {OPSETS[-1]}, found {self.opset}")
        if not self.strong_sparsity:
            raise UsageError("strong_sparsity: expected at least one, found none")
        if self.schedule not in get_args(Schedule):
            raise UsageError(f"schedule: expected one of {', '.join(get_args(Schedule))}, found {self.schedule!r}")
        if MODES[self.mode].weak_level == "same" and self.sparsity:
            raise UsageError(
                f"sparsity: {self.mode} guidance has no sparser branch: give strong_sparsity, or guidance sg"
            )
        if (MODES[self.mode].weak_network == "weak") != (self.weak_checkpoint is not None):
            found = "none" if self.weak_checkpoint is None else f"{self.weak_checkpoint} for {self.mode}"
            raise UsageError(f"weak_checkpoint: expected one for autoguidance and for no other mode, found {found}")

        self._check_targets()

    def _check_targets(self) -> None:
        for name, value, known in (
            ("precision", self.precision, get_args(Precision)),
            *(("target", target, get_args(Target)) for target in self.targets),
        ):
            if value not in known:
                raise UsageError(f"{name}: expected one of {', '.join(known)}, found {value!r}")
        if not self.targets:
            raise UsageError("target: expected at least one, found none")
        if "onnxruntime" in self.targets:
            if len(self.batch) > 1:
                raise UsageError(
                    f"batch: expected at most one for ONNX graphs, which are fixed to it, found {len(self.batch)}: "
                    f"leave it out, and they take any"
                )
            if self.precision == "bf16":
                raise UsageError(
                    "precision bf16: ONNX Runtime's CPU provider has none: give fp32 or fp16, or --target tensorrt-rtx"
                )
        libraries = self.libraries
        if not libraries:
            for number in self.compute_capabilities:
                raise UsageError(f"--sm {number}: only for engines: give --target tensorrt-rtx")
            for name in ("workspace", "timing_cache", "keep_onnx", "allow_unfused"):
                if getattr(self, name):
                    raise UsageError(f"{name}: only for engines: give --target tensorrt-rtx or tensorrt")
        if "tensorrt" in libraries and "tensorrt_rtx" not in libraries:
            check_targets("tensorrt", self.compute_capabilities, ())
        if "tensorrt_rtx" in libraries:
            products: set[str] = {self.precision} if self.half_only else {self.precision, "fp32"}
            if self.quantize is not None:
                products.add(self.quantize.type)
                if self.quantize.type == "fp8" and not self.compute_capabilities:
                    raise UsageError(
                        "precision fp8: expected --sm 8.9 or above for TensorRT-RTX, which by itself builds for GPUs "
                        "without FP8, too; found none"
                    )
            check_targets("tensorrt_rtx", self.compute_capabilities, products)

    @property
    def libraries(self) -> tuple[EngineLibrary, ...]:
        """The libraries of the engines that are built."""
        known = {target: library for library, target in ENGINE_TARGETS.items()}
        return tuple(known[target] for target in dict.fromkeys(self.targets) if target in known)

    @property
    def half_only(self) -> bool:
        """Whether no product may be in FP32: one of the GPUs has none."""
        return self.precision == "fp16" and 75 in self.compute_capabilities

    @property
    def mode(self) -> GuidanceMode:
        """The guidance mode, given or implied."""
        return self.guidance or ("sg" if self.weak_checkpoint is None else "autoguidance")

    @property
    def has_onnx(self) -> bool:
        """Whether the bundle carries ONNX graphs."""
        return "onnxruntime" in self.targets or self.keep_onnx

    @property
    def graph_batch(self) -> int | None:
        """The image count that the ONNX graphs are fixed to, None where it is symbolic."""
        return self.batch[0] if self.batch and not self.libraries else None
