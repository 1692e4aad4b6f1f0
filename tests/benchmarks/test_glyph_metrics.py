"""The metrics of `quality_glyphs`, checked against closed forms, brute force and small cases."""

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.glyph_judge import real_images
from benchmarks.glyph_metrics import (
    AMBIGUOUS_GROUPS,
    CHUNK,
    Gaussian,
    accuracy,
    frechet_distance,
    merged,
    nearest_distances,
    spread,
    symmetric_root,
)
from examples.glyphs import CLASS_NAMES, TRAINING_FONTS

ROUNDING = 1e-9
"""Relative tolerance.

Float64 eigenvalues of well-conditioned matrices of size 8 keep about 13 digits.
"""


def covariance(size: int, seed: int) -> NDArray[np.float64]:
    """Return a random covariance (size, size), well away from singular."""
    factor = np.random.default_rng(seed).normal(size=(size, size))
    return factor @ factor.T + 0.1 * np.eye(size)


def gaussian(size: int, seed: int) -> Gaussian:
    return Gaussian(np.random.default_rng(100 + seed).normal(size=size), covariance(size, seed))


def labels(text: str) -> NDArray[np.int64]:
    return np.array([CLASS_NAMES.index(character) for character in text], dtype=np.int64)


def random_images(count: int, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, size=(count, 16, 16), dtype=np.uint8)


def test_frechet_distance_equal_gaussians_is_zero() -> None:
    one = gaussian(64, 0)
    # the distance is a difference of traces of this size
    assert frechet_distance(one, one) == pytest.approx(0, abs=ROUNDING * np.trace(one.covariance))


def test_frechet_distance_shifted_gaussian_is_squared_shift() -> None:
    one = gaussian(8, 0)
    shift = np.arange(8.0)
    moved = Gaussian(one.mean + shift, one.covariance)
    assert frechet_distance(one, moved) == pytest.approx(140, rel=ROUNDING)  # 0 + 1 + 4 + … + 49


def test_frechet_distance_one_dimension_is_difference_of_deviations() -> None:
    first = Gaussian(np.array([1.0]), np.array([[4.0]]))
    second = Gaussian(np.array([4.0]), np.array([[25.0]]))
    assert frechet_distance(first, second) == pytest.approx((4 - 1) ** 2 + (5 - 2) ** 2, rel=ROUNDING)


@pytest.mark.parametrize("seed", range(5))
def test_frechet_distance_noncommuting_two_dimensions_matches_closed_form(seed: int) -> None:
    first, second = gaussian(2, seed), gaussian(2, seed + 50)
    product = first.covariance @ second.covariance
    assert not np.allclose(product, product.T)
    # With the eigenvalues a², b² of a 2×2 matrix product, the trace of its root is a + b, and
    # (a + b)² = a² + b² + 2ab = trace + 2 √determinant.
    root_trace = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    offset = np.square(first.mean - second.mean).sum()
    expected = offset + np.trace(first.covariance + second.covariance) - 2 * root_trace
    assert frechet_distance(first, second) == pytest.approx(expected, rel=ROUNDING)


def test_frechet_distance_noncommuting_many_dimensions_matches_eigenvalues_of_the_product() -> None:
    first, second = gaussian(8, 1), gaussian(8, 2)
    # Heusel's form: C1 C2 is not symmetric, but its eigenvalues are real and positive
    values = np.linalg.eigvals(first.covariance @ second.covariance)
    root_trace = np.sqrt(values.real).sum()
    expected = np.square(first.mean - second.mean).sum()
    expected += np.trace(first.covariance) + np.trace(second.covariance) - 2 * root_trace
    assert frechet_distance(first, second) == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize("seed", range(5))
def test_frechet_distance_rotated_and_shifted_together_is_unchanged(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    offset = rng.normal(size=8)
    first, second = gaussian(8, seed), gaussian(8, seed + 50)
    moved = [Gaussian(rotation @ one.mean + offset, rotation @ one.covariance @ rotation.T) for one in (first, second)]
    assert frechet_distance(*moved) == pytest.approx(frechet_distance(first, second), rel=ROUNDING)


def test_frechet_distance_swapped_is_unchanged() -> None:
    first, second = gaussian(8, 3), gaussian(8, 4)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=ROUNDING)


def test_frechet_distance_fewer_samples_than_features_is_finite_and_positive() -> None:
    rng = np.random.default_rng(0)
    first, second = (Gaussian.of(rng.normal(size=(10, 64))) for _ in range(2))
    assert 0 < frechet_distance(first, second) < np.inf


def test_gaussian_of_known_features_divides_by_one_less() -> None:
    fitted = Gaussian.of(np.array([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]], dtype=np.float32))
    np.testing.assert_allclose(fitted.mean, [2, 2], rtol=ROUNDING)
    np.testing.assert_allclose(fitted.covariance, [[4, 3], [3, 3]], rtol=ROUNDING)
    assert fitted.covariance.dtype == np.float64


def test_symmetric_root_squared_gives_the_matrix() -> None:
    matrix = covariance(8, 7)
    root = symmetric_root(matrix)
    np.testing.assert_allclose(root @ root, matrix, rtol=0, atol=ROUNDING * np.trace(matrix))
    np.testing.assert_allclose(root, root.T, rtol=0, atol=ROUNDING * np.trace(matrix))


def test_accuracy_case_and_shape_confusions_count_once_merged() -> None:
    meant = labels("OoSl1AaB")
    seen = labels("0OsI1aAB")  # wrong in both measures: A read as a, and a read as A, whose shapes differ
    assert accuracy(seen, meant) == 2 / 8
    assert accuracy(merged(seen), merged(meant)) == 6 / 8


def test_merged_without_groups_changes_nothing() -> None:
    every = np.arange(len(CLASS_NAMES))
    np.testing.assert_array_equal(merged(every, ()), every)


def test_ambiguous_groups_are_disjoint_characters() -> None:
    members = "".join(AMBIGUOUS_GROUPS)
    assert len(set(members)) == len(members)
    assert set(members) <= set(CLASS_NAMES)
    assert len(set(merged(np.arange(62)).tolist())) == 62 - len(members) + len(AMBIGUOUS_GROUPS)


def test_nearest_distances_planted_duplicate_is_zero() -> None:
    references, images = random_images(2000, 0), random_images(5, 1)
    images[3] = references[1234]
    distances = nearest_distances(images, references)
    assert distances[3] == 0
    assert (np.delete(distances, 3) > 50).all()  # independent noise is 104 grey levels apart on average


def test_nearest_distances_one_grey_level_off_is_found() -> None:
    references = random_images(2000, 0)
    image = references[77].astype(np.int16)
    image[5, 5] += 1 if image[5, 5] < 255 else -1
    # one level in one of 256 pixels: √(1 / 256)
    assert nearest_distances(image[None].astype(np.uint8), references)[0] == 1 / 16


def test_nearest_distances_more_than_a_chunk_matches_brute_force() -> None:
    references, images = random_images(40, 0), random_images(CHUNK + 3, 1)
    squares = np.square(images[:, None].astype(np.int64) - references[None].astype(np.int64))
    expected = np.sqrt(squares.mean(axis=(2, 3)).min(axis=1))
    np.testing.assert_allclose(nearest_distances(images, references), expected, rtol=ROUNDING)


def test_nearest_distances_more_than_256_pixels_raises() -> None:
    large = np.zeros((1, 17, 17), dtype=np.uint8)
    with pytest.raises(ValueError, match="at most 256 pixels"):
        nearest_distances(large, large)


def test_spread_matches_all_pairs() -> None:
    images = random_images(12, 0)
    classes = np.repeat([3, 5], 6)
    pairs = [
        np.square(images[i].astype(float) - images[j].astype(float)).mean()
        for i in range(12)
        for j in range(i)
        if classes[i] == classes[j]
    ]
    assert spread(images, classes) == pytest.approx(np.sqrt(np.mean(pairs)), rel=ROUNDING)


def test_spread_one_image_per_class_repeated_is_zero() -> None:
    images = random_images(3, 0).repeat(4, axis=0)
    assert spread(images, np.repeat([0, 1, 2], 4)) == 0


def test_real_images_asked_for_some_are_balanced_and_fresh_by_seed() -> None:
    images, classes = real_images(TRAINING_FONTS[:2], per_class=3, seed=5)
    assert images.shape == (3 * 62, 16, 16)
    np.testing.assert_array_equal(np.bincount(classes), np.full(62, 3))
    again, _ = real_images(TRAINING_FONTS[:2], per_class=3, seed=5)
    np.testing.assert_array_equal(images, again)
    other, _ = real_images(TRAINING_FONTS[:2], per_class=3, seed=6)
    assert nearest_distances(other, images).min() > 0
