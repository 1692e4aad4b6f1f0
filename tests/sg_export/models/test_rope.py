"""Rotary position embedding, compared with rotations of complex numbers."""

import itertools

import numpy as np
import pytest
import torch

from sg_export.models.rope import rope_table, rotate


@pytest.mark.parametrize(("grid", "sizes"), [((3, 5), (4, 4)), ((2, 7), (2, 6)), ((4,), (8,))], ids=str)
def test_rotate_by_table_is_a_product_of_complex_numbers(grid: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    places = list(itertools.product(*map(range, grid)))
    x = torch.randn(2, len(places), 3, sum(sizes), generator=torch.Generator().manual_seed(0))
    found = rotate(x, rope_table(grid, sizes, 100.0)[None])
    pairs = x.double().numpy().view(np.complex128)
    for row, place in enumerate(places):
        angles = np.concatenate(
            [at * 100.0 ** (-np.arange(0, size, 2) / size) for at, size in zip(place, sizes, strict=True)]
        )
        wanted = (pairs[:, row] * np.exp(1j * angles)).view(np.float64)
        # Three FP32 roundings of values below 5.
        np.testing.assert_allclose(found[:, row].numpy(), wanted, atol=1e-6)


def test_rope_table_of_far_positions_is_exact_to_fp32() -> None:
    """Angles in FP32 would be off by up to 3e-5 at position 511."""
    table = rope_table((512, 1), (2, 2), 10000.0)
    np.testing.assert_array_equal(table[:, 0].numpy(), np.cos(np.arange(512.0)).astype(np.float32))
    np.testing.assert_array_equal(table[:, 5].numpy(), np.sin(np.arange(512.0)).astype(np.float32))


def test_scores_depend_on_differences_of_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 8, generator=generator).unbind()
    table = rope_table((4, 4), (4, 4), 100.0).view(4, 4, -1)

    def score(first: tuple[int, int], second: tuple[int, int]) -> float:
        rows = [table[place][None, None] for place in (first, second)]
        return float((rotate(query, rows[0]) * rotate(key, rows[1])).sum())

    # Sums of eight products, rounded to FP32.
    assert score((0, 1), (2, 2)) == pytest.approx(score((1, 2), (3, 3)), abs=1e-5)
    assert score((0, 1), (2, 2)) != pytest.approx(score((2, 2), (0, 1)), abs=1e-2)
