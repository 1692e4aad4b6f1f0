"""Distances between arrays, of any float types and equal shapes; defined if an array is zero."""

import math

import numpy as np
from numpy.typing import NDArray

from sg_runtime.arrays import Array
from sg_runtime.manifest import FLOAT32_MAX


def relative_l2(found: Array, wanted: Array) -> float:
    """Return the relative L2 distance in float64.

    Zero arrays are equal: 0. If only `wanted` is zero, the distance is infinite. It is infinite or
    NaN if a value is not finite.
    """
    norm, apart = (float(np.linalg.norm(array)) for array in (_flat(wanted), _flat(found) - _flat(wanted)))
    return apart / norm if norm else math.inf if apart else 0.0


def cosine(found: Array, wanted: Array) -> float:
    """Return the cosine similarity in float64; NaN if a value is not finite.

    Zero arrays are equal: 1. If only one of both is zero, they have nothing in common: 0.
    """
    a, b = _flat(found), _flat(wanted)
    norms = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if not all(norms):
        return 0.0 if any(norms) else 1.0
    return float(a @ b) / norms[0] / norms[1]


def distance(found: Array, wanted: Array) -> float:
    """Return the relative L2 distance as a finite number: at most FLOAT32_MAX, also for NaN."""
    value = relative_l2(found, wanted)
    return value if np.isfinite(value) else FLOAT32_MAX


def cosine_similarity(found: Array, wanted: Array) -> float:
    """Return the cosine similarity as a finite number: -1 if a value is not finite."""
    value = cosine(found, wanted)
    return value if np.isfinite(value) else -1.0


def _flat(array: Array) -> NDArray[np.float64]:
    return array.astype(np.float64).ravel()
