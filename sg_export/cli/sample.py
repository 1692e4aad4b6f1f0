"""`sg-export sample`."""

from pathlib import Path
from typing import Any

import click

from sg_export.cli.errors import Command, check_output_folder, writing
from sg_export.cli.options import DeviceChoice, device_options
from sg_export.cli.output import progress
from sg_export.cli.run_options import (
    BATCH,
    KEEP,
    NEGATIVE,
    PROMPT_FILE,
    QUIET,
    SEED,
    SIZE,
    SamplingChoice,
    plan_options,
    sampling_options,
)
from sg_export.cli.types import ClassesType
from sg_export.progress import with_rate
from sg_runtime.guidance import PlanChanges


@click.command(
    cls=Command,
    sections={
        "Images": ("count", "classes", "prompt_file", "negative", "size", "seed"),
        "Sampling": sampling_options.names,
        "Guidance": plan_options.names,
        "Device": (*device_options.names, "batch", "keep", "ray"),
        "Output": ("output", "format", "shard"),
    },
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--count", type=click.IntRange(min=1), required=True, help="Number of images.")
@click.option(
    "--classes",
    type=ClassesType(),
    metavar="LIST",
    help="Classes to sample, separated by commas: indices, ranges of them such as 0-99, or names. The images cycle "
    "through the classes, so each has the same share.  [default: all classes]",
)
@PROMPT_FILE
@NEGATIVE
@SIZE
@SEED
@sampling_options
@plan_options
@device_options
@BATCH
@KEEP
@click.option(
    "--ray",
    is_flag=False,
    flag_value="",
    metavar="[ADDRESS]",
    help="Sample by Ray on the cluster at ADDRESS, with a worker for each GPU, or for each group of --threads cores. "
    "Without ADDRESS on this machine alone.  [default: in this process]",
)
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    required=True,
    help="Folder of the images, new or of the same job.",
)
@click.option(
    "--format",
    type=click.Choice(["png", "webdataset", "npz"]),
    default="png",
    show_default=True,
    help="Form of the images: PNG files, tar shards of WebDataset, or one .npz as ADM's evaluation suite reads it.",
)
@click.option(
    "--shard",
    type=click.IntRange(min=1),
    help="Images in a shard, which is written when it is complete.  [default: about 512, fewer of large pictures]",
)
@QUIET
def sample(
    bundle: Path,
    count: int,
    classes: tuple[int | str, ...] | None,
    prompt_file: Path | None,
    negative: str | None,
    size: tuple[int, int] | None,
    seed: int,
    sampling: SamplingChoice,
    changes: PlanChanges,
    on: DeviceChoice,
    batch: int | None,
    keep: Any,
    ray: str | None,
    output: Path,
    format: Any,
    shard: int | None,
    quiet: bool,
) -> None:
    """Sample many images from BUNDLE into a folder, in shards.

    If the command is stopped, however it is, start it again: it goes on after the last complete
    shard, and the result is the same, bit for bit on one backend. An image depends only on its
    class or prompt and on its seed.

    \b
    Examples:
      sg-export sample xl-bundle --count 50000 --format npz -o samples
      sg-export sample xl-bundle --count 1000 --classes 207,0-9 -o dogs
      sg-export sample prx-bundle --count 5000 --prompt-file p.txt -o pictures
    """
    from sg_runtime.bulk import Request, run_job
    from sg_runtime.text import read_prompts

    churn = sampling.noise
    check_output_folder(output, "--output")
    request = Request(
        bundle,
        count,
        classes or (),
        () if prompt_file is None else read_prompts("--prompt-file", prompt_file),
        negative,
        seed,
        size,
        sampling.steps,
        sampling.sampler,
        churn,
        changes,
        format,
        shard,
        on.device,
        on.backend,
        batch,
        on.threads,
        keep,
    )
    with writing(output), progress(quiet) as report:
        done = run_job(request, output, cluster=ray, progress=with_rate(report, "images", resumes=True))
    if not quiet:
        if done.sampled:
            rate = done.sampled / done.seconds
            click.echo(f"sampled {done.sampled} images in {done.seconds:.3g} s: {rate:.3g} images/s", err=True)
        click.echo(f"{output}: {done.images} images")
