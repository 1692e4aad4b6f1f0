"""Half precision in the graphs of a network with text: attentions, norms of heads, inputs."""

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import pytest
import tensorrt_rtx
from traced_prx import CONFIG, DENSE, GUIDED, SPECS, TracedPRX, traced_prx

from sg_engines.trt import EngineRecipe, build_engine
from sg_export.graph.check import check_graph, check_types, run_onnx
from sg_export.graph.emulate import emulated
from sg_export.graph.half import HALF, fp32_layers, half_attentions, to_half
from sg_export.graph.spec import GraphSpec
from sg_export.graph.weights import write_graphs
from sg_export.options.types import BASES
from sg_export.packing.engines import count_fused_attention
from sg_export.parity.distances import relative_l2
from sg_runtime.manifest import HalfPrecision

FLOAT = ir.DataType.FLOAT


@pytest.fixture(scope="module")
def prx() -> TracedPRX:
    return traced_prx(symbolic=True)


def blocks_in_half(precision: HalfPrecision) -> int:
    return CONFIG.depth if precision == "fp16" else CONFIG.depth - 1  # in BF16 the last one is in FP32


def attentions(spec: GraphSpec, precision: HalfPrecision) -> int:
    """Return the number of attentions in half precision: one per block and branch."""
    blocks = blocks_in_half(precision)
    return blocks if spec is DENSE else 2 * blocks - 1  # both branches share the first block


def nodes(graph: ir.Graph, *operators: str) -> Iterator[ir.Node]:
    return (node for node in graph if node.op_type in operators)


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_to_half_has_whole_attentions_in_half_precision(
    spec: GraphSpec, precision: HalfPrecision, prx: TracedPRX
) -> None:
    graph = prx.half(spec, precision).graph
    assert half_attentions(graph) == attentions(spec, precision)
    for softmax in nodes(graph, "Softmax"):
        bias = softmax.inputs[0].producer()  # type: ignore[union-attr]
        scores = bias.inputs[0].producer()  # type: ignore[union-attr]
        (weighted,) = (use.node for use in softmax.outputs[0].uses())
        parts = (bias, scores, softmax, weighted)
        assert [part.op_type for part in parts] == ["Add", "MatMul", "Softmax", "MatMul"]  # type: ignore[union-attr]
        types = {value.dtype for part in parts for value in (*part.inputs, *part.outputs)}  # type: ignore[union-attr]
        assert types == {softmax.outputs[0].dtype}
        # No conversion is within the pattern that backends fuse.
        query, keys = (value.producer() for value in scores.inputs)  # type: ignore[union-attr]
        assert (query.op_type, keys.op_type) == ("Mul", "Transpose")  # type: ignore[union-attr]
        assert {value.dtype for part in (query, keys) for value in part.inputs} == types  # type: ignore[union-attr]


@pytest.mark.parametrize("precision", HALF)
def test_to_half_has_norms_and_rotations_of_heads_in_fp32(precision: HalfPrecision, prx: TracedPRX) -> None:
    graph = prx.half(GUIDED, precision).graph
    norms = [*nodes(graph, "Pow", "ReduceMean", "Sqrt", "Div")]
    assert len(norms) == 4 * 2 * CONFIG.depth  # queries and keys
    assert {value.dtype for node in norms for value in node.outputs} == {FLOAT}
    for softmax in nodes(graph, "Softmax"):
        if softmax.outputs[0].dtype == FLOAT:  # of a block in FP32
            continue
        scores = softmax.inputs[0].producer().inputs[0].producer()  # type: ignore[union-attr]
        for value in scores.inputs:  # type: ignore[union-attr]
            node = value.producer()  # type: ignore[union-attr]
            while node.op_type != "Cast":  # type: ignore[union-attr]
                assert node.op_type in ("Mul", "Transpose", "Reshape", "Concat", "Slice")  # type: ignore[union-attr]
                image = -1 if node.op_type == "Concat" else 0  # type: ignore[union-attr]
                node = node.inputs[image].producer()  # type: ignore[union-attr]
            rotated = node.inputs[0].producer()  # type: ignore[union-attr]
            assert rotated.op_type == "Add"  # type: ignore[union-attr]
            assert {value.dtype for value in (*rotated.inputs, *rotated.outputs)} == {FLOAT}  # type: ignore[union-attr]


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_to_half_of_text_inputs_has_keys_and_values_in_the_type_of_the_graph(
    spec: GraphSpec, precision: HalfPrecision, prx: TracedPRX
) -> None:
    graph, half = prx.half(spec, precision).graph, HALF[precision]
    inputs = {str(value.name): value for value in graph.inputs}
    text = [inputs[name] for name in ("text_keys", "text_values")]
    assert {value.dtype for value in text} == {half}
    assert {inputs[name].dtype for name in ("x", "modulations", "text_bias", "r", "c_in")} == {FLOAT}
    assert {value.dtype for value in graph.outputs} == {FLOAT}
    # Keys and values of the text are converted for a block in FP32 alone, and then only its part.
    assert {use.node.op_type for value in text for use in value.uses()} == {"Gather"}
    # The bias is padded in FP32, once for each number of keys, and then converted.
    assert {use.node.op_type for use in inputs["text_bias"].uses()} == {"Pad"}


@pytest.mark.parametrize("precision", HALF)
def test_to_half_types_outputs_for_the_text_as_the_inputs_that_they_become(precision: HalfPrecision) -> None:
    text = "(float[N, 3] x) => (float[N, 3] text_keys, float[N, 3] y) { text_keys = Relu(x) y = Neg(text_keys) }"
    graph = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 20]> g {text}').graph
    to_half(graph, precision, ())
    assert {str(value.name): value.dtype for value in graph.outputs} == {"text_keys": HALF[precision], "y": FLOAT}
    assert [node.op_type for node in graph] == ["Relu", "Cast", "Neg"]


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_half_precision_graph_with_text_is_within_the_gate(
    spec: GraphSpec, precision: HalfPrecision, prx: TracedPRX, tmp_path: Path
) -> None:
    (tmp_path / "fp32").mkdir()
    (plain,) = write_graphs([prx.graph(spec)], tmp_path / "fp32", "weights.bin")
    (path,) = write_graphs([prx.half(spec, precision)], tmp_path, "weights.bin")
    check_graph(path)
    check_types(path, precision, fp32_layers(prx.model, precision))
    feeds = prx.feeds(spec)
    outputs = zip(run_onnx(path, feeds, emulated(path)), run_onnx(plain, feeds), strict=True)
    found = max(relative_l2(output, wanted) for output, wanted in outputs)
    assert BASES["fp32"].gates.graph < found < BASES[precision].gates.graph


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_engine_of_a_graph_with_text_has_a_fused_kernel_for_every_attention(
    spec: GraphSpec, precision: HalfPrecision, prx: TracedPRX, tmp_path: Path
) -> None:
    (path,) = write_graphs([prx.half(spec, precision)], tmp_path, "weights.bin")
    shapes = {name: value.shape for name, value in prx.feeds(spec).items() if value.shape}
    build_engine(tensorrt_rtx, path, EngineRecipe((shapes,), (89,)), tmp_path / "plan", lambda *_: None)
    assert count_fused_attention(tmp_path / "plan") == attentions(spec, precision)
