"""Emulation of half-precision graphs on providers without half-precision kernels.

Each operator runs in FP32, and its inputs and outputs are rounded to half precision. Hardware that
sums in FP32 gives the same, except for the order of the sums. ONNX Runtime's CPU provider has no
BF16 kernels. It runs FP16 graphs with FP32 operators and does not always round between them.
"""

from pathlib import Path

import onnx_ir as ir

from sg_export.graph.half import HALF, cast, replace_output

ROUNDED = "/Rounded"
"""Suffix of a rounding node: `<operator>/Rounded`."""


def emulated(source: Path | ir.Model) -> bytes:
    """Return a half-precision graph with FP32 operators, inputs and outputs, as a serialized model.

    source: path of the graph, or the graph as a model. The result for a path refers to the weights
    next to the file. A model is changed in place.
    """
    model = source if isinstance(source, ir.Model) else ir.load(source)
    graph, halves = model.graph, tuple(HALF.values())
    widened: dict[ir.Value, ir.Value] = {}
    for given in graph.inputs:
        if (half := given.dtype) in halves:
            assert half is not None
            given.type, uses = ir.TensorType(ir.DataType.FLOAT), list(given.uses())
            rounded = cast(graph, given, half)
            for use in uses:
                use.node.replace_input_with(use.idx, rounded)
    for index, output in enumerate(graph.outputs):
        if output.dtype in halves:
            replace_output(graph, index, cast(graph, output, ir.DataType.FLOAT))
    for node in list(graph):
        if node.op_type == "Cast":
            continue
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in halves:
                if value not in widened:
                    widened[value] = cast(graph, value, ir.DataType.FLOAT)
                node.replace_input_with(index, widened[value])
        for index, output in enumerate(node.outputs):
            if (half := output.dtype) in halves:
                assert half is not None
                output.type, uses = ir.TensorType(ir.DataType.FLOAT), list(output.uses())
                rounded = cast(graph, output, half)
                rounding = rounded.producer()
                assert rounding is not None
                rounding.name = f"{node.name}{f':{index}' if index else ''}{ROUNDED}"
                for use in uses:
                    use.node.replace_input_with(use.idx, rounded)
    content: bytes = ir.to_proto(model).SerializeToString()
    return content
