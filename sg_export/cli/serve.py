"""`sg-export serve`."""

from pathlib import Path

import click

from sg_export.cli.errors import Command
from sg_export.cli.options import DeviceChoice, device_options
from sg_export.cli.run_options import MAX_STEPS, RUN_BATCH, WINDOW
from sg_export.cli.types import CountRangeType


@click.command(
    cls=Command,
    sections={
        "HTTP": ("host", "port", "images", "max_steps", "body", "timeout"),
        "Runs": ("batch", "window", "queue", "pad"),
        "Replicas": ("replicas", "gpus", "cluster"),
        "Device": device_options.names,
    },
)
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0 for any that is free.",
)
@click.option(
    "--images",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Largest number of images of a request.",
)
@MAX_STEPS
@click.option(
    "--body",
    type=click.IntRange(min=1),
    default=65536,
    show_default=True,
    help="Largest body of a request in bytes.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds within which the last run of a request must begin.",
)
@RUN_BATCH
@WINDOW
@click.option(
    "--queue",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Largest number of images that wait in a replica.",
)
@click.option(
    "--pad/--no-pad",
    default=True,
    show_default=True,
    help="Fill every run up to the batch, so that an image is the same bit for bit whatever it was batched with. "
    "Without, it is the same up to rounding.",
)
@click.option(
    "--replicas",
    type=CountRangeType(),
    default=(1, 1),
    help="Number of replicas of each bundle, or LEAST:MOST to start and stop them as requests come.  [default: 1]",
)
@click.option(
    "--gpus",
    type=click.FloatRange(min=0),
    help="GPUs that Ray reserves for a replica; 0.5 lets two share one.  [default: 1 if Ray finds GPUs and --device is "
    "not cpu]",
)
@click.option(
    "--cluster",
    metavar="ADDRESS",
    help="Address of a running cluster of Ray that runs the replicas.  [default: this machine alone]",
)
@device_options
def serve(
    bundles: tuple[Path, ...],
    host: str,
    port: int,
    images: int,
    max_steps: int,
    body: int,
    timeout: float,
    batch: int | None,
    window: float,
    queue: int,
    pad: bool,
    replicas: tuple[int, int],
    gpus: float | None,
    cluster: str | None,
    on: DeviceChoice,
) -> None:
    """Serve BUNDLES by HTTP, by the names of their folders.

    POST /v1/images/generations and GET /v1/models are those of OpenAI's interface. GET / is a page
    to try them on. GET /health, /ready and /metrics are for the machines around it. Logs are JSON
    lines on standard error. If the environment variable SG_EXPORT_API_KEY is set, clients must
    give it as a bearer token. Ctrl-C ends the server and its replicas.

    \b
    Examples:
      sg-export serve glyphs-bundle
      sg-export serve glyphs-bundle prx-bundle --port 8080 --replicas 1:4
    """
    from sg_runtime.extras import require

    for library in ("starlette", "uvicorn", "prometheus_client"):
        require(library)
    from sg_export.serving.app import Limits
    from sg_export.serving.deployment import ReplicaSettings, named
    from sg_export.serving.server import run
    from sg_runtime.service import ServiceSettings

    settings = ReplicaSettings(
        ServiceSettings(window, queue, pad), replicas, on.device, on.backend, batch, on.threads, gpus
    )
    limits = Limits(images, max_steps, body, timeout)
    run(named(bundles), host, port, settings, limits, cluster=cluster, started=lambda address: click.echo(address))
