"""The quantization of a bundle and its measured quality."""

from dataclasses import dataclass

from sg_runtime.manifest.base import QuantizedType, Strict

OF_TEXT = "of the text"
"""Reason of a layer that is not quantized because it is a projection of the text."""


@dataclass(frozen=True, slots=True)
class LayerChoice(Strict):
    """The quantization of one layer.

    name: name of the layer.
    quantized: whether the layer is quantized.
    weight_only: whether its activations are left as they are, so that only weights are quantized.
    reason: reason of the choice, as shown by `sg-export inspect`.
    sensitivity: relative L2 distance of the guided prediction to FP32 if only this layer is
    quantized; None if not measured.
    bytes_saved: weight bytes saved against the base precision; 0 if the layer is not quantized.
    linear_macs: multiply-adds of the layer for one image in one guided step.
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
    """Agreement of the predictions at one time with FP32: the worst over all built guidance plans.

    time: t, or sigma of an edm model.
    strong: cosine similarity of the strong branch.
    weak: cosine similarity of the weak branch.
    guided: relative L2 distance of the guided prediction.
    """

    time: float
    strong: float
    weak: float
    guided: float


@dataclass(frozen=True, slots=True)
class QualityGates(Strict):
    """Limits that a quantized bundle must meet at every time.

    cosine: minimum cosine similarity of each branch.
    guided: maximum relative L2 distance of the guided prediction.
    """

    cosine: float
    guided: float


@dataclass(frozen=True, slots=True)
class Quantization(Strict):
    """The quantization of the graphs and its quality, measured when the bundle was built.

    type: type of the weights and activations of quantized matmuls.
    method: method that chose the activation ranges.
    table_sha256: SHA-256 of the range table.
    images: number of images from which the ranges were collected.
    evaluations: number of evaluations from which the ranges were collected.
    layers: choice for each quantizable layer.
    quality: quality at each time.
    runs: relative L2 distance of complete runs to FP32, with equal seeds and kept tokens.
    mask_noise: relative L2 distance of two FP32 runs with different kept tokens.
    gates: limits for `quality`.
    passed: whether the gates hold.
    time_ratio: time of a guided step / time of the FP32 step, on ONNX Runtime's CPU provider of the
    build machine; None if the provider does not run the quantized graphs as they are.
    remarks: warnings for the user of the bundle.
    prompts: prompts of the images that the gates judged, in turn; none if they had classes or
    random embeddings.
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
    prompts: tuple[str, ...] = ()
