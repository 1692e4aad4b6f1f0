"""`sg-export generate`."""

import io
import math
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from sg_export.cli.errors import Command, Failure, check_output_file, writing
from sg_export.cli.options import INTERVAL, SUBSET, DeviceChoice, device_options
from sg_export.cli.output import progress
from sg_export.cli.types import ImageSizeType, RampType
from sg_export.progress import Report
from sg_runtime import __version__
from sg_runtime.manifest import GuidanceMode, Labels, SubsetRule
from sg_runtime.sampling import trajectory

if TYPE_CHECKING:
    from sg_runtime.manifest import GuidancePlan, SamplerName
    from sg_runtime.pipeline import Pipeline

GUIDANCE_MODES = get_args(GuidanceMode)

TELL_SECONDS = 10.0
"""Seconds between two reports of the rate."""


@click.command(
    cls=Command,
    sections={
        "Images": ("classes", "prompts", "prompt_file", "negative", "size", "count", "seed"),
        "Sampling": ("steps", "sampler", "churn", "churn_range", "churn_noise"),
        "Guidance": ("guidance", "sparsity", "strong_sparsity", "scale", "interval", "subset"),
        "Device": (*device_options.names, "batch", "keep"),
        "Output": ("output", "columns", "captions", "zoom"),
    },
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--class",
    "classes",
    multiple=True,
    metavar="CLASS",
    help="Class to sample, by index, or by name if the model has names (a number is always an index). Repeatable; the "
    "images cycle through the classes.  [default: all classes]",
)
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT",
    help="Prompt of a model with text. Repeatable; the images cycle through the prompts.",
)
@click.option(
    "--prompt-file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="File with a prompt in each line; empty lines are left out. They follow those of --prompt.",
)
@click.option(
    "--negative",
    metavar="TEXT",
    help="Prompt of the weak branch, for the guidance cfg and cfg+sg.  [default: no prompt]",
)
@click.option(
    "--size",
    type=ImageSizeType(),
    metavar="HEIGHTxWIDTH",
    help="Height and width of the picture in pixels; BUNDLE must hold them.  [default: the bundle's first]",
)
@click.option(
    "--count",
    type=click.IntRange(min=1),
    help="Number of images.  [default: one for each class or prompt, at most 64]",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    default=0,
    show_default=True,
    help="Seed of the first image; it increases by one per image.",
)
@click.option("--steps", type=click.IntRange(min=1), help="Sampling steps.  [default: the bundle's]")
@click.option("--sampler", type=click.Choice(["euler", "heun"]), help="Sampler of the run.  [default: the bundle's]")
@click.option("--guidance", type=click.Choice(GUIDANCE_MODES), help="Guidance mode.  [default: the bundle's]")
@click.option(
    "--sparsity", type=RampType(), help="Sparsity of the weak branch; BUNDLE must hold it.  [default: the bundle's]"
)
@click.option(
    "--strong-sparsity",
    type=RampType(),
    help="Sparsity of the strong branch; BUNDLE must hold it.  [default: the bundle's]",
)
@click.option(
    "--scale", type=RampType(), help="Guidance scale; 1 gives the strong branch alone.  [default: the bundle's]"
)
@INTERVAL
@SUBSET
@click.option(
    "--churn", type=float, help="Amount of noise added in every step of an edm model (S_churn).  [default: none]"
)
@click.option(
    "--churn-range",
    type=float,
    nargs=2,
    metavar="LOW HIGH",
    help="Sigmas between which --churn adds noise (S_min, S_max).  [default: all]",
)
@click.option(
    "--churn-noise",
    type=float,
    default=1.0,
    show_default=True,
    help="Standard deviation of the noise that --churn adds (S_noise).",
)
@device_options
@click.option("--batch", type=click.IntRange(min=1), help="Maximum number of images in one run of a graph.")
@click.option(
    "--keep",
    type=click.Choice(["all", "step", "one"]),
    default="all",
    show_default=True,
    help="Parts of BUNDLE that stay in memory after use: all; step, without text encoder and decoder; or one part at a "
    "time.",
)
@click.option(
    "--columns", type=click.IntRange(min=1), help="Columns of images in the .png.  [default: nearest to a square]"
)
@click.option(
    "--captions/--no-captions",
    default=None,
    help="Whether prompts stand below the images of the .png.  [default: if there are several]",
)
@click.option(
    "--zoom", type=click.IntRange(min=1), default=1, show_default=True, help="Factor by which the .png is enlarged."
)
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    required=True,
    help="File of the samples: a .png picture, or a .npy of float32 values.",
)
@click.option("--quiet", "-q", is_flag=True, help="Print only errors.")
def generate(
    bundle: Path,
    classes: tuple[str, ...],
    prompts: tuple[str, ...],
    prompt_file: Path | None,
    negative: str | None,
    size: tuple[int, int] | None,
    count: int | None,
    seed: int,
    steps: int | None,
    sampler: Any,
    guidance: Any,
    sparsity: Any,
    strong_sparsity: Any,
    scale: Any,
    interval: tuple[float, float] | None,
    subset: SubsetRule | None,
    churn: float | None,
    churn_range: tuple[float, float] | None,
    churn_noise: float,
    on: DeviceChoice,
    batch: int | None,
    keep: Any,
    columns: int | None,
    captions: bool | None,
    zoom: int,
    output: Path,
    quiet: bool,
) -> None:
    """Sample images from BUNDLE into one file.

    An image depends only on its class or prompt and on its seed, not on other images of the run. A
    bundle without a decoder for its latents writes .npy. A .png carries prompts, seeds, guidance
    and the name of BUNDLE in text chunks. A sparsity or scale FIRST:LAST changes along a cosine
    from the first step to the last.

    \b
    Examples:
      sg-export generate glyphs-bundle --class A --class b --count 16 -o grid.png
      sg-export generate xl-bundle --class 207 --count 4 -o latents.npy
      sg-export generate prx-bundle --prompt "a tram on a beach" -o a.png
    """
    import numpy as np

    from sg_runtime.files import replacing
    from sg_runtime.images import captioned, grid, save_png
    from sg_runtime.pipeline import Pipeline
    from sg_runtime.sampling import Churn

    if output.suffix not in (".png", ".npy"):
        raise Failure(f"{output}: expected a name that ends in .png or .npy", 2)
    check_output_file(output)
    pipe = Pipeline.load(bundle, on.device, backend=on.backend, batch=batch, threads=on.threads, keep=keep)
    pipe = pipe if size is None else pipe.at(*size)
    if output.suffix == ".png" and not pipe.gives_images:
        raise Failure(
            f"{output}: expected .npy, since {bundle} samples latents and holds no decoder: "
            f"give --output {output.with_suffix('.npy')} and decode that file, or build with --vae",
            2,
        )
    texts = [*prompts, *(() if prompt_file is None else _prompts_in(prompt_file))]
    chosen = _classes(pipe, classes, texts, negative)
    total = count or min(len(chosen), 64)
    given = [chosen[k % len(chosen)] for k in range(total)]
    seeds = [(seed + k) % 2**64 for k in range(total)]
    if churn is None and (churn_range is not None or churn_noise != 1):
        raise Failure("--churn-range and --churn-noise describe the noise that --churn adds: give --churn, too", 2)
    plan = pipe.guidance(
        guidance, strong_sparsity=strong_sparsity, sparsity=sparsity, scale=scale, interval=interval, subset=subset
    )
    low, high = churn_range or (0.0, math.inf)
    began = time.monotonic()
    with progress(quiet) as report:
        conditions: Any = given
        if texts:
            report("encoding prompts", 0, None)
            conditions = pipe.from_text(given, "" if negative is None and plan.row.null_weak else negative)
        x = pipe.sample(
            conditions,
            seeds,
            steps=steps,
            sampler=sampler,
            guidance=plan,
            churn=None if churn is None else Churn(churn, low, high, churn_noise),
            progress=_with_rate(report, _steps_per_evaluation(pipe, steps, sampler)),
        )
        seconds = time.monotonic() - began
        if pipe.bundle.manifest.decode_graph is not None and output.suffix == ".png":
            report("decoding", 0, None)
        images = pipe.decode(x) if output.suffix == ".png" else None
    with writing(output):
        if images is None:
            content = io.BytesIO()
            np.save(content, x)  # if NumPy writes to a file itself, it hides the system's reason for an error
            with replacing(output) as temporary:
                temporary.write_bytes(content.getbuffer())
        else:
            if captions if captions is not None else texts and total > 1:
                images = captioned(images, [str(name) for name in given])
            save_png(grid(images, columns, zoom), output, _chunks(pipe, texts and given, negative, seeds, plan))
    if not quiet:
        click.echo(f"sampled in {seconds:.3g} s: {total / seconds:.3g} images/s", err=True)
        click.echo(f"{output}: {total} images")


def _prompts_in(path: Path) -> list[str]:
    """Return the lines of a file that are not blank. Raises Failure if there are none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"--prompt-file {path}: cannot be read as text ({error})", 2) from None
    if not (found := [line.strip() for line in lines if line.strip()]):
        raise Failure(f"--prompt-file {path}: expected a prompt in each line, found none", 2)
    return found


def _classes(pipe: "Pipeline", classes: tuple[str, ...], texts: list[str], negative: str | None) -> list[Any]:
    """Return the distinct classes or prompts that the user gives; by default all classes."""
    conditions = pipe.bundle.manifest.model.conditions
    if not isinstance(conditions, Labels):
        if classes:
            raise Failure("--class: expected none: the model is conditioned on text: give --prompt", 2)
        if not texts:
            raise Failure("--prompt: expected at least one, since the model is conditioned on text, found none", 2)
        return texts
    if texts or negative is not None:
        raise Failure("--prompt: expected none: the model is conditioned on classes: give --class", 2)
    given = [int(name) if re.fullmatch("-?[0-9]{1,9}", name) else name for name in classes]
    return given or list(range(conditions.count))


def _chunks(
    pipe: "Pipeline", prompts: list[Any], negative: str | None, seeds: list[int], plan: "GuidancePlan"
) -> dict[str, str]:
    """Return the text chunks of a picture: a line for each image of prompts and seeds."""
    found = {"Prompt": "\n".join(prompts)} if prompts else {}
    found |= {} if negative is None else {"Negative prompt": negative}
    return found | {
        "Seed": "\n".join(map(str, seeds)),
        "Guidance": str(plan),
        "Bundle": pipe.bundle.root.name,
        "Software": f"sg-export {__version__}",
    }


def _steps_per_evaluation(pipe: "Pipeline", steps: int | None, sampler: "SamplerName | None") -> float:
    sampling = pipe.bundle.manifest.sampling
    run = replace(sampling, steps=steps or sampling.steps, sampler=sampler or sampling.sampler)
    return run.steps / len(trajectory(run, pipe.bundle.manifest.model.prediction).updates)


def _with_rate(report: Report, per_evaluation: float) -> Callable[[int, int], None]:
    """Return a callback (evaluations done, of all) that reports them, and now and then the rate.

    per_evaluation: steps for each evaluation; a step of Heun has two.
    """
    began = told = time.monotonic()
    stage = "sampling"

    def advance(done: int, evaluations: int) -> None:
        nonlocal told, stage
        now = time.monotonic()
        if now - told >= TELL_SECONDS:
            rate = done / (now - began)
            told, stage = (
                now,
                f"sampling, {rate * per_evaluation:.3g} steps/s, {(evaluations - done) / rate:.0f} s left",
            )
        report(stage, done - 1, evaluations)

    return advance
