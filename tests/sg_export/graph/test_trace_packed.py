"""Guided graphs of small random models of both families and of a network with text.

Each weight is read once, and two separate passes give the same result.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from text import SmallPRX, held_by_branches
from torch import Tensor

from sg_export.graph.module import branch_inputs, random_inputs
from sg_export.graph.opset import DEFAULT_OPSET
from sg_export.graph.spec import GraphSpec, graph_inputs
from sg_export.graph.trace import trace
from sg_export.graph.weights import write_graphs
from sg_export.loading import LoadedModel
from sg_export.models.dit import AdaLNNetwork, DiT, DiTConfig
from sg_export.models.maskdit import MaskDiT
from sg_runtime.manifest import Level, Route

pytestmark = pytest.mark.slow

CONFIG = DiTConfig(image_size=6, patch=2, channels=2, width=12, depth=3, heads=2, mlp_width=20, num_classes=3)
TOKENS, IMAGES = 9, 2
SPLIT, WHOLE, FIRST, LAST = Route(1, 1), Route(0, 2), Route(0, 0), Route(2, 2)

# FP32 sums in another order differed by at most 6e-7 when measured. The branches of a case differ
# by 1e-2 or more.
BOUND = 1e-5


@dataclass(frozen=True)
class Case:
    """A guided graph of a network.

    strong, weak: number of tokens that each branch keeps.
    null: whether the weak branch has no class, or text of its own.
    """

    network: type[AdaLNNetwork]
    route: Route
    strong: int
    weak: int
    null: bool

    @property
    def spec(self) -> GraphSpec:
        levels = tuple(Level(1 - keep / TOKENS, keep) for keep in (self.strong, self.weak))
        return GraphSpec("guided", levels, null_weak=self.null)


CASES = {
    "tread": Case(DiT, SPLIT, 9, 4, False),
    "tread no class": Case(DiT, SPLIT, 7, 4, True),
    "tread cfg": Case(DiT, LAST, 9, 9, True),
    "tread equal": Case(DiT, FIRST, 5, 5, False),
    "tread crossing": Case(DiT, WHOLE, 2, 8, False),
    "tread whole no class": Case(DiT, WHOLE, 4, 9, True),
    "maskdit": Case(MaskDiT, WHOLE, 9, 4, False),
    "maskdit no class": Case(MaskDiT, WHOLE, 7, 4, True),
    "text": Case(SmallPRX, SPLIT, 9, 4, False),
    "text cfg": Case(SmallPRX, LAST, 9, 9, True),
    "text cfg+sg": Case(SmallPRX, SPLIT, 7, 4, True),
}


@dataclass(frozen=True)
class Traced:
    case: Case
    loaded: LoadedModel
    model: ir.Model


@pytest.fixture(scope="module", params=CASES)
def traced(request: pytest.FixtureRequest, make_model: Callable[..., LoadedModel]) -> Traced:
    case = CASES[request.param]
    loaded = make_model(case.network, CONFIG, case.route)
    return Traced(case, loaded, trace(loaded.model, [case.spec], loaded.facts, IMAGES, DEFAULT_OPSET)[0])


def weights_of_the_step(loaded: LoadedModel) -> set[str]:
    """Return the names of the tensors that are not part of the conditioning."""
    names = {name.removeprefix("network.") for name in loaded.model.state_dict()}
    ends = ("t_embedder.", "y_embedder.", "time_in.", "txt_in.")
    inside = ("adaLN", "modulation.lin", "txt_kv_proj", "norm_added_k")
    return {name for name in names if not name.startswith(ends) and not any(part in name for part in inside)}


def is_matrix(name: str) -> bool:
    return name.endswith(".weight") and "norm_" not in name


def test_trace_reads_every_weight_once(traced: Traced) -> None:
    expected, found = weights_of_the_step(traced.loaded), {}
    for name, initializer in traced.model.graph.initializers.items():
        if (weight := name.removesuffix(".T")) in expected:
            found[weight] = [use.node.op_type for use in initializer.uses()]
    assert found.keys() == expected
    for name, readers in found.items():
        assert len(readers) == 1, name
        if is_matrix(name):
            assert readers[0] in ("MatMul", "Gemm"), name
    layers = sum(map(is_matrix, expected))
    products = [node for node in traced.model.graph if node.op_type in ("MatMul", "Gemm")]
    weighted = [node for node in products if node.inputs[1] is not None and node.inputs[1].is_initializer()]
    # No weight is stored a second time under another name.
    assert len(weighted) == layers


def test_trace_has_attention_for_each_branch_and_one_prefix(traced: Traced) -> None:
    case, counts = traced.case, Counter(node.op_type for node in traced.model.graph)
    blocks = sum(
        name.endswith(("attn.qkv.weight", "img_qkv_proj.weight")) for name in weights_of_the_step(traced.loaded)
    )
    prefix = 0 if case.null or case.network is MaskDiT else case.route.start
    assert counts["Softmax"] == prefix + 2 * (blocks - prefix)
    # Tokens of all branches are normalised together: twice in each block, once before the head, and
    # once before a decoder.
    assert counts["LayerNormalization"] == 2 * blocks + 1 + (case.network is MaskDiT)


def test_trace_combines_the_branches_where_it_is_first_exact(traced: Traced) -> None:
    """After the last normalisation if they share modulations, also if their text differs."""
    (scale,) = (value for value in traced.model.graph.inputs if value.name == "scale")
    (scaled,) = (use.node for use in scale.uses())
    (difference,) = (value.producer() for value in scaled.inputs if value is not scale and value is not None)
    assert difference is not None
    halves = difference.inputs[0] and difference.inputs[0].producer()
    assert halves is not None
    last = halves.inputs[0] and halves.inputs[0].producer()
    assert last is not None
    own_modulations = traced.case.null and traced.case.network is not SmallPRX
    assert [node.op_type for node in (scaled, difference, halves)] == ["Mul", "Sub", "Split"]
    assert last.op_type == ("Concat" if own_modulations else "LayerNormalization")


def values_of(case: Case, loaded: LoadedModel) -> dict[str, Tensor]:
    """Return random inputs of the graph; the modulations are of random times and classes."""
    generator = torch.Generator().manual_seed(0)
    values = random_inputs(graph_inputs(case.spec, loaded.facts, IMAGES), loaded.facts, {}, generator)
    t, classes = torch.rand(IMAGES, generator=generator), torch.tensor([0, 2])
    nothing = CONFIG.num_classes if case.null else None
    strong, weak = held_by_branches(loaded.model, t, classes, nothing, generator)
    given = strong | {f"{name}_weak": held for name, held in weak.items() if held is not strong[name]}
    assert given.keys() <= values.keys()
    return values | given


def test_trace_equals_two_passes_in_pytorch(traced: Traced, tmp_path: Path) -> None:
    case, model = traced.case, traced.loaded.model
    v = values_of(case, traced.loaded)
    (path,) = write_graphs([traced.model], tmp_path, "weights.bin")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = dict(
        zip(("prediction", "next"), session.run(None, {name: t.numpy() for name, t in v.items()}), strict=True)
    )
    strong, weak = (model.predict(v["c_in"] * v["x"], one.held, one.keep) for one in branch_inputs("guided", v))
    assert (strong - weak).norm() > 1e-2 * strong.norm()
    prediction = v["c_skip"] * v["x"] + v["c_out"] * (weak + v["scale"] * (strong - weak))
    wanted = {"prediction": prediction, "next": v["a"] * v["x"] + v["b"] * prediction + v["e"] * v["r"]}
    for name, value in wanted.items():
        assert np.linalg.norm(found[name] - value.numpy()) <= BOUND * np.linalg.norm(value.numpy()), name
