"""Checks of what a caller asks of a pipeline; each raises UsageError that names the value, and what was expected."""

from collections.abc import Sequence
from operator import index as as_index
from typing import Any

import numpy as np

from sg_runtime.arrays import Indices
from sg_runtime.errors import UsageError
from sg_runtime.manifest import FLOAT32_MAX, ModelFacts


def class_index(model: ModelFacts, name: int | str | None) -> int:
    """The index of a class given by index or by name; None is "no class", index `num_classes`.

    Raises UsageError for a name that the model does not have, and for an index out of range.
    """
    if name is None:
        return model.num_classes
    if isinstance(name, str):
        if model.class_names is None or name not in model.class_names:
            known = "no class names" if model.class_names is None else ", ".join(model.class_names[:80])
            raise UsageError(
                f"class {name!r}: expected one of the model's class names, found none such; it has {known}"
            )
        return model.class_names.index(name)
    index = whole_number("class", name)
    if not 0 <= index < model.num_classes:
        raise UsageError(f"class {index}: expected 0 to {model.num_classes - 1}")
    return index


def given_subset(name: str, given: Indices | None, drawn: Indices | None, tokens: int) -> Indices | None:
    """The subset (B, K) of one evaluation that the caller gives, else the drawn one."""
    if given is None:
        return drawn
    if drawn is None:
        raise UsageError(f"{name}: the branch keeps all {tokens} tokens or is not run: expected None")
    if given.dtype != np.int64 or given.shape != drawn.shape:
        raise UsageError(f"{name}: expected int64 of shape {drawn.shape}, found {given.dtype} of {given.shape}")
    if (np.diff(given, axis=1) <= 0).any() or given.min() < 0 or given.max() >= tokens:
        raise UsageError(f"{name}: expected sorted distinct token indices below {tokens} in each row")
    return given


def check_times(model: ModelFacts, times: Sequence[float]) -> None:
    """Raise UsageError for a time at which the network cannot be asked."""
    for time in times:
        if not abs(time) <= FLOAT32_MAX:
            raise UsageError(f"time {time:g}: expected a finite float32 number")
        if model.prediction == "edm" and time <= 0:
            raise UsageError(f"time {time:g}: expected a sigma above 0, as of an edm model")


def check_seeds(seeds: Sequence[int], images: int) -> None:
    """Raise UsageError unless there is a seed in range for each of `images`."""
    if len(seeds) != images:
        raise UsageError(f"seeds: expected one per class, {images}, found {len(seeds)}")
    for seed in seeds:
        if not 0 <= whole_number("seed", seed) < 2**64:
            raise UsageError(f"seed {seed}: expected 0 to 2**64 - 1")


def whole_number(what: str, value: Any) -> int:
    """`value` as an int, whichever library's integer it is."""
    try:
        return as_index(value)
    except TypeError:
        raise UsageError(f"{what}: expected a whole number, found {value!r}") from None
