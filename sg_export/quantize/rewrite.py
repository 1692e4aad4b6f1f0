"""Rewriting of FP32 graphs to quantized graphs, as models or as a pipeline on the CPU."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
from onnxruntime import InferenceSession

from sg_calibration.qdq import quantize
from sg_export.graph.emulate import emulated
from sg_export.graph.half import to_half
from sg_export.graph.spec import GraphSpec
from sg_runtime.backends.ort import OrtBackend, open_session
from sg_runtime.bundle import Bundle
from sg_runtime.manifest import (
    Precision,
    Quantization,
    QuantizedType,
)
from sg_runtime.pipeline import Pipeline

BATCH = 8
"""Largest number of images in one run of a graph while ranges and errors are measured."""


def reference_pipeline(reference: Bundle) -> Pipeline:
    """Return a pipeline of the FP32 bundle on the CPU, in batches of its fixed size or of BATCH."""
    return Pipeline(reference, OrtBackend(reference), reference.manifest.batch or BATCH)


def quantized_models(
    reference: Bundle, files: Mapping[str, Sequence[GraphSpec]], quantization: Quantization, ranges: Mapping[str, float]
) -> dict[str, ir.Model]:
    """Return the graphs of the FP32 bundle, quantized by the plan, by file name."""
    chosen = [layer.name for layer in quantization.layers if layer.quantized]
    return {
        name: quantized_model(reference.path / "graphs" / f"{name}.onnx", quantization.type, ranges, chosen)
        for name in files
    }


def quantized_model(path: Path, kind: QuantizedType, ranges: Mapping[str, float], chosen: Collection[str]) -> ir.Model:
    """Return the FP32 graph at `path` with the layers `chosen` quantized.

    If a layer has no range, only its weight is quantized.
    """
    proto = onnx.load(path)
    known = {name: ranges[name] for name in chosen if name in ranges}
    model = ir.from_proto(quantize(proto, kind, known, weight_only=[name for name in chosen if name not in ranges]))
    model.graph.sort()  # the quantizer adds its nodes at the end
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            source, typed = node.inputs[0], node.inputs[2 if node.op_type == "QuantizeLinear" else 1]
            assert source is not None
            assert typed is not None
            assert typed.dtype is not None
            node.outputs[0].shape, node.outputs[0].type = source.shape, ir.TensorType(typed.dtype)
    return model


def quantized_pipeline(
    reference: Bundle,
    kind: QuantizedType,
    ranges: Mapping[str, float],
    chosen: Collection[str],
    *,
    base: Precision = "fp32",
    fp32_layers: Collection[str] = (),
) -> Pipeline:
    """Return a pipeline of the bundle on the CPU with the layers `chosen` quantized.

    base, fp32_layers: precision of the other layers, see `half.to_half`.
    """

    def opened(path: Path) -> InferenceSession:
        model = quantized_model(path, kind, ranges, chosen)
        if base == "fp32":
            return open_session(path, ir.to_proto(model).SerializeToString())
        to_half(model.graph, base, fp32_layers)
        return open_session(path, emulated(model))

    return Pipeline(reference, OrtBackend(reference, open_graph=opened), reference.manifest.batch or BATCH)
