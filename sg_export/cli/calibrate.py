"""`sg-export calibrate`."""

import tempfile
from pathlib import Path
from typing import Any

import click

from sg_export.cli.errors import Command, writing
from sg_export.cli.options import RUNS, check_parent, feed_options, model_options, refuse_given
from sg_export.cli.output import progress


@click.command(cls=Command)
@click.argument("model", required=False)
@click.option("--sparsity", type=float, multiple=True, help="Sparsity of the weak branch; repeatable.  [default: 0.5]")
@click.option("--strong-sparsity", type=float, multiple=True, default=(0.0,), help="Of the strong one.  [default: 0]")
@click.option("--scale", type=float, default=2.0, show_default=True, help="Guidance scale of the runs.")
@click.option("--guidance", type=click.Choice(["sg", "cfg", "cfg+sg", "none"]), help="[default: sg]")
@click.option("--weak-checkpoint", type=click.Path(), metavar="PATH", help="That of AutoGuidance.")
@model_options
@feed_options
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    help="Where the states of the runs go, and are found again after an interruption.  [default: a temporary one]",
)
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="The table of ranges, a .json.")
@click.option("--quiet", "-q", is_flag=True, help="Print errors alone.")
def calibrate(
    model: str | None,
    sparsity: tuple[float, ...],
    strong_sparsity: tuple[float, ...],
    scale: float,
    guidance: Any,
    weak_checkpoint: str | None,
    weights: Any,
    route: Any,
    prediction: Any,
    heads: int | None,
    calib_data: Path | None,
    calib_samples: int,
    calib_steps: int,
    calib_seed: int,
    folder: Path | None,
    output: Path,
    quiet: bool,
) -> None:
    """Measure the ranges of MODEL's activations on guided runs of its own, for build --precision int8 or fp8.

    All pairs of sparsities add to one table, which is bound to the checkpoint. build measures ranges itself where it is
    given no table.

    \b
    Examples:
      sg-export calibrate --sparsity 0.5 --calib-samples 32 -o ranges.json
      sg-export build --sparsity 0.5 --precision int8 --calibration ranges.json
    """
    from sg_calibration.feeds import given_shards
    from sg_calibration.ranges import write_table
    from sg_calibration.settings import FeedSettings
    from sg_export.checkpoint import Overrides
    from sg_export.compiler import compile
    from sg_export.options.compile import CompileOptions
    from sg_export.quantize.search import measure_ranges
    from sg_export.reference import DEFAULT_REFERENCE

    check_parent(output)
    if calib_data is not None:
        refuse_given((*RUNS, "folder"), "only where ranges are measured on runs, without --calib-data")
        given_shards(calib_data)  # raises where there are none, before anything is traced
    feeds = FeedSettings(calib_samples, calib_steps, calib_seed)
    with progress(quiet) as report, tempfile.TemporaryDirectory() as scratch:

        def tell(stage: str, share: float | None) -> None:
            report(stage, 0, None, share)

        options = CompileOptions(
            Path(scratch) / "fp32",
            sparsity,
            strong_sparsity,
            scale,
            guidance,
            weak_checkpoint,
            weights=weights,
            overrides=Overrides(route, heads, prediction),
        )
        reference = compile(model or DEFAULT_REFERENCE, options, report)
        table = measure_ranges(reference, feeds, calib_data, folder, tell)
    with writing(output):
        write_table(table, output)
    if not quiet:
        seen = f"{table.evaluations} evaluations of {table.images} images"
        click.echo(f"{output}: ranges of {len(table.layers)} layers, from {seen}")
