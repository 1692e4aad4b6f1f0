"""`sg-export report`."""

from pathlib import Path

import click

from sg_export.cli.errors import Command, check_output_file, writing
from sg_export.cli.output import progress


@click.command(cls=Command)
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Device that runs the bundles: auto, cpu, cuda, or cuda:1 for another GPU.",
)
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="File of the page (.html).")
@click.option("--quiet", "-q", is_flag=True, help="Print only errors.")
def report(bundles: tuple[Path, ...], device: str, output: Path, quiet: bool) -> None:
    """Write one self-contained page about BUNDLES of one model.

    It shows costs, quality over time, layers, samples, sizes and times. The other bundles are
    compared with the first one: give the FP32 bundle first.

    \b
    Examples:
      sg-export report glyphs-bundle glyphs-fp16 glyphs-int8 -o report.html
    """
    from sg_export.packing.folder import own_paths
    from sg_export.report.collect import collect
    from sg_export.report.page import render
    from sg_runtime.files import replacing

    check_output_file(output, own_paths(bundles))
    with progress(quiet) as tell:
        page = render(collect(bundles, device=device, report=tell))
    with writing(output), replacing(output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    if not quiet:
        click.echo(f"{output}: {len(page) / 1e3:.0f} kB")
