"""`sg-export generate`."""

import io
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click

from sg_export.cli.errors import Command, Failure, check_output_file, writing
from sg_export.cli.options import INTERVAL, SUBSET, DeviceChoice, device_options
from sg_export.cli.output import progress
from sg_export.cli.types import RampType
from sg_export.progress import Report
from sg_runtime.manifest import GuidanceMode, SubsetRule

GUIDANCE_MODES = get_args(GuidanceMode)

TELL_SECONDS = 10.0
"""Seconds between two reports of the rate."""


@click.command(
    cls=Command,
    sections={
        "Images": ("classes", "count", "seed"),
        "Sampling": ("steps", "sampler", "churn", "churn_range", "churn_noise"),
        "Guidance": ("guidance", "sparsity", "strong_sparsity", "scale", "interval", "subset"),
        "Device": (*device_options.names, "batch"),
        "Output": ("output", "columns", "zoom"),
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
@click.option("--count", type=click.IntRange(min=1), help="Number of images.  [default: one per class, at most 64]")
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
    "--columns", type=click.IntRange(min=1), help="Columns of images in the .png.  [default: nearest to a square]"
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
    columns: int | None,
    zoom: int,
    output: Path,
    quiet: bool,
) -> None:
    """Sample images from BUNDLE into one file.

    An image depends only on its class and seed, not on other images of the run. Models of latents
    write .npy. A sparsity or scale FIRST:LAST changes along a cosine from the first step to the
    last.

    \b
    Examples:
      sg-export generate glyphs-bundle --class A --class b --count 16 -o grid.png
      sg-export generate xl-bundle --class 207 --count 4 -o latents.npy
    """
    import numpy as np

    from sg_runtime.files import replacing
    from sg_runtime.images import grid, save_png
    from sg_runtime.pipeline import Pipeline
    from sg_runtime.sampling import Churn

    if output.suffix not in (".png", ".npy"):
        raise Failure(f"{output}: expected a name that ends in .png or .npy", 2)
    check_output_file(output)
    pipe = Pipeline.load(bundle, on.device, backend=on.backend, batch=batch, threads=on.threads)
    model = pipe.bundle.manifest.model
    if output.suffix == ".png" and model.space == "latent":
        raise Failure(
            f"{output}: expected .npy, since {bundle} samples latents and holds no decoder: "
            f"give --output {output.with_suffix('.npy')} and decode that file",
            2,
        )
    chosen = [int(name) if re.fullmatch("-?[0-9]{1,9}", name) else name for name in classes]
    chosen = chosen or list(range(model.labels.count))
    total = count or min(len(chosen), 64)
    labels = [chosen[k % len(chosen)] for k in range(total)]
    seeds = [(seed + k) % 2**64 for k in range(total)]
    if churn is None and (churn_range is not None or churn_noise != 1):
        raise Failure("--churn-range and --churn-noise describe the noise that --churn adds: give --churn, too", 2)
    plan = pipe.guidance(
        guidance, strong_sparsity=strong_sparsity, sparsity=sparsity, scale=scale, interval=interval, subset=subset
    )
    low, high = churn_range or (0.0, math.inf)
    began = time.monotonic()
    with progress(quiet) as report:
        x = pipe.sample(
            labels,
            seeds,
            steps=steps,
            sampler=sampler,
            guidance=plan,
            churn=None if churn is None else Churn(churn, low, high, churn_noise),
            progress=_with_rate(report, total),
        )
    seconds = time.monotonic() - began
    with writing(output):
        if output.suffix == ".npy":
            content = io.BytesIO()
            np.save(content, x)  # if NumPy writes to a file itself, it hides the system's reason for an error
            with replacing(output) as temporary:
                temporary.write_bytes(content.getbuffer())
        else:
            save_png(grid(pipe.decode(x), columns, zoom), output)
    if not quiet:
        click.echo(f"sampled in {seconds:.3g} s: {total / seconds:.3g} images/s", err=True)
        click.echo(f"{output}: {total} images")


def _with_rate(report: Report, images: int) -> Callable[[int, int], None]:
    """Return a callback (evaluations done, of all) that reports them, and now and then the rate.

    An image counts in parts, by the evaluations that are done.
    """
    began = told = time.monotonic()
    stage = "sampling"

    def advance(done: int, evaluations: int) -> None:
        nonlocal told, stage
        now = time.monotonic()
        if now - told >= TELL_SECONDS:
            told, stage = now, f"sampling, {images * done / evaluations / (now - began):.3g} images/s"
        report(stage, done - 1, evaluations)

    return advance
