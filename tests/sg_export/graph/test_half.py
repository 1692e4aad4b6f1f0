"""Half precision in traced graphs: its matmuls, the parts in FP32, and the types in the file."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from sg_calibration.layers import layers_of
from sg_export.cost.count import count_cost, layer_macs
from sg_export.graph.check import check_types
from sg_export.graph.half import HALF, fp32_layers, half_attentions, to_half
from sg_export.graph.opset import DEFAULT_OPSET
from sg_export.graph.products import belongs, weight_of, weighted_products
from sg_export.graph.spec import GraphSpec, keep_sizes
from sg_export.graph.trace import trace
from sg_export.graph.weights import write_graphs
from sg_export.loading import LoadedModel
from sg_export.models.dit import ENDS, DiT, DiTConfig
from sg_export.models.maskdit import MaskDiT
from sg_export.quantize.rewrite import quantized_model
from sg_runtime.errors import ExportError
from sg_runtime.manifest import HalfPrecision, Level, QuantizedType, Route

pytestmark = pytest.mark.slow

CONFIG = DiTConfig(image_size=6, patch=2, channels=2, width=12, depth=3, heads=2, mlp_width=20, num_classes=3)
FLOAT, FLOAT16, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
GUIDED = GraphSpec("guided", (Level(0.0, 9), Level(0.5, 4)))
MASKED = GraphSpec("guided", (Level(0.2, 7), Level(0.5, 4)), null_weak=True)


@pytest.fixture(scope="module")
def loaded(make_model: Callable[..., LoadedModel]) -> LoadedModel:
    return make_model(DiT, CONFIG, Route(1, 1))


@pytest.fixture(scope="module")
def masked(make_model: Callable[..., LoadedModel]) -> LoadedModel:
    return make_model(MaskDiT, CONFIG, Route(0, 2))


@cache
def content(loaded: LoadedModel, spec: GraphSpec) -> onnx.ModelProto:
    """Return the traced graph as a proto."""
    return ir.to_proto(trace(loaded.model, [spec], loaded.facts, None, DEFAULT_OPSET, symbolic_keep=True)[0])


def traced(loaded: LoadedModel, spec: GraphSpec) -> ir.Model:
    """Return a fresh copy of a graph that is traced only once."""
    return ir.from_proto(content(loaded, spec))


def halved(loaded: LoadedModel, spec: GraphSpec, precision: HalfPrecision, layers: tuple[str, ...]) -> ir.Graph:
    model = traced(loaded, spec)
    to_half(model.graph, precision, layers)
    return model.graph


def test_fp32_layers_are_the_ends_and_in_bf16_the_layer_after_the_route(
    loaded: LoadedModel, masked: LoadedModel, make_model: Callable[..., LoadedModel]
) -> None:
    assert fp32_layers(loaded.model, "fp32") == ()
    assert fp32_layers(loaded.model, "fp16") == ENDS
    assert fp32_layers(loaded.model, "bf16") == (*ENDS, "blocks.2")
    assert fp32_layers(masked.model, "bf16") == (*ENDS, "decoder_blocks.0")
    assert fp32_layers(loaded.model, "fp16", half_only=True) == ()
    to_the_end = make_model(DiT, CONFIG, Route(1, 2))
    assert fp32_layers(to_the_end.model, "bf16") == ENDS


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("family", ["loaded", pytest.param("masked", marks=pytest.mark.slow)])
def test_to_half_types_the_products_and_nothing_else_but_attention(
    family: str, precision: HalfPrecision, request: pytest.FixtureRequest
) -> None:
    model: LoadedModel = request.getfixturevalue(family)
    layers = fp32_layers(model.model, precision)
    graph = halved(model, GUIDED if family == "loaded" else MASKED, precision, layers)
    half = HALF[precision]
    for weight, node in weighted_products(graph):
        expected = FLOAT if belongs(weight, layers) else half
        assert {value.dtype for value in (*node.inputs, *node.outputs) if value is not None} == {expected}, weight
    for node in graph:
        if node.op_type == "LayerNormalization":
            assert node.outputs[0].dtype == FLOAT
    for value in (*graph.inputs, *graph.outputs):
        assert value.dtype in (FLOAT, ir.DataType.INT64), value.name


def test_to_half_keeps_attention_whole_in_half_precision(loaded: LoadedModel) -> None:
    graph = halved(loaded, GUIDED, "fp16", ENDS)
    assert half_attentions(graph) == 1 + 2 * 2  # one before the route, two in it and after it
    for node in graph:
        if node.op_type == "Softmax":
            product = node.inputs[0].producer()  # type: ignore[union-attr]
            (use,) = node.outputs[0].uses()
            for part in (product, node, use.node):
                assert {v.dtype for v in (*part.inputs, *part.outputs)} == {FLOAT16}  # type: ignore[union-attr]
    # Between the matmuls of a block there is one conversion to half precision, before a matmul, and
    # one to FP32, at the gate.
    after = halved(loaded, GUIDED, "fp16", (*ENDS, "blocks.2"))
    assert half_attentions(after) == 1 + 2


def test_to_half_keeps_the_residual_stream_in_fp32(loaded: LoadedModel) -> None:
    graph = halved(loaded, GUIDED, "fp16", ENDS)
    gather = [node for node in graph if node.op_type == "Gather"]
    assert len(gather) == 2
    assert all(node.outputs[0].dtype == FLOAT for node in gather)


def test_to_half_halves_the_bytes_of_the_layers(loaded: LoadedModel) -> None:
    plain, half = traced(loaded, GUIDED).graph, halved(loaded, GUIDED, "bf16", ())
    assert plain.initializers.keys() == half.initializers.keys()
    weights = [name for name in plain.initializers if name.endswith(".weight.T")]
    assert len(weights) > 10
    for name in weights:
        before, after = plain.initializers[name].const_value, half.initializers[name].const_value
        assert (after.nbytes, after.dtype) == (before.nbytes // 2, BFLOAT16)  # type: ignore[union-attr]
        # bfloat16 has 8 bits of precision.
        np.testing.assert_allclose(after.numpy().astype(np.float32), before.numpy(), rtol=2**-8)  # type: ignore[union-attr]


def test_to_half_of_a_weight_out_of_range_names_it_when_it_is_written(loaded: LoadedModel, tmp_path: Path) -> None:
    model = traced(loaded, GUIDED)
    weight = model.graph.initializers["blocks.1.mlp.fc1.weight.T"]
    assert weight.const_value is not None
    weight.const_value = ir.tensor(np.full(weight.const_value.shape.numpy(), 1e5, np.float32), name=weight.name)
    to_half(model.graph, "fp16", ENDS)
    with pytest.raises(
        ExportError, match=r"blocks.1.mlp.fc1.weight.T: expected weights that float16 holds, found up to 100000"
    ):
        write_graphs([model], tmp_path, "weights.bin", external_min_bytes=0)


def parse(text: str) -> ir.Graph:
    """Return the graph of `text`, with its input w turned into an initializer."""
    graph = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 20]> g {text}').graph
    weight = next(value for value in graph.inputs if value.name == "w")
    graph.inputs.remove(weight)
    assert weight.shape is not None
    weight.const_value = ir.tensor(np.ones(weight.shape.numpy(), np.float32), name="w")
    graph.register_initializer(weight)
    return graph


def test_to_half_of_an_output_in_half_precision_casts_it_under_its_name() -> None:
    graph = parse("(float[N, 3] x, float[3, 3] w) => (float[N, 3] y) { y = MatMul(x, w) }")
    to_half(graph, "fp16", ())
    assert [node.op_type for node in graph] == ["Cast", "MatMul", "Cast"]
    (output,) = graph.outputs
    assert (output.name, output.dtype) == ("y", FLOAT)


def test_to_half_of_a_weight_that_both_types_read_has_it_twice() -> None:
    graph = parse(
        "(float[N, 3] x, float[3, 3] w) => (float[N, 3] z) <float[N, 3] y> { y = MatMul(x, w)  z = Add(x, w) }"
    )
    graph.outputs.append(graph[0].outputs[0])
    to_half(graph, "fp16", ())
    assert {name: value.dtype for name, value in graph.initializers.items()} == {"w": FLOAT, "w.fp16": FLOAT16}


@pytest.mark.parametrize("precision", HALF)
def test_check_types_passes_what_to_half_wrote(precision: HalfPrecision, loaded: LoadedModel, tmp_path: Path) -> None:
    model, layers = traced(loaded, GUIDED), fp32_layers(loaded.model, precision)
    to_half(model.graph, precision, layers)
    (path,) = write_graphs([model], tmp_path, "weights.bin")
    onnx.checker.check_model(str(path))
    check_types(path, precision, layers)
    with pytest.raises(ExportError, match=r"guided-9-K.onnx: node blocks.0.attn.qkv/MatMul: expected FLOAT, found"):
        check_types(path, "fp32", ())


def test_check_types_of_a_graph_left_in_fp32_names_a_node(loaded: LoadedModel, tmp_path: Path) -> None:
    (path,) = write_graphs([traced(loaded, GUIDED)], tmp_path, "weights.bin")
    check_types(path, "fp32", ())
    with pytest.raises(ExportError, match=r"node blocks.0.attn.qkv/MatMul: expected FLOAT16, found FLOAT; please"):
        check_types(path, "fp16", ENDS)


def quantized(loaded: LoadedModel, kind: QuantizedType, folder: Path) -> ir.Model:
    """Return the guided graph with all layers quantized except those of the first block."""
    (path,) = write_graphs([traced(loaded, GUIDED)], folder, "weights.bin")
    names = [name for name in layers_of(onnx.load(path), ENDS) if not name.startswith("blocks.0.")]
    return quantized_model(path, kind, dict.fromkeys(names, 4.0), names)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_weight_of_sees_through_dequantize_linear(kind: QuantizedType, loaded: LoadedModel, tmp_path: Path) -> None:
    plain, graph = traced(loaded, GUIDED).graph, quantized(loaded, kind, tmp_path).graph
    assert {name for name, _ in weighted_products(graph)} == {name for name, _ in weighted_products(plain)}
    stored = [weight_of(node) for name, node in weighted_products(graph) if belongs(name, ("blocks.1", "blocks.2"))]
    assert len(stored) == 8
    assert all(weight is not None and weight.is_initializer() and weight.dtype.itemsize == 1 for weight in stored)  # type: ignore[union-attr]
    assert sum(weight_of(node) is None for node in graph if node.op_type == "MatMul") == 2 * 5, "two of each attention"


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("precision", HALF)
def test_to_half_of_a_quantized_graph_has_half_precision_after_dequantizing(
    precision: HalfPrecision, kind: QuantizedType, loaded: LoadedModel, tmp_path: Path
) -> None:
    model, layers = quantized(loaded, kind, tmp_path), fp32_layers(loaded.model, precision)
    to_half(model.graph, precision, layers)
    half, dequantized = HALF[precision], 0
    for weight, node in weighted_products(model.graph):
        expected = FLOAT if belongs(weight, layers) else half
        assert {value.dtype for value in (*node.inputs, *node.outputs) if value is not None} == {expected}, weight
        for value in node.inputs[:2]:
            assert value is not None
            source = value.producer()
            if source is not None and source.op_type == "DequantizeLinear":
                dequantized += 1
                assert source.inputs[1].dtype == expected, "a scale has the output's type"  # type: ignore[union-attr]
                assert source.inputs[0].dtype.itemsize == 1  # type: ignore[union-attr]
    assert dequantized == 2 * 8
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            assert node.inputs[0].dtype == node.inputs[1].dtype  # type: ignore[union-attr]
    (tmp_path / "half").mkdir()
    (path,) = write_graphs([model], tmp_path / "half", "weights.bin")
    onnx.checker.check_model(str(path))
    onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True)
    check_types(path, precision, layers)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_count_cost_of_a_quantized_graph_has_the_same_products_and_fewer_bytes(
    kind: QuantizedType, loaded: LoadedModel, tmp_path: Path
) -> None:
    sizes = keep_sizes(GUIDED, (9, 4))
    plain, graph = traced(loaded, GUIDED).graph, quantized(loaded, kind, tmp_path).graph
    before, after = count_cost(plain, sizes), count_cost(graph, sizes)
    assert (after.linear_macs, after.attention_macs) == (before.linear_macs, before.attention_macs)
    assert layer_macs(graph, sizes) == layer_macs(plain, sizes)
    weights = sum(
        int(np.prod(weight_of(node).shape))
        for name, node in weighted_products(plain)
        if belongs(name, ("blocks.1", "blocks.2"))
    )  # type: ignore[union-attr, arg-type]
    # Each weight saves three of four bytes, except for scales and zero points: a layer has at most
    # 36 output channels, each with a scale of four bytes.
    assert 0 <= after.weight_bytes - (before.weight_bytes - 3 * weights) < 8 * (36 * 5 + 3 * 5)
