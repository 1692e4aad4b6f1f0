"""Counter-based randomness. A number depends only on seed, purpose, step, evaluation and branch.

Every draw is a block of raw 64-bit words of Philox4x64-10 (Salmon et al. 2011), as NumPy's `Philox`
emits them. The key is (seed, purpose). The counter is (0, step, evaluation, branch), lowest word
first. NumPy adds one to the counter before every block of four words, including the first. Hence an
image depends neither on its batch nor on earlier images. Test vectors:
`tests/sg_runtime/test_philox.py`.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

INITIAL_NOISE = 0
CHURN = 1
SUBSET = 2

STRONG = 0
WEAK = 1


def raw_words(
    seed: int, purpose: int, count: int, *, step: int = 0, evaluation: int = 0, branch: int = 0
) -> NDArray[np.uint64]:
    """Return `count` raw 64-bit words. seed: 0 to 2**64 - 1."""
    key = np.array([seed, purpose], dtype=np.uint64)
    counter = np.array([0, step, evaluation, branch], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def normal(seed: int, purpose: int, shape: tuple[int, ...], *, step: int = 0) -> NDArray[np.float32]:
    """Return standard normal numbers of `shape`, float32.

    Applies the Box–Muller transform in float64 to pairs of words: the first gives the radius, the
    second the angle.
    """
    size = int(np.prod(shape))
    words = raw_words(seed, purpose, 2 * ((size + 1) // 2), step=step)
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius = np.sqrt(-2 * np.log(uniform[0::2]))
    angle = 2 * np.pi * uniform[1::2]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return pairs.reshape(-1)[:size].reshape(shape).astype(np.float32)


def subset(seed: int, tokens: int, keep: int, *, step: int, evaluation: int, branch: int) -> NDArray[np.int64]:
    """Return the kept tokens: `keep` of `tokens` indices, sorted, int64.

    The tokens with the smallest random words are kept; ties are broken by index. If the counters
    are equal, a smaller set of kept tokens is contained in a larger one.
    """
    words = raw_words(seed, SUBSET, tokens, step=step, evaluation=evaluation, branch=branch)
    return np.sort(np.argsort(words, kind="stable")[:keep])


def subsets(seed: int, tokens: int, keep: int, places: Sequence[tuple[int, int]], *, branch: int) -> NDArray[np.int64]:
    """Return `subset` for each (step, evaluation) of `places`, (E, K) int64."""
    rows = np.empty((len(places), tokens), np.uint64)
    blocks, position = -(-tokens // 4), branch << 192
    generator = np.random.Philox(
        key=np.array([seed, SUBSET], np.uint64), counter=np.array([0, 0, 0, branch], np.uint64)
    )
    for row, (step, evaluation) in zip(rows, places, strict=True):
        wanted = step << 64 | evaluation << 128 | branch << 192
        generator.advance((wanted - position) % (1 << 256))
        row[:] = generator.random_raw(tokens)
        position = wanted + blocks
    least = rows <= np.partition(rows, keep - 1, axis=1)[:, keep - 1 :][:, :1]
    if np.count_nonzero(least) != keep * len(rows):  # equal words
        return np.sort(np.argsort(rows, axis=1, kind="stable")[:, :keep], axis=1)
    return np.flatnonzero(least).reshape(-1, keep) % tokens
