"""Options of a compilation, and the checks that reject a request before any work starts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from sg_export.checkpoint import Overrides
from sg_export.graph.opset import DEFAULT_OPSET, OPSETS
from sg_export.options.engines import EngineOptions
from sg_export.options.quantize import QuantizeOptions
from sg_runtime.errors import UsageError
from sg_runtime.guidance import Ramp
from sg_runtime.manifest import MODES, PARTS, EngineLibrary, GuidanceMode, OnnxTarget, Part, Precision, SubsetRule

DEFAULT_SPARSITY = 0.5

Schedule = Literal["constant", "cosine"]


@dataclass(frozen=True, slots=True)
class CompileOptions:
    """What to build: ONNX graphs, or engines.

    output: folder of the bundle.
    sparsity: sparsities of the weak branch in [0, 1); the first is the default of runs. If empty,
    the sparsity is 0.5, provided that the mode has a sparser branch.
    strong_sparsity: sparsities of the strong branch; the first is the default of runs.
    scale: guidance scale, or the scales of the first and the last step.
    guidance: default mode, for which guided graphs are built. None is "sg", or "autoguidance" with
    weak_checkpoint.
    weak_checkpoint: an earlier checkpoint of the same training run, as weak branch.
    schedule: "constant" uses the first sparsity of a branch. "cosine" goes from the first to the
    last over a run, through all sparsities of the branch.
    interval: times (t or sigma) between which guidance applies.
    subset: when runs draw kept tokens, see `GuidancePlan`; None for the family's rule.
    steps: default sampling steps; None for the family's.
    precision: type of the matmuls and of attention, see `sg_export.graph.half`.
    batch: number of images that the ONNX graphs are fixed to; None for any number. For engines, see
    `EngineOptions.batch`.
    onnx_target: what the ONNX graphs are for. "onnxruntime-cuda" gives the form of
    `sg_export.graph.cuda`, neither quantized nor for engines.
    engines: engines to build instead of ONNX graphs; None for ONNX graphs.
    quantize: how to quantize layers to INT8 or FP8; None for no quantization.
    opset: ONNX opset.
    weights, overrides: see `load_model`.
    sizes: height and width, in pixels, of further sizes of the picture, next to that in `overrides`
    or the model's own.
    parts: parts of the bundle, of which "step" is one; None for all that `vae`, `pipeline` or the
    checkpoint's folder has.
    pipeline: folder of a pipeline of diffusers whose text encoder and decoder are taken; None for
    the checkpoint, if it is one.
    vae: folder of the autoencoder whose decoder is taken; None for that of the pipeline.
    text_precision: precision of the text encoder; None for BF16 where it can run, if `precision` is
    a half precision, else FP32.
    force: replace an existing bundle that holds only its own files.
    """

    output: Path
    sparsity: tuple[float, ...] = ()
    strong_sparsity: tuple[float, ...] = (0.0,)
    scale: Ramp = 2.0
    guidance: GuidanceMode | None = None
    weak_checkpoint: str | Path | None = None
    schedule: Schedule = "constant"
    interval: tuple[float, float] | None = None
    subset: SubsetRule | None = None
    steps: int | None = None
    precision: Precision = "fp32"
    batch: int | None = None
    onnx_target: OnnxTarget = "onnxruntime"
    engines: EngineOptions | None = None
    quantize: QuantizeOptions | None = None
    opset: int = DEFAULT_OPSET
    weights: str | None = None
    overrides: Overrides = field(default_factory=Overrides)
    sizes: tuple[tuple[int, int], ...] = ()
    parts: tuple[Part, ...] | None = None
    pipeline: Path | None = None
    vae: Path | None = None
    text_precision: Precision | None = None
    force: bool = False

    def __post_init__(self) -> None:
        for name, count in (("batch", self.batch), ("steps", self.steps)):
            if count is not None and count < 1:
                raise UsageError(f"{name}: expected at least 1, found {count}")
        if self.opset not in OPSETS:
            raise UsageError(f"opset: expected {OPSETS[0]} to {OPSETS[-1]}, found {self.opset}")
        if not self.strong_sparsity:
            raise UsageError("strong_sparsity: expected at least one, found none")
        for name, value, known in (
            ("schedule", self.schedule, get_args(Schedule)),
            ("precision", self.precision, get_args(Precision)),
            ("guidance", self.mode, tuple(MODES)),
            ("onnx_target", self.onnx_target, get_args(OnnxTarget)),
            ("text_precision", self.text_precision or "fp32", get_args(Precision)),
            *(("parts", part, PARTS) for part in self.parts or ()),
        ):
            if value not in known:
                raise UsageError(f"{name}: expected one of {', '.join(known)}, found {value!r}")
        if self.parts is not None:
            if "step" not in self.parts:
                raise UsageError(f"parts: expected step among them, found {', '.join(self.parts) or 'none'}")
            for part, option in (("decode", "vae"), ("text", "text_precision")):
                if part not in self.parts and getattr(self, option) is not None:
                    raise UsageError(f"{option}: expected none for a bundle without {part}, found one")
        if MODES[self.mode].weak_level == "same" and self.sparsity:
            raise UsageError(
                f"sparsity: {self.mode} guidance has no sparser branch: give strong_sparsity, or guidance sg"
            )
        if (MODES[self.mode].weak_network == "weak") != (self.weak_checkpoint is not None):
            found = "none" if self.weak_checkpoint is None else f"{self.weak_checkpoint} for {self.mode}"
            raise UsageError(f"weak_checkpoint: expected one for autoguidance and for no other mode, found {found}")
        if self.for_cuda and self.engines is not None:
            raise UsageError(
                "onnxruntime-cuda: expected no engines, whose libraries do not know its operators: build two bundles"
            )
        if self.for_cuda and self.quantize is not None:
            raise UsageError(
                f"onnxruntime-cuda: expected no quantization, found {self.quantize.type}: this provider computes "
                f"quantized layers in floating point: give `precision` fp16, or `onnx_target` onnxruntime"
            )
        if self.engines is not None:
            if self.batch is not None:
                raise UsageError("batch: expected none next to engines, which have image counts of their own")
            self.engines.check_types(self.precision, None if self.quantize is None else self.quantize.type)
        elif "bf16" in (self.precision, self.text_precision) and not self.for_cuda:
            name = "precision" if self.precision == "bf16" else "text_precision"
            raise UsageError(
                f"{name} bf16: ONNX Runtime's CPU provider has none: give fp32 or fp16, or build for ONNX Runtime's "
                "CUDA provider, `onnx_target` onnxruntime-cuda, or for TensorRT-RTX, `libraries` tensorrt_rtx"
            )

    @property
    def precision_of_text(self) -> Precision:
        """Precision of the text encoder. Gemma's activations are beyond the range of FP16."""
        if self.text_precision is not None:
            return self.text_precision
        return "bf16" if self.precision != "fp32" and (self.for_cuda or self.engines is not None) else "fp32"

    @property
    def for_cuda(self) -> bool:
        """Whether the ONNX graphs have the form for ONNX Runtime's CUDA provider."""
        return self.onnx_target == "onnxruntime-cuda"

    @property
    def tokens_in_half(self) -> bool:
        """Whether tokens are in half precision between the layers; see `sg_export.graph.cuda`."""
        return self.for_cuda and self.precision == "fp16"

    @property
    def libraries(self) -> tuple[EngineLibrary, ...]:
        """Libraries of the engines to build."""
        return () if self.engines is None else self.engines.libraries

    @property
    def products(self) -> frozenset[str]:
        """Types of matrix products in the engines' graphs."""
        quantized = None if self.quantize is None else self.quantize.type
        return frozenset() if self.engines is None else self.engines.products(self.precision, quantized)

    @property
    def half_only(self) -> bool:
        """Whether no matmul may be in FP32."""
        return self.engines is not None and self.engines.half_only(self.precision)

    @property
    def mode(self) -> GuidanceMode:
        """Guidance mode, stated or implied."""
        return self.guidance or ("sg" if self.weak_checkpoint is None else "autoguidance")

    @property
    def has_onnx(self) -> bool:
        """Whether the bundle holds ONNX graphs."""
        return self.engines is None or self.engines.keep_onnx
