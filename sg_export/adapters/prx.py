"""Adapter of PRX transformers.

It reads the names of diffusers (0.42.1, `transformer_prx.py`) and of Photoroom/PRX, the training
code (commit 44ce5c4). Conventions of the training code:

* The names of a checkpoint of Composer begin with "denoiser.", those of its averaged weights with
  "ema_denoiser.model." (`algorithm/ema.py`). The averaged weights are read if there are any.
* `algorithm/resolution_aware.py` keeps the embedder of the resolution next to the denoiser and does
  not average it.
* A branch drops round(N * sparsity) tokens, half to even, at least one and at most N - 1
  (`algorithm/tread.py`, `_sample_indices`).
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sg_export.adapters import dit, tread
from sg_export.checkpoint import Checkpoint
from sg_export.models.prx import PERIOD, PRX, THETA, TIME_FACTOR, PRXConfig
from sg_runtime.errors import CheckpointError, UsageError
from sg_runtime.manifest import Prediction, Route, Sampling, Shifted
from sg_runtime.manifest.model import KEPT

FAMILY: str = "prx"
KEYS: tuple[str, ...] = ("txt_in.weight", "blocks.0.modulation.lin.weight", "final_layer.linear.weight")

TEXT_TOKENS = 256
"""Number of text tokens of the published models, with padding."""

SAMPLES = {64: (16, 2), 32: (32, 1), 768: (3, 16), 3072: (3, 32)}
"""Channels and patch size of the published models, by the number of values of a patch."""

SETS = ("ema_denoiser.model.", "denoiser.")
"""Prefixes of the names of the denoiser in the training code's checkpoints, the preferred first."""

RENAMED = {
    r"img_qkv_proj": "attention.img_qkv_proj",
    r"txt_kv_proj": "attention.txt_kv_proj",
    r"attn_out": "attention.to_out.0",
    r"qk_norm\.query_norm": "attention.norm_q",
    r"qk_norm\.key_norm": "attention.norm_k",
    r"k_norm": "attention.norm_added_k",
}
"""Names of diffusers by patterns of the training code's names, without block and ending."""

SHIFT = 3.0
"""Shift of the times of the published models."""

STEPS = 28
"""Default number of steps of diffusers' pipelines of PRX."""

TIME_FLOOR = 0.05
"""Least divisor of the velocity of a model that predicts x0, in both codes."""

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
"""The supported scheduler of diffusers."""

UNSUPPORTED = (
    "use_dynamic_shifting",
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)
"""Fields of the scheduler that change its times or its step."""

DYNAMIC = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type")
"""Fields of the scheduler that have an effect only with `use_dynamic_shifting`."""

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


def load_network(
    checkpoint: Checkpoint,
    image_size: tuple[int, int],
    *,
    sample: tuple[int, int] | None = None,
    text_tokens: int = TEXT_TOKENS,
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
    (values,) = dit.shape_of(checkpoint, "final_layer.linear.bias", "values of a patch")
    channels, patch = sample or SAMPLES.get(values, (0, 0))
    if channels * patch**2 != values:
        known = ", ".join(f"{c} and {p}" for c, p in SAMPLES.values())
        found = f"{channels} and {patch}" if sample else f"none; the published models have {known}"
        raise UsageError(
            f"{file}: channels and patch size: expected channels * patch² = {values}, the values of a patch in "
            f"final_layer.linear.bias, found {found}"
        )
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


def default_sampling(prediction: Prediction, times: Shifted, noise_scale: float) -> Sampling:
    """Return the default sampling of a PRX model: Euler's method, as in both codes."""
    return Sampling("euler", STEPS, times, noise_scale, TIME_FLOOR if prediction == "x0" else 0.0)


def scheduler_times(shift: float, count: int = 1000) -> Shifted:
    """Return the times of diffusers' scheduler (0.42.1, `scheduling_flow_match_euler_discrete.py`).

    It shifts the smallest of its `count` training times, 1 / count, before a run, and all times of
    a run again.
    """
    return Shifted(shift, shift / (shift + count - 1))


def read_scheduler(stated: Mapping[str, Any], where: str) -> Shifted:
    """Return the times that diffusers' configuration of a scheduler states.

    stated: content of scheduler_config.json. where: its place, for errors.

    Raises CheckpointError for another scheduler, and for a field that is not supported.
    """
    if (found := stated.get("_class_name")) != SCHEDULER:
        raise CheckpointError(f"{where}: _class_name: expected {SCHEDULER}, found {found}: it is not supported")
    for name, found in stated.items():
        if name.startswith("_") or name in ("shift", "num_train_timesteps", *DYNAMIC):
            continue
        if name not in UNSUPPORTED:
            raise CheckpointError(f"{where}: {name}: expected no such field, found {found}: it is not supported")
        if found not in (None, False):
            raise CheckpointError(f"{where}: {name}: expected none, found {found}: it is not supported")
    shift, count = stated.get("shift", 1.0), stated.get("num_train_timesteps", 1000)
    if type(count) is not int or count < 2:
        raise CheckpointError(f"{where}: num_train_timesteps: expected a number of at least 2, found {count!r}")
    if type(shift) not in (int, float):
        raise CheckpointError(f"{where}: shift: expected a number, found {shift!r}")
    try:
        return scheduler_times(float(shift), count)
    except (UsageError, ZeroDivisionError, OverflowError):
        raise CheckpointError(f"{where}: shift: expected a float32 number above 0, found {shift}") from None


def check_config(stated: Mapping[str, Any], config: PRXConfig, where: str) -> None:
    """Raise CheckpointError unless diffusers' configuration of a transformer is that of `config`.

    It states what tensors do not show: the constants of RoPE and of the sinusoids, and how channels
    and patch size make the values of a patch. Fields that begin with "_" are about the file.

    stated: content of config.json.
    where: its place, for the error.
    """
    axis = config.width // config.heads // 2
    expected = {
        "in_channels": config.channels,
        "patch_size": config.patch,
        "context_in_dim": config.context,
        "hidden_size": config.width,
        "mlp_ratio": config.mlp_width / config.width,
        "num_heads": config.heads,
        "depth": config.depth,
        "axes_dim": [axis, axis],
        "theta": THETA,
        "time_factor": TIME_FACTOR,
        "time_max_period": PERIOD,
        "bottleneck_size": config.bottleneck,
        "resolution_embeds": config.resolution,
    }
    for name, found in stated.items():
        if name.startswith("_"):
            continue
        if name not in expected:
            raise CheckpointError(f"{where}: {name}: expected no such field, found {found}: it is not supported")
        if name == "axes_dim" and found is None:
            found = [32, 32]
        if name == "mlp_ratio" and isinstance(found, float | int) and int(config.width * found) == config.mlp_width:
            continue
        if found != expected[name]:
            raise CheckpointError(
                f"{where}: {name}: expected {expected[name]}, as in the tensors or all published models, found {found}"
            )
