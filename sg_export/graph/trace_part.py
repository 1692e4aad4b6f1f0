"""Tracing of the parts around the network: a module that runs once, with fixed shapes."""

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from sg_export.graph.exported import finished, initializer_of, module_of, optimize_around_weights, quiet
from sg_export.graph.stamp import MODULE, Program, assemble
from sg_export.graph.translate import translate, was_interrupt
from sg_runtime.errors import ExportError
from sg_runtime.manifest import TensorFacts


def trace_part(
    module: nn.Module,
    name: str,
    inputs: Sequence[TensorFacts],
    outputs: Sequence[TensorFacts],
    opset: int,
    lower: Callable[[ir.Graph], None],
) -> ir.Model:
    """Trace a module as the graph `name`.

    inputs, outputs: arguments and results of the module, in order, with fixed shapes.
    lower: pass that brings the graph, with nodes `Attention`, to the form of its target, in place.

    The initializers are views of the module's parameters and buffers and have their names; see
    `sg_export.graph.trace.trace`. Raises ExportError if PyTorch cannot export the module.
    """
    shapes = [[size for size in tensor.shape if isinstance(size, int)] for tensor in inputs]
    types = [getattr(torch, tensor.dtype) for tensor in inputs]
    values = tuple(torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, types, strict=True))
    program = _Program(module).eval()
    try:
        with quiet(), torch.no_grad():
            exported = translate(torch.export.export(program, values), opset)
    except Exception as error:  # PyTorch's exporter raises many kinds
        if was_interrupt(error):
            raise KeyboardInterrupt from None
        raise ExportError(f"graph {name}: PyTorch {torch.__version__} cannot export it: {error}") from error
    optimize_around_weights(exported, program)
    for node in exported.graph:
        node.metadata_props[MODULE] = module_of(node)
    starts, ends = exported.graph.inputs, exported.graph.outputs
    traced = Program(
        exported,
        inputs=[{tensor.name: value for tensor, value in zip(inputs, starts, strict=True)}],
        outputs=[{tensor.name: value for tensor, value in zip(outputs, ends, strict=True)}],
        bodies=[],
        weight=lambda weight: initializer_of(program.model, weight),
        layer_name=str,
        layer_inputs=lambda _: {},
    )
    return finished(assemble(traced, 0, name), outputs, lower)


class _Program(nn.Module):
    """A module in the place in which `sg_export.graph.exported` expects it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.model: Any = nn.Module()
        self.model.network = module

    def forward(self, *values: Tensor) -> Tensor:
        made: Tensor = self.model.network(*values)
        return made
