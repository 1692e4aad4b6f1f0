"""Distances between arrays."""

import numpy as np
import pytest

from sg_export.parity.distances import cosine_similarity, distance
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
    # The prediction of an untrained network is zero, and nothing is divided by it.
    assert (distance(0 * good, 0 * good), cosine_similarity(0 * good, good)) == (0.0, 0.0)
