"""Distances between arrays."""

import numpy as np

from sg_runtime.arrays import Array
from sg_runtime.manifest import FLOAT32_MAX


def distance(found: Array, wanted: Array) -> float:
    """Return the relative L2 distance in float64; FLOAT32_MAX if a value is not finite."""
    norm = float(np.linalg.norm(wanted.astype(np.float64)))
    value = float(np.linalg.norm(found.astype(np.float64) - wanted)) / max(norm, 1e-12)
    return value if np.isfinite(value) else FLOAT32_MAX


def cosine_similarity(found: Array, wanted: Array) -> float:
    """Return the cosine similarity in float64; -1 if a value is not finite."""
    a, b = found.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
    value = float(a @ b) / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-12)
    return value if np.isfinite(value) else -1.0
