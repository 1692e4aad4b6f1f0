"""Options of the commands that sample or serve: conditions, sampling, guidance, runs."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from sg_export.cli.options import INTERVAL, SUBSET, Group, refuse_given
from sg_export.cli.types import ImageSizeType, RampType
from sg_runtime.guidance import PlanChanges
from sg_runtime.manifest import GuidanceMode, SamplerName

if TYPE_CHECKING:
    from sg_runtime.sampling import Churn

PROMPT_FILE = click.option(
    "--prompt-file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="File with a prompt in each line, for a model with text; empty lines are left out. The images cycle through "
    "the prompts.",
)

NEGATIVE = click.option(
    "--negative",
    metavar="TEXT",
    help="Prompt of the weak branch, for the guidance cfg and cfg+sg.  [default: no prompt]",
)

SIZE = click.option(
    "--size",
    type=ImageSizeType(),
    metavar="HEIGHTxWIDTH",
    help="Height and width of the picture in pixels; BUNDLE must hold them.  [default: the bundle's first]",
)

SEED = click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    default=0,
    show_default=True,
    help="Seed of the first image; it increases by one per image.",
)

BATCH = click.option("--batch", type=click.IntRange(min=1), help="Maximum number of images in one run of a graph.")

KEEP = click.option(
    "--keep",
    type=click.Choice(["all", "step", "one"]),
    default="all",
    show_default=True,
    help="Parts of BUNDLE that stay in memory after use: all; step, without text encoder and decoder; or one part at a "
    "time.",
)

RUN_BATCH = click.option(
    "--batch",
    type=click.IntRange(min=1),
    help="Number of images of an engine run.  [default: the largest that the bundle was built for, or 4]",
)

WINDOW = click.option(
    "--window",
    type=click.FloatRange(0, 60),
    default=0.005,
    show_default=True,
    help="Seconds for which an image waits for others that can share its run.",
)

MAX_STEPS = click.option(
    "--max-steps",
    type=click.IntRange(min=1),
    default=250,
    show_default=True,
    help="Largest number of steps of a request.",
)

QUIET = click.option("--quiet", "-q", is_flag=True, help="Print only errors.")


@dataclass(frozen=True, slots=True)
class SamplingChoice:
    """The sampling of a run, chosen by options."""

    steps: int | None
    sampler: Any
    churn: float | None
    churn_range: tuple[float, float] | None
    churn_noise: float

    @property
    def noise(self) -> "Churn | None":
        """The noise that an edm run adds.

        Raises UsageError for options of the noise without its amount.
        """
        from sg_runtime.sampling import Churn

        if self.churn is None:
            refuse_given(("churn_range", "churn_noise"), "describes the noise that --churn adds: give --churn, too")
            return None
        low, high = self.churn_range or (0.0, math.inf)
        return Churn(self.churn, low, high, self.churn_noise)


sampling_options = Group(
    "sampling",
    SamplingChoice,
    (
        click.option("--steps", type=click.IntRange(min=1), help="Sampling steps.  [default: the bundle's]"),
        click.option(
            "--sampler", type=click.Choice(get_args(SamplerName)), help="Sampler of the run.  [default: the bundle's]"
        ),
        click.option(
            "--churn",
            type=float,
            help="Amount of noise added in every step of an edm model (S_churn).  [default: none]",
        ),
        click.option(
            "--churn-range",
            type=float,
            nargs=2,
            metavar="LOW HIGH",
            help="Sigmas between which --churn adds noise (S_min, S_max).  [default: all]",
        ),
        click.option(
            "--churn-noise",
            type=float,
            default=1.0,
            show_default=True,
            help="Standard deviation of the noise that --churn adds (S_noise).",
        ),
    ),
)

plan_options = Group(
    "changes",
    PlanChanges,
    (
        click.option(
            "--guidance",
            "mode",
            type=click.Choice(get_args(GuidanceMode)),
            help="Guidance mode.  [default: the bundle's]",
        ),
        click.option(
            "--sparsity",
            type=RampType(),
            help="Sparsity of the weak branch; BUNDLE must hold it.  [default: the bundle's]",
        ),
        click.option(
            "--strong-sparsity",
            type=RampType(),
            help="Sparsity of the strong branch; BUNDLE must hold it.  [default: the bundle's]",
        ),
        click.option(
            "--scale",
            type=RampType(),
            help="Guidance scale; 1 gives the strong branch alone.  [default: the bundle's]",
        ),
        INTERVAL,
        SUBSET,
    ),
)
