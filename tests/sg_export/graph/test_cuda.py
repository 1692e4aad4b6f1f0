"""The form of graphs for ONNX Runtime's CUDA provider: the same results by fewer operators."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.kernel_counts import KERNELS, launches
from sg_export.cost.count import count_cost
from sg_export.graph.attention import lower_attention
from sg_export.graph.check import check_graph, check_types, run_onnx
from sg_export.graph.cuda import MICROSOFT, MOST_OUTPUTS, lower_for_cuda
from sg_export.graph.emulate import emulated
from sg_export.graph.exported import finished
from sg_export.graph.half import fp32_layers, to_half
from sg_export.graph.module import random_inputs
from sg_export.graph.opset import DEFAULT_OPSET
from sg_export.graph.spec import GraphSpec, graph_inputs, graph_outputs
from sg_export.graph.stamp import DOMAIN
from sg_export.graph.trace import trace
from sg_export.graph.weights import write_graphs
from sg_export.loading import LoadedModel
from sg_export.models.dit import DiT, DiTConfig
from sg_export.models.maskdit import MaskDiT
from sg_export.options.types import BASES
from sg_export.parity.distances import relative_l2
from sg_runtime.errors import ExportError
from sg_runtime.manifest import HalfPrecision, Level, Precision, Route

pytestmark = pytest.mark.slow

CONFIG = DiTConfig(image_size=6, patch=2, channels=2, width=12, depth=3, heads=2, mlp_width=20, num_classes=3)
ALL, HALF = Level(0.0, 9), Level(0.5, 4)
CONDITION, DENSE, SPARSE = GraphSpec("condition"), GraphSpec("dense", (ALL,)), GraphSpec("sparse", (HALF,))
GUIDED, JOINED = GraphSpec("guided", (ALL, HALF)), GraphSpec("guided", (ALL, Level(0.25, 7)))
EQUAL, UNEQUAL = (GraphSpec("guided", levels, null_weak=True) for levels in ((HALF, HALF), (ALL, HALF)))
SPECS = (CONDITION, DENSE, SPARSE, GUIDED, JOINED, EQUAL, UNEQUAL)
SYMBOLIC = (CONDITION, SPARSE, GUIDED, JOINED, EQUAL)
"""The graphs that are traced with a symbolic batch, which takes longer."""


@pytest.fixture(scope="module")
def dit(make_model: Callable[..., LoadedModel]) -> LoadedModel:
    return make_model(DiT, CONFIG, Route(1, 1))


@dataclass(frozen=True)
class Network:
    """A network and the graphs of it that are lowered, for `batch` images."""

    loaded: LoadedModel
    batch: int | None
    specs: tuple[GraphSpec, ...] = SPECS


@pytest.fixture(
    scope="module", params=["dit-1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dit-any", "maskdit-1"))]
)
def network(dit: LoadedModel, make_model: Callable[..., LoadedModel], request: pytest.FixtureRequest) -> Network:
    if request.param == "maskdit-1":
        return Network(make_model(MaskDiT, CONFIG, Route(1, 1)), 1, (CONDITION, SPARSE, GUIDED))
    return Network(dit, 1) if request.param == "dit-1" else Network(dit, None, SYMBOLIC)


@cache
def traced(network: Network) -> list[ir.Model]:
    """Return all graphs before they are lowered."""
    loaded = network.loaded
    return trace(loaded.model, network.specs, loaded.facts, network.batch, DEFAULT_OPSET, lower=lambda graph: None)


@cache
def graphs(network: Network, precision: Precision, *, cuda: bool = True) -> dict[GraphSpec, ir.Model]:
    """Return all graphs in the form for CUDA or in the generic form, with the types of a build."""
    lower = partial(lower_for_cuda, precision=precision) if cuda else lower_attention
    loaded = network.loaded
    models = {
        spec: finished(model.clone(), graph_outputs(spec, loaded.facts, network.batch), lower)
        for spec, model in zip(network.specs, traced(network), strict=True)
    }
    if precision != "fp32":
        for spec, model in models.items():
            tokens_in_half = cuda and precision == "fp16" and spec is not CONDITION
            layers = fp32_layers(loaded.model, precision)
            to_half(model.graph, precision, layers, tokens_in_half=tokens_in_half)
    return models


@cache
def plain(network: Network) -> dict[GraphSpec, bytes]:
    """Return the generic graphs in FP32, with their weights inside them."""
    found = graphs(network, "fp32", cuda=False)
    return {spec: ir.to_proto(model).SerializeToString() for spec, model in found.items()}


def feeds_of(network: Network, spec: GraphSpec) -> dict[str, NDArray[Any]]:
    facts = network.loaded.facts
    inputs = graph_inputs(spec, facts, network.batch)
    values = random_inputs(inputs, facts, {"B": 2, "S": 5}, torch.Generator().manual_seed(3))
    return {name: value.numpy() for name, value in values.items()}


def distances(network: Network, precision: Precision, folder: Path) -> dict[GraphSpec, float]:
    """Return the distance of each graph in the form for CUDA to the generic graph in FP32."""
    paths = write_graphs([*graphs(network, precision).values()], folder, "weights.bin")
    found = {}
    for spec, path in zip(network.specs, paths, strict=True):
        check_graph(path)
        check_types(path, precision, fp32_layers(network.loaded.model, precision))
        feeds = feeds_of(network, spec)
        wanted = run_onnx(path, feeds, plain(network)[spec])
        outputs = run_onnx(path, feeds, None if precision == "fp32" else emulated(path))
        found[spec] = max(relative_l2(one, other) for one, other in zip(outputs, wanted, strict=True))
    return found


def test_lower_for_cuda_gives_the_results_of_the_generic_form(network: Network, tmp_path: Path) -> None:
    # Only the order of the sums differs.
    assert max(distances(network, "fp32", tmp_path).values()) < BASES["fp32"].gates.graph


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_lower_for_cuda_in_half_precision_is_within_the_gate(
    network: Network, precision: HalfPrecision, tmp_path: Path
) -> None:
    found = distances(network, precision, tmp_path)
    assert max(found.values()) < BASES[precision].gates.graph
    assert min(found.values()) > BASES["fp32"].gates.graph  # the results are in half precision


def operators(graph: ir.Graph) -> Counter[str]:
    return Counter(node.op_type for node in graph)


@pytest.mark.parametrize("network", ["dit-1", pytest.param("dit-any", marks=pytest.mark.slow)], indirect=True)
def test_lower_for_cuda_leaves_one_fused_operator_per_attention_norm_and_gelu(network: Network) -> None:
    for spec, model in graphs(network, "fp32").items():
        if spec is CONDITION:
            assert MICROSOFT not in model.opset_imports
            continue
        found = operators(model.graph)
        assert model.opset_imports[MICROSOFT] == 1
        assert not {"Softmax", "Gelu", "Attention"} & found.keys()
        assert found["Transpose"] == 2  # patches to tokens and back
        assert found["FastGelu"] == CONFIG.depth
        # Branches with equal numbers of tokens are rows of one attention: everywhere in EQUAL, else
        # after the route. The 16 tokens of JOINED are one sequence; 13 tokens are not.
        assert found["MultiHeadAttention"] == (CONFIG.depth + 1 if spec in (GUIDED, UNEQUAL) else CONFIG.depth)
        # One modulated norm follows no residual sum: the first of each part of the network. The
        # last norm of a guided graph is modulated after the branches are combined.
        fused = found["SkipLayerNormalization"]
        shared = network.batch == 1 and spec not in (EQUAL, UNEQUAL)
        assert fused == ({DENSE: 6, SPARSE: 4, GUIDED: 3, JOINED: 3}[spec] if shared else 0)


def test_lower_for_cuda_keeps_the_cost_of_a_graph(network: Network) -> None:
    for spec, cuda in graphs(network, "fp32").items():
        before, after = count_cost(graphs(network, "fp32", cuda=False)[spec].graph), count_cost(cuda.graph)
        assert after.linear_macs == before.linear_macs, spec.name
        # In JOINED, tokens of the route also attend to those of the other branch, with weight 0.
        others = 2 * (2 * 9 * 7) * CONFIG.width if spec is JOINED else 0
        assert after.attention_macs == before.attention_macs + others, spec.name


def test_lower_for_cuda_in_fp16_converts_tokens_and_modulations_once(dit: LoadedModel) -> None:
    graph = graphs(Network(dit, None, SYMBOLIC), "fp16")[GUIDED].graph
    casts = [node for node in graph if node.op_type == "Cast"]
    # Modulations, embedded tokens, tokens of the last norm, and both vectors of its modulation.
    assert len(casts) == 5
    assert {value.dtype for value in (*graph.inputs, *graph.outputs)} == {ir.DataType.FLOAT, ir.DataType.INT64}
    norms = [node for node in graph if node.op_type == "LayerNormalization"]
    assert [node.outputs[0].dtype.name for node in norms] == ["FLOAT16"] * 6 + ["FLOAT"]  # type: ignore[union-attr]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_operator_has_a_kernel_and_fewer_are_launched(network: Network, precision: Precision) -> None:
    for spec, cuda in graphs(network, precision).items():
        before = launches(graphs(network, "fp32", cuda=False)[spec].graph).total()
        after = launches(cuda.graph).total()
        if spec is CONDITION:
            assert before > 0
        elif precision != "fp32":  # in FP32, attention of few tokens has no fused kernel
            assert after < before, spec.name


def test_launches_of_an_operator_without_a_kernel_is_an_error() -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]> g ({} [2] x) => ({} [2] y) {{ y = {} (x) }}'
    for kind, operator in (("float", "Erf"), ("double", "Gelu")):
        graph = ir.from_onnx_text(text.format(kind, kind, operator)).graph
        with pytest.raises(ValueError, match=f"expected an operator in KERNELS, found {operator} of"):
            launches(graph)
    assert "Erf" not in KERNELS


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_lower_for_cuda_of_a_short_sequence_of_branches_masks_the_other_branch(
    dit: LoadedModel, precision: Precision
) -> None:
    graph = graphs(Network(dit, 1), precision)[JOINED].graph
    (masked,) = (node for node in graph if node.op_type == "MultiHeadAttention" and len(node.inputs) == 6)
    (mask,) = (value for value in masked.inputs[3:] if value is not None)
    assert mask.const_value is not None
    assert mask.dtype == masked.outputs[0].dtype
    bias = mask.const_value.numpy()
    assert bias.shape == (1, 1, 16, 16)
    assert (bias[0, 0, :9, :9] == 0).all()
    assert (bias[0, 0, 9:, 9:] == 0).all()
    assert (bias[0, 0, :9, 9:] == -65504).all()
    assert (bias[0, 0, 9:, :9] == -65504).all()


def test_lower_for_cuda_in_bf16_or_of_a_long_sequence_has_an_attention_per_branch(
    dit: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Flash attention takes no bias, and it is the fused kernel that BF16 is known to have.
    network = Network(dit, 1)
    assert operators(graphs(network, "bf16")[JOINED].graph)["MultiHeadAttention"] == CONFIG.depth + 1
    monkeypatch.setattr("sg_export.graph.cuda.MOST_MASKED", 15)
    graph = traced(network)[network.specs.index(JOINED)].clone().graph
    lower_for_cuda(graph, "fp32")
    assert operators(graph)["MultiHeadAttention"] == CONFIG.depth + 1


def test_lower_for_cuda_of_another_attention_is_an_error() -> None:
    graph = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 20, "{DOMAIN}" : 1]> g (float[1,2,3,4] q) => (float[1,2,3,4] y) '
        f"{{ y = {DOMAIN}.Attention (q, q, q) }}"
    ).graph
    with pytest.raises(
        ExportError, match=r"attention y: expected inputs that are views of \(B, tokens, heads \* size\)"
    ):
        lower_for_cuda(graph, "fp32")


def test_splits_have_no_more_outputs_than_a_kernel_takes_by_value(make_model: Callable[..., LoadedModel]) -> None:
    deep = make_model(DiT, DiTConfig(4, 2, 1, 4, 6, 1, 4, 2), Route(1, 4))  # 38 vectors
    spec = GraphSpec("dense", (Level(0.0, 4),))
    lower = partial(lower_for_cuda, precision="fp32")
    (model,) = trace(deep.model, [spec], deep.facts, 1, DEFAULT_OPSET, lower=lower)
    splits = [len(node.outputs) for node in model.graph if node.op_type == "Split"]
    assert sorted(splits, reverse=True)[:2] == [MOST_OUTPUTS, 12]  # 12 sums of gate and bias
