"""Classes and prompts as rows of the inputs of hoisted graphs, and requests that do not fit."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sg_runtime.bundle import Bundle
from sg_runtime.conditions import Conditions, check, examples, of_classes, of_prompts, parse
from sg_runtime.errors import UsageError
from sg_runtime.manifest import Labels, ModelFacts, Text

L, C = 4, 3


@pytest.fixture(scope="module")
def labels(tiny_bundle: Any) -> ModelFacts:
    return Bundle.open(tiny_bundle).manifest.model


@pytest.fixture(scope="module")
def text(labels: ModelFacts) -> ModelFacts:
    held = {"modulations": (8,), "text_keys": (2, L, 8), "text_values": (2, L, 8), "text_bias": (L,)}
    return replace(labels, family="prx", conditions=Text(L, C), held=held)


def embeds(prompts: int, start: float = 0.0) -> Any:
    """Return the embeddings of prompts; every value differs."""
    return start + np.arange(prompts * L * C, dtype=np.float32).reshape(prompts, L, C)


def test_of_classes_has_a_row_for_each_class_and_one_for_no_class() -> None:
    found = of_classes(Labels(5, None), [3, 5, 0, 3])
    assert found.columns["class"].tolist() == [0, 3, 5]
    assert found.strong.tolist() == [1, 2, 0, 1]
    assert found.weak is not None
    assert found.weak.tolist() == [2] * 4
    assert found.rows(weak=False)["class"].tolist() == [3, 5, 0, 3]
    assert found.rows(weak=True)["class"].tolist() == [5] * 4


def test_of_some_images_has_their_rows_alone() -> None:
    own = of_classes(Labels(5, None), [3, 1, 0]).of(np.array([2, 0, 0]))
    assert own.columns["class"].tolist() == [0, 3, 5]
    assert own.rows(weak=False)["class"].tolist() == [0, 3, 3]
    assert own.rows(weak=True)["class"].tolist() == [5] * 3
    alone = own.of(weak=False)
    assert alone.columns["class"].tolist() == [0, 3]
    assert alone.weak is None


def test_of_prompts_has_a_row_for_each_prompt_and_negative_prompt(text: ModelFacts) -> None:
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1]], bool)
    found = of_prompts(text, embeds(2), mask, embeds(1, 100.0))
    assert found.strong.tolist() == [0, 1]
    assert found.weak is not None
    assert found.weak.tolist() == [2, 2]
    np.testing.assert_array_equal(found.rows(weak=False)["embeddings"], embeds(2))
    np.testing.assert_array_equal(found.rows(weak=False)["mask"], mask)
    np.testing.assert_array_equal(found.rows(weak=True)["embeddings"], np.repeat(embeds(1, 100.0), 2, axis=0))
    assert found.rows(weak=True)["mask"].tolist() == [[1] * L] * 2
    assert {name: values.dtype.name for name, values in found.columns.items()} == {
        "embeddings": "float32",
        "mask": "int64",
    }


def test_of_prompts_gives_one_prompt_to_all_images(text: ModelFacts) -> None:
    found = of_prompts(text, embeds(1), images=3)
    assert found.strong.tolist() == [0, 0, 0]
    assert found.weak is None
    assert len(found) == 3


def test_of_prompts_of_another_library_is_that_of_numpy(text: ModelFacts) -> None:
    torch = pytest.importorskip("torch")
    found = of_prompts(text, torch.from_numpy(embeds(2)).to(torch.float16), torch.ones(2, L, dtype=torch.int32))
    np.testing.assert_array_equal(found.columns["embeddings"], embeds(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((embeds(1)[:, :2],), r"prompt_embeds: expected floats of shape \(prompts, 4, 3\), found float32 of shape \(1"),
        ((embeds(1)[..., :2],), r"found float32 of shape \(1, 4, 2\): pad or cut the prompts to 4 tokens"),
        ((embeds(1).astype(int),), r"prompt_embeds: expected floats of shape \(prompts, 4, 3\), found int64"),
        ((embeds(0),), r"prompt_embeds: expected floats of shape \(prompts, 4, 3\), found float32 of shape \(0"),
        ((embeds(1) * np.nan,), "prompt_embeds: expected finite numbers, found NaN or infinity"),
        (("a cat",), "prompt_embeds: expected a NumPy array, or one that DLPack can export to the CPU, found str"),
        ((embeds(1), np.ones((1, 3), int)), r"prompt_mask: expected 1 for a token .*, found int64 of shape \(1, 3\)"),
        ((embeds(1), np.full((1, L), 2)), "prompt_mask: expected 1 for a token and 0 for padding"),
        ((embeds(1), np.ones((1, L))), "prompt_mask: .* found float64"),
        ((embeds(2), None, embeds(3)), "negative_embeds: expected 1 prompt, or 2, one per image, found 3"),
        ((embeds(2), None, None, np.ones((2, L), int)), "negative_mask: expected none without negative_embeds"),
        ((embeds(2), None, embeds(1), np.ones((2, L), int)), r"negative_mask: expected .* shape \(1, 4\)"),
        ((embeds(2), None, None, None, 3), "prompt_embeds: expected 1 prompt, or 3, one per image, found 2"),
    ],
)
def test_of_prompts_that_do_not_fit_is_refused(text: ModelFacts, arguments: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        of_prompts(text, *arguments)


@pytest.mark.parametrize("give", [lambda model: of_prompts(model, embeds(1)), lambda model: parse(model, of_text())])
def test_prompts_for_a_class_model_are_refused(labels: ModelFacts, give: Callable[[ModelFacts], object]) -> None:
    with pytest.raises(UsageError, match=r"conditioned on classes: give classes|conditions: expected class, found"):
        give(labels)


def of_text() -> Conditions:
    return Conditions({"embeddings": embeds(1), "mask": np.ones((1, L), np.int64)}, np.zeros(1, np.int64), None)


@pytest.mark.parametrize("classes", [[0], ["A"], [None], []])
def test_classes_for_a_text_model_are_refused(text: ModelFacts, classes: Any) -> None:
    with pytest.raises(UsageError, match="conditioned on text: give prompts or prompt_em"):
        parse(text, classes)


def test_check_of_conditions_of_another_model_is_refused(text: ModelFacts) -> None:
    with pytest.raises(UsageError, match="conditions: expected embeddings, mask, found class"):
        check(text, of_classes(Labels(5, None), [0]))


def test_labels_of_a_text_model_are_refused(text: ModelFacts) -> None:
    with pytest.raises(UsageError, match="expected a model of classes, found prx, which is conditioned on text"):
        _ = text.labels


@pytest.mark.parametrize("model", ["labels", "text"])
def test_examples_are_conditions_of_the_model(model: str, request: pytest.FixtureRequest) -> None:
    facts = request.getfixturevalue(model)
    found = examples(facts, 3, seed=1)
    check(facts, found)
    assert len(found) == 3
    assert found.weak is not None
    for name, values in examples(facts, 3, seed=1).columns.items():
        np.testing.assert_array_equal(values, found.columns[name])
    other = examples(facts, 3, seed=2)
    assert any(not np.array_equal(other.rows(weak=False)[name], rows) for name, rows in found.rows(weak=False).items())
