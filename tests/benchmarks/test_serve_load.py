"""The load test of serving: times of arrival, and what counts as lost or wrong."""

import random
from collections import Counter

import numpy as np

from benchmarks.serve_load import Tally, arrivals


def test_arrivals_have_the_rate_and_the_spread_of_a_poisson_process() -> None:
    """The standard deviation of 5000 counts is 71, and that of a mean gap of 0.1 s is 0.0014 s."""
    times = np.array(list(arrivals(random.Random(0), 10.0, 500.0)))
    gaps = np.diff(times)
    assert abs(len(times) - 5000) < 5 * 71
    assert (gaps > 0).all()
    assert times[-1] < 500
    assert abs(gaps.std() - gaps.mean()) < 5 * 0.0014 * 2


def test_summary_counts_what_has_no_end_as_lost() -> None:
    kinds = Counter({"arrived": 10, "answered": 6, "refused": 2, "expired": 1, "wrong": 1})
    found = Tally(kinds, [0.1] * 5 + [1.1], [5_000_000]).summary(3.0)
    assert (found["lost"], found["wrong"], found["images_per_second"]) == (1, 1, 2.0)
    assert found["p50_ms"] == 100.0
    assert 1000 < found["p99_ms"] <= 1100
    assert found["memory_mb"] == [5.0]
