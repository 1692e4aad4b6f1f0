"""What a graph costs, counted from the graph itself."""

import math

import onnx_ir as ir

from sg_runtime.manifest import Cost


def count_cost(graph: ir.Graph) -> Cost:
    """Multiply-adds, weight bytes read and peak of activations for one image, or for one row of `condition`.

    Linear: MatMul, Gemm and Conv with a weight. Attention: MatMul of two computed tensors. A fixed batch divides out;
    a symbolic one counts as 1. A weight's bytes count once for every node that takes it.
    """
    linear = attention = 0
    rows = graph.inputs[0].shape
    assert rows is not None
    batch = rows[0] if isinstance(rows[0], int) else 1
    for node in graph:
        if node.op_type not in ("MatMul", "Gemm", "Conv"):
            continue
        right, output = node.inputs[1], node.outputs[0]
        assert right is not None
        assert right.shape is not None
        macs = _elements(output) * _reduced(node, right.shape)
        if right.is_initializer():
            linear += macs
        else:
            attention += macs
    weights = sum(
        value.const_value.nbytes * len(value.uses())
        for value in graph.initializers.values()
        if value.const_value is not None
    )
    return Cost(linear // batch, attention // batch, weights, _activation_peak(graph) // batch)


def _activation_peak(graph: ir.Graph) -> int:
    """The most bytes of inputs and computed tensors that live at once when the nodes run in order."""
    last_use = {value: index for index, node in enumerate(graph) for value in node.inputs if value is not None}
    end = len(graph)
    last_use |= dict.fromkeys(graph.outputs, end)
    live = {value: _bytes(value) for value in graph.inputs}
    peak = sum(live.values())
    for index, node in enumerate(graph):
        live |= {output: _bytes(output) for output in node.outputs}
        peak = max(peak, sum(live.values()))
        for value in (*node.inputs, *node.outputs):
            if value in live and last_use.get(value, index) <= index:
                del live[value]
    return peak


def _elements(value: ir.Value) -> int:
    """Elements of a tensor of one image."""
    assert value.shape is not None
    return math.prod(size if isinstance(size, int) else 1 for size in value.shape)


def _bytes(value: ir.Value) -> int:
    assert value.dtype is not None
    return math.ceil(_elements(value) * value.dtype.itemsize)


def _reduced(node: ir.Node, right: ir.Shape) -> int:
    """How many products make up one output value."""
    transposed = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int() == 1
    sizes = right[1:] if node.op_type == "Conv" or transposed else right[-2:-1]
    return math.prod(size for size in sizes if isinstance(size, int))  # none of these is symbolic
