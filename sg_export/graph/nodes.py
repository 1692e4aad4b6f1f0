"""Insertion of nodes and constants into a graph."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

Dims = Sequence[int | ir.SymbolicDim]


def insert(
    graph: ir.Graph,
    before: ir.Node,
    operator: str,
    inputs: Sequence[ir.Value | None],
    shapes: Sequence[Dims | None],
    domain: str = "",
    **attributes: Any,
) -> list[ir.Value]:
    """Insert a node before `before`, with the same metadata; return its outputs.

    The outputs have the type of the first input.
    shapes: shape of each output; None for an output that nobody reads.
    """
    node = ir.node(
        operator,
        inputs,
        attributes,
        domain=domain,
        num_outputs=len(shapes),
        metadata_props=dict(before.metadata_props),
    )
    first = inputs[0]
    assert first is not None
    for number, (output, shape) in enumerate(zip(node.outputs, shapes, strict=True)):
        if shape is None:
            output.name = ""
            continue
        output.name = f"{before.outputs[0].name}/{operator}" + (f"_{number}" if number else "")
        output.type, output.shape = ir.TensorType(first.dtype or ir.DataType.FLOAT), ir.Shape(list(shape))
    graph.insert_before(before, node)
    return list(node.outputs)


def integers(graph: ir.Graph, *values: int) -> ir.Value:
    """Return the initializer of the graph with these int64 values, made once."""
    name = f"{graph.name}.int64.{'_'.join(map(str, values))}"
    if name not in graph.initializers:
        tensor = ir.tensor(list(values), dtype=ir.DataType.INT64, name=name)
        graph.register_initializer(
            ir.Value(name=name, shape=ir.Shape([len(values)]), type=ir.TensorType(tensor.dtype), const_value=tensor)
        )
    return graph.initializers[name]


def remove_unused(graph: ir.Graph) -> None:
    """Remove the nodes and initializers that no output of the graph depends on."""
    outputs = set(graph.outputs)
    for node in reversed(graph):
        if not any(value in outputs or value.uses() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
