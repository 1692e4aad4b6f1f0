"""`sg-export generate`."""

import io
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sg_export.cli.errors import Command, Failure, check_output_file, writing
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
from sg_export.cli.types import class_name
from sg_export.progress import with_rate
from sg_runtime import __version__
from sg_runtime.guidance import PlanChanges
from sg_runtime.manifest import Labels
from sg_runtime.sampling import trajectory
from sg_runtime.text import read_prompts

if TYPE_CHECKING:
    from sg_runtime.manifest import GuidancePlan
    from sg_runtime.pipeline import Pipeline


@click.command(
    cls=Command,
    sections={
        "Images": ("classes", "prompts", "prompt_file", "negative", "size", "count", "seed"),
        "Sampling": sampling_options.names,
        "Guidance": plan_options.names,
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
@PROMPT_FILE
@NEGATIVE
@SIZE
@click.option(
    "--count",
    type=click.IntRange(min=1),
    help="Number of images.  [default: one for each class or prompt, at most 64]",
)
@SEED
@sampling_options
@plan_options
@device_options
@BATCH
@KEEP
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
@QUIET
def generate(
    bundle: Path,
    classes: tuple[str, ...],
    prompts: tuple[str, ...],
    prompt_file: Path | None,
    negative: str | None,
    size: tuple[int, int] | None,
    count: int | None,
    seed: int,
    sampling: SamplingChoice,
    changes: PlanChanges,
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

    churn = sampling.noise
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
    texts = [*prompts, *(() if prompt_file is None else read_prompts("--prompt-file", prompt_file))]
    chosen = _classes(pipe, classes, texts, negative)
    total = count or min(len(chosen), 64)
    given = [chosen[k % len(chosen)] for k in range(total)]
    seeds = [(seed + k) % 2**64 for k in range(total)]
    plan = changes.of(pipe.bundle.manifest)
    began = time.monotonic()
    with progress(quiet) as report:
        conditions: Any = given
        if texts:
            report("encoding prompts", 0, None)
            conditions = pipe.from_text(given, "" if negative is None and plan.row.null_weak else negative)
        x = pipe.sample(
            conditions,
            seeds,
            steps=sampling.steps,
            sampler=sampling.sampler,
            guidance=plan,
            churn=churn,
            progress=with_rate(report, "steps", _steps_per_evaluation(pipe, sampling)),
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
    return [class_name(name) for name in classes] or list(range(conditions.count))


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


def _steps_per_evaluation(pipe: "Pipeline", chosen: SamplingChoice) -> float:
    sampling = pipe.bundle.manifest.sampling
    run = replace(sampling, steps=chosen.steps or sampling.steps, sampler=chosen.sampler or sampling.sampler)
    return run.steps / len(trajectory(run, pipe.bundle.manifest.model.prediction).updates)
