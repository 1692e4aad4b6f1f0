"""Checks of pipeline arguments. Each raises UsageError with the value and the expected range."""

from collections.abc import Sequence

import numpy as np

from sg_runtime.arrays import Indices
from sg_runtime.errors import UsageError
from sg_runtime.manifest import FLOAT32_MAX, ModelFacts
from sg_runtime.manifest.base import items, whole_number


def given_subset(name: str, given: Indices | None, drawn: Indices | None, tokens: int) -> Indices | None:
    """Return the kept tokens (B, K) of one evaluation: `given`, or `drawn` if `given` is None.

    Raises UsageError if the branch takes no kept tokens, or if `given` does not fit it.
    """
    if given is None:
        return drawn
    if drawn is None:
        raise UsageError(f"{name}: the branch keeps all {tokens} tokens or does not run: expected None")
    expect(name, given, np.ndarray, f"an int64 array of shape {drawn.shape}")
    if given.dtype != np.int64 or given.shape != drawn.shape:
        raise UsageError(f"{name}: expected int64 of shape {drawn.shape}, found {given.dtype} of {given.shape}")
    if (np.diff(given, axis=1) <= 0).any() or given.min() < 0 or given.max() >= tokens:
        raise UsageError(f"{name}: expected sorted distinct token indices below {tokens} in each row")
    return given


def check_times(model: ModelFacts, times: Sequence[float]) -> None:
    """Raise UsageError if the network cannot be evaluated at one of the times."""
    for time in times:
        if not abs(time) <= FLOAT32_MAX:
            raise UsageError(f"time {time:g}: expected a finite float32 number")
        if model.prediction == "edm":
            if time <= 0:
                raise UsageError(f"time {time:g}: expected a sigma above 0 for an edm model")
        elif not 0 <= time <= 1:
            raise UsageError(f"time {time:g}: expected 0 (image) to 1 (noise) for a model of {model.prediction}")


def checked_seeds(seeds: Sequence[int], images: int | None = None) -> list[int]:
    """Return valid seeds as a list of int. Raises UsageError unless there is one for each image.

    images: number of images; None for any.
    """
    found = [whole_number("seed", seed) for seed in items("seeds", seeds, "a sequence of whole numbers")]
    if not found or images not in (None, len(found)):
        wanted = "at least one" if images is None else f"{images}, one per image"
        raise UsageError(f"seeds: expected {wanted}, found {len(found)}")
    for seed in found:
        if not 0 <= seed < 2**64:
            raise UsageError(f"seed {seed}: expected 0 to 2**64 - 1")
    return found


def checked_prompts(name: str, prompts: object, *, empty: bool = False) -> list[str]:
    """Return prompts as a list of texts, "" for no prompt. A text alone is a list of one.

    empty: whether "" is accepted besides None. Raises UsageError for anything but texts and None,
    and for no prompts at all.
    """
    found = items(name, [prompts] if isinstance(prompts, str) else prompts, "a text, or a sequence of texts")
    if not found:
        raise UsageError(f"{name}: expected at least one text, found none")
    for text in found:
        if text is not None and not isinstance(text, str):
            raise UsageError(f"{name}: expected texts, found {text!r}")
        if text is not None and not text.strip() and not (empty and not text):
            raise UsageError(f"{name}: expected words, found {text!r}: give None for no prompt")
    return [text or "" for text in found]


def image_rows(name: str, given: int, images: int) -> Indices:
    """Return the row of each image among `given` prompts: that of the one, or one for each.

    Raises UsageError for another number of prompts.
    """
    if given not in (1, images):
        raise UsageError(f"{name}: expected 1 prompt, or {images}, one per image, found {given}")
    return np.zeros(images, np.int64) if given == 1 else np.arange(images)


def expect(name: str, value: object, kind: type | tuple[type, ...], words: str) -> None:
    """Raise UsageError unless an argument is None or of this kind, which `words` describe."""
    if value is not None and not isinstance(value, kind):
        raise UsageError(f"{name}: expected {words}, found {value!r}")


def expect_callable(name: str, value: object) -> None:
    """Raise UsageError unless an argument is None or a function."""
    if value is not None and not callable(value):
        raise UsageError(f"{name}: expected a function, found {value!r}")
