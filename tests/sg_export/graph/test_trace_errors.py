"""Models that cannot be traced, and tracing that is interrupted."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from sg_export.graph.attention import translate_attention
from sg_export.graph.opset import DEFAULT_OPSET
from sg_export.graph.spec import GraphSpec
from sg_export.graph.trace import trace
from sg_export.loading import LoadedModel, load_model
from sg_export.models.sparse import SparseModel
from sg_runtime.errors import ExportError
from sg_runtime.manifest import Level, Route

DENSE = GraphSpec("dense", (Level(0.0, 16),))
BOOLEAN = ir.Value(name="mask", type=ir.TensorType(ir.DataType.BOOL))


@pytest.fixture(scope="module")
def loaded(quick_checkpoint: Path) -> LoadedModel:
    return load_model(quick_checkpoint)


class Failing(SparseModel):
    """A model that raises `error` within the exporter.

    If `wrapped`, it raises another error while it handles a TypeError.
    """

    error: BaseException
    wrapped = False

    def predict(self, x: torch.Tensor, held: Mapping[str, torch.Tensor], keep: Any = None) -> torch.Tensor:
        try:
            raise self.error
        except TypeError as error:
            if self.wrapped:
                raise ValueError("no conversion") from error
            raise


# PyTorch's message if Ctrl-C arrives while it reads an argument.
TOLD = (
    """empty_strided(): argument 'size' failed to unpack the object at pos 1 with error "KeyboardInterrupt: <EMPTY>\""""
)


@pytest.mark.parametrize(
    ("error", "wrapped"),
    [(KeyboardInterrupt(), False), (TypeError(TOLD), False), (TypeError(TOLD), True)],
    ids=["plain", "told", "wrapped"],
)
def test_trace_that_is_interrupted_is_no_export_error(error: BaseException, wrapped: bool, loaded: LoadedModel) -> None:
    model = Failing(loaded.model.network, Route(0, 0)).eval()  # type: ignore[arg-type]
    model.error, model.wrapped = error, wrapped
    with pytest.raises(KeyboardInterrupt):
        trace(model, [DENSE], loaded.facts, None, DEFAULT_OPSET)


def test_trace_leaves_pytorchs_logs_as_they_were(loaded: LoadedModel) -> None:
    names = ("torch.onnx", "torch._subclasses.fake_tensor")
    before = [logging.getLogger(name).level for name in names]
    model = Failing(loaded.model.network, Route(0, 0)).eval()  # type: ignore[arg-type]
    model.error = ValueError("a")
    with pytest.raises(ExportError, match="cannot export it: a"):
        trace(model, [DENSE], loaded.facts, None, DEFAULT_OPSET)
    assert [logging.getLogger(name).level for name in names] == before


def test_trace_of_a_model_that_branches_on_data_raises(loaded: LoadedModel) -> None:
    class Branching(SparseModel):
        def predict(self, x: torch.Tensor, held: Mapping[str, torch.Tensor], keep: Any = None) -> torch.Tensor:
            return x if x.sum() > 0 else super().predict(x, held, keep)

    model = Branching(loaded.model.network, Route(0, 0)).eval()  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=f"^graph dense: PyTorch {re.escape(torch.__version__)} cannot export it: "):
        trace(model, [DENSE], loaded.facts, None, DEFAULT_OPSET)


@pytest.mark.parametrize(
    "change",
    [{"attn_mask": BOOLEAN}, {"dropout_p": 0.1}, {"is_causal": True}, {"scale": 0.5}, {"enable_gqa": True}],
    ids=lambda change: next(iter(change)),
)
def test_attention_in_another_form_raises(change: dict[str, Any]) -> None:
    with pytest.raises(ExportError, match="expected the plain form of scaled_dot_product_attention"):
        translate_attention(None, None, None, **change)
