"""Translation of exported programs: as they are, and decomposed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.onnx import OnnxExporterError

import sg_export.graph.translate
from sg_export.graph.opset import DEFAULT_OPSET
from sg_export.graph.translate import translate

# `trace` ignores PyTorch's warnings about its own deprecated parts.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class Function(nn.Module):
    """A function of one tensor as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def exported(function: Callable[[Tensor], Tensor]) -> torch.export.ExportedProgram:
    """Export a function of x (N, K, 6), with symbolic N and K."""
    sizes = {axis: torch.export.Dim(name, min=1) for axis, name in enumerate("NK")}
    return torch.export.export(Function(function).eval(), (torch.ones(2, 3, 6),), dynamic_shapes=(sizes,))


def operators(model: ir.Model) -> set[str]:
    return {node.op_type for node in model.graph}


def outputs(model: ir.Model, x: Tensor) -> Any:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with each decomposition."""
    calls: list[int] = []
    original = torch.export.ExportedProgram.run_decompositions

    def run(self: torch.export.ExportedProgram, *arguments: Any) -> torch.export.ExportedProgram:
        calls.append(1)
        return original(self, *arguments)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", run)
    return calls


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        pytest.param(
            lambda x: x.unflatten(-1, (2, -1)).transpose(1, 2).flatten(2), {"Reshape", "Transpose"}, id="heads"
        ),
        pytest.param(lambda x: x.unflatten(-1, (-1, 3)).flatten(-2), {"Reshape"}, id="pairs"),
        pytest.param(lambda x: x.flatten(0, 1), {"Reshape"}, id="rows"),
        pytest.param(lambda x: x.to(torch.float64).to(torch.float64), {"Cast", "Identity"}, id="types"),
    ],
)
def test_translate_of_a_program_as_it_is_reads_no_shape(
    function: Callable[[Tensor], Tensor], wanted: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, x = exported(function), torch.randn(3, 5, 6)
    calls = counted(monkeypatch)
    model = translate(program, DEFAULT_OPSET)
    assert not calls
    assert operators(model) - {"Constant"} == wanted
    np.testing.assert_array_equal(outputs(model, x), function(x).numpy())


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: (2 * x).add_(1), id="in place"),
        pytest.param(lambda x: x.square() + 1, id="no translation"),
        pytest.param(lambda x: x.transpose(0, 2).flatten(0, 1) + 1, id="symbolic axis after the flattened ones"),
    ],
)
def test_translate_of_another_program_decomposes_it(
    function: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, x = exported(function), torch.randn(3, 5, 6)
    calls = counted(monkeypatch)
    model = translate(program, DEFAULT_OPSET)
    assert calls == [1]
    np.testing.assert_array_equal(outputs(model, x), function(x).numpy())


def test_translate_of_an_operator_that_onnx_has_not_raises() -> None:
    program = exported(lambda x: torch.special.airy_ai(x))
    with pytest.raises(OnnxExporterError, match="airy"):
        translate(program, DEFAULT_OPSET)


def test_translate_that_is_interrupted_does_not_begin_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise TypeError("argument 'size' failed to unpack with error \"KeyboardInterrupt: <EMPTY>\"")

    table = sg_export.graph.translate._TRANSLATIONS
    monkeypatch.setitem(table, torch.ops.aten.flatten.using_ints, interrupted)
    program = exported(lambda x: x.flatten(0, 1))
    calls = counted(monkeypatch)
    with pytest.raises(OnnxExporterError, match="KeyboardInterrupt"):
        translate(program, DEFAULT_OPSET)
    assert not calls
