"""The form of graphs for ONNX Runtime's CUDA provider: the same results by fewer operators."""

from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray

from sg_export.cost.count import count_cost
from sg_export.graph.attention import lower_attention
from sg_export.graph.check import check_graph, run_onnx
from sg_export.graph.cuda import MICROSOFT, lower_for_cuda
from sg_export.graph.emulate import emulated
from sg_export.graph.half import fp32_layers, to_half
from sg_export.graph.module import examples
from sg_export.graph.opset import DEFAULT_OPSET
from sg_export.graph.spec import GraphSpec, graph_inputs
from sg_export.graph.trace import trace
from sg_export.graph.weights import write_graphs
from sg_export.loading import LoadedModel
from sg_export.models.dit import DiT, DiTConfig
from sg_export.models.maskdit import MaskDiT
from sg_export.options.types import BASES
from sg_export.parity.distances import relative_l2
from sg_runtime.errors import ExportError
from sg_runtime.manifest import HalfPrecision, Level, Precision, Route

CONFIG = DiTConfig(image_size=6, patch=2, channels=2, width=12, depth=4, heads=2, mlp_width=20, num_classes=3)
DENSE, HALF = Level(0.0, 9), Level(0.5, 4)
SPECS = (
    GraphSpec("condition"),
    GraphSpec("dense", (DENSE,)),
    GraphSpec("sparse", (HALF,)),
    GraphSpec("guided", (DENSE, HALF)),
    GraphSpec("guided", (HALF, HALF), null_weak=True),
    GraphSpec("guided", (DENSE, HALF), null_weak=True),
)
IDS = [spec.name for spec in SPECS]


@pytest.fixture(scope="module", params=[DiT, MaskDiT], ids=["dit", "maskdit"])
def loaded(make_model: Callable[..., LoadedModel], request: pytest.FixtureRequest) -> LoadedModel:
    return make_model(request.param, CONFIG, Route(1, 2))


@cache
def models(loaded: LoadedModel, batch: int | None, precision: Precision, cuda: bool) -> dict[str, ir.Model]:
    """Return all graphs in the generic or the CUDA form, by name."""
    lower = partial(lower_for_cuda, precision=precision) if cuda else lower_attention
    found = trace(loaded.model, SPECS, loaded.facts, batch, DEFAULT_OPSET, lower=lower)
    return {str(model.graph.name): model for model in found}


def written(models: dict[str, ir.Model], folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in write_graphs(list(models.values()), folder, "weights.bin", 0)}


@pytest.mark.parametrize("batch", [None, 1, 3])
def test_lower_for_cuda_gives_the_results_of_the_generic_form(
    loaded: LoadedModel, batch: int | None, tmp_path: Path
) -> None:
    for folder in ("plain", "cuda"):
        (tmp_path / folder).mkdir()
    plain = written(models(loaded, batch, "fp32", False), tmp_path / "plain")
    cuda = written(models(loaded, batch, "fp32", True), tmp_path / "cuda")
    for spec in SPECS:
        feeds = feeds_of(loaded, spec, batch)
        check_graph(cuda[spec.name])
        wanted, found = run_onnx(plain[spec.name], feeds), run_onnx(cuda[spec.name], feeds)
        for one, other in zip(wanted, found, strict=True):
            assert relative_l2(other, one) < 1e-5, spec.name  # the order of the sums differs


def feeds_of(loaded: LoadedModel, spec: GraphSpec, batch: int | None) -> dict[str, NDArray[Any]]:
    generator = torch.Generator().manual_seed(3)
    inputs = graph_inputs(spec, loaded.facts, batch)
    return {n: v.numpy() for n, v in examples(inputs, loaded.facts, {"B": 2, "S": 5}, generator).items()}
