"""The form of graphs with text for ONNX Runtime's CUDA provider."""

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from traced_prx import CONFIG, DENSE, GUIDED, SPECS, TracedPRX, traced_prx

from benchmarks.kernel_counts import launches
from sg_export.cost.count import count_cost
from sg_export.graph.check import check_graph, check_types, run_onnx
from sg_export.graph.cuda import lower_for_cuda
from sg_export.graph.emulate import emulated
from sg_export.graph.half import HALF, fp32_layers, to_half
from sg_export.graph.spec import GraphSpec
from sg_export.graph.stamp import DOMAIN
from sg_export.graph.weights import write_graphs
from sg_export.options.types import BASES
from sg_export.parity.distances import relative_l2
from sg_runtime.errors import ExportError
from sg_runtime.manifest import Precision


@pytest.fixture(scope="module")
def prx() -> TracedPRX:
    return traced_prx(symbolic=False)


def lowered(prx: TracedPRX, spec: GraphSpec, precision: Precision) -> ir.Model:
    """Return a graph in the form for CUDA, with the types of a build."""
    model = prx.graph(spec, partial(lower_for_cuda, precision=precision))
    if precision != "fp32":
        to_half(model.graph, precision, fp32_layers(prx.model, precision), tokens_in_half=precision == "fp16")
    return model


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_lower_for_cuda_of_a_graph_with_text_gives_the_results_of_the_generic_form(
    spec: GraphSpec, precision: Precision, prx: TracedPRX, tmp_path: Path
) -> None:
    (tmp_path / "plain").mkdir()
    (plain,) = write_graphs([prx.graph(spec)], tmp_path / "plain", "weights.bin")
    (path,) = write_graphs([lowered(prx, spec, precision)], tmp_path, "weights.bin")
    check_graph(path)
    check_types(path, precision, fp32_layers(prx.model, precision))
    feeds = prx.feeds(spec)
    found = run_onnx(path, feeds, None if precision == "fp32" else emulated(path))
    wanted = run_onnx(plain, feeds)
    assert max(relative_l2(one, other) for one, other in zip(found, wanted, strict=True)) < BASES[precision].gates.graph


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_lower_for_cuda_has_one_attention_per_branch_with_one_bias_per_shape(
    precision: Precision, prx: TracedPRX
) -> None:
    graph = lowered(prx, GUIDED, precision).graph
    attentions = [node for node in graph if node.op_type == "MultiHeadAttention"]
    assert len(attentions) == 2 * CONFIG.depth - 1
    assert not {"Softmax", "Attention"} & {node.op_type for node in graph}
    shapes = set()
    for node in attentions:
        assert node.inputs[3] is None
        assert node.inputs[4] is None
        bias, query, key = node.inputs[5], node.inputs[0], node.inputs[1]
        assert bias is not None
        assert query is not None
        assert key is not None
        assert (str(bias.shape[0]), *bias.shape[1:]) == ("B", 1, query.shape[1], key.shape[1])  # type: ignore[index]
        assert {value.dtype for value in node.inputs if value is not None} == {node.outputs[0].dtype}
        shapes.add((bias, query.shape[1], key.shape[1]))  # type: ignore[index]
    # All tokens attend, and the kept ones. In BF16 the last block takes the bias in FP32.
    assert len(shapes) == (3 if precision == "bf16" else 2)
    repeated = [node for node in graph if node.op_type == "Expand" and len(node.outputs[0].shape or ()) == 4]
    assert len(repeated) == 2
    # The other Transposes are those from patches to tokens and back.
    assert Counter(node.op_type for node in graph)["Transpose"] == 2


def test_lower_for_cuda_in_bf16_has_attentions_of_half_precision_blocks_in_bf16(prx: TracedPRX) -> None:
    graph = lowered(prx, GUIDED, "bf16").graph
    types = [node.outputs[0].dtype for node in graph if node.op_type == "MultiHeadAttention"]
    assert types == [HALF["bf16"]] * 3 + [ir.DataType.FLOAT] * 2


def test_lower_for_cuda_in_fp16_squares_heads_in_fp32(prx: TracedPRX) -> None:
    graph = lowered(prx, GUIDED, "fp16").graph
    squares = [node for node in graph if node.op_type in ("Pow", "ReduceMean", "Sqrt", "Div")]
    assert len(squares) == 4 * 2 * CONFIG.depth
    assert {node.outputs[0].dtype for node in squares} == {ir.DataType.FLOAT}
    norms = [node for node in graph if node.op_type == "LayerNormalization"]
    assert [node.outputs[0].dtype for node in norms[:-1]] == [HALF["fp16"]] * (len(norms) - 1)


def test_norms_of_heads_are_fused_by_onnx_runtime(prx: TracedPRX, tmp_path: Path) -> None:
    (path,) = write_graphs([lowered(prx, DENSE, "fp32")], tmp_path, "weights.bin")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx", load_external_data=False)
    found = Counter(node.op_type for node in optimized.graph.node)
    assert found["SimplifiedLayerNormalization"] == 2 * CONFIG.depth


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_operator_of_a_graph_with_text_has_a_kernel(precision: Precision, prx: TracedPRX) -> None:
    for spec in SPECS:
        assert launches(lowered(prx, spec, precision).graph).total() > 0


def test_lower_for_cuda_of_a_graph_with_text_keeps_its_cost(prx: TracedPRX) -> None:
    for spec in SPECS:
        before, after = count_cost(prx.graph(spec).graph), count_cost(lowered(prx, spec, "fp32").graph)
        assert (after.linear_macs, after.attention_macs) == (before.linear_macs, before.attention_macs)


def test_lower_for_cuda_of_padding_ignores_it(prx: TracedPRX, tmp_path: Path) -> None:
    (path,) = write_graphs([lowered(prx, GUIDED, "fp32")], tmp_path, "weights.bin")
    feeds = prx.feeds(GUIDED)
    other = {name: np.array(value) for name, value in feeds.items()}
    for name in ("text_keys", "text_values"):
        other[name][1, :, 5:] = 3.0  # of the padded tokens of the second image
    for one, two in zip(run_onnx(path, feeds), run_onnx(path, other), strict=True):
        np.testing.assert_array_equal(one, two)


def test_lower_for_cuda_of_a_bias_with_a_symbolic_number_of_queries_is_an_error() -> None:
    graph = ir.from_onnx_text(
        f'''<ir_version: 10, opset_import: ["" : 20, "{DOMAIN}" : 1]>
        g (float[1, K, 8] x, float[1, 1, 1, K] bias, int64[4] shape) => (float[1, 2, K, 4] y)
        <float[1, K, 2, 4] divided, float[1, 2, K, 4] heads> {{
            divided = Reshape (x, shape)
            heads = Transpose <perm = [0, 2, 1, 3]> (divided)
            y = {DOMAIN}.Attention (heads, heads, heads, bias)
        }}'''
    ).graph
    with pytest.raises(ExportError, match=r"attention y: expected a fixed number of queries, .* found K"):
        lower_for_cuda(graph, "fp32")
