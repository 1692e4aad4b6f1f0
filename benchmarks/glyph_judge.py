"""Compare a set of images with real glyphs."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import glyph_classifier
from benchmarks.glyph_classifier import Classifier, judge
from benchmarks.glyph_metrics import (
    Gaussian,
    accuracy,
    frechet_distance,
    merged,
    nearest_distances,
    spread,
)
from examples import glyphs
from examples.glyphs import CLASS_NAMES, HELD_OUT_FONTS, TRAINING_FONTS, render

MODEL_SEED = 0
"""Seed of the images that the reference model was trained on.

This is the default of `examples.train_glyphs`.
"""

CLASSIFIER_SEED = 101
CHECK_SEED = 102
MEASURE_SEED = 103
SEARCH_SEED = 104
"""Seeds of the distortions, one per purpose.

CLASSIFIER_SEED renders the classifier's training images, CHECK_SEED the images for its accuracy.
MEASURE_SEED and SEARCH_SEED render the held-out fonts that measurement and search compare with.
Rows of real images use seeds of 1000 and up.
"""

NEAR_COPY_SHARE = 0.01
"""Share of fresh distortions that defines a near copy.

An image is a near copy if it is closer to a training image than all but this share of fresh
distortions are.
"""

Images = NDArray[np.uint8]
Classes = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of one set of images.

    accuracy: share of images that the classifier reads as the requested character.
    merged_accuracy: the same share with ambiguous characters merged into one class.
    frechet_training: squared Fréchet distance to the training images.
    frechet_held_out: squared Fréchet distance to images of the held-out fonts.
    spread: see `glyph_metrics.spread`.
    nearest: mean distance to the nearest training image, in grey levels.
    near_copies: share of near copies, see `NEAR_COPY_SHARE`.
    """

    accuracy: float
    merged_accuracy: float
    frechet_training: float
    frechet_held_out: float
    spread: float
    nearest: float
    near_copies: float


@dataclass(frozen=True, slots=True)
class Judge:
    """A classifier and the real images that sets of images are compared with."""

    classifier: Classifier
    training_images: Images
    training: Gaussian
    held_out: Gaussian
    near_copy_distance: float

    @classmethod
    def of(cls, classifier: Classifier, variants: int, held_out_seed: int) -> "Judge":
        """Build a judge from the model's training images and distortions of the held-out fonts.

        variants: number of distortions of each character in each font.
        """
        training_images, _ = render(TRAINING_FONTS, variants, MODEL_SEED)
        fresh, _ = render(TRAINING_FONTS, max(1, variants // 8), CHECK_SEED)
        return cls(
            classifier,
            training_images,
            Gaussian.of(judge(classifier, training_images)[1]),
            held_out_gaussian(classifier, variants, held_out_seed),
            float(np.quantile(nearest_distances(fresh, training_images), NEAR_COPY_SHARE)),
        )

    def figures(self, images: Images, classes: Classes) -> Figures:
        """Measure images (N, 16, 16) that should show `classes` (N,)."""
        predicted, features = judge(self.classifier, images)
        gaussian = Gaussian.of(features)
        nearest = nearest_distances(images, self.training_images)
        return Figures(
            accuracy=accuracy(predicted, classes),
            merged_accuracy=accuracy(merged(predicted), merged(classes)),
            frechet_training=frechet_distance(gaussian, self.training),
            frechet_held_out=frechet_distance(gaussian, self.held_out),
            spread=spread(images, classes),
            nearest=float(nearest.mean()),
            near_copies=float((nearest < self.near_copy_distance).mean()),
        )


def held_out_gaussian(classifier: Classifier, variants: int, seed: int) -> Gaussian:
    """Fit the features of `variants` distortions of every character in the held-out fonts."""
    images, _ = render(HELD_OUT_FONTS, variants, seed)
    return Gaussian.of(judge(classifier, images)[1])


@dataclass(frozen=True, slots=True)
class ClassifierFacts:
    """Accuracy of the classifier on unseen distortions of one set of fonts.

    confusions: (meant, seen, count) of the most common errors, in descending order of count.
    """

    images: int
    accuracy: float
    merged_accuracy: float
    confusions: tuple[tuple[str, str, int], ...]

    @classmethod
    def of(cls, classifier: Classifier, fonts: tuple[str, ...], variants: int) -> "ClassifierFacts":
        """Classify `variants` fresh distortions of every character in every font."""
        images, classes = render(fonts, variants, CHECK_SEED)
        predicted, _ = judge(classifier, images)
        wrong = np.flatnonzero(predicted != classes)
        confusions = Counter((CLASS_NAMES[classes[index]], CLASS_NAMES[predicted[index]]) for index in wrong)
        return cls(
            len(images),
            accuracy(predicted, classes),
            accuracy(merged(predicted), merged(classes)),
            tuple((meant, seen, count) for (meant, seen), count in confusions.most_common(20)),
        )


def cached_classifier(folder: Path, variants: int, epochs: int) -> Classifier:
    """Return the classifier trained on `variants` distortions of the training fonts.

    If `folder` does not hold it yet, it is trained and saved there.
    """
    sources = b"".join(Path(str(module.__file__)).read_bytes() for module in (glyph_classifier, glyphs))
    key = hashlib.sha256(sources + f"{variants} {epochs} {CLASSIFIER_SEED}".encode()).hexdigest()[:12]
    path = folder / f"classifier-{key}.pt"
    if not path.exists():
        glyph_classifier.save(
            glyph_classifier.train(*render(TRAINING_FONTS, variants, CLASSIFIER_SEED), epochs, CLASSIFIER_SEED), path
        )
    return glyph_classifier.load(path)


def real_images(fonts: tuple[str, ...], per_class: int, seed: int) -> tuple[Images, Classes]:
    """Render fresh distortions of `fonts`, `per_class` images of each character.

    They are drawn from an equal number of images of every font.
    """
    variants = -(-per_class // len(fonts))
    images, classes = render(fonts, variants, seed)
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(np.flatnonzero(classes == index))[:per_class] for index in range(len(CLASS_NAMES))]
    chosen = np.concatenate(drawn)
    return images[chosen], classes[chosen]
