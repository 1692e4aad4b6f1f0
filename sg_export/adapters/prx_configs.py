"""What diffusers' configurations (0.42.1) state about a PRX, and the defaults of what they lack.

A folder has configurations of its pipeline, transformer, scheduler and autoencoder; see
`sg_export.diffusers_folder`. A file alone has none.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sg_export.checkpoint import Checkpoint
from sg_export.diffusers_folder import latent_side
from sg_export.models.prx import PERIOD, THETA, TIME_FACTOR, PRXConfig
from sg_runtime.errors import CheckpointError, UsageError
from sg_runtime.manifest import Prediction, Sampling, Shifted

TEXT_TOKENS = 256
"""Number of text tokens of the published models, with padding."""

SIZES = {"PRXPipeline": 512, "PRXPixelPipeline": 1024}
"""Height and width of a pipeline's pictures if its configuration has none."""

NOISE_SCALES = {"PRXPipeline": 1.0, "PRXPixelPipeline": 2.0}
"""Noise scale of a pipeline if its configuration has none."""

PREDICTIONS: Mapping[str, Prediction] = {"PRXPipeline": "flow", "PRXPixelPipeline": "x0"}
"""What the network of a pipeline predicts."""

PIXELS_PER_LATENT = {3: 1, 16: 8, 32: 32}
"""Side of the square that one latent of the published models decodes to, by channels.

3 are pixels, 16 the latents of Flux's autoencoder, 32 those of DC-AE.
"""

SHIFT = 3.0
"""Shift of the times of the published models."""

STEPS = 28
"""Number of steps by default of the pipelines."""

TIME_FLOOR = 0.05
"""Least divisor of the velocity of a model that predicts x0, here and in Photoroom/PRX."""

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
"""The supported scheduler."""

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


def pipeline_of(checkpoint: Checkpoint, pixel: bool) -> str:
    """Return the class of the pipeline, or of the usual one for a transformer alone."""
    usual = "PRXPixelPipeline" if pixel else "PRXPipeline"
    return str(checkpoint.configs.get("pipeline", {}).get("_class_name", usual))


def field(checkpoint: Checkpoint, component: str, name: str, default: float, *, whole: bool = True) -> Any:
    """Return a number in the configuration of a component; `default` if it is not there.

    whole: whether it is a whole number of at least 1. Raises CheckpointError for another value.
    """
    found = checkpoint.configs.get(component, {}).get(name)
    if found is None:
        return default
    if type(found) not in ((int,) if whole else (int, float)) or (whole and found < 1):
        wanted = "a whole number of at least 1" if whole else "a number"
        raise CheckpointError(f"{where(checkpoint, component)}: {name}: expected {wanted}, found {found!r}")
    return found


def where(checkpoint: Checkpoint, component: str) -> str:
    """Return the name of a configuration in errors."""
    return f"{checkpoint.source.file}, configuration of the {component}"


def pixels_per_latent(checkpoint: Checkpoint, channels: int) -> int:
    """Return the side, in pixels, of the square of the picture that one latent decodes to.

    It is stated by the author, or follows from the autoencoder (`spatial_compression_ratio`, and
    `vae_scale_factor` in the pipeline), or else from the channels.
    """
    file, stated = checkpoint.source.file, checkpoint.facts.pixels_per_latent
    if stated is not None:
        if stated < 1:
            raise CheckpointError(f"{file}: pixels_per_latent: expected at least 1, found {stated}")
        return stated
    config = checkpoint.configs.get("vae")
    if config is None:
        if channels in PIXELS_PER_LATENT:
            return PIXELS_PER_LATENT[channels]
        raise UsageError(
            f"{file}: expected samples of {', '.join(map(str, PIXELS_PER_LATENT))} channels, found {channels}: state "
            f"pixels_per_latent, the side in pixels of a latent, in a JSON file next to it"
        )
    return latent_side(config, channels, where(checkpoint, "autoencoder"))


def default_sampling(prediction: Prediction, times: Shifted, noise_scale: float) -> Sampling:
    """Return the default sampling of a PRX model: Euler's method."""
    return Sampling("euler", STEPS, times, noise_scale, TIME_FLOOR if prediction == "x0" else 0.0)


def scheduler_times(shift: float, count: int = 1000) -> Shifted:
    """Return the times of the scheduler (`scheduling_flow_match_euler_discrete.py`).

    It shifts the smallest of its `count` training times, 1 / count, before a run, and all times of
    a run again.
    """
    return replace(Shifted(shift, None), last=shift / (shift + count - 1))


def read_scheduler(stated: Mapping[str, Any], place: str) -> Shifted:
    """Return the times that the configuration of a scheduler states.

    stated: content of scheduler_config.json. place: its name, for errors.

    Raises CheckpointError for another scheduler, and for a field that is not supported.
    """
    if (found := stated.get("_class_name")) != SCHEDULER:
        raise CheckpointError(f"{place}: _class_name: expected {SCHEDULER}, found {found}: it is not supported")
    for name, found in stated.items():
        if name.startswith("_") or name in ("shift", "num_train_timesteps", *DYNAMIC):
            continue
        if name not in UNSUPPORTED:
            raise CheckpointError(f"{place}: {name}: expected no such field, found {found}: it is not supported")
        if found not in (None, False):
            raise CheckpointError(f"{place}: {name}: expected none, found {found}: it is not supported")
    shift, count = stated.get("shift", 1.0), stated.get("num_train_timesteps", 1000)
    if type(count) is not int or count < 2:
        raise CheckpointError(f"{place}: num_train_timesteps: expected a number of at least 2, found {count!r}")
    if type(shift) not in (int, float):
        raise CheckpointError(f"{place}: shift: expected a number, found {shift!r}")
    try:
        return scheduler_times(float(shift), count)
    except UsageError:
        raise CheckpointError(f"{place}: shift: expected a float32 number above 0, found {shift}") from None


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
