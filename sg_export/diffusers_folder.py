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
CONFIGS = {
    "transformer": "config.json",
    "scheduler": "scheduler_config.json",
    "vae": "config.json",
    "tokenizer": "tokenizer_config.json",
}
"""File of the configuration in the folder of each component that is read."""

OPTIONAL = ("vae", "tokenizer")
"""Components whose configurations may be absent: they only confirm or complete facts."""

STEM = "diffusion_pytorch_model"
"""First word of the names of weights that diffusers writes."""

AUTOENCODERS = {"AutoencoderKL": "block_out_channels", "AutoencoderDC": "encoder_block_out_channels"}
"""Supported autoencoders, and the field of their configuration with an entry for each level."""


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder with a configuration of diffusers, of any class."""
    return any((path / name).is_file() for name in (PIPELINE_FILE, CONFIGS["transformer"]))


def find_configs(folder: Path) -> dict[str, Path]:
    """Return the configurations in a folder by component: "pipeline" and the keys of `CONFIGS`.

    A pipeline has all of them, but those of OPTIONAL may be absent. The folder of a transformer has
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
        elif component not in OPTIONAL:
            raise CheckpointError(f"{folder}: expected {component}/{name}, found none: fetch the folder again")
    _check_class(found["transformer"], (TRANSFORMER,))
    return found


def find_weights(folder: Path, variant: str | None, stem: str = STEM) -> tuple[Path, str | None]:
    """Return the file of weights in the folder of a component, or its index, and its variant.

    variant: variant to take; None for the weights without a variant, or the only variant.
    stem: first word of the names of weights.

    Raises CheckpointError if there are no weights, and UsageError if the variant is not there or
    has to be chosen.
    """
    file = re.compile(rf"{stem}(\.(?P<variant>[^.]+?))?(?<!-of-\d{{5}})\.safetensors")
    index = re.compile(rf"{stem}\.safetensors\.index(\.(?P<variant>[^.]+))?\.json")
    found: dict[str | None, Path] = {}
    for form in (file, index):  # as in diffusers, an index comes before a file
        found |= {match["variant"]: path for path in folder.iterdir() if (match := form.fullmatch(path.name))}
    variants = sorted(name for name in found if name is not None)
    if not found:
        names = sorted(path.name for path in folder.iterdir()) or ["nothing"]
        raise CheckpointError(
            f"{folder}: expected {stem}.safetensors or its index, found {listed(names)}: save the model with "
            f"safe_serialization=True"
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


def latent_side(config: Mapping[str, Any], channels: int, place: str) -> int:
    """Return the side, in pixels, of the square that a latent of an autoencoder decodes to.

    config: content of its config.json. channels: channels of a latent of the model. place: name of
    the configuration, for errors.

    Raises CheckpointError for another autoencoder, and for other channels.
    """
    name = str(config.get("_class_name"))
    if name not in AUTOENCODERS:
        raise CheckpointError(f"{place}: _class_name: expected {' or '.join(AUTOENCODERS)}, found {name}")
    if (latents := config.get("latent_channels")) != channels:
        raise CheckpointError(f"{place}: latent_channels: expected {channels}, as in the model, found {latents}")
    levels = config.get(AUTOENCODERS[name])
    if not isinstance(levels, list) or not 1 <= len(levels) <= 16:
        raise CheckpointError(f"{place}: {AUTOENCODERS[name]}: expected a list with a number per level, found {levels}")
    return 1 << (len(levels) - 1)


def _check_class(path: Path, supported: tuple[str, ...]) -> None:
    found = read_config(path).get("_class_name")
    if found not in supported:
        kind = "a class that is not stated" if found is None else found
        raise CheckpointError(f"{path}: _class_name: expected {' or '.join(supported)}, found {kind}")
