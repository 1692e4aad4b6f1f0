"""What a graph costs, counted from the graph itself."""

import math

import onnx_ir as ir

from sg_runtime.manifest import Cost


def count_cost(graph: ir.Graph) -> Cost:
    """Multiply-adds and weight bytes for one image, or for one row of `condition`.

    Linear: MatMul, Gemm and Conv with a weight. Attention: MatMul of two computed tensors. A fixed batch divides out;
    a symbolic one counts as 1. Weight bytes: every initializer once.
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
        assert output.shape is not None
        depth = _reduced(node, right.shape)
        macs = math.prod(size if isinstance(size, int) else 1 for size in output.shape) * depth
        if right.is_initializer():
            linear += macs
        else:
            attention += macs
    weights = sum(value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None)
    return Cost(linear // batch, attention // batch, weights)


def _reduced(node: ir.Node, right: ir.Shape) -> int:
    """How many products make up one output value."""
    transposed = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int() == 1
    sizes = right[1:] if node.op_type == "Conv" or transposed else right[-2:-1]
    return math.prod(size for size in sizes if isinstance(size, int))  # none of these is symbolic
