"""`sg-export triton`."""

from pathlib import Path

import click

from sg_export.cli.errors import Command
from sg_export.cli.options import DeviceChoice, device_options
from sg_export.cli.run_options import MAX_STEPS, RUN_BATCH, WINDOW


@click.command(
    cls=Command,
    sections={
        "Repository": ("output", "name", "link", "force"),
        "Runs": ("batch", "window", "queue", "timeout", "max_steps"),
        "Instances": ("instances", *device_options.names),
    },
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    required=True,
    metavar="REPOSITORY",
    help="Folder of the model repository; it may hold other models.",
)
@click.option("--name", help="Name of the model for clients.  [default: the name of the bundle's folder]")
@click.option(
    "--link",
    is_flag=True,
    help="Link to the bundle instead of copying it. The server must find the bundle at the same path.",
)
@click.option("--force", is_flag=True, help="Replace a model of this name that sg-export wrote.")
@RUN_BATCH
@WINDOW
@click.option(
    "--queue",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Largest number of requests that wait.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=1e-6, max=86400),
    default=60.0,
    show_default=True,
    help="Seconds within which the run of a request must begin.",
)
@MAX_STEPS
@click.option(
    "--instances",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Number of processes that run the bundle, on each GPU or on the CPU.",
)
@device_options
def triton(
    bundle: Path,
    output: Path,
    name: str | None,
    link: bool,
    force: bool,
    batch: int | None,
    window: float,
    queue: int,
    timeout: float,
    max_steps: int,
    instances: int,
    on: DeviceChoice,
) -> None:
    """Write a model repository of NVIDIA's Triton Inference Server that serves BUNDLE.

    Triton's Python backend runs the bundle by sg_runtime, which its Python must have. Triton
    batches requests and fills its queue; the device is that of its instances: by default GPUs for
    engines and for graphs of onnxruntime-cuda, else the CPU.

    \b
    Example:
      sg-export triton glyphs-bundle -o models
    """
    from sg_export.triton import Settings, write_repository

    settings = Settings(batch, window, queue, timeout, max_steps, instances, on.device, on.backend, on.threads)
    click.echo(write_repository(bundle, output, settings, name=name, link=link, force=force))
