"""Half precision, decided in the graph: which products run in it, and where it returns to FP32.

The output of a half-precision product stays in half precision until an operator combines it with an
FP32 value: a gate, the residual stream, a LayerNorm. So attention runs in half precision between
its projections. Modulation, residuals, guidance and the update stay in FP32 without being named.

Norms and rotations of queries and keys are in FP32. An attention is in half precision nevertheless
if its values come from a half-precision product: queries and keys are converted before it. If it
changes its scores after their product, as a cap does, these changes and the softmax stay in FP32.

The parts around the network have residuals without gates and attention without softmax: sums of two
computed values, and products of two outside of attention, are in FP32. A table of embeddings is
stored in half precision, and its rows are converted.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import get_args

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sg_export.graph.products import belongs, token_table, weighted_products
from sg_export.models.sparse import SparseModel
from sg_export.options.types import BASES
from sg_runtime.errors import ExportError
from sg_runtime.manifest import HalfPrecision, Precision
from sg_runtime.vocabulary import HELD

STATISTICS = ("GroupNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization", "Pow")
"""Operators that square. FP16 holds squares up to 65504."""

LAYOUT = ("Concat", "Expand", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze")
"""Operators that place values and compute none. Pad adds some, and CUDA pads no BF16."""

_CHANGES = ("Add", "Div", "Mul", "Tanh")
"""Operators between the scores of an attention and its softmax: bias, scale, and cap."""

_PRECISIONS: tuple[HalfPrecision, ...] = get_args(HalfPrecision)
HALF: Mapping[HalfPrecision, ir.DataType] = {name: ir.DataType(BASES[name].onnx) for name in _PRECISIONS}
"""Half-precision types by the names that users give them."""

_FP32 = ir.DataType.FLOAT
_SUFFIX = {_FP32: "fp32"} | {dtype: name for name, dtype in HALF.items()}


def fp32_layers(model: SparseModel, precision: Precision, *, half_only: bool = False) -> tuple[str, ...]:
    """Return the modules whose products stay in FP32 in a graph of this precision.

    These are the embedders and the head. In BF16 the first layer after the route is added, where
    kept tokens meet the dropped ones. `benchmarks/precision_policies.py` measured the effect of
    each. half_only: return none, for GPUs without FP32 products.
    """
    if precision == "fp32" or half_only:
        return ()
    after = model.route.end + 1
    if precision == "fp16" or after == model.network.layers:
        return model.network.ends
    return (*model.network.ends, model.network.layer_name(after))


def to_half(
    graph: ir.Graph,
    precision: HalfPrecision,
    fp32_layers: Iterable[str],
    fp32_operators: Iterable[str] = STATISTICS,
    *,
    tokens_in_half: bool = False,
) -> None:
    """Type a graph in half precision, in place, except `fp32_operators` and `fp32_layers`.

    fp32_layers: modules, as the prefixes of their weights' names.
    tokens_in_half: whether the graph converts its tokens itself. Then no operator is in FP32 by its
    name, and operators that read weights alone, whose results join the tokens, are in half too.

    Inputs and outputs of the graph keep their types, except those that `is_half` names. Weights are
    converted when they are read. Reading raises ExportError if a weight is out of range.
    """
    half, layers = HALF[precision], tuple(fp32_layers)
    weighted = {node: name for name, node in weighted_products(graph)}
    tables = {node: str(table.name) for node in graph if (table := token_table(node)) is not None}
    attended, scored = _half_attentions(graph, {node for node, name in weighted.items() if not belongs(name, layers)})
    exact = scored if tokens_in_half else scored | _exact(graph, tuple(fp32_operators))
    copies: dict[ir.Value, ir.Value] = {}

    def typed(value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The value in the other type, made once."""
        if value not in copies:
            copies[value] = _constant(value, dtype) if value.is_initializer() else cast(graph, value, dtype)
        return copies[value]

    for value in graph.inputs:
        if is_half(str(value.name)):
            value.type = ir.TensorType(half)
    for node in list(graph):
        if node.op_type == "Cast":
            continue
        floats = {i: value for i, value in enumerate(node.inputs) if value is not None and value.dtype in (_FP32, half)}
        computed = [value for value in floats.values() if not value.is_initializer()]
        if node.op_type == "DequantizeLinear":  # as what it feeds
            products = [use.node for use in node.outputs[0].uses()]
            wanted = _FP32 if any(belongs(weighted[product], layers) for product in products) else half
        elif node in weighted:
            wanted = _FP32 if belongs(weighted[node], layers) else half
        elif node in attended:
            wanted = half
        elif node in tables:
            wanted = _FP32 if belongs(tables[node], layers) else half
        elif node in exact or not all(value.dtype == half for value in computed):
            wanted = _FP32
        else:
            wanted = half if computed or tokens_in_half else _FP32
        for index, value in floats.items():
            if value.dtype != wanted:
                node.replace_input_with(index, typed(value, wanted))
        if wanted == half:
            for output in node.outputs:
                if output.dtype == _FP32:
                    output.type = ir.TensorType(half)
            if node in tables:
                uses = list(node.outputs[0].uses())
                rows = typed(node.outputs[0], _FP32)
                for use in uses:
                    use.node.replace_input_with(use.idx, rows)
    for index, output in enumerate(graph.outputs):
        wanted = half if is_half(str(output.name)) else _FP32
        if output.dtype in (_FP32, half) and output.dtype != wanted:
            replace_output(graph, index, typed(output, wanted))
    for value, copy in copies.items():
        if value.is_initializer():
            if value.uses():
                copy.name = f"{value.name}.{precision}"
            else:
                graph.initializers.pop(str(value.name))
            graph.register_initializer(copy)


def is_half(name: str) -> bool:
    """Whether an input or output of a half-precision graph is in half precision, by its name.

    These are keys and values of the text: they are large, and only attention reads them. The bias
    of the text stays in FP32: it is small, and the host makes it.
    """
    held = name.removesuffix("_weak")
    return HELD.get(held) == "image" and held != "text_bias"


def _half_attentions(graph: ir.Graph, products: Collection[ir.Node]) -> tuple[set[ir.Node], set[ir.Node]]:
    """Return the nodes of the attentions whose values come from one of these products.

    These are the nodes from the scaled query to the weighted values, and those before them that
    only place queries, keys, values and bias. If scores are changed after their product, the nodes
    that do so and the softmax are in the second set in place of the first.
    """
    found, scored = set[ir.Node](), set[ir.Node]()
    for softmax, changes, scores, weighted in _attentions(graph):
        values, sources = _before([node.inputs[1] for node in weighted], _places)
        if not sources.isdisjoint(products):
            plain = all(node.op_type == "Add" for node in changes)
            placed = (*scores, *changes) if plain else scores
            inputs, _ = _before([value for node in placed for value in node.inputs], _places)
            (found if plain else scored).update({softmax, *changes})
            found |= {*scores, *weighted, *values, *inputs}
    for fused in [node for node in graph if node.op_type == "MultiHeadAttention"]:
        _, sources = _before([fused.inputs[2]], _places)
        if not sources.isdisjoint(products):
            found |= {fused, *_before(fused.inputs, _places)[0]}
    return found, scored


def _exact(graph: ir.Graph, operators: Collection[str]) -> set[ir.Node]:
    """Return the nodes that stay in FP32: `operators`, residual sums, and linear attention.

    A product of two computed tensors is of linear attention if no softmax follows or precedes it.
    """
    beside = {node for _, _, scores, weighted in _attentions(graph) for node in (*scores, *weighted)}
    found = set[ir.Node]()
    for node in graph:
        computed = not any(value is None or value.is_initializer() for value in node.inputs)
        residual = node.op_type == "Add" or (node.op_type == "MatMul" and node not in beside)
        if node.op_type in operators or (computed and residual):
            found.add(node)
    return found


def _attentions(graph: ir.Graph) -> Iterator[tuple[ir.Node, set[ir.Node], set[ir.Node], set[ir.Node]]]:
    """Yield each softmax, with what changes its scores, their product, and that with the values."""
    for softmax in [node for node in graph if node.op_type == "Softmax"]:
        changes, terms = _before([softmax.inputs[0]], lambda node: node.op_type in _CHANGES)
        scores = {node for node in terms if node.op_type == "MatMul"}
        weighted = {use.node for use in softmax.outputs[0].uses() if use.node.op_type == "MatMul" and use.idx == 0}
        yield softmax, changes, scores, weighted


def _places(node: ir.Node) -> bool:
    """Whether a node only places values, or multiplies them by one constant."""
    factors = [value for value in node.inputs if value is not None and value.is_initializer() and value.shape == ()]
    return node.op_type in LAYOUT or (node.op_type == "Mul" and bool(factors))


def _before(values: Iterable[ir.Value | None], inside: Callable[[ir.Node], bool]) -> tuple[set[ir.Node], set[ir.Node]]:
    """Return the nodes before `values`, as far as they are `inside`, and those before them."""
    nodes, ends, rest = set[ir.Node](), set[ir.Node](), list(values)
    while rest:
        value = rest.pop()
        node = None if value is None else value.producer()
        if node is None or node in nodes:
            continue
        if inside(node):
            nodes.add(node)
            rest += node.inputs
        else:
            ends.add(node)
    return nodes, ends


def half_attentions(graph: ir.Graph) -> int:
    """Count the attentions in half precision. A backend can have a fused kernel for these."""
    return sum(node.op_type == "Softmax" and node.outputs[0].dtype in HALF.values() for node in graph)


def replace_output(graph: ir.Graph, index: int, value: ir.Value) -> None:
    """Make a computed value the output at this index, under the output's name."""
    output = graph.outputs[index]
    graph.outputs[index] = value
    value.name, output.name = output.name, f"{output.name}.{_SUFFIX[output.dtype or _FP32]}"


def _constant(value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Return an initializer of the same name and content in `dtype`, converted when it is read."""
    tensor = value.const_value
    assert tensor is not None

    def converted() -> ir.TensorProtocol:
        with np.errstate(over="ignore"):
            array: NDArray[np.generic] = tensor.numpy().astype(dtype.numpy())
        if not np.isfinite(array).all():
            raise ExportError(
                f"{value.name}: expected weights that {dtype.name.lower()} holds, found up to "
                f"{float(np.abs(tensor.numpy()).max()):g}; build with `precision` bf16 or fp32"
            )
        return ir.tensor(array, dtype=dtype)

    lazy = ir.LazyTensor(converted, dtype=dtype, shape=ir.Shape(tensor.shape.numpy()), name=str(value.name))
    return ir.Value(name=value.name, shape=value.shape, type=ir.TensorType(dtype), const_value=lazy)


def cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Insert a Cast of a computed value or an input of `graph`; return its output.

    The node comes right after the node that makes the value.
    """
    node = ir.node("Cast", [value], {"to": dtype}, name=f"{value.name}.{_SUFFIX[dtype]}")
    output = node.outputs[0]
    output.name, output.type, output.shape = node.name, ir.TensorType(dtype), value.shape
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(producer, node)
    return output
