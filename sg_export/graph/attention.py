"""Attention: one operator while a graph is traced, then the form that backends run.

The exporter translates PyTorch's scaled_dot_product_attention to a node `Attention` of the domain
`sg_export`. `lower_attention` replaces it after tracing. So the form is chosen in one pass, without
a second trace.
"""

from collections.abc import Sequence
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript

from sg_export.graph.stamp import DOMAIN
from sg_runtime.errors import ExportError

_T = onnx.defs.OpSchema.FormalParameter
_BIAS = _T("bias", "T", param_option=onnx.defs.OpSchema.FormalParameterOption.Optional)
_ATTENTION = onnxscript.values.Op(
    onnxscript.values.Opset(DOMAIN, 1),
    "Attention",
    onnx.defs.OpSchema(
        "Attention",
        DOMAIN,
        1,
        inputs=[_T("query", "T"), _T("key", "T"), _T("value", "T"), _BIAS],
        outputs=[_T("output", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
    ),
)
"""Operator for softmax(query keyᵀ / √size + bias) value.

query, key and value are (B, heads, tokens, size). The bias is optional: (B, 1, 1, tokens), one
value per key.
"""


def translate_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Translate aten.scaled_dot_product_attention to a node `Attention`.

    attn_mask: a bias, see `_ATTENTION`. Raises ExportError for a boolean mask, dropout, causality,
    scale or grouped heads.
    """
    boolean = attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL
    if boolean or dropout_p or is_causal or scale is not None or enable_gqa:
        raise ExportError("attention: expected the plain form of scaled_dot_product_attention")
    return _ATTENTION(query, key, value) if attn_mask is None else _ATTENTION(query, key, value, attn_mask)


def lower_attention(graph: ir.Graph) -> None:
    """Replace every `Attention` by Mul, Transpose, MatMul, (Add,) Softmax, MatMul.

    Backends fuse this pattern. The query is scaled, not the scores, so that half-precision scores
    stay in range.
    """
    scales: dict[int, ir.Value] = {}
    for node in list(graph):
        if node.domain != DOMAIN or node.op_type != "Attention":
            continue
        query, key, value, *biases = (tensor for tensor in node.inputs if tensor is not None)
        assert query.shape is not None
        assert key.shape is not None
        size = query.shape[-1]
        assert isinstance(size, int)
        if size not in scales:
            scales[size] = _scale(graph, size)
        scaled = _node(graph, node, "Mul", [query, scales[size]], query.shape)
        source, order = _transposed(key)
        batch, heads, tokens, _ = key.shape
        keys = _node(graph, node, "Transpose", [source], [batch, heads, size, tokens], perm=order)
        scores = _node(graph, node, "MatMul", [scaled, keys], [*query.shape[:3], tokens])
        for bias in biases:  # none or one
            scores = _node(graph, node, "Add", [scores, bias], [*query.shape[:3], tokens])
        weights = _node(graph, node, "Softmax", [scores], [*query.shape[:3], tokens], axis=-1)
        output = _node(graph, node, "MatMul", [weights, value], node.outputs[0].shape or ())
        output.name = node.outputs[0].name
        node.outputs[0].replace_all_uses_with(output)
        graph.remove(node, safe=True)
        producer = key.producer()
        if producer is not None and source is not key and not key.uses():
            graph.remove(producer, safe=True)


def _transposed(key: ir.Value) -> tuple[ir.Value, list[int]]:
    """Return a value and an axis order, whose Transpose is the key with swapped last two axes."""
    producer, order = key.producer(), [0, 1, 3, 2]
    if producer is None or producer.op_type != "Transpose" or producer.inputs[0] is None:
        return key, order
    first = producer.attributes["perm"].as_ints()
    return producer.inputs[0], [first[axis] for axis in order]


def _node(
    graph: ir.Graph,
    before: ir.Node,
    operator: str,
    inputs: Sequence[ir.Value],
    shape: Sequence[int | ir.SymbolicDim] | ir.Shape,
    **attributes: Any,
) -> ir.Value:
    """Insert a float32 node before `before`, with the same metadata; return its output."""
    node = ir.node(operator, inputs, attributes, metadata_props=dict(before.metadata_props))
    output = node.outputs[0]
    output.name = f"{before.outputs[0].name}/{operator}" + ("" if operator != "MatMul" else f"_{len(list(shape))}")
    output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(list(shape))
    graph.insert_before(before, node)
    return output


def _scale(graph: ir.Graph, size: int) -> ir.Value:
    """Add an initializer 1 / √size to the graph and return it."""
    name = f"{graph.name}.attention.{size}"
    tensor = ir.tensor(float(size) ** -0.5, dtype=ir.DataType.FLOAT, name=name)
    value = ir.Value(name=name, shape=ir.Shape(()), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
