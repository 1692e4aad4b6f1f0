"""Metrics of sets of glyph images.

The metrics are accuracy, Fréchet distance, distance to the nearest training image, and spread.
Every function is a pure function of arrays.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from examples.glyphs import CLASS_NAMES

AMBIGUOUS_GROUPS = ("Cc", "Il1", "Kk", "Oo0", "Pp", "Ss", "Uu", "Vv", "Ww", "Xx", "Yy", "Zz")
"""Characters that one distorted image may not distinguish.

Merged accuracy counts each group as one class. The pairs are the letters whose upper and lower case
EMNIST merges (Cohen et al. 2017, arXiv 1702.05373, "ByMerge", after NIST Special Database 19:
C I J K L M O P S U V W X Y Z), without I, J, L and M. The two cases of these four letters have
different shapes in print. EMNIST does not merge digits. In print, `I`, `l` and `1` are one upright
stroke with or without serifs. `O` and `0` are one oval in two widths, and the distortions change
widths by up to a tenth in either direction. So these groups are merged, too.
"""

CHUNK = 512
"""Number of images that are compared with the entire training set at once."""


@dataclass(frozen=True, slots=True)
class Gaussian:
    """Mean (D,) and covariance (D, D) of a set of features, float64.

    The covariance divides by N - 1.
    """

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> "Gaussian":
        """Fit features (N, D) with N of at least 2."""
        values = features.astype(np.float64)
        return cls(values.mean(axis=0), np.atleast_2d(np.cov(values, rowvar=False)))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Return the squared Fréchet distance of two Gaussians, as in FID.

    It is |m1 - m2|² + Tr(C1 + C2 - 2 (C1 C2)^½). The product C1 C2 is not symmetric. The product
    C1^½ C2 C1^½ is symmetric and has the same eigenvalues, so both roots have the same trace.
    Source: Dowson and Landau 1982; Heusel et al. 2017, arXiv 1706.08500, section 4.
    """
    root = symmetric_root(first.covariance)
    cross = root @ second.covariance @ root
    cross_trace = np.sqrt(np.linalg.eigvalsh((cross + cross.T) / 2).clip(min=0)).sum()
    offset = first.mean - second.mean
    return float(offset @ offset + np.trace(first.covariance) + np.trace(second.covariance) - 2 * cross_trace)


def symmetric_root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the root of a symmetric positive semidefinite matrix (D, D) by its eigenvectors.

    Eigenvalues that are negative by rounding become 0.
    """
    values, vectors = np.linalg.eigh(matrix)
    root: NDArray[np.float64] = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    return root


def accuracy(predicted: NDArray[np.int64], classes: NDArray[np.int64]) -> float:
    """Return the share of `predicted` (N,) that equals `classes` (N,)."""
    return float((predicted == classes).mean())


def merged(classes: NDArray[np.int64], groups: Sequence[str] = AMBIGUOUS_GROUPS) -> NDArray[np.int64]:
    """Return classes (N,) with every member of a group replaced by the group's first member."""
    representative = np.arange(len(CLASS_NAMES))
    for group in groups:
        members = [CLASS_NAMES.index(character) for character in group]
        representative[members] = members[0]
    return representative[classes]


def nearest_distances(images: NDArray[np.uint8], references: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the distance of each image (N, 16, 16) to the nearest reference (M, 16, 16).

    The result is (N,), in root mean square grey levels. The search is exact: all products and sums
    of 256 bytes are integers or half-integers that float32 represents exactly. Raises ValueError if
    an image has more than 256 pixels.
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
    """Return the root mean square difference between two images of the same class, in grey levels.

    images is (N, 16, 16) and classes is (N,), with at least two images of each class. All classes
    have equal weight. The mean square difference of two draws is twice the variance.
    """
    variances = [images[classes == index].var(axis=0, ddof=1, dtype=np.float64).mean() for index in np.unique(classes)]
    return float(np.sqrt(2 * np.mean(variances)))
