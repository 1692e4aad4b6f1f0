"""Translation of an exported PyTorch program to ONNX."""

from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18
from torch.onnx import OnnxExporterError

from sg_export.graph.attention import translate_attention


def translate(program: torch.export.ExportedProgram, opset: int) -> ir.Model:
    """Translate a program to ONNX; the program is not usable afterwards.

    The exporter decomposes a program first: it traces the program two more times to replace
    operators that it has no translation for, and changes in place. The networks of this package
    have neither, so the program is translated as it is. If that fails, it is decomposed.

    Raises OnnxExporterError if PyTorch cannot translate the program.
    """
    program.run_decompositions = lambda *_: program  # type: ignore[method-assign]
    try:
        return _translated(program, opset)
    except OnnxExporterError:
        del program.run_decompositions
        return _translated(program, opset)


def _translated(program: torch.export.ExportedProgram, opset: int) -> ir.Model:
    exported = torch.onnx.export(
        program,
        opset_version=opset,
        optimize=False,
        verbose=False,
        custom_translation_table={
            torch.ops.aten.scaled_dot_product_attention.default: translate_attention,
            torch.ops.aten.to.dtype: _translate_to,
        },
    )
    assert exported is not None
    return exported.model


def _translate_to(x: Any, dtype: int, *_: Any) -> Any:
    """Translate aten.to.dtype."""
    return opset18.Identity(x) if x.dtype == dtype else opset18.Cast(x, to=dtype)
