"""The random numbers: test vectors, a second implementation, and properties for any counter.

One draw is the stream of 64-bit words of Philox4x64-10 (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3") with

    key      (seed, purpose)                        purpose: 0 initial noise, 1 churn, 2 kept tokens
    counter  (1 + block, step, evaluation, branch)  branch: 0 strong, 1 weak

Both list the lowest word first. A block has four words. The first block has counter 1, not 0:
NumPy's `Philox` is created with counter (0, step, evaluation, branch) and adds one to it before it
computes a block.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sg_runtime import philox

MASK = 2**64 - 1
WORDS = st.integers(0, MASK)
PLACES = st.fixed_dictionaries({"step": WORDS, "evaluation": WORDS, "branch": WORDS})

few = settings(max_examples=50)


def philox_in_python(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """Return one block (four words) of Philox4x64-10, computed as in Random123's `philox.h`."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (
            (product1 >> 64) ^ c1 ^ k0,
            product1 & MASK,
            (product0 >> 64) ^ c3 ^ k1,
            product0 & MASK,
        )
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return [c0, c1, c2, c3]


def words_in_python(seed: int, purpose: int, count: int, step: int, evaluation: int, branch: int) -> list[int]:
    """Return what `philox.raw_words` must return, computed without NumPy."""
    blocks = range(-(-count // 4))
    return [w for b in blocks for w in philox_in_python((b + 1, step, evaluation, branch), (seed, purpose))][:count]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        (
            (0, 0, 0, 0),
            (0, 0),
            [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B],
        ),
        (
            (MASK, MASK, MASK, MASK),
            (MASK, MASK),
            [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0],
        ),
        (
            (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
            (0x452821E638D01377, 0xBE5466CF34E90C6C),
            [0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6],
        ),
    ],
)
def test_philox_in_python_gives_the_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], words: list[int]
) -> None:
    """Check the implementation above against Random123's `kat_vectors`."""
    assert philox_in_python(counter, key) == words


@pytest.mark.parametrize(
    ("seed", "purpose", "place", "words"),
    [
        (
            0,
            0,
            (0, 0, 0),
            [
                0x02F4BA6408E4D89B,
                0x3DD62B0B9CA8C5B2,
                0x1C8667A55D902E79,
                0x907D7A052FD5B4DC,
                0x809BF322883987C3,
                0x471128B9E807F7DD,
            ],
        ),
        (
            1,
            2,
            (3, 1, 1),
            [
                0x043831445050A3D5,
                0xBF78B8ADD5BE091A,
                0xCBBF3DCE04A947CB,
                0xFCD7C17C41535D05,
                0x81FDB620B0F82569,
                0x2691CBB9FEF8904A,
            ],
        ),
        (
            2**64 - 1,
            2,
            (39, 0, 0),
            [
                0x7F2C0CB1BB92AFDF,
                0xA53D6681BF9DF9F3,
                0xC646A20F41362EE0,
                0x95ABBCF117DA9E74,
                0x970364D526E1F20F,
                0xF966B02C90FF1E5E,
            ],
        ),
    ],
)
def test_raw_words_of_test_vectors_are_as_committed(
    seed: int, purpose: int, place: tuple[int, int, int], words: list[int]
) -> None:
    step, evaluation, branch = place
    drawn = philox.raw_words(seed, purpose, 6, step=step, evaluation=evaluation, branch=branch)
    assert drawn.dtype == np.uint64
    assert [int(word) for word in drawn] == words


def test_purposes_and_branches_are_as_documented() -> None:
    """The numbers are part of every key and counter. A change would change every image."""
    assert (philox.INITIAL_NOISE, philox.CHURN, philox.SUBSET) == (0, 1, 2)
    assert (philox.STRONG, philox.WEAK) == (0, 1)


@few
@given(WORDS, st.integers(0, 2), st.integers(0, 13), PLACES)
def test_raw_words_of_any_place_equal_those_of_plain_python(
    seed: int, purpose: int, count: int, place: dict[str, int]
) -> None:
    drawn = philox.raw_words(seed, purpose, count, **place)
    assert [int(word) for word in drawn] == words_in_python(seed, purpose, count, **place)


@pytest.mark.parametrize(
    ("seed", "step", "numbers"),
    [
        (
            0,
            0,
            [
                0.15853384137153625,
                2.982879400253296,
                -1.9256919622421265,
                -0.8249255418777466,
                -0.2025032788515091,
                1.1557642221450806,
            ],
        ),
        (
            2**64 - 1,
            0,
            [
                -0.3471274971961975,
                -1.666235089302063,
                -0.2814759612083435,
                -1.3031625747680664,
                0.11720728874206543,
            ],
        ),
    ],
)
def test_normal_of_test_vectors_is_as_committed(seed: int, step: int, numbers: list[float]) -> None:
    drawn = philox.normal(seed, philox.INITIAL_NOISE, (len(numbers),), step=step)
    assert drawn.dtype == np.float32
    # Two machines may compute float64 logarithms and cosines that differ in the last bit. This may
    # move the rounding to float32 by one place, at most 2**-23 relative.
    np.testing.assert_allclose(drawn, numbers, rtol=2**-23, atol=0)


def test_normal_of_plain_python_is_the_same() -> None:
    """The Box–Muller transform takes pairs of uniform numbers in (0, 1].

    They are made of the upper 53 bits of each word.
    """
    expected = []
    words = words_in_python(7, philox.CHURN, 10, 5, 0, 0)
    for first, second in zip(words[0::2], words[1::2], strict=True):
        u, v = (((word >> 11) + 0.5) / 2**53 for word in (first, second))
        radius = math.sqrt(-2 * math.log(u))
        expected += [radius * math.cos(2 * math.pi * v), radius * math.sin(2 * math.pi * v)]
    drawn = philox.normal(7, philox.CHURN, (3, 3), step=5)
    assert drawn.shape == (3, 3)
    # As for the test vectors, plus the absolute error of a cosine near its zero.
    np.testing.assert_allclose(drawn.reshape(-1), expected[:9], rtol=2**-23, atol=1e-15)


@few
@given(WORDS, st.lists(st.integers(1, 5), max_size=4))
def test_normal_of_a_smaller_shape_begins_the_larger_one(seed: int, shape: list[int]) -> None:
    drawn = philox.normal(seed, philox.INITIAL_NOISE, tuple(shape))
    larger = philox.normal(seed, philox.INITIAL_NOISE, (drawn.size + 3,))
    assert drawn.shape == tuple(shape)
    np.testing.assert_array_equal(drawn.reshape(-1), larger[: drawn.size])


def test_normal_of_many_has_the_moments_of_a_standard_normal() -> None:
    count = 100_000
    drawn = philox.normal(3, philox.INITIAL_NOISE, (count,)).astype(np.float64)
    # The bounds are five standard deviations of the estimates. The numbers are always the same, so
    # the test cannot fail by chance.
    assert abs(drawn.mean()) < 5 * math.sqrt(1 / count)
    assert abs(drawn.var() - 1) < 5 * math.sqrt(2 / count)
    assert abs((drawn**3).mean()) < 5 * math.sqrt(15 / count)
    assert abs((drawn**4).mean() - 3) < 5 * math.sqrt(96 / count)
    # The two numbers of a pair share their radius. They must still be uncorrelated.
    assert abs((drawn[0::2] * drawn[1::2]).mean()) < 5 * math.sqrt(1 / (count / 2))


def test_normal_of_the_extreme_words_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logarithm never gets a zero, even for the smallest and the largest word.

    The words are patched in because no known seed draws them.
    """
    monkeypatch.setattr(philox, "raw_words", lambda *_, **__: np.array([0, 0, MASK, MASK], dtype=np.uint64))
    drawn = philox.normal(0, philox.INITIAL_NOISE, (4,))
    assert np.isfinite(drawn).all()
    # The longest and the shortest possible radius. Float32 rounds the longest.
    assert drawn[0] == pytest.approx(math.sqrt(-2 * math.log(2**-54)), rel=2**-23)
    assert drawn[2] == 0


@pytest.mark.parametrize(
    ("seed", "place", "four", "eight"),
    [
        (0, (0, 0, 0), [6, 7, 10, 13], [2, 6, 7, 9, 10, 13, 14, 15]),
        (0, (0, 0, 1), [2, 7, 10, 13], [2, 4, 5, 7, 10, 11, 13, 15]),
        (12345, (7, 1, 1), [0, 9, 11, 13], [0, 4, 8, 9, 10, 11, 13, 15]),
    ],
)
def test_subset_of_test_vectors_is_as_committed(
    seed: int, place: tuple[int, int, int], four: list[int], eight: list[int]
) -> None:
    step, evaluation, branch = place
    for expected in (four, eight):
        drawn = philox.subset(seed, 16, len(expected), step=step, evaluation=evaluation, branch=branch)
        assert drawn.dtype == np.int64
        assert drawn.tolist() == expected


@few
@given(st.data(), WORDS, st.integers(1, 300), PLACES)
def test_subset_of_any_place_is_sorted_distinct_in_range_and_nested(
    data: st.DataObject, seed: int, tokens: int, place: dict[str, int]
) -> None:
    keep = data.draw(st.integers(1, tokens))
    larger = data.draw(st.integers(keep, tokens))
    drawn = philox.subset(seed, tokens, keep, **place)
    assert drawn.shape == (keep,)
    assert (np.diff(drawn) > 0).all()
    assert drawn[0] >= 0
    assert drawn[-1] < tokens
    assert set(drawn) <= set(philox.subset(seed, tokens, larger, **place))


@few
@given(WORDS, st.integers(1, 40), PLACES)
def test_subset_of_any_place_holds_the_smallest_words(seed: int, tokens: int, place: dict[str, int]) -> None:
    words = words_in_python(seed, philox.SUBSET, tokens, **place)
    by_word = sorted(range(tokens), key=lambda token: (words[token], token))
    for keep in {1, (tokens + 1) // 2, tokens}:
        assert philox.subset(seed, tokens, keep, **place).tolist() == sorted(by_word[:keep])


def test_subset_of_equal_words_takes_the_lower_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """The words are patched in because no known seed draws a word twice."""
    monkeypatch.setattr(philox, "raw_words", lambda *_, **__: np.array([5, 3, 5, 3, 5], dtype=np.uint64))
    assert philox.subset(0, 5, 3, step=0, evaluation=0, branch=0).tolist() == [0, 1, 3]


def test_subset_of_many_seeds_keeps_every_token_equally_often() -> None:
    tokens, keep, seeds = 16, 4, 4000
    counts = np.zeros(tokens)
    for seed in range(seeds):
        counts[philox.subset(seed, tokens, keep, step=0, evaluation=0, branch=0)] += 1
    share = keep / tokens
    # Five standard deviations of a binomial count. The seeds are always the same.
    assert np.abs(counts / seeds - share).max() < 5 * math.sqrt(share * (1 - share) / seeds)


def test_raw_words_of_different_places_are_different() -> None:
    """Every part of the key and of the counter changes the words."""
    draws = {
        tuple(philox.raw_words(seed, purpose, 4, step=step, evaluation=evaluation, branch=branch).tolist())
        for seed in (0, 1, 2)
        for purpose in (philox.INITIAL_NOISE, philox.CHURN, philox.SUBSET)
        for step in (0, 1, 2)
        for evaluation in (0, 1)
        for branch in (philox.STRONG, philox.WEAK)
    }
    assert len(draws) == 3 * 3 * 3 * 2 * 2
    assert len({word for draw in draws for word in draw}) == 4 * len(draws)


@pytest.mark.parametrize("tokens", [5, 16, 256])
def test_subsets_are_the_subset_of_each_place(tokens: int) -> None:
    """Also in any order, and where the places lie far apart."""
    places = [(0, 0), (1, 0), (1, 1), (7, 1), (2, 0), (39, 0)]
    for seed, branch in ((0, philox.STRONG), (2**64 - 1, philox.WEAK)):
        found = philox.subsets(seed, tokens, 3, places, branch=branch)
        for row, (step, evaluation) in zip(found, places, strict=True):
            expected = philox.subset(seed, tokens, 3, step=step, evaluation=evaluation, branch=branch)
            np.testing.assert_array_equal(row, expected)


def test_subsets_of_equal_words_take_the_lower_index(monkeypatch: pytest.MonkeyPatch) -> None:
    class Equal:
        def __init__(self, **_: object) -> None:
            pass

        def advance(self, _: int) -> None:
            pass

        def random_raw(self, count: int) -> NDArray[np.uint64]:
            return np.full(count, 9, np.uint64)

    monkeypatch.setattr(np.random, "Philox", Equal)
    np.testing.assert_array_equal(philox.subsets(0, 8, 3, [(0, 0)], branch=0), [[0, 1, 2]])
