"""Adapter of PRX transformers.

It reads folders of diffusers (0.42.1), its names of tensors (`transformer_prx.py`), and those of
Photoroom/PRX, the training code (commits 44ce5c4 and 1a052fd). Conventions of the training code:

* The names of a checkpoint of Composer begin with "denoiser.", those of its averaged weights with
  "ema_denoiser.model." (`algorithm/ema.py`). The averaged weights are read if there are any.
* `algorithm/resolution_aware.py` of 44ce5c4 keeps the embedder of the resolution next to the
  denoiser and does not average it. In 1a052fd it is a part of both denoisers.
* A branch drops round(N * sparsity) tokens, half to even, at least one and at most N - 1
  (`algorithm/tread.py`, `_sample_indices`).
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from sg_export.adapters import dit, prx_configs, tread
from sg_export.checkpoint import Checkpoint, Overrides, merge_facts
from sg_export.models.prx import PRX, PRXConfig
from sg_export.models.sparse import SparseModel
from sg_runtime.errors import CheckpointError, UsageError
from sg_runtime.manifest import ModelFacts, Route, Sampling, Shifted, Text
from sg_runtime.manifest.model import KEPT

FAMILY: str = "prx"
KEYS: tuple[str, ...] = ("txt_in.weight", "blocks.0.modulation.lin.weight", "final_layer.linear.weight")

SAMPLES = {64: (16, 2), 32: (32, 1), 768: (3, 16), 3072: (3, 32)}
"""Channels and patch size of the published models, by the number of values of a patch."""

SETS = ("ema_denoiser.model.", "denoiser.")
"""Prefixes of the names of the denoiser in the training code's checkpoints, the preferred first."""

PREFIXES: tuple[str, ...] = ("", *SETS)

RENAMED = {
    r"img_qkv_proj": "attention.img_qkv_proj",
    r"txt_kv_proj": "attention.txt_kv_proj",
    r"attn_out": "attention.to_out.0",
    r"qk_norm\.query_norm": "attention.norm_q",
    r"qk_norm\.key_norm": "attention.norm_k",
    r"k_norm": "attention.norm_added_k",
}
"""Names of diffusers by patterns of the training code's names, without block and ending."""

MOST_TEXT_TOKENS = 1024
"""A tokenizer with a larger `model_max_length` states the length of its language model's texts."""

VARIANTS = {
    "sprint_fuse.": "the fusion of SPRINT",
    "sprint_mask_token": "the mask token of SPRINT",
    "resolution_embedder.h_embedder.": "the resolution as text tokens (mode token)",
}
"""Variants that are not supported, by the start of the name that identifies them."""


def kept_count(tokens: int, sparsity: float) -> int:
    """Return the number of tokens that a branch keeps; see above for the rounding."""
    return KEPT[FAMILY](tokens, sparsity)


def usual_route(depth: int) -> Route:
    """Return the route of the public recipe, 2-12 for 16 blocks: that of the family tread."""
    return tread.usual_route(depth)


def build(checkpoint: Checkpoint, overrides: Overrides) -> tuple[SparseModel, ModelFacts]:
    """Build the network of a checkpoint, in evaluation mode, and return it with its facts.

    The size of the picture is the default of the folder's pipeline, unless the user or the author
    states another. Models of pixels predict x0, others the velocity, unless it is stated.

    Raises CheckpointError for tensors that are missing, unknown or of another shape, and for a
    configuration or variant that is not supported. Raises UsageError for facts that do not fit the
    network, and if the size is unknown.
    """
    file, given = checkpoint.source.file, merge_facts(checkpoint, overrides)
    if checkpoint.facts.class_names is not None:
        raise CheckpointError(f"{file}: class_names: expected none for a model that is conditioned on text, found some")
    channels, patch = _sample(checkpoint)
    per = prx_configs.pixels_per_latent(checkpoint, channels)
    space: Literal["pixel", "latent"] = "pixel" if per == 1 else "latent"
    if checkpoint.facts.space not in (None, space):
        raise CheckpointError(
            f"{file}: space: expected {space}, as the side of a latent is {per} pixels, found {checkpoint.facts.space}"
        )
    pipeline = prx_configs.pipeline_of(checkpoint, space == "pixel")
    prediction = given.prediction or prx_configs.PREDICTIONS[pipeline]
    if prediction == "edm":
        raise UsageError(f"{file}: prediction edm: expected flow or x0, as in all PRX models")
    network = load_network(
        checkpoint,
        _latent_size(file, given.size or _default_size(checkpoint, pipeline), per, patch),
        sample=(channels, patch),
        text_tokens=_text_tokens(checkpoint, given.text_tokens),
    )
    config, route = network.config, given.route
    if "transformer" in checkpoint.configs:
        place = prx_configs.where(checkpoint, "transformer")
        prx_configs.check_config(checkpoint.configs["transformer"], config, place)
    if given.heads not in (None, config.heads):
        raise UsageError(
            f"{file}: heads: expected {config.heads}, as in the tensors, found {given.heads}: leave it out"
        )
    if route is not None and route.end >= config.depth:
        raise UsageError(f"{file}: route {route}: expected blocks 0 to {config.depth - 1}")
    model_facts = ModelFacts(
        family=FAMILY,
        prediction=prediction,
        space=space,
        latent=(config.channels, *config.image_size),
        pixels_per_latent=per,
        patch=config.patch,
        tokens=config.tokens,
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        conditions=Text(config.text_tokens, config.context),
        held=network.held,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        route=route,
        ends=network.ends,
        masked=False,
    )
    return SparseModel(network, route or Route(0, config.depth - 1)).eval().requires_grad_(False), model_facts


def resized(file: str, model: SparseModel, facts: ModelFacts, size: tuple[int, int]) -> tuple[SparseModel, ModelFacts]:
    """Return the model for another size of the picture in pixels, with the same parameters.

    Raises UsageError if a side is no multiple of a token's.
    """
    network, per = model.network, facts.pixels_per_latent
    assert isinstance(network, PRX)
    assert per is not None  # `build` knows it
    with torch.device("meta"):
        made = PRX(replace(network.config, image_size=_latent_size(file, size, per, facts.patch)))
    made.load_state_dict(network.state_dict(), assign=True)
    latent = (facts.latent[0], *made.config.image_size)
    return (
        SparseModel(made, model.route).eval().requires_grad_(False),
        replace(facts, latent=latent, tokens=made.config.tokens),
    )


def sampling(checkpoint: Checkpoint, facts: ModelFacts) -> Sampling:
    """Return the default sampling.

    Times and noise scale are those that the author states, or else those of the folder's scheduler
    and pipeline. A file alone has the shift of the published models. Its layout of names tells
    whose scheduler and whose default noise scale it has, diffusers' or the training code's.

    Raises CheckpointError for a scheduler that is not supported, and for numbers that cannot be.
    """
    try:
        return _sampling(checkpoint, facts)
    except UsageError as error:
        raise CheckpointError(f"{checkpoint.source.file}: {error}") from None


def _sampling(checkpoint: Checkpoint, facts: ModelFacts) -> Sampling:
    stated = checkpoint.facts
    shift = prx_configs.SHIFT if stated.time_shift is None else stated.time_shift
    if _is_training_layout(checkpoint):
        times, noise_scale = Shifted(shift, None), 1.0
    else:
        times = prx_configs.scheduler_times(shift)
        if stated.time_shift is None and "scheduler" in checkpoint.configs:
            place = prx_configs.where(checkpoint, "scheduler")
            times = prx_configs.read_scheduler(checkpoint.configs["scheduler"], place)
        usual = prx_configs.NOISE_SCALES[prx_configs.pipeline_of(checkpoint, facts.space == "pixel")]
        noise_scale = prx_configs.field(checkpoint, "pipeline", "noise_scale", usual, whole=False)
    if stated.noise_scale is not None:
        noise_scale = stated.noise_scale
    return prx_configs.default_sampling(facts.prediction, times, float(noise_scale))


def _is_training_layout(checkpoint: Checkpoint) -> bool:
    """Return whether the tensors have the names of the training code."""
    return any(re.search(r"(^|\.)blocks\.0\.img_qkv_proj\.", name) for name in checkpoint.tensors)


def _sample(checkpoint: Checkpoint) -> tuple[int, int]:
    """Return channels and patch size by the configuration, the author's facts, or the tensors."""
    facts = checkpoint.facts
    if "transformer" in checkpoint.configs:
        channels, patch = SAMPLES[64]  # diffusers' defaults
        return (
            prx_configs.field(checkpoint, "transformer", "in_channels", channels),
            prx_configs.field(checkpoint, "transformer", "patch_size", patch),
        )
    stated = None
    if facts.channels is not None or facts.patch is not None:
        stated = facts.channels or 0, facts.patch or 0
    return _sample_of(replace(checkpoint, tensors=diffusers_names(checkpoint.tensors)), stated)


def _text_tokens(checkpoint: Checkpoint, stated: int | None) -> int:
    """Return the number of text tokens that is stated, or else that of pipeline or tokenizer."""
    if stated is None:
        longest = prx_configs.field(checkpoint, "tokenizer", "model_max_length", prx_configs.TEXT_TOKENS)
        usual = longest if longest <= MOST_TEXT_TOKENS else prx_configs.TEXT_TOKENS
        stated = prx_configs.field(checkpoint, "pipeline", "prompt_max_tokens", usual)
    if stated < 1:
        raise UsageError(f"{checkpoint.source.file}: text_tokens: expected at least 1, found {stated}")
    return stated


def _default_size(checkpoint: Checkpoint, pipeline: str) -> tuple[int, int]:
    """Return height and width of a pipeline's pictures. Raises UsageError without a pipeline."""
    if "pipeline" not in checkpoint.configs:
        raise UsageError(
            f"{checkpoint.source.file}: the size of the picture is unknown: give `size` HEIGHTxWIDTH, such as 512x512"
        )
    side = prx_configs.field(checkpoint, "pipeline", "default_sample_size", prx_configs.SIZES[pipeline])
    return side, side


def _latent_size(file: str, size: tuple[int, int], per: int, patch: int) -> tuple[int, int]:
    """Return height and width of a sample.

    Raises UsageError if a side of the picture, `size`, is no multiple of a token's.
    """
    step = per * patch
    if size[0] % step or size[1] % step or min(size) < step:
        sides = [dict.fromkeys(max(side + up, step) // step * step for up in (0, step - 1)) for side in size]
        near = [f"{height}x{width}" for height in sides[0] for width in sides[1]]
        raise UsageError(
            f"{file}: size {size[0]}x{size[1]}: expected multiples of {step} pixels, the side of a token: give `size` "
            f"{', '.join(near)}"
        )
    return size[0] // per, size[1] // per


def load_network(
    checkpoint: Checkpoint,
    image_size: tuple[int, int],
    *,
    sample: tuple[int, int] | None = None,
    text_tokens: int = prx_configs.TEXT_TOKENS,
) -> PRX:
    """Build the network of a checkpoint, in evaluation mode, with FP32 weights.

    image_size: height and width of the sampled image, in pixels or latents.
    sample: channels and patch size; if None, those of the published model with as many values in a
    patch.
    text_tokens: number of text tokens, with padding.

    Raises CheckpointError for tensors that are missing, unknown or of another shape, and for
    unsupported variants. Raises UsageError for an image size that is no multiple of the patch, and
    for channels and patch size that are unknown or do not fit the tensors.
    """
    named = replace(checkpoint, tensors=diffusers_names(checkpoint.tensors))
    file = named.source.file
    for start, meaning in VARIANTS.items():
        if (name := next((name for name in named.tensors if name.startswith(start)), None)) is not None:
            raise CheckpointError(
                f"{file}: {name}: expected none, found one: {meaning}, which is not supported; take a checkpoint that "
                f"was trained without it"
            )
    config = infer_config(named, image_size, sample, text_tokens)
    with torch.device("meta"):
        network = PRX(config)
    dit.check_tensors(file, FAMILY, named.tensors, network)
    network.load_state_dict({name: tensor.float() for name, tensor in named.tensors.items()}, assign=True)
    return network.eval().requires_grad_(False)


def diffusers_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the denoiser by diffusers' names."""
    prefix = next((prefix for prefix in SETS if any(name.startswith(prefix) for name in tensors)), "")
    chosen = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith((prefix, "resolution_embedder."))
    }
    return {_renamed(name): tensor for name, tensor in chosen.items()}


def _renamed(name: str) -> str:
    for theirs, ours in RENAMED.items():
        if match := re.fullmatch(rf"(blocks\.\d+\.){theirs}\.(weight|scale)", name):
            return f"{match[1]}{ours}.weight"
    return name


def infer_config(
    checkpoint: Checkpoint, image_size: tuple[int, int], sample: tuple[int, int] | None, text_tokens: int
) -> PRXConfig:
    """Infer the network's shape from its tensors, which have diffusers' names.

    Other arguments, and errors, are those of `load_network`.
    """
    file, tensors = checkpoint.source.file, checkpoint.tensors
    width, context = dit.shape_of(checkpoint, "txt_in.weight", "D", "context")
    (head,) = dit.shape_of(checkpoint, "blocks.0.attention.norm_q.weight", "head size")
    if width % head or head % 4:
        raise CheckpointError(
            f"{file}: blocks.0.attention.norm_q.weight: expected a divisor of the width {width} and a multiple of 4, "
            f"found {head}"
        )
    channels, patch = _sample_of(checkpoint, sample)
    if image_size[0] % patch or image_size[1] % patch or min(image_size) < patch:
        raise UsageError(
            f"{file}: image size {image_size[0]}×{image_size[1]}: expected multiples of the patch size {patch}"
        )
    bottleneck = "img_in.0.weight" in tensors
    return PRXConfig(
        image_size=image_size,
        patch=patch,
        channels=channels,
        width=width,
        depth=len({match[1] for name in tensors if (match := re.match(r"blocks\.([0-9]+)\.", name))}),
        heads=width // head,
        mlp_width=dit.shape_of(checkpoint, "blocks.0.gate_proj.weight", "hidden", "D")[0],
        context=context,
        text_tokens=text_tokens,
        bottleneck=dit.shape_of(checkpoint, "img_in.0.weight", "bottleneck", "values")[0] if bottleneck else None,
        resolution=any(name.startswith("resolution_embedder.") for name in tensors),
    )


def _sample_of(checkpoint: Checkpoint, sample: tuple[int, int] | None) -> tuple[int, int]:
    """Return channels and patch size that fit the tensors, which have diffusers' names.

    sample: what is stated; if None, those of the published model with as many values in a patch.
    """
    file = checkpoint.source.file
    (values,) = dit.shape_of(checkpoint, "final_layer.linear.bias", "values of a patch")
    channels, patch = sample or SAMPLES.get(values, (0, 0))
    if channels * patch**2 != values:
        known = ", ".join(f"{c} and {p}" for c, p in SAMPLES.values())
        found = f"{channels} and {patch}" if sample else f"none; the published models have {known}"
        raise UsageError(
            f"{file}: channels and patch size: expected channels * patch² = {values}, the values of a patch in "
            f"final_layer.linear.bias, found {found}"
        )
    return channels, patch
