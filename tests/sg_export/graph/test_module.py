"""The computation of a graph in PyTorch."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sg_export.graph.module import GraphModule, branch_inputs, random_inputs
from sg_export.graph.spec import GraphSpec, graph_inputs
from sg_export.loading import LoadedModel, load_model
from sg_export.models.subset import Subset
from sg_runtime.manifest import Level, TensorFacts

FULL, MOST, HALF, FEW = Level(0.0, 16), Level(0.25, 12), Level(0.5, 8), Level(0.75, 4)


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    return load_model(tiny_checkpoint)


@pytest.mark.parametrize("end", ["", "_strong"])
def test_examples_of_kept_tokens_belong_together(end: str, loaded: LoadedModel) -> None:
    tensors = [TensorFacts(f"rows{end}", "int64", ("B", 8)), TensorFacts(f"restore{end}", "int64", ("B", 16))]
    rows, restore = random_inputs(tensors, loaded.facts, {"B": 50}, torch.Generator().manual_seed(0)).values()
    keep = rows - 16 * torch.arange(50)[:, None]
    assert keep.shape == (50, 8)
    assert (keep.diff(dim=1) > 0).all()
    assert keep.min() == 0
    assert keep.max() == 15
    assert torch.equal(restore, Subset.of(keep, 16, masked=False).restore)


def test_examples_of_times_lie_between_noise_and_image(loaded: LoadedModel) -> None:
    tensor = TensorFacts("t", "float32", ("S",))
    values = random_inputs([tensor], loaded.facts, {"S": 50}, torch.Generator().manual_seed(0))["t"]
    assert values.shape == (50,)
    assert values.min() >= 0
    assert values.max() < 1


@pytest.mark.parametrize(
    "spec",
    [
        GraphSpec("dense", (FULL,)),
        GraphSpec("sparse", (HALF,)),
        GraphSpec("guided", (FULL, FEW)),
        GraphSpec("guided", (MOST, FEW)),
        GraphSpec("guided", (MOST, FEW), null_weak=True),
        GraphSpec("guided", (MOST, MOST), null_weak=True),
    ],
    ids=lambda spec: spec.name,
)
def test_forward_of_a_step_is_two_passes_their_combination_and_the_update(spec: GraphSpec, loaded: LoadedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    values = random_inputs(graph_inputs(spec, loaded.facts, 2), loaded.facts, {}, generator)
    t = torch.tensor([0.3, 0.7])
    values["modulations"] = loaded.model.hoist("condition", {"t": t, "class": torch.tensor([1, 2])})[0]
    if spec.null_weak:
        values["modulations_weak"] = loaded.model.hoist("condition", {"t": t, "class": torch.tensor([5, 5])})[0]
    v = SimpleNamespace(**values)
    prediction, following = GraphModule(loaded.model, spec, list(values))(*values.values())
    output, *others = (
        loaded.model.predict(v.c_in * v.x, one.held, one.keep) for one in branch_inputs(spec.kind, values)
    )
    assert len(others) == (spec.kind == "guided")
    for weak in others:
        strong, output = output, weak + v.scale * (output - weak)
        assert (strong - weak).norm() / output.norm() > 0.01
    wanted = v.c_skip * v.x + v.c_out * output
    # Combining before the head instead of after it changes the order of sums: a few FP32 steps of
    # 1.2e-7 each.
    assert (prediction - wanted).norm() / wanted.norm() < 2e-6
    wanted = v.a * v.x + v.b * wanted + v.e * v.r
    assert (following - wanted).norm() / wanted.norm() < 2e-6


def test_forward_of_condition_is_that_of_the_model(loaded: LoadedModel) -> None:
    t, classes = torch.tensor([0.1, 0.9]), torch.tensor([0, 5])
    found = GraphModule(loaded.model, GraphSpec("condition"), ["t", "class"])(t, classes)
    assert torch.equal(found, loaded.model.hoist("condition", {"t": t, "class": classes})[0])
