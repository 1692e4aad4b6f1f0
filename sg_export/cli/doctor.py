"""`sg-export doctor`."""

import json
import os
import platform
from importlib import metadata

import click

from sg_export.cli.base import Command, print_table
from sg_runtime import __version__

LIBRARIES = (
    ("numpy", "runtime", None),
    ("pillow", "images", None),
    ("onnxruntime", "backend onnxruntime", "ort"),
    ("torch", "building", "export"),
    ("onnx", "building", "export"),
    ("onnxscript", "building", "export"),
    ("onnx-ir", "building", "export"),
    ("safetensors", "building", "export"),
    ("polygraphy", "verify", "verify"),
)
"""Distribution, what needs it, and the extra that installs it."""


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Show the versions, backends and devices that are found here, and how to install what is missing.

    \b
    Example:
      sg-export doctor
    """
    versions = {name: _version(name) for name, _, _ in LIBRARIES}
    providers = _providers()
    backend = "onnxruntime on the CPU" if providers else None
    facts = {
        "sg-export": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "libraries": versions,
        "onnxruntime providers": providers,
        "device auto": backend,
    }
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    rows = [
        (name, versions[name] or f"missing: pip install 'sg-export[{extra}]'", need) for name, need, extra in LIBRARIES
    ]
    machine = f"Python {facts['python']}, {facts['platform']}, {facts['processors']} processors"
    click.echo(f"sg-export {__version__}; {machine}")
    print_table("", ("library", "version", "needed for"), rows)
    click.echo(f"ONNX Runtime providers: {', '.join(providers) or 'none'}")
    click.echo(f"device auto: {backend or 'none; pip install ' + repr('sg-export[ort]')}")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _providers() -> list[str]:
    try:
        import onnxruntime
    except ImportError:
        return []
    return list(onnxruntime.get_available_providers())
