"""Distances between arrays."""

import math

import numpy as np
import pytest

from sg_export.parity.distances import cosine, cosine_similarity, distance, relative_l2
from sg_runtime.manifest import FLOAT32_MAX


def test_distance_and_cosine_of_what_is_no_number_are_the_worst() -> None:
    good = np.ones((2, 3), np.float32)
    for bad in (np.nan, np.inf):
        found = np.where(np.eye(2, 3) == 1, np.float32(bad), good)
        assert distance(found, good) == FLOAT32_MAX
        assert cosine_similarity(found, good) == -1.0
    assert (distance(good, good), distance(2 * good, good)) == (0.0, 1.0)
    assert cosine_similarity(3 * good, good) == pytest.approx(1.0)
    assert cosine_similarity(-good, good) == pytest.approx(-1.0)


def test_distance_and_cosine_of_zeros_are_defined() -> None:
    good = np.ones((2, 3), np.float32)
    zeros = 0 * good
    assert (relative_l2(zeros, zeros), cosine(zeros, zeros)) == (0.0, 1.0)  # an untrained network's prediction
    assert (relative_l2(good, zeros), cosine(good, zeros)) == (math.inf, 0.0)
    assert (relative_l2(zeros, good), cosine(zeros, good)) == (1.0, 0.0)
    assert (distance(good, zeros), cosine_similarity(good, zeros)) == (FLOAT32_MAX, 0.0)


def test_distance_and_cosine_do_not_depend_on_the_scale() -> None:
    wanted = np.array([3, 4], np.float32)
    found = np.array([3, 4.5], np.float32)
    for scale in (np.float32(1e-18), np.float32(1), np.float32(1e18)):
        assert relative_l2(scale * found, scale * wanted) == pytest.approx(0.1)
        assert cosine(scale * found, scale * wanted) == pytest.approx((9 + 18) / (5 * math.hypot(3, 4.5)))
