"""Cost of a graph, counted from its nodes."""

import functools
import math
import re
from collections.abc import Callable, Mapping

import onnx_ir as ir
import sympy

from sg_export.graph.products import PRODUCTS, token_table, weight_of, weighted_products
from sg_runtime.manifest import Cost

Dimension = int | ir.SymbolicDim


def count_cost(graph: ir.Graph, sizes: Mapping[str, int] | None = None) -> Cost:
    """Count multiply-adds, weight bytes read and peak bytes of activations.

    The result is for one image, or for one row of a hoisted graph. Linear multiply-adds are those
    of MatMul, Gemm and Conv with a weight. Attention multiply-adds are those of MatMul of two
    computed tensors, and of MultiHeadAttention. A fixed batch is divided out. A symbolic size has
    its value in `sizes`; the value is 1 if `sizes` lacks it. A weight's bytes count once for every
    node that reads it. Of a table of embeddings, the rows of the tokens count.
    """
    size_of = functools.partial(_size, sizes=tuple((sizes or {}).items()))
    linear = attention = 0
    batch = _shape(graph.inputs[0])[0]
    for node in graph:
        if node.op_type == "MultiHeadAttention":
            attention += _attention_macs(node, size_of)
        if node.op_type not in PRODUCTS:
            continue
        macs = _macs(node, size_of)
        if weight_of(node) is not None:
            linear += macs
        else:
            attention += macs
    weights = sum(
        value.const_value.nbytes * sum(token_table(use.node) is None for use in value.uses())
        for value in graph.initializers.values()
        if value.const_value is not None
    ) + sum(_bytes(node.outputs[0], size_of) for node in graph if token_table(node) is not None)
    images = batch if isinstance(batch, int) else 1
    return Cost(linear // images, attention // images, weights, _activation_peak(graph, size_of) // images)


def layer_macs(graph: ir.Graph, sizes: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return the multiply-adds of each product with a weight.

    Keys are the names of the weights in the checkpoint. The counts are for one image, or for one
    row of `condition`.
    """
    size_of = functools.partial(_size, sizes=tuple((sizes or {}).items()))
    batch, found = _shape(graph.inputs[0])[0], {}
    images = batch if isinstance(batch, int) else 1
    for name, node in weighted_products(graph):
        found[name] = _macs(node, size_of) // images
    return found


def _activation_peak(graph: ir.Graph, size_of: Callable[[Dimension], int]) -> int:
    """Return the peak bytes of live inputs and computed tensors if the nodes run in order."""
    last_use = {value: index for index, node in enumerate(graph) for value in node.inputs if value is not None}
    end = len(graph)
    last_use |= dict.fromkeys(graph.outputs, end)
    live = {value: _bytes(value, size_of) for value in graph.inputs}
    peak = sum(live.values())
    for index, node in enumerate(graph):
        live |= {output: _bytes(output, size_of) for output in node.outputs if output.name}  # others are not made
        peak = max(peak, sum(live.values()))
        for value in (*node.inputs, *node.outputs):
            if value in live and last_use.get(value, index) <= index:
                del live[value]
    return peak


def _macs(node: ir.Node, size_of: Callable[[Dimension], int]) -> int:
    """Return the multiply-adds of a product: number of outputs × multiply-adds per output."""
    right = node.inputs[1]
    assert right is not None
    shape = _shape(right)
    transposed = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int() == 1
    reduced = math.prod(map(size_of, shape[1:] if node.op_type == "Conv" or transposed else shape[-2:-1]))
    return _elements(node.outputs[0], size_of) * reduced


def _attention_macs(node: ir.Node, size_of: Callable[[Dimension], int]) -> int:
    """Return the multiply-adds of both products of a MultiHeadAttention.

    Its inputs are (B, T, D), (B, L, D) and (B, L, V).
    """
    query, key, value = (_shape(tensor) for tensor in node.inputs[:3] if tensor is not None)
    return math.prod(map(size_of, (*query[:2], key[1]))) * (size_of(query[2]) + size_of(value[2]))


def _bytes(value: ir.Value, size_of: Callable[[Dimension], int]) -> int:
    assert value.dtype is not None
    return math.ceil(_elements(value, size_of) * value.dtype.itemsize)


def _elements(value: ir.Value, size_of: Callable[[Dimension], int]) -> int:
    """Return the number of elements of a tensor."""
    return math.prod(map(size_of, _shape(value)))


def _shape(value: ir.Value) -> tuple[Dimension, ...]:
    assert value.shape is not None
    return value.shape.dims


@functools.cache
def _size(dimension: Dimension, sizes: tuple[tuple[str, int], ...]) -> int:
    """Return a dimension as a number.

    A symbolic dimension may be an expression, such as K_strong + K_weak.
    """
    if isinstance(dimension, int):
        return dimension
    text, known = dimension.value or "1", dict(sizes)
    names = {name: sympy.Integer(known.get(name, 1)) for name in re.findall(r"[A-Za-z_]\w*", text)}
    return int(sympy.sympify(text, locals=names))
