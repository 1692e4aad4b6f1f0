"""Translation of an exported PyTorch program to ONNX."""

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18
from torch.onnx import OnnxExporterError

from sg_export.graph.attention import translate_attention


def translate(program: torch.export.ExportedProgram, opset: int) -> ir.Model:
    """Translate a program to ONNX. The program cannot be used afterwards.

    PyTorch's exporter first decomposes a program: it traces it two more times, to replace operators
    that have no translation and operators that change a tensor in place. The networks of this
    package have neither, so their programs are translated as they are. A program that cannot be
    translated as it is, is decomposed.

    Raises OnnxExporterError if PyTorch cannot translate the program.
    """
    program.run_decompositions = lambda *_: program  # the exporter calls it first
    try:
        return _translated(program, opset)
    except OnnxExporterError as error:
        if was_interrupt(error):
            raise
        del program.run_decompositions
        return _translated(program, opset)


def was_interrupt(error: BaseException | None) -> bool:
    """Whether the cause of an error is Ctrl-C.

    If it comes while PyTorch reads an argument, PyTorch reports it in the text of a TypeError.
    """
    while error is not None:
        if "KeyboardInterrupt" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _translated(program: torch.export.ExportedProgram, opset: int) -> ir.Model:
    exported = torch.onnx.export(
        program, opset_version=opset, optimize=False, verbose=False, custom_translation_table=_TRANSLATIONS
    )
    assert exported is not None
    return exported.model


def _flatten(x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    """Translate aten.flatten; the axes after the flattened ones have fixed sizes."""
    rank = len(x.shape)
    return _reshape(x, [*[0] * (start_dim % rank), -1, *x.shape[end_dim % rank + 1 :]])


def _unflatten(x: Any, dim: int, sizes: Sequence[int]) -> Any:
    """Translate aten.unflatten; the axes after the divided one have fixed sizes."""
    axis = dim % len(x.shape)
    return _reshape(x, [*[0] * axis, *sizes, *x.shape[axis + 1 :]])


def _reshape(x: Any, shape: Sequence[int]) -> Any:
    """Make a Reshape. A size of 0 is that of the same axis of `x`, so the graph reads no shape."""
    sizes: Any = opset18.Constant(value_ints=shape)
    return opset18.Reshape(x, sizes)


def _to(x: Any, dtype: int, *_: Any) -> Any:
    """Translate aten.to."""
    return opset18.Identity(x) if x.dtype == dtype else opset18.Cast(x, to=dtype)


def _same(x: Any) -> Any:
    """Translate an operator that changes nothing in a graph, such as aten.detach_."""
    return opset18.Identity(x)


_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.scaled_dot_product_attention.default: translate_attention,
    torch.ops.aten.flatten.using_ints: _flatten,
    torch.ops.aten.unflatten.int: _unflatten,
    torch.ops.aten.to.dtype: _to,
    torch.ops.aten.detach_.default: _same,
}
