"""Kept tokens as rows of two gathers, compared with PyTorch's."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sg_export.models.subset import Subset
from sg_runtime.run.kept import restore, rows


def subsets(runs: int, images: int, count: int, tokens: int) -> NDArray[np.int64]:
    """Return sorted distinct indices, (runs, images, count)."""
    rng = np.random.default_rng(count)
    return np.sort(rng.permuted(np.tile(np.arange(tokens), (runs, images, 1)), axis=-1)[..., :count], axis=-1)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 9), st.data())
def test_rows_take_the_kept_tokens_and_restore_puts_them_back(
    runs: int, images: int, tokens: int, data: st.DataObject
) -> None:
    keep = subsets(runs, images, data.draw(st.integers(1, tokens - 1)), tokens)
    values = np.arange(images * tokens).reshape(images, tokens)
    for mask in (None, np.array([-7])):
        for own, taken, places in zip(keep, rows(keep, tokens), restore(keep, tokens, mask is not None), strict=True):
            np.testing.assert_array_equal(values.ravel()[taken], np.take_along_axis(values, own, axis=1))
            routed = -1 - values.ravel()[taken]
            table = np.concatenate([values.ravel() if mask is None else mask, routed.ravel()])
            expected = values.copy() if mask is None else np.full_like(values, -7)
            np.put_along_axis(expected, own, routed, axis=1)
            np.testing.assert_array_equal(table[places], expected)


@pytest.mark.parametrize("masked", [False, True])
def test_rows_and_restore_are_those_of_the_model(masked: bool) -> None:
    (keep,) = subsets(1, 3, 4, 9)
    expected = Subset.of(torch.from_numpy(keep), 9, masked)
    np.testing.assert_array_equal(rows(keep, 9), expected.rows)
    np.testing.assert_array_equal(restore(keep, 9, masked), expected.restore)
