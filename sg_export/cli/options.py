"""What every command shares: errors as messages with exit codes, options, progress, tables."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from sg_export.cli.types import RouteType
from sg_runtime.backends import BACKENDS
from sg_runtime.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])
RUNS = ("calib_samples", "calib_steps", "calib_seed")
"""Options of the runs that ranges are measured on."""
QUANTIZATION = (
    *("calibration", "calib_data", *RUNS, "method", "exclude", "like"),
    *("gate_cosine", "gate_guided", "allow_quality_loss", "base_precision"),
)
"""Options of INT8 and FP8 alone."""


INTERVAL = click.option(
    "--interval",
    type=float,
    nargs=2,
    metavar="LOW HIGH",
    help="Times between which guidance applies, t or sigma; outside, the strong branch runs alone.",
)


def _decorated(command: F, options: Sequence[Callable[[F], F]]) -> F:
    """The command with these options, in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def model_options(command: F) -> F:
    """Options that state what a checkpoint does not."""
    options = (
        click.option("--weights", type=click.Choice(["ema", "model"]), help="Weights to take; the EMA by default."),
        click.option("--route", type=RouteType(), help="Blocks that run on the kept tokens, both included: 2-24."),
        click.option(
            "--prediction", type=click.Choice(["flow", "edm"]), help="What the network predicts, where unknown."
        ),
        click.option(
            "--heads", type=click.IntRange(min=1), help="Attention heads, where the width is none of upstream's."
        ),
    )
    return _decorated(command, options)


def feed_options(command: F) -> F:
    """Options that say what ranges of activations are measured on."""
    options = (
        click.option(
            "--calib-data",
            type=click.Path(path_type=Path),
            metavar="DIR",
            help="Shards of your own (.npz with x, time, label) in place of guided runs of the model.",
        ),
        click.option(
            "--calib-samples",
            type=click.IntRange(min=1),
            default=16,
            show_default=True,
            help="Images for each pair of sparsities.",
        ),
        click.option(
            "--calib-steps",
            type=click.IntRange(min=25),
            default=25,
            show_default=True,
            help="Steps of their Heun runs: times at which ranges are seen.",
        ),
        click.option(
            "--calib-seed", type=click.IntRange(min=0), default=0, show_default=True, help="Their first seed."
        ),
    )
    return _decorated(command, options)


def quantization_options(command: F) -> F:
    """Options of int8 and fp8."""
    options = (
        click.option(
            "--calibration",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Ranges from sg-export calibrate.  [default: they are measured]",
        ),
        feed_options,
        click.option(
            "--method",
            type=click.Choice(["min-max", "percentile", "entropy"]),
            help="How a range follows from what was seen.  [default: percentile for int8, min-max for fp8]",
        ),
        click.option("--exclude", multiple=True, metavar="LAYER", help="A layer to leave as it is; repeatable."),
        click.option(
            "--like",
            type=click.Path(path_type=Path),
            metavar="BUNDLE",
            help="A quantized bundle whose choice of layers to take over, in place of a search.",
        ),
        click.option("--gate-cosine", type=click.FloatRange(0, 1), help="[default: 0.99 for int8, 0.995 for fp8]"),
        click.option("--gate-guided", type=click.FloatRange(0), help="[default: 0.1 for int8, 0.06 for fp8]"),
        click.option("--allow-quality-loss", is_flag=True, help="Write the bundle though its gates do not hold."),
    )
    return _decorated(command, options)


def refuse_given(names: Collection[str], why: str) -> None:
    """Raise UsageError for the first of these options of the running command that was given."""
    context = click.get_current_context()
    for option in context.command.params:
        if option.name in names and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE:
            raise UsageError(f"{option.opts[0]}: {why}")


def check_parent(path: Path) -> None:
    """Raise UsageError where a file cannot be written for want of its folder, before any work."""
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: cannot be written: found no folder {path.absolute().parent}")


def device_options(command: F) -> F:
    """Options that say what runs a bundle."""
    options = (
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, or cuda:1 for another GPU."),
        click.option("--backend", type=click.Choice(BACKENDS), help="[default: the best that works here]"),
    )
    return _decorated(command, options)
