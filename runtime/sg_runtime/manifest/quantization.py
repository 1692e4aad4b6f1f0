"""How graphs were quantized, and how good that is."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
from sg_runtime.manifest.base import QuantizedType, Strict


@dataclass(frozen=True, slots=True)
class LayerChoice(Strict):
    """What became of a quantizable layer.

    quantized: whether it is; its activations too, unless weight_only. reason: why, as inspect shows it. sensitivity:
    relative L2 distance of the guided prediction to FP32 where it alone is quantized, None where that was not measured.
    bytes_saved: of its weight, where it is quantized. linear_macs: of one image and guided step.
    """

    name: str
    quantized: bool
    weight_only: bool
    reason: str
    sensitivity: float | None
    bytes_saved: int
    linear_macs: int


@dataclass(frozen=True, slots=True)
class StratumQuality(Strict):
    """How close the predictions at one time (t, or sigma) are to FP32: the worst over the guidances that are built.

    strong, weak: cosine of each branch. guided: relative L2 distance of the guided prediction.
    """

    time: float
    strong: float
    weak: float
    guided: float


@dataclass(frozen=True, slots=True)
class QualityGates(Strict):
    """What a quantized bundle must reach at every time: the least cosine of a branch, the most guided distance."""

    cosine: float
    guided: float


@dataclass(frozen=True, slots=True)
class Quantization(Strict):
    """How the graphs were quantized, and what it did to them, as measured when they were built.

    type: of the products' weights and activations. method: of the ranges; table_sha256: of the table that they are
    from. images, evaluations: that they were seen on. runs: relative L2 distance of whole runs to FP32, at equal seeds
    and subsets; mask_noise: that of two FP32 runs with different subsets. passed: whether the gates hold. time_ratio:
    of a guided step to FP32's on ONNX Runtime's CPU provider, where it was built; None where that does not run it as it
    is. remarks: what a user should know before taking it.
    """

    type: QuantizedType
    method: str
    table_sha256: str
    images: int
    evaluations: int
    layers: tuple[LayerChoice, ...]
    quality: tuple[StratumQuality, ...]
    runs: float
    mask_noise: float
    gates: QualityGates
    passed: bool
    time_ratio: float | None
    remarks: tuple[str, ...]
