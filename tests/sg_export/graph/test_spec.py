"""The graphs of a bundle, and the tensors of each graph."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sg_export.graph.spec import GraphSpec, graph_inputs, graph_outputs, graphs_for
from sg_export.loading import LoadedModel, load_model
from sg_runtime.manifest import Level, ModelFacts, TensorFacts, Text

FULL, MOST, HALF, FEW = Level(0.0, 16), Level(0.25, 12), Level(0.5, 8), Level(0.75, 4)
X, R = (TensorFacts(name, "float32", ("B", 2, 8, 8)) for name in "xr")
MODULATIONS, MODULATIONS_WEAK = (
    TensorFacts(name, "float32", ("B", 640)) for name in ("modulations", "modulations_weak")
)
SCALE, *SCALARS = (TensorFacts(name, "float32", ()) for name in ("scale", "c_in", "c_skip", "c_out", "a", "b", "e"))
TAIL = [*SCALARS, R]
PREDICTION, NEXT = (TensorFacts(name, "float32", ("B", 2, 8, 8)) for name in ("prediction", "next"))


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    return load_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def facts(loaded: LoadedModel) -> ModelFacts:
    return loaded.facts


def kept(count: int, end: str = "") -> list[TensorFacts]:
    return [TensorFacts(f"rows{end}", "int64", ("B", count)), TensorFacts(f"restore{end}", "int64", ("B", 16))]


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (GraphSpec("condition"), "condition"),
        (GraphSpec("dense", (FULL,)), "dense"),
        (GraphSpec("sparse", (HALF,)), "sparse-8"),
        (GraphSpec("guided", (MOST, FEW)), "guided-12-4"),
        (GraphSpec("guided", (MOST, FEW), null_weak=True), "guided-12-4-null"),
        (GraphSpec("guided", (FULL, FULL), null_weak=True), "guided-16-16-null"),
        (GraphSpec("condition", network="weak"), "weak-condition"),
        (GraphSpec("dense", (FULL,), "weak"), "weak-dense"),
        (GraphSpec("sparse", (HALF,), "weak"), "weak-sparse-8"),
    ],
)
def test_name_holds_network_kind_kept_tokens_and_null(spec: GraphSpec, name: str) -> None:
    assert spec.name == name


@pytest.mark.parametrize(
    ("mode", "strong", "weak", "singles", "guided"),
    [
        ("sg", [FULL, HALF], [MOST, FEW], ["dense", 12, 8, 4], ["16-12", "16-4", "8-4"]),
        ("sg", [FULL, HALF], [HALF, FEW], ["dense", 8, 4], ["16-8", "16-4", "8-4"]),
        ("sg", [HALF, FULL], [FEW, HALF], ["dense", 8, 4], ["8-4", "16-4", "16-8"]),
        ("sg", [HALF], [FULL, HALF], ["dense", 8], []),
        ("cfg+sg", [FULL, MOST], [HALF], ["dense", 12, 8], ["16-8-null", "12-8-null"]),
        ("cfg+sg", [FULL, HALF], [HALF, FULL], ["dense", 8], ["16-8-null"]),
        ("cfg", [FULL, HALF], [FULL, HALF], ["dense", 8], ["16-16-null", "8-8-null"]),
        ("none", [HALF, FULL], [HALF, FULL], ["dense", 8], []),
    ],
)
def test_graphs_for_of_one_network_has_singles_and_the_pairs_of_the_mode(
    mode: Any, strong: list[Level], weak: list[Level], singles: list[str | int], guided: list[str]
) -> None:
    names = [spec.name for spec in graphs_for(mode, strong, weak, ["condition"])]
    expected = [single if single == "dense" else f"sparse-{single}" for single in singles]
    assert names == ["condition", *expected, *(f"guided-{pair}" for pair in guided)]


def test_graphs_for_of_two_networks_has_the_singles_of_each() -> None:
    specs = graphs_for("autoguidance", [FULL, MOST], [HALF, FULL], ["condition"])
    strong, weak = ["condition", "dense", "sparse-12"], ["weak-condition", "weak-dense", "weak-sparse-8"]
    assert [spec.name for spec in specs] == [*strong, *weak]
    assert [spec.network for spec in specs] == ["main"] * 3 + ["weak"] * 3


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (GraphSpec("condition"), [TensorFacts("t", "float32", ("S",)), TensorFacts("class", "int64", ("S",))]),
        (GraphSpec("dense", (FULL,)), [X, MODULATIONS, *TAIL]),
        (GraphSpec("sparse", (HALF,), "weak"), [X, MODULATIONS, *kept(8), *TAIL]),
        (GraphSpec("guided", (FULL, HALF)), [X, MODULATIONS, *kept(8, "_weak"), SCALE, *TAIL]),
        (
            GraphSpec("guided", (MOST, HALF)),
            [X, MODULATIONS, *kept(12, "_strong"), *kept(8, "_weak"), SCALE, *TAIL],
        ),
        (
            GraphSpec("guided", (MOST, HALF), null_weak=True),
            [X, MODULATIONS, MODULATIONS_WEAK, *kept(12, "_strong"), *kept(8, "_weak"), SCALE, *TAIL],
        ),
        (GraphSpec("guided", (FULL, FULL), null_weak=True), [X, MODULATIONS, MODULATIONS_WEAK, SCALE, *TAIL]),
    ],
    ids=lambda value: value.name if isinstance(value, GraphSpec) else "",
)
def test_inputs_of_each_kind_are_the_designs(spec: GraphSpec, expected: list[TensorFacts], facts: ModelFacts) -> None:
    assert graph_inputs(spec, facts, None) == tuple(expected)
    fixed = [TensorFacts(t.name, t.dtype, tuple(3 if size == "B" else size for size in t.shape)) for t in expected]
    # The caller chooses the number of rows of condition, regardless of the batch size.
    assert graph_inputs(spec, facts, 3) == tuple(fixed)


@pytest.fixture(scope="module")
def text(facts: ModelFacts) -> ModelFacts:
    """Facts of a network with text, of 3 layers, 4 text tokens, and embeddings of 6 values."""
    held = {"modulations": (24,), "text_keys": (3, 4, 8), "text_values": (3, 4, 8), "text_bias": (4,)}
    return replace(facts, conditions=Text(4, 6), held=held)


@pytest.mark.parametrize("null", [False, True], ids=["same text", "other text"])
def test_inputs_of_a_network_with_text_share_the_modulations(null: bool, text: ModelFacts) -> None:
    held = [TensorFacts(name, "float32", ("B", *shape)) for name, shape in text.held.items()]
    own = [TensorFacts(f"{tensor.name}_weak", "float32", tensor.shape) for tensor in held[1:]] if null else []
    spec = GraphSpec("guided", (FULL, HALF), null_weak=null)
    assert graph_inputs(spec, text, None) == (X, *held, *own, *kept(8, "_weak"), SCALE, *TAIL)


def test_hoisted_graphs_of_a_network_with_text_are_condition_and_prompt(text: ModelFacts) -> None:
    condition, prompt, *steps = graphs_for("sg", [FULL], [HALF], text.conditions.hoisted)
    assert [spec.name for spec in (condition, prompt, *steps)] == [
        "condition",
        "prompt",
        "dense",
        "sparse-8",
        "guided-16-8",
    ]
    assert [spec.hoisted for spec in (condition, prompt, *steps)] == [True, True, False, False, False]
    assert graph_inputs(condition, text, 3) == (TensorFacts("t", "float32", ("S",)),)
    assert graph_inputs(prompt, text, 3) == (
        TensorFacts("embeddings", "float32", ("S", 4, 6)),
        TensorFacts("mask", "int64", ("S", 4)),
    )
    assert graph_outputs(prompt, text, 3) == tuple(
        TensorFacts(name, "float32", ("S", *text.held[name])) for name in ("text_keys", "text_values", "text_bias")
    )


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (GraphSpec("condition"), [TensorFacts("modulations", "float32", ("S", 640))]),
        (GraphSpec("sparse", (HALF,)), [PREDICTION, NEXT]),
        (GraphSpec("guided", (FULL, HALF)), [PREDICTION, NEXT]),
    ],
    ids=lambda value: value.name if isinstance(value, GraphSpec) else "",
)
def test_outputs_of_each_kind_are_the_designs(spec: GraphSpec, expected: list[TensorFacts], facts: ModelFacts) -> None:
    assert graph_outputs(spec, facts, None) == tuple(expected)


def test_outputs_of_fixed_batch_have_it(facts: ModelFacts) -> None:
    assert [tensor.shape for tensor in graph_outputs(GraphSpec("dense", (FULL,)), facts, 3)] == [(3, 2, 8, 8)] * 2
