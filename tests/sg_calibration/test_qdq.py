"""Q/DQ nodes: their places, their values, and that the graph still runs."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from sg_calibration.layers import layers_of
from sg_calibration.qdq import quantize
from sg_calibration.types import QUANTS
from sg_export.models.dit import ENDS
from sg_runtime.errors import ExportError
from sg_runtime.manifest import QuantizedType

KINDS = [("int8", TensorProto.INT8), ("fp8", TensorProto.FLOAT8E4M3FN)]
WEIGHTS = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.floats(-100, 100, width=32))


def product(operator: str, weight: NDArray[np.float32]) -> onnx.ModelProto:
    """Return a graph of one layer; `weight` is (in, out), stored as the compiler leaves it.

    Gemm stores the weight transposed.
    """
    stored = weight.T.copy() if operator == "Gemm" else weight
    name = "layer.weight" if operator == "Gemm" else "layer.weight.T"
    given, made = weight.shape
    inputs = ["x", name, *(["layer.bias"] if operator == "Gemm" else [])]
    node = helper.make_node(operator, inputs, ["y"], "layer/product", **({"transB": 1} if operator == "Gemm" else {}))
    tensors = [numpy_helper.from_array(stored, name), numpy_helper.from_array(np.ones(made, np.float32), "layer.bias")]
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", given])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", made])],
        tensors[: len(inputs) - 1],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def tensors(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def dequantized(model: onnx.ModelProto, operator: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return the layer's dequantized weight (in, out), its scales and its one-byte values.

    There is one scale for each column.
    """
    node = next(node for node in model.graph.node if node.op_type == operator)
    found, values = producers(model)[node.input[1]], tensors(model)
    stored, scale, zero = (values[name] for name in found.input)
    assert not np.asarray(zero, np.float32).any()
    axis = next((a.i for a in found.attribute if a.name == "axis"), 1)
    if scale.ndim == 1:
        assert scale.shape == (stored.shape[axis],)
        scale = scale.reshape([-1 if k == axis else 1 for k in range(2)])
    weight = stored.astype(np.float32) * scale
    return (
        (weight.T, np.broadcast_to(scale, weight.shape).T, stored)
        if operator == "Gemm"
        else (
            weight,
            np.broadcast_to(scale, weight.shape),
            stored,
        )
    )


@pytest.mark.parametrize("operator", ["MatMul", "Gemm"])
@settings(max_examples=40)
@given(weight=WEIGHTS)
def test_quantize_int8_is_within_half_a_scale_of_each_output_channel(
    operator: str, weight: NDArray[np.float32]
) -> None:
    model = quantize(product(operator, weight), "int8", {"layer": 2.54})
    found, scale, stored = dequantized(model, operator)
    assert stored.dtype == np.int8
    assert stored.min() >= -127, "symmetric"
    for column in range(weight.shape[1]):
        assert len(set(scale[:, column])) == 1
        if (most := np.abs(weight[:, column]).max()) > 1e-30:  # any scale fits a column of zeros
            np.testing.assert_allclose(scale[0, column], most / 127, rtol=1e-6)  # a few roundings of float32
    # At most half a scale, plus float32 rounding of a quotient of up to 127.
    np.testing.assert_array_less(np.abs(found - weight), scale * (0.5 + 127 * 2**-22) + 1e-37)


@pytest.mark.parametrize("operator", ["MatMul", "Gemm"])
@settings(max_examples=40)
@given(weight=WEIGHTS.filter(lambda weight: np.abs(weight).max() > 1e-30))
def test_quantize_fp8_rounds_to_e4m3_with_one_scale(operator: str, weight: NDArray[np.float32]) -> None:
    model = quantize(product(operator, weight), "fp8", {"layer": 1.0})
    found, scale, stored = dequantized(model, operator)
    assert stored.dtype.name == "float8_e4m3fn"
    assert len(set(scale.flat)) == 1
    np.testing.assert_allclose(scale.flat[0], np.abs(weight).max() / 448, rtol=1e-6)  # a few roundings
    # e4m3 has three bits of mantissa: the error is at most half of 2**-3 of the value. Below 2**-6
    # scales it is at most half of the smallest step, 2**-9. The margin is for the rounding of
    # float32, which decides ties.
    most = np.maximum(np.abs(weight) * 2**-4, scale * 2**-10) * 1.0001
    assert (np.abs(found - weight) <= most).all()


@pytest.mark.parametrize("kind", QUANTS)
def test_quantize_of_zero_weights_gives_zeros(kind: QuantizedType) -> None:
    """An untrained adaLN layer has zero weights."""
    model = quantize(product("MatMul", np.zeros((3, 2), np.float32)), kind, {"layer": 1.0})
    found, scale, _ = dequantized(model, "MatMul")
    assert (scale > 0).all()
    np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_quantize_of_a_graph_has_nodes_around_layers_alone(
    kind: QuantizedType, dtype: int, guided: onnx.ModelProto
) -> None:
    layers, before = layers_of(guided, ENDS), Counter(node.op_type for node in guided.graph.node)
    outputs = [value.name for value in guided.graph.output]
    plain = {name for name in tensors(guided) if name not in {layer.weight for layer in layers.values()}}
    ranges = {name: 1.0 + number for number, name in enumerate(layers)}
    model = quantize(guided, kind, ranges)
    made, values = producers(model), tensors(model)
    after = Counter(node.op_type for node in model.graph.node)
    assert after == before + Counter(QuantizeLinear=len(layers), DequantizeLinear=2 * len(layers))
    assert [value.name for value in model.graph.output] == outputs
    assert plain <= values.keys(), "biases, norms and embedders are unchanged"
    fed = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    nodes = {node.name: node for node in model.graph.node}
    assert fed == {name for layer in layers.values() for name in nodes[layer.node].input[:2]}
    users = Counter(name for node in model.graph.node for name in node.input)
    assert all(users[name] == 1 for name in fed)
    for name, layer in layers.items():
        source, weight = (made[tensor] for tensor in nodes[layer.node].input[:2])
        rounded = made[source.input[0]]
        assert (rounded.op_type, rounded.input[0]) == ("QuantizeLinear", layer.source)
        assert list(rounded.input[1:]) == list(source.input[1:])
        np.testing.assert_allclose(values[source.input[1]], ranges[name] / QUANTS[kind].largest, rtol=1e-6)  # rounding
        assert values[source.input[1]].shape == (), "one scale per tensor"
        types = {t.name: t.data_type for t in model.graph.initializer}
        assert types[weight.input[0]] == types[weight.input[2]] == types[source.input[2]] == dtype
        assert values[weight.input[1]].ndim == (1 if kind == "int8" else 0)


def test_quantize_of_weights_alone_leaves_activations(guided: onnx.ModelProto) -> None:
    layers, names = layers_of(guided, ENDS), ["blocks.0.attn.qkv", "blocks.1.mlp.fc1"]
    model = quantize(guided, "int8", {names[0]: 1.0}, weight_only=[names[1]])
    nodes, made = {node.name: node for node in model.graph.node}, producers(model)
    counts = Counter(node.op_type for node in model.graph.node)
    assert (counts["QuantizeLinear"], counts["DequantizeLinear"]) == (1, 3)
    assert nodes[layers[names[1]].node].input[0] == layers[names[1]].source
    assert made[nodes[layers[names[1]].node].input[1]].op_type == "DequantizeLinear"


@pytest.mark.parametrize("kind", QUANTS)
@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_quantize_with_a_range_that_is_none_is_refused(kind: QuantizedType, bad: float) -> None:
    with pytest.raises(ExportError, match="layer layer: expected a positive range of x, found"):
        quantize(product("MatMul", np.ones((2, 3), np.float32)), kind, {"layer": bad})


# 8-bit activations and weights each have an error of about 0.4 % of the largest value; e4m3 has at
# most 2**-4. Sums reduce the error.
@pytest.mark.parametrize(("kind", "most"), [("int8", 0.02), ("fp8", 0.1)])
@pytest.mark.parametrize("operator", ["MatMul", "Gemm"])
def test_quantize_gives_a_graph_that_runs(kind: QuantizedType, most: float, operator: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weight, x = (random.standard_normal(shape, np.float32) for shape in ((64, 32), (9, 64)))
    plain = product(operator, weight)
    wanted = x @ weight + (1 if operator == "Gemm" else 0)
    model = ir.from_proto(quantize(plain, kind, {"layer": float(np.abs(x).max())}))
    model.graph.sort()
    path = tmp_path / "graph.onnx"
    ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    (found,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    assert np.linalg.norm(found - wanted) <= most * np.linalg.norm(wanted)
