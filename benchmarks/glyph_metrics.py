"""Figures for sets of glyph images: accuracy, Fréchet distance, distance to the nearest training image, spread.

Everything here is a pure function of arrays.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from examples.glyphs import CLASS_NAMES

AMBIGUOUS_GROUPS = ("Cc", "Il1", "Kk", "Oo0", "Pp", "Ss", "Uu", "Vv", "Ww", "Xx", "Yy", "Zz")
"""Characters that one distorted image may not tell apart, counted as one class in the merged accuracy.

The pairs are those whose upper and lower case EMNIST merges (Cohen et al. 2017, arXiv 1702.05373, "ByMerge", after NIST
Special Database 19: C I J K L M O P S U V W X Y Z), less I, J, L and M, whose two cases are different shapes in print.
EMNIST leaves the digits alone. In print `I`, `l` and `1` are one upright stroke with or without serifs, and `O` and `0`
two widths of one oval, while the distortions change widths by up to a tenth either way; so these join too.
"""

CHUNK = 512
"""Images compared with the whole training set at once."""


@dataclass(frozen=True, slots=True)
class Gaussian:
    """Mean (D,) and covariance (D, D) of a set of features, float64; the covariance divides by N - 1."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> "Gaussian":
        """Fit features (N, D), N at least 2."""
        values = features.astype(np.float64)
        return cls(values.mean(axis=0), np.atleast_2d(np.cov(values, rowvar=False)))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|m1 - m2|² + Tr(C1 + C2 - 2 (C1 C2)^½), the squared Fréchet distance of two Gaussians, as FID is.

    The trace of the root of C1 C2, which is not symmetric, is that of (C1^½ C2 C1^½)^½, which is: the two products have
    the same eigenvalues. Source: Dowson and Landau 1982; Heusel et al. 2017, arXiv 1706.08500, section 4.
    """
    root = symmetric_root(first.covariance)
    cross = root @ second.covariance @ root
    cross_trace = np.sqrt(np.linalg.eigvalsh((cross + cross.T) / 2).clip(min=0)).sum()
    offset = first.mean - second.mean
    return float(offset @ offset + np.trace(first.covariance) + np.trace(second.covariance) - 2 * cross_trace)


def symmetric_root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The root of a symmetric positive semidefinite matrix (D, D) by its eigenvectors; negative rounding becomes 0."""
    values, vectors = np.linalg.eigh(matrix)
    root: NDArray[np.float64] = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    return root


def accuracy(predicted: NDArray[np.int64], classes: NDArray[np.int64]) -> float:
    """Share of predicted classes (N,) that equal the given ones (N,)."""
    return float((predicted == classes).mean())


def merged(classes: NDArray[np.int64], groups: Sequence[str] = AMBIGUOUS_GROUPS) -> NDArray[np.int64]:
    """Classes (N,) with every member of a group replaced by the group's first."""
    representative = np.arange(len(CLASS_NAMES))
    for group in groups:
        members = [CLASS_NAMES.index(character) for character in group]
        representative[members] = members[0]
    return representative[classes]


def nearest_distances(images: NDArray[np.uint8], references: NDArray[np.uint8]) -> NDArray[np.float64]:
    """How far each image (N, 16, 16) is from the nearest reference (M, 16, 16): (N,), root mean square grey levels.

    The search is exact: all products and sums of 256 bytes are whole numbers or halves that float32 holds.
    """
    size = int(np.prod(images.shape[1:]))
    if size > 256:
        raise ValueError(f"images: expected at most 256 pixels for exact sums in float32, found {size}")
    points = references.reshape(-1, size).astype(np.float32)
    half_norms = np.einsum("md,md->m", points, points) / 2
    distances = []
    for start in range(0, len(images), CHUNK):
        queries = images[start : start + CHUNK].reshape(-1, size).astype(np.float32)
        nearest = points[(half_norms - queries @ points.T).argmin(axis=1)]
        distances.append(np.sqrt(np.square(queries - nearest, dtype=np.float64).mean(axis=1)))
    return np.concatenate(distances)


def spread(images: NDArray[np.uint8], classes: NDArray[np.int64]) -> float:
    """Root mean square difference between two images of the same class, in grey levels, all classes weighted alike.

    images (N, 16, 16), classes (N,), at least two images of each class. The mean square difference of two draws is
    twice the variance.
    """
    variances = [images[classes == index].var(axis=0, ddof=1, dtype=np.float64).mean() for index in np.unique(classes)]
    return float(np.sqrt(2 * np.mean(variances)))
