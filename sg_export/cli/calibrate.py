"""`sg-export calibrate`."""

import tempfile
from pathlib import Path
from typing import Any

import click

from sg_export.cli.errors import Command, check_output_file, check_output_folder, writing
from sg_export.cli.options import (
    GUIDANCE,
    RUNS,
    SPARSITY,
    STRONG_SPARSITY,
    WEAK_CHECKPOINT,
    ModelSource,
    RangeSource,
    feed_options,
    model_options,
    refuse_given,
)
from sg_export.cli.output import progress


@click.command(
    cls=Command,
    sections={
        "Model": model_options.names,
        "Guidance of the runs": ("sparsity", "strong_sparsity", "scale", "guidance", "weak_checkpoint"),
        "Calibration": (*feed_options.names, "folder"),
    },
)
@click.argument("model", required=False)
@SPARSITY
@STRONG_SPARSITY
@click.option("--scale", type=float, default=2.0, show_default=True, help="Guidance scale of the calibration runs.")
@GUIDANCE
@WEAK_CHECKPOINT
@model_options
@feed_options
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    help="Folder that keeps the states of the runs, so that an interrupted calibration can continue.  [default: a "
    "temporary folder]",
)
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), required=True, help="File of the table of ranges (.json)."
)
@click.option("--quiet", "-q", is_flag=True, help="Print only errors.")
def calibrate(
    model: str | None,
    sparsity: tuple[float, ...],
    strong_sparsity: tuple[float, ...],
    scale: float,
    guidance: Any,
    weak_checkpoint: str | None,
    source: ModelSource,
    ranges: RangeSource,
    folder: Path | None,
    output: Path,
    quiet: bool,
) -> None:
    """Measure the ranges of MODEL's activations, for build --precision int8 or fp8.

    They are measured on guided runs of MODEL, or on your data. One table covers all pairs of
    sparsities and all sizes that are given. It is valid only for this checkpoint. Without a table,
    build measures the ranges.

    \b
    Examples:
      sg-export calibrate --sparsity 0.5 --calib-samples 32 -o ranges.json
      sg-export build --sparsity 0.5 --precision int8 --calibration ranges.json
    """
    from sg_calibration.feeds import given_shards, shard_folders
    from sg_calibration.prompts import Prompts, read_prompts
    from sg_calibration.ranges import write_table
    from sg_export.compiler import compile, inputs_of
    from sg_export.options.compile import CompileOptions
    from sg_export.quantize.search import measure_ranges
    from sg_export.reference import DEFAULT_REFERENCE
    from sg_runtime.pipeline import Pipeline

    check_output_file(output, inputs_of(model or DEFAULT_REFERENCE, weak_checkpoint))
    if folder is not None:
        check_output_folder(folder, "--folder")
    if ranges.calib_data is not None:
        refuse_given((*RUNS, "folder"), "only if ranges are measured on runs, without --calib-data")
        for data in shard_folders(ranges.calib_data, source.size):
            given_shards(data)  # raises before anything is traced
    feeds = ranges.feeds
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
            weights=source.weight_set,
            sizes=source.size[1:],
            overrides=source.overrides_of_first,
            parts=None if ranges.calib_data is None else ("step",),
        )
        reference = compile(model or DEFAULT_REFERENCE, options, report)
        prompts = None
        if reference.manifest.text is not None:
            prompts = Prompts(read_prompts(ranges.prompts), Pipeline.load(reference, "cpu").encode)
        elif ranges.prompts is not None:
            refuse_given(("prompts",), "expected none: there is no text encoder to read them")
        table = measure_ranges(reference, feeds, ranges.calib_data, folder, tell, prompts)
    with writing(output):
        write_table(table, output)
    if not quiet:
        seen = f"{table.evaluations} evaluations of {table.images} images"
        click.echo(f"{output}: ranges of {len(table.layers)} layers, from {seen}")
