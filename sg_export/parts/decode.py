"""Decoders of latents: the second half of an autoencoder of diffusers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sg_export.checkpoint import read_part
from sg_export.diffusers_folder import AUTOENCODERS, PIPELINE_FILE, STEM, latent_side, read_config
from sg_export.parts.modules import fill, find_part, refused_by, source_of, without_weights
from sg_export.recognize import what_is
from sg_runtime.errors import CheckpointError, UsageError
from sg_runtime.extras import require
from sg_runtime.manifest import ModelFacts, Source

EARLIER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Layers of an attention by their names in early versions of diffusers, and by their names now."""


@dataclass(frozen=True, slots=True, eq=False)  # a module is equal to itself alone
class LoadedDecoder:
    """The decoder of an autoencoder.

    module: computes images (1, 3, H·p, W·p) float32 from latents (1, C, H, W) float32, as the
    network samples them. Pixels are about [-1, 1], not clipped. It is in FP32 and evaluation mode.
    pixels_per_latent: p, side of the square of the image that one latent decodes to.
    source: name of the folder, and hash of all files that were read.
    """

    module: nn.Module
    pixels_per_latent: int
    source: Source


class Decoder(nn.Module):
    """An autoencoder's decoder, with the scaling and shift of latents that a pipeline undoes."""

    def __init__(self, vae: Any, scaling: float, shift: float) -> None:
        super().__init__()
        self.vae = vae
        self.scaling, self.shift = scaling, shift

    def forward(self, latents: Tensor) -> Tensor:
        """Return the images (1, 3, H·p, W·p) of latents (1, C, H, W)."""
        images: Tensor = self.vae.decode(latents / self.scaling + self.shift, return_dict=False)[0]
        return images


def load_decoder(folder: Path, model: ModelFacts, variant: str | None = None) -> LoadedDecoder:
    """Load the decoder of latents from the folder of a pipeline, or of an autoencoder alone.

    variant: variant of the weights.

    Raises UsageError for a model of pixels and for a variant that is not there, CheckpointError for
    a folder that lacks a file or does not fit the model, and MissingExtraError without diffusers.
    """
    if model.space == "pixel":
        raise UsageError(f"{folder}: expected a model of latents, found {model.family}, a model of pixels")
    library = require("diffusers", "diffusers")
    place = folder / "vae" if (folder / PIPELINE_FILE).is_file() else folder
    path = place / "config.json"
    if not path.is_file():
        found = what_is(str(folder)) if place == folder else "none: give the folder of its autoencoder"
        raise CheckpointError(
            f"{folder}: expected {path.relative_to(folder)} of {' or '.join(AUTOENCODERS)}, found {found}"
        )
    config = read_config(path)
    side = latent_side(config, model.latent[0], str(path))
    if model.pixels_per_latent not in (side, None):
        raise CheckpointError(
            f"{path}: expected an autoencoder of {model.pixels_per_latent} pixels per latent, as in the model, found "
            f"{side}: give the one that the model was trained with"
        )
    kind = getattr(library, str(config["_class_name"]))
    with refused_by(library, path):
        vae = without_weights(lambda: kind.from_config(dict(config)))
    if (colors := vae.config.get("out_channels", vae.config.get("in_channels"))) != 3:
        raise CheckpointError(f"{path}: expected pictures of 3 channels, found {colors}")
    scaling, shift = _number(vae.config, "scaling_factor", 1.0, path), _number(vae.config, "shift_factor", 0.0, path)
    vae.encoder, vae.quant_conv = nn.Identity(), None
    files = find_part(place, {"vae": path}, variant, STEM)
    tensors, digest = read_part(files)
    fill(vae, _decoding(tensors), place)
    return LoadedDecoder(
        Decoder(vae, scaling, shift).eval().requires_grad_(False), side, source_of(folder, files, digest)
    )


def _decoding(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the second half, by their names in today's diffusers."""
    names = "|".join(EARLIER)
    return {
        re.sub(rf"(?<=\.)({names})(?=\.(weight|bias)$)", lambda match: EARLIER[match[0]], name): tensor
        for name, tensor in tensors.items()
        if name.startswith(("decoder.", "post_quant_conv."))
    }


def _number(config: Mapping[str, Any], name: str, default: float, path: Path) -> float:
    """Return a number of a configuration, completed by its class; `default` if both have none."""
    found = config.get(name)
    if found is None:
        return default
    if type(found) not in (int, float) or (name == "scaling_factor" and found == 0):
        raise CheckpointError(f"{path}: {name}: expected a number, found {found!r}")
    return float(found)
