"""`sg-export verify`."""

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sg_export.cli.errors import Command, Failure, check_output_file, check_output_folder, writing
from sg_export.cli.output import print_table, progress
from sg_runtime.backends import BACKENDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sg_export.parity.compare import Comparison

EPSILON = 1e-12
"""Replacement for a gate of zero."""


@click.command(cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint", type=click.Path(), help="Checkpoint that BUNDLE was built from.  [default: found by its name]"
)
@click.option(
    "--weak-checkpoint", type=click.Path(), help="Checkpoint of the weak network.  [default: found by its name]"
)
@click.option(
    "--pipeline",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Folder of the pipeline whose text encoder and decoder BUNDLE has.  [default: found by its name]",
)
@click.option(
    "--vae",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Folder of the autoencoder whose decoder BUNDLE has.  [default: found by its name]",
)
@click.option(
    "--device",
    help="Device that runs the bundle: auto, cpu, cuda, cuda:1.  [default: the CPU, which emulates half precision in "
    "FP32 with rounding]",
)
@click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    metavar="BACKEND",
    help=f"Library that runs the bundle: {', '.join(BACKENDS)}.  [default: the fastest that works on the device]",
)
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    help="File of the results.  [default: BUNDLE/verify.json, if it can be written]",
)
@click.option(
    "--save-polygraphy",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for the inputs and PyTorch's outputs; prints the polygraphy commands that compare the graphs and "
    "engines with them.",
)
@click.option("--quiet", "-q", is_flag=True, help="Print only errors.")
def verify(
    bundle: Path,
    checkpoint: str | None,
    weak_checkpoint: str | None,
    pipeline: Path | None,
    vae: Path | None,
    device: str | None,
    backend: str | None,
    output: Path | None,
    save_polygraphy: Path | None,
    quiet: bool,
) -> None:
    """Compare BUNDLE with its checkpoint in PyTorch, by Polygraphy.

    The checkpoint must be the file that the bundle was built from. Every graph is compared at times
    from 0.02 to 0.98, a guided graph with two separate passes. Then complete runs with equal seeds
    and kept tokens are compared. A quantized bundle is compared at every time of a guided PyTorch
    run, by the gates that it was built with. Text encoder and decoder are compared at prompts and
    at noise. The exit code is 5 if a gate fails.

    Engines run on their GPU alone. With --save-polygraphy, inputs and PyTorch's outputs for each of
    their profiles are saved anywhere, also for a bundle of engines alone.

    \b
    Examples:
      sg-export verify glyphs-bundle
      sg-export verify xl-bundle --checkpoint latest.pt --save-polygraphy parity
      sg-export verify xl-bundle --checkpoint latest.pt --device cuda
    """
    from sg_export.compiler import inputs_of
    from sg_export.loading import found_by_name
    from sg_export.packing.folder import VERIFY_FILE, own_paths
    from sg_export.parity.compare import write_parity
    from sg_export.parity.verify import verify as compare
    from sg_runtime.bundle import Bundle

    target, unwritable = output or bundle / VERIFY_FILE, None
    try:
        check_output_file(target, [*own_paths([bundle]), *inputs_of(checkpoint, weak_checkpoint)])
    except Failure as failure:
        if output is not None:
            raise
        unwritable = failure.message  # a bundle may be on a read-only disk
    if output is not None:
        opened = Bundle.open(bundle, verify_hashes=False)  # the comparison checks them
        parts = (part.source for part in opened.manifest.parts.values())
        sources = filter(None, (opened.manifest.source, opened.manifest.weak_source, *parts))
        check_output_file(output, inputs_of(*(found_by_name(opened, source) for source in sources)))
    if save_polygraphy is not None:
        check_output_folder(save_polygraphy, "--save-polygraphy")
    with progress(quiet) as report:
        parity = compare(
            bundle,
            checkpoint,
            weak_checkpoint=weak_checkpoint,
            pipeline=pipeline,
            vae=vae,
            device=device,
            backend=backend,
            save_polygraphy=save_polygraphy,
            report=report,
        )
    if not parity.comparisons:  # a bundle of engines alone
        if not quiet:
            click.echo(f"{bundle}: nothing was compared: it holds engines alone; run these where their GPU is:")
            for command in parity.commands:
                click.echo(command)
        return
    quantized = any(c.output == "guided" for c in parity.comparisons)
    if not quiet:
        (_print_strata if quantized else _print_worst)(bundle, parity.comparisons)
        for command in parity.commands:
            click.echo(command)
    if unwritable is None:
        with writing(target):
            write_parity(parity, Bundle.open(bundle, verify_hashes=False), target)
    if not quiet:
        click.echo(f"results: {target}" if unwritable is None else f"results are not written: {unwritable}")
    failed = [c for c in parity.comparisons if not c.passed]
    if failed:
        worst = max(failed, key=_excess)
        remedy = "exclude more layers, or calibrate on more images" if quantized else "build the bundle again"
        if worst.overflow is not None:
            remedy = f"{worst.overflow} is the first to exceed the range of half precision: build with bf16 or fp32"
        criterion = f"a cosine of at least {worst.least_cosine:g}, found {worst.cosine:.6f}"
        if worst.gate is not None and not worst.relative_l2 <= worst.gate:
            criterion = f"relative L2 at most {worst.gate:g}, found {worst.relative_l2:g}"
        raise Failure(
            f"{bundle}: {len(failed)} of {len(parity.comparisons)} comparisons fail; the worst, {worst.subject}: "
            f"expected {criterion}; {remedy}",
            5,
        )


def _print_worst(bundle: Path, comparisons: "Sequence[Comparison]") -> None:
    """Print every graph run and every sampling run with its worst output."""
    runs = itertools.groupby(comparisons, key=lambda c: (c.subject, c.time))
    worst_outputs = [max(outputs, key=_excess) for _, outputs in runs]
    rows = [
        (c.subject, c.time, c.output, c.max_abs, c.relative_l2, f"{c.cosine:.7f}", _verdict([c])) for c in worst_outputs
    ]
    columns = ("graph or run", "t", "worst output", "max abs", "relative L2", "cosine", "verdict")
    gates = sorted({c.gate for c in comparisons if c.gate is not None})
    print_table(f"{bundle} compared with PyTorch", columns, rows)
    click.echo(f"gates, relative L2: {' for a graph, '.join(f'{gate:g}' for gate in gates)} for a complete run")


def _print_strata(bundle: Path, comparisons: "Sequence[Comparison]") -> None:
    """Print the comparison of a quantized bundle: each time of each guidance, and complete runs."""
    columns = ("t", "cosine, strong", "cosine, weak", "guided, relative L2", "verdict")
    for subject, members in itertools.groupby(comparisons, key=lambda c: c.subject):
        group = list(members)
        if group[0].time is None:
            click.echo(f"{subject}; found: {group[0].relative_l2:.2%} from PyTorch's")
            continue
        rows = []
        for strong, weak, guided in zip(group[::3], group[1::3], group[2::3], strict=True):
            verdict = _verdict([strong, weak, guided])
            cosines = (f"{strong.cosine:.5f}", f"{weak.cosine:.5f}")
            rows.append((guided.time, *cosines, f"{guided.relative_l2:.2%}", verdict))
        print_table(f"{bundle}, {subject}, compared with PyTorch", columns, rows)


def _verdict(comparisons: "Sequence[Comparison]") -> str:
    return "pass" if all(c.passed for c in comparisons) else "FAIL"


def _excess(comparison: "Comparison") -> float:
    """Return the largest distance of a comparison, relative to its gate; infinity for NaN."""
    if math.isnan(comparison.relative_l2):
        return math.inf
    shares = [0.0]
    if comparison.gate is not None:
        shares.append(comparison.relative_l2 / max(comparison.gate, EPSILON))
    if comparison.least_cosine is not None:
        shares.append((1 - comparison.cosine) / max(1 - comparison.least_cosine, EPSILON))
    return max(shares)
