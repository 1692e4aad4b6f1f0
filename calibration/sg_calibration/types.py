"""One-byte types of quantized matmuls."""

from collections.abc import Mapping
from dataclasses import dataclass

from sg_calibration.settings import Method
from sg_runtime.manifest import QualityGates, QuantizedType


@dataclass(frozen=True, slots=True)
class QuantType:
    """A one-byte type.

    onnx: its number among ONNX's tensor types.
    largest: its largest value, to which the end of a range is mapped.
    per_channel: a weight has one scale per output channel, else one scale.
    method: default rule that makes a range from observed values.
    gates: default gates of a bundle.
    """

    onnx: int
    largest: float
    per_channel: bool
    method: Method
    gates: QualityGates


QUANTS: Mapping[QuantizedType, QuantType] = {
    "int8": QuantType(3, 127.0, True, "percentile", QualityGates(0.99, 0.10)),
    "fp8": QuantType(17, 448.0, False, "min-max", QualityGates(0.995, 0.06)),
}
"""FP8 is float8_e4m3fn.

`benchmarks/quantization.py` found the methods best: INT8 gains from cutting off outliers, FP8 has
room for them.
"""
