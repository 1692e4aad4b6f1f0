"""Checks of pipeline arguments. Each raises UsageError with the value and the expected range."""

from collections.abc import Sequence
from operator import index as as_index
from typing import Any

import numpy as np

from sg_runtime.arrays import Indices
from sg_runtime.errors import UsageError
from sg_runtime.manifest import FLOAT32_MAX, ModelFacts


def class_index(model: ModelFacts, name: int | str | None) -> int:
    """Return the index of a class given by index or name; None is "no class", index `num_classes`.

    Raises UsageError if no class or several have this name, or if the index is out of range.
    """
    if name is None:
        return model.num_classes
    if isinstance(name, str):
        if model.class_names is None or name not in model.class_names:
            known = "no class names" if model.class_names is None else ", ".join(model.class_names[:80])
            raise UsageError(
                f"class {name!r}: expected one of the model's class names, found no match; the model has {known}"
            )
        indices = [index for index, known_name in enumerate(model.class_names) if known_name == name]
        if len(indices) > 1:
            raise UsageError(
                f"class {name!r}: expected the name of one class, found it at {', '.join(map(str, indices))}: "
                f"give the index"
            )
        return indices[0]
    index = whole_number("class", name)
    if not 0 <= index < model.num_classes:
        raise UsageError(f"class {index}: expected 0 to {model.num_classes - 1}")
    return index


def given_subset(name: str, given: Indices | None, drawn: Indices | None, tokens: int) -> Indices | None:
    """Return the kept tokens (B, K) of one evaluation: `given`, or `drawn` if `given` is None.

    Raises UsageError if the branch takes no kept tokens, or if `given` does not fit it.
    """
    if given is None:
        return drawn
    if drawn is None:
        raise UsageError(f"{name}: the branch keeps all {tokens} tokens or does not run: expected None")
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
        if model.prediction == "edm" and time <= 0:
            raise UsageError(f"time {time:g}: expected a sigma above 0 for an edm model")


def check_seeds(seeds: Sequence[int], images: int) -> None:
    """Raise UsageError unless there is one valid seed for each of `images` images."""
    if len(seeds) != images:
        raise UsageError(f"seeds: expected {images}, one per class, found {len(seeds)}")
    for seed in seeds:
        if not 0 <= whole_number("seed", seed) < 2**64:
            raise UsageError(f"seed {seed}: expected 0 to 2**64 - 1")


def whole_number(what: str, value: Any) -> int:
    """Return `value`, an integer of any library, as an int. Raises UsageError for other types."""
    try:
        return as_index(value)
    except TypeError:
        raise UsageError(f"{what}: expected a whole number, found {value!r}") from None
