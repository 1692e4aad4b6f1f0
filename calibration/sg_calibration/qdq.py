"""Insertion of QuantizeLinear and DequantizeLinear into ONNX graphs, by ONNX Runtime's quantizer.

Quantization is explicit and symmetric, as TensorRT and TensorRT-RTX require. Weights are
one-byte initializers. An INT8 weight has one scale per output channel. An FP8 weight has one scale
per tensor, and so has an activation. Outputs of the quantized products, biases and all other
operators are left unchanged.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx
from onnx import helper
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import add_infer_metadata

from sg_calibration.layers import PRODUCTS, Layer, layers_of
from sg_calibration.types import QUANTS
from sg_runtime.errors import ExportError
from sg_runtime.manifest import QuantizedType


def quantize(
    model: onnx.ModelProto, kind: QuantizedType, ranges: Mapping[str, float], *, weight_only: Collection[str] = ()
) -> onnx.ModelProto:
    """Quantize layers of the graph in place and return the graph.

    ranges: largest magnitude of each layer's activations; layers that the graph lacks are ignored.
    weight_only: layers of which only the weights are quantized. The model must have its weights
    loaded and must have the types of all values. Raises ExportError if a range is not a positive
    finite number.
    """
    layers = {name: layer for name, layer in layers_of(model).items() if name in ranges or name in weight_only}
    for name, layer in layers.items():
        if name not in weight_only and not 0 < ranges[name] < np.inf:
            raise ExportError(f"layer {name}: expected a positive range of {layer.source}, found {ranges[name]}")
    add_infer_metadata(model)  # marks types as inferred; without it, the quantizer infers them through a file on disk
    both = [layer for name, layer in layers.items() if name not in weight_only]
    weights = [layer for name, layer in layers.items() if name in weight_only]
    for chosen, quantizer in ((both, QDQQuantizer), (weights, _WeightQuantizer)):
        if chosen:
            model = _quantized(model, kind, chosen, ranges, quantizer)
    del model.metadata_props[:]
    return model


def _quantized(
    model: onnx.ModelProto,
    kind: QuantizedType,
    layers: Sequence[Layer],
    ranges: Mapping[str, float],
    quantizer: type[QDQQuantizer],
) -> onnx.ModelProto:
    """Return the model with these layers quantized by `quantizer`."""
    quantized = next(known for known in QuantType if known.tensor_type == QUANTS[kind].onnx)
    zero = np.array(0, helper.tensor_dtype_to_np_dtype(QUANTS[kind].onnx))
    scales = {layer.source: ranges.get(layer.name, 1.0) / QUANTS[kind].largest for layer in layers}
    if not QUANTS[kind].per_channel:
        arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        scales |= {
            layer.weight: float(np.abs(arrays[layer.weight]).max() or 1.0) / QUANTS[kind].largest for layer in layers
        }
    overrides = {
        name: [{"scale": np.array(scale, np.float32), "zero_point": zero, "quant_type": quantized}]
        for name, scale in scales.items()
    }
    # The quantizer requires these ranges, but the scales in `overrides` take precedence.
    known = {layer.source: TensorData(lowest=np.float32(-1), highest=np.float32(1)) for layer in layers}
    found = quantizer(
        model,
        kind == "int8",  # one scale per output channel
        False,
        quantized,
        quantized,
        TensorsData(CalibrationMethod.MinMax, known),
        [layer.node for layer in layers],
        [],
        list(PRODUCTS),
        {
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "QDQDisableWeightAdjustForInt32Bias": True,
            "OpTypesToExcludeOutputQuantization": list(PRODUCTS),
            "TensorQuantOverrides": overrides,
        },
    )
    found.quantize_model()
    result: onnx.ModelProto = found.model.model
    return result


class _WeightQuantizer(QDQQuantizer):  # type: ignore[misc]  # ONNX Runtime is untyped
    """A quantizer that quantizes weights only."""

    def quantize_activation_tensor(self, tensor_name: str) -> None:
        pass
