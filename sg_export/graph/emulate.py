"""Half-precision graphs where no kernel is: each operator in FP32, its inputs and outputs rounded to half precision.

That is what hardware does that sums in FP32, but for the order of sums. ONNX Runtime's CPU provider has no BF16 at all,
and runs FP16 by FP32 operators that it does not always round between.
"""

from pathlib import Path

import onnx_ir as ir

from sg_export.graph.half import HALF, cast

ROUNDED = "/Rounded"
"""Ends the name of the node that rounds what an operator gives; the operator's name comes before it."""


def emulated(source: Path | ir.Model) -> bytes:
    """A half-precision graph in FP32 operators: a serialized model, which of a file refers to the weights beside it.

    A model given as such is changed.
    """
    model = source if isinstance(source, ir.Model) else ir.load(source)
    graph, halves = model.graph, tuple(HALF.values())
    widened: dict[ir.Value, ir.Value] = {}
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
