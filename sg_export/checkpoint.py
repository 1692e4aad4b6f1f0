"""Reader of checkpoint files.

A checkpoint is read as one flat dict of tensors, and the facts that tensor shapes do not show.
"""

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sg_export.reference import REFERENCES, reference_path
from sg_runtime.errors import CheckpointError, UsageError
from sg_runtime.files import sha256_of
from sg_runtime.manifest import Prediction, Route, Source

Weights = Literal["ema", "model"]
WeightSet = Literal["ema", "model", "bare"]
METADATA_KEY = "sg_export"

_SETS: dict[str, Weights] = {
    "ema_state_dict": "ema",
    "ema": "ema",
    "model_state_dict": "model",
    "model": "model",
    "state_dict": "model",
}
_PREFIXES = re.compile(r"^(module\.|model\.|_orig_mod\.)+")


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """Facts that a checkpoint's author may state.

    They are read from safetensors metadata (key "sg_export") and from a .json file next to the
    checkpoint. The .json file takes precedence.

    family: name of the adapter, a key of `sg_export.adapters.ADAPTERS`.
    heads: number of attention heads.
    route: first and last block that run on the kept tokens, both included, as "2-24".
    selection_rate: sparsity during training.
    prediction: what the network predicts.
    space: whether the samples are pixels or latents.
    class_names: names of the classes, in the order of their indices.
    training: free text and numbers about the training.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    family: str | None = None
    heads: int | None = None
    route: str | None = None
    selection_rate: float | None = None
    prediction: Prediction | None = None
    space: Literal["pixel", "latent"] | None = None
    class_names: tuple[str, ...] | None = None
    training: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Overrides:
    """Facts that the user states about a checkpoint. They take precedence over its own facts."""

    route: Route | None = None
    heads: int | None = None
    prediction: Prediction | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The content of a checkpoint file.

    source: file name and hash.
    tensors: tensors by their names without wrapper prefixes.
    facts: facts that the author states.
    prefix: longest wrapper prefix that was removed from a name.
    """

    source: Source
    tensors: Mapping[str, Tensor]
    facts: CheckpointFacts
    prefix: str


def read_checkpoint(checkpoint: str | Path, weights: Weights | None = None) -> Checkpoint:
    """Read a .pt, .pth or .safetensors file, or a reference model by its name.

    weights: the set of weights to read if the file holds several. The default is the EMA set if
    there is one.

    Pickles are read only with `weights_only=True`. Raises CheckpointError for a file that is
    missing, damaged, or not safe to read. Raises UsageError if the file does not hold `weights`.
    """
    reference = str(checkpoint) if str(checkpoint) in REFERENCES else None
    path = reference_path(reference) if reference else Path(checkpoint)
    if not path.is_file():
        found = "a directory" if path.is_dir() else "nothing there"
        raise CheckpointError(
            f"{path}: expected a checkpoint (.pt, .pth, .safetensors) or the name of a reference model "
            f"({', '.join(REFERENCES)}), found {found}"
        )
    if path.suffix == ".safetensors":
        content, facts = _read_safetensors(path)
    elif path.suffix in (".pt", ".pth"):
        content, facts = _read_pickle(path), CheckpointFacts()
    else:
        raise CheckpointError(f"{path}: expected a file name that ends in .pt, .pth or .safetensors")
    sidecar = path.with_suffix(".json")
    if sidecar.is_file():
        stated = parse_facts(_read_text(sidecar), str(sidecar))
        values = {field.name: getattr(stated, field.name) for field in fields(CheckpointFacts)}
        facts = replace(facts, **{name: value for name, value in values.items() if value is not None})
    chosen, tensors = _choose_set(path, content, weights)
    plain, prefix = _without_prefixes(path, tensors)
    return Checkpoint(Source(path.name, sha256_of(path), chosen, reference), plain, facts, prefix)


def parse_facts(text: str, where: str) -> CheckpointFacts:
    """Parse facts strictly from JSON.

    where: place of the text, for the error. Raises CheckpointError for the first invalid key.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(CheckpointFacts).validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "content"
        known = ", ".join(field.name for field in fields(CheckpointFacts))
        raise CheckpointError(f"{where}: {key}: {first['msg']}; the known keys are {known}") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: expected checkpoint facts as JSON, cannot read the file ({error})") from None


def _read_safetensors(path: Path) -> tuple[Mapping[str, Any], CheckpointFacts]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged, or not a safetensors file ({error}); copy it again") from None
    text = metadata.get(METADATA_KEY)
    return tensors, CheckpointFacts() if text is None else parse_facts(text, f"{path}, metadata {METADATA_KEY}")


def _read_pickle(path: Path) -> Mapping[str, Any]:

    try:
        # MaskDiT's training script stores its parsed options with the weights, in a Namespace.
        # A Namespace only holds values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        # PyTorch's own message advises to read the file without this check, so it is not shown.
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {asked[1]}" if asked else "PyTorch's weights_only reader does not know its instructions"
        raise CheckpointError(
            f"{path}: refused: it is damaged, or holds more than tensors and plain values, so that reading it would "
            f"run its code ({reason}); save only its state dict, with torch.save or as safetensors"
        ) from None
    except Exception as error:  # damaged bytes can raise any exception in PyTorch's reader
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise CheckpointError(f"{path}: damaged, or not a PyTorch file ({reason}); copy it again") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected a dict of tensors, found {type(content).__name__}")
    return content


def _choose_set(
    path: Path, content: Mapping[str, Any], weights: Weights | None
) -> tuple[WeightSet, Mapping[str, Tensor]]:
    """Return the requested set of tensors with its name.

    If the content is a bare state dict, return the content itself as the set "bare".
    """
    sets: dict[WeightSet, Mapping[Any, Any]] = {}
    for key, kind in _SETS.items():
        if isinstance(content.get(key), Mapping):
            sets.setdefault(kind, content[key])
    if not sets:
        if weights is not None:
            raise UsageError(f"{path}: holds a single bare state dict: leave out --weights {weights}")
        sets["bare"] = content
    default: WeightSet = "ema" if "ema" in sets else next(iter(sets))
    chosen: WeightSet = weights if weights is not None else default
    if chosen not in sets:
        raise UsageError(
            f"{path}: expected {chosen} weights, found {' and '.join(sets)}: give --weights {next(iter(sets))}"
        )
    tensors = sets[chosen]
    strangers = [
        str(name) for name, value in tensors.items() if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if strangers or not tensors:
        found = f"other values: {_listed(strangers)}" if strangers else "nothing"
        raise CheckpointError(f"{path}: expected tensors, or dicts of tensors under {', '.join(_SETS)}; found {found}")
    return chosen, tensors


def _without_prefixes(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    plain: dict[str, Tensor] = {}
    longest = ""
    for name, tensor in tensors.items():
        match = _PREFIXES.match(name)
        prefix = match[0] if match else ""
        longest = max(longest, prefix, key=len)
        short = name[len(prefix) :]
        if short in plain:
            raise CheckpointError(f"{path}: two tensors are named {short} without wrapper prefixes")
        plain[short] = tensor
    return plain, longest


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def merge_facts(checkpoint: Checkpoint, overrides: Overrides) -> Overrides:
    """Return the user's facts about a checkpoint, completed by the facts that its author states."""
    facts = checkpoint.facts
    return Overrides(
        overrides.route or (Route.parse(facts.route) if facts.route else None),
        facts.heads if overrides.heads is None else overrides.heads,
        overrides.prediction or facts.prediction,
    )
