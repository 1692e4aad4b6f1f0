"""Graphs of text encoders and decoders, compared with their modules, in FP32 and in half."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import tensorrt_rtx
import torch
from full_pipelines import FULL, TOKENS, autoencoder, qwen_encoder, text_encoder
from numpy.typing import NDArray
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sg_engines.child import build_in_child
from sg_engines.trt import EngineRecipe
from sg_export.cost.count import count_cost
from sg_export.graph.attention import lower_attention
from sg_export.graph.check import check_graph, check_types, run_onnx
from sg_export.graph.emulate import emulated
from sg_export.graph.half import HALF, to_half
from sg_export.graph.opset import CONV_IN_BF16, DEFAULT_OPSET, OPSETS
from sg_export.graph.products import token_table, weighted_products
from sg_export.graph.trace_part import trace_part
from sg_export.graph.weights import write_graphs
from sg_export.options.types import BASES
from sg_export.parity.distances import relative_l2
from sg_export.parts.decode import Decoder
from sg_export.parts.text import ENCODERS
from sg_runtime.backends.rtx_header import read_rtx_header
from sg_runtime.errors import ExportError
from sg_runtime.manifest import HalfPrecision, Precision, TensorFacts

pytestmark = pytest.mark.slow

FLOAT = ir.DataType.FLOAT
TEXT = ("T5Gemma", "T5Gemma with a window", "Qwen3VL")
DECODERS = ("AutoencoderKL", "AutoencoderDC")

SHAPED = {"If", "Loop", "Scan", "Shape", "Size", "Range", "Where", "ConstantOfShape", "NonZero", "Constant"}
"""Operators of control flow, and of shapes and masks that a fixed shape makes constants."""


def module_of(name: str) -> nn.Module:
    if name == "Qwen3VL":
        return ENCODERS["Qwen3VLTextModel"](qwen_encoder(), TOKENS)
    if name in TEXT:
        window = {"sliding_window": 3} if "window" in name else {}
        return ENCODERS["T5GemmaEncoder"](text_encoder(**window), TOKENS)
    return Decoder(autoencoder(name), 0.5, 0.1)


@dataclass(frozen=True)
class Part:
    """A module with its graph, an input, and what the module makes of it."""

    name: str
    module: nn.Module
    model: ir.Model
    feeds: dict[str, NDArray[Any]]
    expected: NDArray[Any]

    @property
    def graph(self) -> ir.Graph:
        """A copy of the graph, to be changed."""
        return ir.from_proto(ir.to_proto(self.model)).graph

    def distance(self, found: NDArray[Any]) -> float:
        """Return the relative distance of a result. Embeddings of padding are left out."""
        kept = self.feeds["mask"][0].astype(bool) if "mask" in self.feeds else slice(None)
        return relative_l2(found[0, kept], self.expected[0, kept])

    def write(self, folder: Path, precision: Precision = "fp32") -> Path:
        """Write the graph and its weights."""
        graph = self.graph
        if precision != "fp32":
            to_half(graph, precision, ())
        (path,) = write_graphs([ir.Model(graph, ir_version=self.model.ir_version)], folder, "weights.bin", 256)
        return path


def facts_of(name: str) -> tuple[list[TensorFacts], list[TensorFacts]]:
    if name in TEXT:
        inputs = [TensorFacts(each, "int64", (1, TOKENS)) for each in ("ids", "mask")]
        return inputs, [TensorFacts("embeddings", "float32", (1, TOKENS, FULL.context))]
    height, width = FULL.image_size
    latents = TensorFacts("latents", "float32", (1, FULL.channels, height, width))
    return [latents], [TensorFacts("images", "float32", (1, 3, 8 * height, 8 * width))]


def make(name: str, opset: int) -> Part:
    module = module_of(name).eval().requires_grad_(False)
    inputs, outputs = facts_of(name)
    model = trace_part(module, "text" if name in TEXT else "decode", inputs, outputs, opset, lower_attention)
    generator = torch.Generator().manual_seed(0)
    if name in TEXT:
        ids = torch.randint(300, (1, TOKENS), generator=generator)
        values = [ids, (torch.arange(TOKENS) >= 4).long()[None]]
    else:
        values = [torch.randn(*inputs[0].shape, generator=generator)]
    feeds = {facts.name: value.numpy() for facts, value in zip(inputs, values, strict=True)}
    return Part(name, module, model, feeds, module(*values).numpy())


@pytest.fixture(scope="module")
def parts() -> dict[tuple[str, int], Part]:
    return {}


@pytest.fixture
def part(request: pytest.FixtureRequest, parts: dict[tuple[str, int], Part]) -> Part:
    """The part by the parameter, traced once: its name, and the opset if it is not the default."""
    name, opset = request.param if isinstance(request.param, tuple) else (request.param, DEFAULT_OPSET)
    if (name, opset) not in parts:
        parts[name, opset] = make(name, opset)
    return parts[name, opset]


each = pytest.mark.parametrize("part", [*TEXT, *DECODERS], indirect=True)
gemma = pytest.mark.parametrize("part", ["T5Gemma"], indirect=True)
last_opset = pytest.mark.parametrize(
    "part", [(name, OPSETS[-1]) for name in ("T5Gemma", *DECODERS)], indirect=True, ids=str
)


@each
def test_trace_part_is_the_module(part: Part, tmp_path: Path) -> None:
    """FP32 sums in another order: when measured, up to 3e-7."""
    path = part.write(tmp_path)
    check_graph(path)
    (found,) = run_onnx(path, part.feeds)
    assert part.distance(found) <= 1e-5


@last_opset
def test_trace_part_of_last_opset_is_the_module(part: Part, tmp_path: Path) -> None:
    path = part.write(tmp_path)
    check_graph(path)
    (found,) = run_onnx(path, part.feeds)
    assert part.distance(found) <= 1e-5


@each
def test_trace_part_has_fixed_shapes_and_computes_none(part: Part) -> None:
    graph, (inputs, outputs) = part.model.graph, facts_of(part.name)
    for values, facts in ((graph.inputs, inputs), (graph.outputs, outputs)):
        assert [(value.name, value.shape.dims) for value in values] == [(one.name, one.shape) for one in facts]  # type: ignore[union-attr]
    assert not SHAPED & {node.op_type for node in graph}
    assert {node.domain for node in graph} == {""}
    shapes = [output.shape for node in graph for output in node.outputs]
    assert all(shape is not None and all(isinstance(dim, int) for dim in shape) for shape in shapes)


@each
def test_trace_part_computes_next_to_nothing_without_an_input(part: Part) -> None:
    """Weights alone are read by 1 + weight of norms, and by new axes of vectors and tables."""
    reached = set(part.model.graph.inputs)
    constant = []
    for node in part.model.graph:
        if reached.isdisjoint(node.inputs):
            constant.append(node.op_type)
        else:
            reached.update(node.outputs)
    assert set(constant) <= {"Add", "Unsqueeze"}


@each
def test_trace_part_names_weights_and_nodes_as_the_module(part: Part) -> None:
    tensors = dict(part.module.named_parameters()) | dict(part.module.named_buffers())
    weights = part.model.graph.initializers
    named = {name for name in weights if name.removesuffix(".T") in tensors}
    assert all(name.startswith(f"{part.model.graph.name}.") for name in weights.keys() - named)
    used = {name for name in tensors if not name.startswith(("vae.encoder.", "vae.quant_conv."))}
    assert {name.removesuffix(".T") for name in named} == used
    for name in named:
        tensor = tensors[name.removesuffix(".T")].numpy()
        found = weights[name].const_value
        assert found is not None
        np.testing.assert_array_equal(found.numpy(), tensor.T if name.endswith(".T") else tensor)
    modules = {name for name, _ in part.module.named_modules()}
    names = [str(node.name) for node in part.model.graph]
    assert len(set(names)) == len(names)
    assert {name.rpartition("/")[0] for name in names} <= modules


def test_trace_part_of_a_module_that_cannot_be_exported_says_so() -> None:
    class Chosen(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    facts = [TensorFacts("x", "float32", (1, 2))]
    with pytest.raises(ExportError, match=r"^graph text: PyTorch .* cannot export it: "):
        trace_part(Chosen(), "text", facts, [TensorFacts("y", "float32", (1, 2))], DEFAULT_OPSET, lower_attention)


def test_trace_part_keeps_an_epsilon_that_onnxscript_takes_for_0(tmp_path: Path) -> None:
    class Ratio(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / (x + 1e-15)

    facts = [TensorFacts("x", "float32", (1, 2))], [TensorFacts("y", "float32", (1, 2))]
    model = trace_part(Ratio(), "ratio", *facts, DEFAULT_OPSET, lower_attention)
    (path,) = write_graphs([model], tmp_path, "weights.bin")
    (found,) = run_onnx(path, {"x": np.array([[0.0, 2.0]], np.float32)})
    np.testing.assert_array_equal(found, [[0.0, 1.0]])


half = pytest.mark.parametrize("precision", HALF)


def in_half(names: Sequence[str]) -> pytest.MarkDecorator:
    """Parametrize a test by parts and precisions."""
    found = [
        ((name, CONV_IN_BF16 if precision == "bf16" and name in DECODERS else DEFAULT_OPSET), precision)
        for name in names
        for precision in HALF
    ]
    return pytest.mark.parametrize(("part", "precision"), found, indirect=["part"], ids=str)


@in_half((*TEXT, *DECODERS))
def test_to_half_of_a_part_is_near_its_module(part: Part, precision: HalfPrecision, tmp_path: Path) -> None:
    path = part.write(tmp_path, precision)
    check_graph(path)
    check_types(path, precision, ())
    (found,) = run_onnx(path, part.feeds, emulated(path))
    rounding = {"fp16": 1e-5, "bf16": 1e-4}[precision]
    assert rounding < part.distance(found) <= BASES[precision].build_limit


def nodes(graph: ir.Graph, *operators: str) -> Iterator[ir.Node]:
    return (node for node in graph if node.op_type in operators)


def types(found: Iterator[ir.Node]) -> set[ir.DataType | None]:
    return {output.dtype for node in found for output in node.outputs}


@half
@pytest.mark.parametrize("part", TEXT, indirect=True)
def test_to_half_of_a_text_encoder_keeps_norms_caps_and_softmax_in_fp32(part: Part, precision: HalfPrecision) -> None:
    graph = part.graph
    to_half(graph, precision, ())
    assert types(nodes(graph, "MatMul")) == {HALF[precision]}
    operators = ["Pow", "ReduceMean", "Softmax", "Add", *(["Tanh", "Div"] if part.name != "Qwen3VL" else [])]
    for operator in operators:
        assert types(nodes(graph, operator)) == {FLOAT}, operator
    (lookup,) = (node for node in graph if token_table(node) is not None)
    table = lookup.inputs[0]
    assert table is not None
    assert (table.dtype, str(table.name)) == (HALF[precision], "text_encoder.embed_tokens.weight")
    rows = [use.node for use in lookup.outputs[0].uses()]
    assert [(node.op_type, node.outputs[0].dtype) for node in rows] == [("Cast", FLOAT)]


@half
@gemma
def test_to_half_keeps_a_table_in_fp32_if_asked(precision: HalfPrecision, part: Part) -> None:
    graph = part.graph
    to_half(graph, precision, ("text_encoder.embed_tokens",))
    assert graph.initializers["text_encoder.embed_tokens.weight"].dtype == FLOAT


@in_half(DECODERS)
def test_to_half_of_a_decoder_keeps_norms_and_residuals_in_fp32(part: Part, precision: HalfPrecision) -> None:
    graph, wanted = part.graph, HALF[precision]
    to_half(graph, precision, ())
    assert {node.outputs[0].dtype for _, node in weighted_products(graph)} == {wanted}
    norms = ("InstanceNormalization", "GroupNormalization", "Pow", "ReduceMean")
    assert types(nodes(graph, *norms)) == {FLOAT}
    sums = (n for n in nodes(graph, "Add") if not any(v is not None and v.is_initializer() for v in n.inputs))
    assert types(sums) == {FLOAT}
    attention = set(nodes(graph, "MatMul")) - {node for _, node in weighted_products(graph)}
    # That of AutoencoderKL has a softmax. That of AutoencoderDC is linear and sums over all places.
    expected = wanted if part.name == "AutoencoderKL" else FLOAT
    assert types(iter(attention)) == {expected}


@each
def test_count_cost_of_a_part_is_what_pytorch_counts(part: Part) -> None:
    """PyTorch counts two operations per multiply-add, of all products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # a fused one it does not count
        part.module(*(torch.from_numpy(value) for value in part.feeds.values()))
    cost = count_cost(part.model.graph)
    assert 2 * (cost.linear_macs + cost.attention_macs) == counter.get_total_flops()


@gemma
def test_count_cost_of_a_text_encoder_is_the_closed_form(part: Part) -> None:
    width, mlp, heads, size, layers = FULL.context, 24, 2, 8, 3
    cost = count_cost(part.model.graph)
    projections = width * size * (heads + 2 + heads)  # one head of keys, one of values
    assert cost.linear_macs == layers * TOKENS * (projections + 3 * width * mlp)
    assert cost.attention_macs == layers * 2 * heads * TOKENS**2 * size


@pytest.mark.parametrize("precision", ["fp32", *HALF])
@gemma
def test_count_cost_of_a_text_encoder_reads_a_row_of_its_table_per_token(precision: Precision, part: Part) -> None:
    graph = part.graph
    if precision != "fp32":
        to_half(graph, precision, ())
    everything = sum(
        value.const_value.nbytes * len(value.uses()) for value in graph.initializers.values() if value.const_value
    )
    size = 4 if precision == "fp32" else 2
    assert count_cost(graph).weight_bytes == everything - (320 - TOKENS) * FULL.context * size


@pytest.mark.parametrize(
    ("part", "precision"),
    [
        *((name, precision) for name in ("T5Gemma", "Qwen3VL") for precision in ("fp32", "bf16", "fp16")),
        *((name, precision) for name in DECODERS for precision in ("fp32", "fp16")),
        *(((name, CONV_IN_BF16), "bf16") for name in DECODERS),
    ],
    indirect=["part"],
    ids=str,
)
def test_tensorrt_rtx_builds_a_part(part: Part, precision: Precision, tmp_path: Path) -> None:
    path = part.write(tmp_path, precision)
    output = tmp_path / "part.engine"
    capabilities = () if precision == "fp32" else (89,)
    figures = build_in_child("tensorrt_rtx", path, EngineRecipe(({},), capabilities), output, lambda *_: None)
    assert read_rtx_header(output).version == tensorrt_rtx.__version__
    assert figures.memory_bytes > 0
