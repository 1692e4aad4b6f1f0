"""Folders of diffusers that hold a PRX: which files they consist of, and their configurations.

A folder is a pipeline (`model_index.json`, `transformer/`, `scheduler/`), or the folder of a
transformer alone (`config.json` and weights). Names are those of diffusers 0.42.1: a variant stands
before the last ending of a name, as in `diffusion_pytorch_model.fp16.safetensors`.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sg_export.recognize import listed, what_is
from sg_runtime.errors import CheckpointError, UsageError

TRANSFORMER = "PRXTransformer2DModel"
PIPELINES = ("PRXPipeline", "PRXPixelPipeline")
"""Supported pipelines, of latents and of pixels."""

PIPELINE_FILE = "model_index.json"
CONFIGS = {"transformer": "config.json", "scheduler": "scheduler_config.json", "vae": "config.json"}
"""File of the configuration in the folder of each component that is read."""

WEIGHTS = re.compile(r"diffusion_pytorch_model(\.(?P<variant>[^.]+?(?<!-of-\d{5})))?\.safetensors")
INDEX = re.compile(r"diffusion_pytorch_model\.safetensors\.index(\.(?P<variant>[^.]+))?\.json")


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder with a configuration of diffusers, of any class."""
    return any((path / name).is_file() for name in (PIPELINE_FILE, CONFIGS["transformer"]))


def find_configs(folder: Path) -> dict[str, Path]:
    """Return the configurations in a folder by component: "pipeline" and the keys of `CONFIGS`.

    A pipeline has all of them, but "vae" may be absent. The folder of a transformer has
    "transformer" alone. Raises CheckpointError for another folder, and for a component that is
    missing.
    """
    if not is_folder(folder):
        raise CheckpointError(
            f"{folder}: expected a checkpoint file, or a folder of diffusers with {PIPELINE_FILE} or "
            f"{CONFIGS['transformer']}, found {what_is(str(folder))}"
        )
    if not (folder / PIPELINE_FILE).is_file():
        _check_class(folder / CONFIGS["transformer"], (TRANSFORMER,))
        return {"transformer": folder / CONFIGS["transformer"]}
    _check_class(folder / PIPELINE_FILE, PIPELINES)
    found = {"pipeline": folder / PIPELINE_FILE}
    for component, name in CONFIGS.items():
        path = folder / component / name
        if path.is_file():
            found[component] = path
        elif component != "vae":  # its configuration only confirms the size of latents
            raise CheckpointError(f"{folder}: expected {component}/{name}, found none: fetch the folder again")
    _check_class(found["transformer"], (TRANSFORMER,))
    return found


def find_weights(folder: Path, variant: str | None) -> tuple[Path, str | None]:
    """Return the file of weights in the folder of a transformer, or its index, and its variant.

    variant: variant to take; None for the weights without a variant, or the only variant.

    Raises CheckpointError if there are no weights, and UsageError if the variant is not there or
    has to be chosen.
    """
    found: dict[str | None, Path] = {}
    for form in (WEIGHTS, INDEX):  # as in diffusers, an index comes before a file
        found |= {match["variant"]: path for path in folder.iterdir() if (match := form.fullmatch(path.name))}
    variants = sorted(name for name in found if name is not None)
    if not found:
        names = sorted(path.name for path in folder.iterdir()) or ["nothing"]
        raise CheckpointError(
            f"{folder}: expected diffusion_pytorch_model.safetensors or its index, found {listed(names)}: save the "
            f"transformer with safe_serialization=True"
        )
    if variant is None and None not in found:
        if len(variants) > 1:
            raise UsageError(f"{folder}: holds the variants {listed(variants)}: give `weights` {variants[0]}")
        variant = variants[0]
    if variant not in found:
        others = f"the variants {listed(variants)}" if variants else "weights without a variant"
        raise UsageError(f"{folder}: expected weights of the variant {variant}, found {others}")
    return found[variant], variant


def read_config(path: Path) -> Mapping[str, Any]:
    """Return the content of a configuration. Raises CheckpointError unless it is a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, found a damaged file ({error}): fetch it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _check_class(path: Path, supported: tuple[str, ...]) -> None:
    found = read_config(path).get("_class_name")
    if found not in supported:
        kind = "a class that is not stated" if found is None else found
        raise CheckpointError(f"{path}: _class_name: expected {' or '.join(supported)}, found {kind}")
