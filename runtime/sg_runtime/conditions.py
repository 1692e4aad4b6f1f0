"""What images are conditioned on: classes or prompts, as rows of the inputs of hoisted graphs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sg_runtime.arrays import Indices
from sg_runtime.devices.memory import from_dlpack
from sg_runtime.errors import UsageError
from sg_runtime.manifest import Labels, ModelFacts, Text
from sg_runtime.manifest.base import items, whole_number
from sg_runtime.requests import image_rows

Classes = Sequence[int | str | None]


@dataclass(frozen=True, slots=True)
class Conditions:
    """The conditions of B images.

    columns: inputs of hoisted graphs besides time, by name, (U, …): a row for each distinct
    condition.
    strong: (B,) int64, row of each image.
    weak: (B,) int64, row of each image in a weak branch with a condition of its own: "no class", or
    a negative prompt; None if there are no negative prompts.
    """

    columns: Mapping[str, NDArray[Any]]
    strong: Indices
    weak: Indices | None

    def __len__(self) -> int:
        return len(self.strong)

    def of(self, images: Indices | slice = slice(None), *, weak: bool = True) -> "Conditions":
        """Return the conditions of some of the images, with the rows that they have alone.

        weak: whether also those of a weak branch.
        """
        chosen = (self.strong, self.weak if weak else None)
        parts = [rows[images] for rows in chosen if rows is not None]
        used, places = np.unique(np.concatenate(parts), return_inverse=True)
        rows = np.split(places, len(parts))
        columns = {name: values[used] for name, values in self.columns.items()}
        return Conditions(columns, rows[0], rows[1] if len(rows) > 1 else None)

    def rows(self, *, weak: bool) -> dict[str, NDArray[Any]]:
        """Return the columns with a row for each image, (B, …).

        weak: whether of the conditions that a weak branch has of its own.
        """
        chosen = self.weak if weak else self.strong
        assert chosen is not None
        return {name: values[chosen] for name, values in self.columns.items()}


def parse(model: ModelFacts, given: Classes | Conditions) -> Conditions:
    """Return the conditions that a caller gives: classes, or for a text model `prompts(…)`.

    Raises UsageError if the model takes the other, or for a class that it lacks.
    """
    if isinstance(given, Conditions):
        check(model, given)
        return given
    if isinstance(model.conditions, Text):
        raise UsageError(
            f"classes: expected none: the model is conditioned on text: give prompts or prompt_embeds, or what "
            f"Pipeline.from_text(…) or Pipeline.prompts(…) returns; found {given!r}"
        )
    names = items("classes", given, "a sequence with a class for each image")
    if not names:
        raise UsageError("classes: expected at least one, found none")
    return of_classes(model.conditions, [class_index(model.conditions, name) for name in names])


def of_classes(labels: Labels, classes: Sequence[int]) -> Conditions:
    """Return the conditions of images with these class indices; `count` is "no class"."""
    known, places = np.unique(np.array([*classes, labels.count], np.int64), return_inverse=True)
    return Conditions({"class": known}, places[:-1], np.full(len(classes), places[-1]))


def class_index(labels: Labels, name: int | str | None) -> int:
    """Return the index of a class given by index or name; None is "no class", index `count`.

    Raises UsageError if no class or several have this name, or if the index is out of range.
    """
    if name is None:
        return labels.count
    if isinstance(name, str):
        if labels.names is None or name not in labels.names:
            known = "no class names" if labels.names is None else ", ".join(labels.names[:80])
            raise UsageError(
                f"class {name!r}: expected one of the model's class names, found no match; the model has {known}"
            )
        indices = [index for index, known_name in enumerate(labels.names) if known_name == name]
        if len(indices) > 1:
            raise UsageError(
                f"class {name!r}: expected the name of one class, found it at {', '.join(map(str, indices))}: "
                f"give the index"
            )
        return indices[0]
    index = whole_number("class", name)
    if not 0 <= index < labels.count:
        raise UsageError(f"class {index}: expected 0 to {labels.count - 1}")
    return index


def of_prompts(
    model: ModelFacts,
    embeds: object,
    mask: object = None,
    negative_embeds: object = None,
    negative_mask: object = None,
    images: int | None = None,
) -> Conditions:
    """Return the conditions of images with these prompts; see `Pipeline.prompts`.

    images: number of images; None for one per prompt. A single prompt, or negative prompt, is that
    of all images. Raises UsageError if the model takes no text, or for arrays that do not fit it.
    """
    text = model.conditions
    if not isinstance(text, Text):
        raise UsageError(f"prompt_embeds: expected none: {model.family} is conditioned on classes: give classes")
    strong = _prompt_columns(text, "prompt", embeds, mask)
    count = len(strong["mask"]) if images is None else images
    rows = [image_rows("prompt_embeds", len(strong["mask"]), count)]
    columns = [strong]
    if negative_embeds is not None:
        columns.append(_prompt_columns(text, "negative", negative_embeds, negative_mask))
        rows.append(len(strong["mask"]) + image_rows("negative_embeds", len(columns[1]["mask"]), count))
    elif negative_mask is not None:
        raise UsageError("negative_mask: expected none without negative_embeds, found one")
    joined = {name: np.concatenate([part[name] for part in columns]) for name in strong}
    return Conditions(joined, rows[0], rows[1] if len(rows) > 1 else None)


def _prompt_columns(text: Text, what: str, embeds: object, mask: object) -> dict[str, NDArray[Any]]:
    found = _array(f"{what}_embeds", embeds)
    if found.ndim != 3 or found.shape[1:] != (text.tokens, text.width) or found.dtype.kind != "f" or not len(found):
        raise UsageError(
            f"{what}_embeds: expected floats of shape (prompts, {text.tokens}, {text.width}), found {found.dtype} of "
            f"shape {found.shape}: pad or cut the prompts to {text.tokens} tokens, and encode them with the text "
            f"encoder of this model"
        )
    if not np.isfinite(found).all():
        raise UsageError(f"{what}_embeds: expected finite numbers, found NaN or infinity")
    shape = found.shape[:2]
    valid = np.ones(shape, np.int64) if mask is None else _array(f"{what}_mask", mask)
    if valid.shape != shape or valid.dtype.kind not in "biu" or not np.isin(valid, (0, 1)).all():
        raise UsageError(
            f"{what}_mask: expected 1 for a token and 0 for padding, of shape {shape}, found {valid.dtype} of shape "
            f"{valid.shape}"
        )
    return {"embeddings": found.astype(np.float32), "mask": valid.astype(np.int64)}


def _array(name: str, value: object) -> NDArray[Any]:
    try:
        return value if isinstance(value, np.ndarray) else from_dlpack(value)
    except UsageError as error:
        raise UsageError(f"{name}: {error}; convert a tensor with .float().cpu()") from None


def check(model: ModelFacts, conditions: Conditions) -> None:
    """Raise UsageError if the conditions are not of this kind of model."""
    names = [tensor.name for inputs in model.conditions.hoisted.values() for tensor in inputs if tensor.name != "t"]
    if list(conditions.columns) != names:
        raise UsageError(f"conditions: expected {', '.join(names)}, found {', '.join(conditions.columns)}")


def examples(model: ModelFacts, count: int, seed: int = 0) -> Conditions:
    """Return conditions to try a model on: classes in turn, or random prompts of random lengths.

    Prompts are normally distributed embeddings. The negative prompt is one of one token.
    """
    if isinstance(model.conditions, Labels):
        return of_classes(model.conditions, [(seed + image) % model.conditions.count for image in range(count)])
    text, draw = model.conditions, np.random.default_rng(seed)
    embeds = draw.standard_normal((count + 1, text.tokens, text.width), np.float32)
    lengths = np.append(draw.integers(1, text.tokens, count, endpoint=True), 1)
    mask = (np.arange(text.tokens) < lengths[:, None]).astype(np.int64)
    return Conditions({"embeddings": embeds, "mask": mask}, np.arange(count), np.full(count, count))
