"""What graphs a bundle has, and the tensors of each."""

from pathlib import Path

import pytest
import torch

from sg_export import graphs
from sg_export.graphs import GraphModule, GraphSpec, plan_graphs
from sg_export.loading import LoadedModel, load_model
from sg_runtime.manifest import Level, ModelFacts, TensorFacts

FULL, MOST, HALF, FEW = Level(0.0, 16), Level(0.25, 12), Level(0.5, 8), Level(0.75, 4)
X = TensorFacts("x", "float32", ("B", 2, 8, 8))
MODULATIONS = TensorFacts("modulations", "float32", ("B", 640))
PREDICTION = TensorFacts("prediction", "float32", ("B", 2, 8, 8))
SCALE = TensorFacts("scale", "float32", ())


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    return load_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def facts(loaded: LoadedModel) -> ModelFacts:
    return loaded.facts


def keep(name: str, count: int) -> TensorFacts:
    return TensorFacts(name, "int64", ("B", count))


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (GraphSpec("condition"), "condition"),
        (GraphSpec("dense", (FULL,)), "dense"),
        (GraphSpec("sparse", (HALF,)), "sparse-8"),
        (GraphSpec("guided", (MOST, FEW)), "guided-12-4"),
    ],
)
def test_name_holds_kind_and_kept_tokens(spec: GraphSpec, name: str) -> None:
    assert spec.name == name


def test_plan_graphs_of_sg_has_singles_and_rising_pairs() -> None:
    names = [spec.name for spec in plan_graphs([FULL, HALF], [MOST, FEW])]
    singles = ["condition", "dense", "sparse-12", "sparse-8", "sparse-4"]
    assert names == [*singles, "guided-16-12", "guided-16-4", "guided-8-4"]


def test_plan_graphs_of_level_in_both_branches_has_it_once() -> None:
    names = [spec.name for spec in plan_graphs([FULL, HALF], [HALF, FEW])]
    assert names == ["condition", "dense", "sparse-8", "sparse-4", "guided-16-8", "guided-16-4", "guided-8-4"]


def test_plan_graphs_without_weak_branch_has_singles_alone() -> None:
    assert [spec.name for spec in plan_graphs([HALF], [])] == ["condition", "sparse-8"]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (GraphSpec("condition"), (TensorFacts("t", "float32", ("S",)), TensorFacts("class", "int64", ("S",)))),
        (GraphSpec("dense", (FULL,)), (X, MODULATIONS)),
        (GraphSpec("sparse", (HALF,)), (X, MODULATIONS, keep("keep", 8))),
        (GraphSpec("guided", (FULL, HALF)), (X, MODULATIONS, keep("keep_weak", 8), SCALE)),
        (
            GraphSpec("guided", (MOST, HALF)),
            (X, MODULATIONS, keep("keep_strong", 12), keep("keep_weak", 8), SCALE),
        ),
    ],
    ids=lambda value: value.name if isinstance(value, GraphSpec) else "",
)
def test_inputs_of_each_kind_are_the_designs(
    spec: GraphSpec, expected: tuple[TensorFacts, ...], facts: ModelFacts
) -> None:
    assert graphs.inputs(spec, facts, None) == expected
    fixed = [TensorFacts(t.name, t.dtype, tuple(3 if size == "B" else size for size in t.shape)) for t in expected]
    # The rows of condition are its caller's, whatever the images per run.
    assert graphs.inputs(spec, facts, 3) == tuple(fixed)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (GraphSpec("condition"), TensorFacts("modulations", "float32", ("S", 640))),
        (GraphSpec("sparse", (HALF,)), PREDICTION),
        (GraphSpec("guided", (FULL, HALF)), PREDICTION),
    ],
    ids=lambda value: value.name if isinstance(value, GraphSpec) else "",
)
def test_outputs_of_each_kind_are_the_designs(spec: GraphSpec, expected: TensorFacts, facts: ModelFacts) -> None:
    assert graphs.outputs(spec, facts, None) == (expected,)


def test_outputs_of_fixed_batch_have_it(facts: ModelFacts) -> None:
    (output,) = graphs.outputs(GraphSpec("dense", (FULL,)), facts, 3)
    assert output.shape == (3, 2, 8, 8)


def test_example_of_indices_is_sorted_and_distinct() -> None:
    values = graphs.example(keep("keep", 8), 16, {"B": 50}, torch.Generator().manual_seed(0))
    assert values.shape == (50, 8)
    assert (values.diff(dim=1) > 0).all()
    assert values.min() == 0
    assert values.max() == 15


def test_example_of_times_lies_between_noise_and_image() -> None:
    values = graphs.example(TensorFacts("t", "float32", ("S",)), 16, {"S": 50}, torch.Generator().manual_seed(0))
    assert values.shape == (50,)
    assert values.min() >= 0
    assert values.max() < 1


@pytest.mark.parametrize("strong", [FULL, MOST], ids=["dense", "sparse"])
def test_forward_of_guided_is_the_combination_of_two_passes(strong: Level, loaded: LoadedModel) -> None:
    spec = GraphSpec("guided", (strong, FEW))
    inputs = graphs.inputs(spec, loaded.facts, 2)
    generator = torch.Generator().manual_seed(0)
    values = {tensor.name: graphs.example(tensor, 16, {}, generator) for tensor in inputs}
    values["modulations"] = loaded.model.condition(torch.tensor([0.3, 0.7]), torch.tensor([1, 5]))
    guided = GraphModule(loaded.model, spec, list(values))(*values.values())
    strong_pass = loaded.model.predict(values["x"], values["modulations"], values.get("keep_strong"))
    weak_pass = loaded.model.predict(values["x"], values["modulations"], values["keep_weak"])
    expected = weak_pass + values["scale"] * (strong_pass - weak_pass)
    # Combining before the head instead of after it changes the order of sums: some FP32 steps, 1.2e-7 each.
    assert (guided - expected).norm() / expected.norm() < 2e-6
    assert (strong_pass - weak_pass).norm() / expected.norm() > 0.01


def test_forward_of_condition_is_that_of_the_model(loaded: LoadedModel) -> None:
    t, classes = torch.tensor([0.1, 0.9]), torch.tensor([0, 5])
    found = GraphModule(loaded.model, GraphSpec("condition"), ["t", "class"])(t, classes)
    assert torch.equal(found, loaded.model.condition(t, classes))
