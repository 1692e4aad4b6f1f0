"""Prompts that a text model is calibrated and judged on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sg_runtime.conditions import Conditions
from sg_runtime.errors import CalibrationError
from sg_runtime.text import read_prompts as read_texts

DEFAULT = Path(__file__).with_name("prompts.txt")
"""Prompts of everyday pictures, one in each line."""

Encode = Callable[[Sequence[str]], tuple[NDArray[Any], NDArray[Any]]]
"""Texts, "" for no prompt → embeddings (P, L, C) float32 and mask (P, L) int64."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """Texts, and the text encoder of the model."""

    texts: tuple[str, ...]
    encode: Encode

    def of(self, places: Sequence[int], count: int) -> "Prompts":
        """Return the first `count` texts whose number divided by 4 leaves one of these remainders.

        All texts serve if there are fewer than four.
        """
        own = (text for number, text in enumerate(self.texts) if len(self.texts) < 4 or number % 4 in places)
        return Prompts(tuple(own)[:count], self.encode)

    def conditions(self, count: int) -> Conditions:
        """Return the conditions of `count` images, in turn; the weak branch has no prompt."""
        embeddings, mask = self.encode([*self.texts, ""])
        rows = np.arange(count) % len(self.texts)
        return Conditions({"embeddings": embeddings, "mask": mask}, rows, np.full(count, len(self.texts)))


def read_prompts(path: Path | None) -> tuple[str, ...]:
    """Return the lines of a file that are not blank; those of `DEFAULT` without a file.

    Raises CalibrationError if the file cannot be read as text or has none.
    """
    return read_texts("`prompts`", path or DEFAULT, CalibrationError)
