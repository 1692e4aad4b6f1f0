"""`sg-export doctor`."""

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sg_export.cli.errors import Command
from sg_export.cli.output import print_table, with_options
from sg_runtime import __version__
from sg_runtime.backends import choose_onnx_backend
from sg_runtime.backends.ort_check import two_wheels
from sg_runtime.extras import LIBRARIES, install_extra, outdated

if TYPE_CHECKING:
    from sg_runtime.bundle import Bundle


@click.command(cls=Command)
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(bundle: Path | None, as_json: bool) -> None:
    """Show versions, backends and devices found here, and how to install missing libraries.

    With a BUNDLE, show which backend would run it here, or why none can.

    \b
    Examples:
      sg-export doctor
      sg-export doctor glyphs-bundle
    """
    if bundle is not None:
        from sg_runtime.backends import choose_backend
        from sg_runtime.bundle import Bundle

        opened = Bundle.open(bundle)
        choice = choose_backend(opened)
        click.echo(f"{bundle}: device auto is {choice.name}")
        for reason in choice.rejected:
            click.echo(f"not {with_options(reason)}")
        for line in _parts(opened, choice.name):
            click.echo(line)
        return
    versions = {library.distribution: _version(library.distribution) for library in LIBRARIES}
    providers = _providers()
    gpus = _gpus()
    chosen = choose_onnx_backend()
    backend = chosen.name if chosen is not None else None
    reasons = chosen.rejected if chosen is not None else ()
    wheels, cuda = two_wheels(), _cuda()
    faults = [*([wheels] if wheels else []), *outdated()]
    facts = {
        "sg-export": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "libraries": versions,
        "onnxruntime providers": providers,
        "gpus": gpus,
        "cuda of the driver": cuda,
        "device auto": backend,
        "reasons against others": reasons,
        "faults": faults,
    }
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    rows = [
        (
            library.distribution,
            versions[library.distribution] or f"missing: {install_extra(library.extra or '')}",
            library.use,
        )
        for library in LIBRARIES
    ]
    machine = f"Python {facts['python']}, {facts['platform']}, {facts['processors']} processors"
    click.echo(f"sg-export {__version__}; {machine}")
    print_table("", ("library", "version", "needed for"), rows)
    click.echo(f"ONNX Runtime providers: {', '.join(providers) or 'none'}")
    found = ", ".join(gpus) if gpus else "none found" if gpus is not None else "unknown without cuda-bindings"
    click.echo(f"NVIDIA GPUs: {found}")
    if cuda is not None:
        click.echo(f"NVIDIA's driver: for CUDA up to {cuda}")
    auto = backend or f"none; {install_extra('ort')}"
    click.echo(f"device auto: {auto}, for bundles with ONNX graphs")
    for reason in reasons:
        click.echo(f"not {reason}")
    for fault in faults:
        click.echo(f"fault: {fault}")
    click.echo("sg-export doctor BUNDLE says what would run a bundle here, and why nothing faster")


def _parts(bundle: "Bundle", backend: str) -> list[str]:
    """Return a line for each part of a bundle: what it needs, or why it does not run here."""
    from sg_runtime.backends.choice import check_part
    from sg_runtime.errors import SgError
    from sg_runtime.extras import require
    from sg_runtime.manifest import TextEncoder
    from sg_runtime.run.budget import part_bytes

    lines = []
    for name, part in bundle.manifest.parts.items():
        try:
            check_part(bundle, part, backend)
            if isinstance(part, TextEncoder):
                for module in ("tokenizers", *(() if part.cleaning == "none" else ("ftfy",))):
                    require(module, "text")
        except SgError as error:
            lines.append(f"not the part {name}: {with_options(str(error))}")
        else:
            lines.append(f"part {name}: {part_bytes(bundle.manifest, name) / 1e6:,.0f} MB with activations")
    return lines


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> list[str] | None:
    """Return names and compute capabilities of the GPUs; None if the driver cannot be asked."""
    from sg_runtime.devices.gpus import find_gpus
    from sg_runtime.errors import SgError

    try:
        return [f"{gpu.name} (SM {gpu.compute_capability})" for gpu in find_gpus()]
    except SgError:
        return None


def _cuda() -> str | None:
    """Return the latest CUDA version that the driver supports; None if it cannot be asked."""
    from sg_runtime.devices.gpus import driver_cuda
    from sg_runtime.errors import SgError

    try:
        major, minor = driver_cuda()
    except SgError:
        return None
    return f"{major}.{minor}"


def _providers() -> list[str]:
    try:
        import onnxruntime
    except ImportError:
        return []
    return list(onnxruntime.get_available_providers())
