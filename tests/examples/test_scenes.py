"""The scenes data set: captions, drawings, and the pairs that training does not see."""

from itertools import combinations
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from examples import scenes
from examples.scenes import (
    ANY_SIZE,
    COLOURS,
    DIRECTIONS,
    KINDS,
    NAMES,
    SIDE,
    SIZES,
    UNSEEN_PAIRS,
    WORDS,
    Caption,
    Kind,
    draw,
    draw_caption,
)
from sg_runtime.text import clean

CAPTIONS = 500


def captions(**choice: object) -> list[Caption]:
    rng = np.random.default_rng(3)
    return [draw_caption(rng, **choice) for _ in range(CAPTIONS)]  # type: ignore[arg-type]


def pairs(caption: Caption) -> set[frozenset[str]]:
    return {frozenset(pair) for pair in combinations(set(caption.names), 2)}


def test_shares_of_kinds_add_up() -> None:
    assert tuple(KINDS) == get_args(Kind)
    assert sum(KINDS.values()) == pytest.approx(1)


def test_captions_have_words_of_the_grammar_that_cleaning_keeps() -> None:
    found = set()
    for caption in captions():
        text = str(caption)
        assert clean("full", text) == text
        tokens = text.replace(",", " ,").split()
        assert len(tokens) < 16, "room for the first token"
        found |= set(tokens)
    assert found == set(WORDS)


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        (Caption("single", ("apple",), (None,), None, ("blue", "green")), "an apple on blue over green"),
        (Caption("size", ("umbrella",), ("large",)), "a large umbrella"),
        (Caption("counting", ("fox",) * 3, (None,) * 3, None, ("pink",)), "three foxes on pink"),
        (Caption("three", ("fox", "apple", "car"), (None,) * 3), "a fox, an apple and a car"),
        (Caption("position", ("fox", "apple"), ("small", "large"), "left of"), "a small fox left of a large apple"),
    ],
)
def test_caption_as_text(caption: Caption, text: str) -> None:
    assert str(caption) == text


def test_prompts_for_quantization_are_captions() -> None:
    rng = np.random.default_rng(203)
    expected = [str(draw_caption(rng)) for _ in range(128)]
    assert (Path(scenes.__file__).parent / "scenes-prompts.txt").read_text().splitlines() == expected


def test_unseen_pairs_are_a_fifth_of_all_and_balanced() -> None:
    assert len(UNSEEN_PAIRS) * 5 == len(list(combinations(NAMES, 2)))
    assert {sum(name in pair for pair in UNSEEN_PAIRS) for name in NAMES} == {3}


def test_training_sees_all_pairs_but_the_unseen_ones() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_caption(rng) for _ in range(4 * CAPTIONS)]
    assert (
        set.union(*(pairs(caption) for caption in drawn))
        == {frozenset(pair) for pair in combinations(NAMES, 2)} - UNSEEN_PAIRS
    )


@pytest.mark.parametrize("kind", ["two", "three", "position"])
def test_captions_of_unseen_pairs_have_one(kind: Kind) -> None:
    assert all(pairs(caption) & UNSEEN_PAIRS for caption in captions(kind=kind, unseen=True))


def test_background_is_named_when_asked_for() -> None:
    assert all(caption.background for caption in captions(background=True))
    assert not any(caption.background for caption in captions(background=False))


def test_scene_shows_what_the_caption_says() -> None:
    rng = np.random.default_rng(1)
    for caption in captions():
        scene = draw(caption, rng)
        assert scene.pixels.shape == (SIDE, SIDE, 3)
        assert tuple(placed.name for placed in scene.objects) == caption.names
        for placed, size in zip(scene.objects, caption.sizes, strict=True):
            low, high = SIZES[size] if size else ANY_SIZE
            assert low <= placed.side <= high
            assert placed.side / 2 <= min(placed.x, placed.y)
            assert max(placed.x, placed.y) <= SIDE - placed.side / 2
        if caption.background:
            assert scene.background == (caption.background[0], caption.background[-1])
        if caption.relation:
            first, second = scene.objects
            dx, dy = DIRECTIONS[caption.relation]
            assert (first.x - second.x) * dx + (first.y - second.y) * dy > 0


def test_pixels_are_background_and_objects() -> None:
    caption = Caption("single", ("star",), ("small",), None, ("blue", "black"))
    scene = draw(caption, np.random.default_rng(2))
    (placed,) = scene.objects
    top, left = round(placed.y - placed.side / 2), round(placed.x - placed.side / 2)
    yellow = scene.pixels[top : top + placed.side, left : left + placed.side].reshape(-1, 3).max(axis=0)
    assert (yellow[:2] > 200).all()
    beside = np.ones((SIDE, SIDE), bool)
    beside[top : top + placed.side, left : left + placed.side] = False
    assert set(map(tuple, scene.pixels[beside].tolist())) == {COLOURS["blue"], COLOURS["black"]}


def test_same_seed_draws_the_same_scene() -> None:
    first, second = (draw(draw_caption(rng), rng) for rng in (np.random.default_rng(5), np.random.default_rng(5)))
    np.testing.assert_array_equal(first.pixels, second.pixels)
    assert first.objects == second.objects
