"""The computation of a graph in PyTorch."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sg_export.graph.module import GraphModule, example
from sg_export.graph.spec import GraphSpec, graph_inputs
from sg_export.loading import LoadedModel, load_model
from sg_runtime.manifest import Level, TensorFacts

FULL, MOST, HALF, FEW = Level(0.0, 16), Level(0.25, 12), Level(0.5, 8), Level(0.75, 4)


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    return load_model(tiny_checkpoint)


def test_example_of_indices_is_sorted_and_distinct() -> None:
    values = example(TensorFacts("keep", "int64", ("B", 8)), 16, {"B": 50}, torch.Generator().manual_seed(0))
    assert values.shape == (50, 8)
    assert (values.diff(dim=1) > 0).all()
    assert values.min() == 0
    assert values.max() == 15


def test_example_of_times_lies_between_noise_and_image() -> None:
    values = example(TensorFacts("t", "float32", ("S",)), 16, {"S": 50}, torch.Generator().manual_seed(0))
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
    values = {tensor.name: example(tensor, 16, {}, generator) for tensor in graph_inputs(spec, loaded.facts, 2)}
    t = torch.tensor([0.3, 0.7])
    values["modulations"] = loaded.model.condition(t, torch.tensor([1, 2]))
    if spec.null_weak:
        values["modulations_weak"] = loaded.model.condition(t, torch.tensor([5, 5]))
    v = SimpleNamespace(**values)
    prediction, following = GraphModule(loaded.model, spec, list(values))(*values.values())
    if spec.kind == "guided":
        strong = loaded.model.predict(v.c_in * v.x, v.modulations, values.get("keep_strong"))
        weak = loaded.model.predict(v.c_in * v.x, values.get("modulations_weak", v.modulations), v.keep_weak)
        output = weak + v.scale * (strong - weak)
        assert (strong - weak).norm() / output.norm() > 0.01
    else:
        output = loaded.model.predict(v.c_in * v.x, v.modulations, values.get("keep"))
    wanted = v.c_skip * v.x + v.c_out * output
    # Combining before the head instead of after it changes the order of sums: a few FP32 steps of
    # 1.2e-7 each.
    assert (prediction - wanted).norm() / wanted.norm() < 2e-6
    wanted = v.a * v.x + v.b * wanted + v.e * v.r
    assert (following - wanted).norm() / wanted.norm() < 2e-6


def test_forward_of_condition_is_that_of_the_model(loaded: LoadedModel) -> None:
    t, classes = torch.tensor([0.1, 0.9]), torch.tensor([0, 5])
    found = GraphModule(loaded.model, GraphSpec("condition"), ["t", "class"])(t, classes)
    assert torch.equal(found, loaded.model.condition(t, classes))
