"""`sg-export bench`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from sg_export.cli.errors import Command
from sg_export.cli.options import DeviceChoice, device_options
from sg_export.cli.output import print_table, progress, with_options
from sg_export.cli.types import ImageSizeType


@click.command(cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@device_options
@click.option(
    "--size",
    type=ImageSizeType(),
    help="Height and width of the picture, of those that BUNDLE was built for.  [default: the first]",
)
@click.option(
    "--images",
    type=click.IntRange(min=1),
    help="Number of images that one run samples.  [default: 1 on a CPU, else the largest batch of a graph run]",
)
@click.option("--steps", type=click.IntRange(min=1), help="Sampling steps.  [default: the bundle's]")
@click.option("--runs", type=click.IntRange(min=1), default=10, show_default=True, help="Number of timed runs.")
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    type=click.Choice(["pytorch", "pytorch-compiled"]),
    help="Also time a PyTorch loop with two passes per step, alternating with the bundle's runs; repeatable.",
)
@click.option("--checkpoint", type=click.Path(), help="Checkpoint of the baselines.  [default: found by its name]")
@click.option(
    "--weak-checkpoint",
    type=click.Path(),
    help="Checkpoint of the baselines' weak network.  [default: found by its name]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--quiet", "-q", is_flag=True, help="Show no progress.")
def bench(
    bundle: Path,
    on: DeviceChoice,
    size: tuple[int, int] | None,
    images: int | None,
    steps: int | None,
    runs: int,
    baselines: tuple[Any, ...],
    checkpoint: str | None,
    weak_checkpoint: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Time complete runs of BUNDLE with its default guidance.

    Prints times per step and per image in milliseconds (50th, 90th and 99th percentile), and the
    share of the machine's measured peak performance.

    \b
    Examples:
      sg-export bench glyphs-bundle --images 16
      sg-export bench glyphs-bundle --baseline pytorch --json
    """
    from sg_export.bench.measure import bench as measure

    with progress(quiet or as_json) as report:
        result = measure(
            bundle,
            device=on.device,
            backend=on.backend,
            threads=on.threads,
            size=size,
            images=images,
            steps=steps,
            runs=runs,
            baselines=baselines,
            checkpoint=checkpoint,
            weak_checkpoint=weak_checkpoint,
            report=report,
        )
    if as_json:
        click.echo(json.dumps(asdict(result), indent=1))
        return
    rows = [
        (
            side.name,
            side.precision,
            *(f"{value:.4g}" for value in asdict(side.step).values()),
            *(f"{value:.4g}" for value in asdict(side.image).values()),
            f"{side.images_per_second:.4g}",
            f"{side.ratio:.2f}",
            "-" if side.peak_bytes is None else f"{side.peak_bytes / 1e9:.2f}",
        )
        for side in result.sides
    ]
    times = [f"{of} {share}" for of in ("step", "image") for share in ("p50", "p90", "p99")]
    columns = ("", "precision", *times, "images/s", "time", "peak GB")
    plan = f"images at once: {result.images}, {result.steps} {result.sampler} steps, {result.runs} runs"
    print_table(f"{bundle}: {plan}, on {result.device}", columns, rows)
    for part in result.parts:
        unit = "a prompt" if part.part == "text" else "an image"
        click.echo(
            f"{part.part}: {part.run.p50:.4g} ms for {unit}, {part.share:.0%} of an image with a prompt of its own"
        )
    for reason in result.rejected:
        click.echo(f"not {with_options(reason)}")
    if result.roofline is None:
        click.echo("share of the machine's peak: unknown without PyTorch, which measures the peak of a GPU")
    else:
        limits = (
            f"{result.roofline.macs_per_second / 1e9:.4g} GMAC/s, {result.roofline.bytes_per_second / 1e9:.4g} GB/s"
        )
        click.echo(f"share of the machine's peak: {result.roofline.share:.0%} ({limits}, measured here)")
