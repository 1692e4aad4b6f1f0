"""TensorRT and TensorRT-RTX: whether a bundle's engines can run here, found out before one is opened."""

from collections.abc import Sequence
from importlib import import_module

from sg_runtime.backends.rtx_header import RTX_TARGETS, read_rtx_header
from sg_runtime.build_command import build_command
from sg_runtime.bundle import Bundle
from sg_runtime.devices.gpus import Gpu, find_gpus
from sg_runtime.errors import BundleError, MissingExtraError, UsageError
from sg_runtime.extras import install_command
from sg_runtime.manifest import ENGINE_NAMES, EngineFacts, EngineLibrary


def installed_version(library: EngineLibrary) -> str | None:
    """The library's version here; None where it is not installed, or cannot be loaded."""
    try:
        version: str = import_module(library).__version__
    except (ImportError, OSError):
        return None
    return version


def check_engines(bundle: Bundle, library: EngineLibrary, batch: int | None = None, number: int = 0) -> None:
    """Raise unless GPU `number` can run the bundle's engines of `library`, `batch` images at a time if that is given.

    UsageError where no profile has as many images; MissingExtraError where their library is not installed; BundleError
    for another version of it, for no GPU or another one than they were built for, and for a file that is none.
    """
    sizes = bundle.manifest.engine_batches(library)
    if batch is not None and batch not in sizes:
        raise UsageError(
            f"{bundle.path}: batch: expected {', '.join(map(str, sizes))}, for which the engines have profiles, found "
            f"{batch}; build it anew: {build_command(bundle.manifest, str(bundle.path), batch=batch)}"
        )
    version = installed_version(library)
    if version is None:
        raise MissingExtraError(
            f"{bundle.path}: its engines need {ENGINE_NAMES[library]}, which is not installed: "
            f"{install_command(library)}"
        )
    check_library(bundle, library, version, find_gpus()[number:])


def check_library(bundle: Bundle, library: EngineLibrary, version: str, gpus: Sequence[Gpu]) -> None:
    """Raise BundleError unless engines of `library` can run with its `version` on the first of `gpus`."""
    for engine in bundle.manifest.engines:
        if engine.library != library:
            continue
        _check_file(bundle, engine)
        name, where = ENGINE_NAMES[library], f"{bundle.path}: {engine.file}"
        targets = ", ".join(map(str, engine.compute_capabilities))
        if engine.version != version:
            raise BundleError(
                f"{where}: expected {name} {engine.version}, which built it, found {version}; "
                f"build it anew: {build_command(bundle.manifest, str(bundle.path))}"
            )
        if not gpus:
            raise BundleError(
                f"{where}: expected a GPU of compute capability {targets}, found none; run it on such a machine, or "
                f"build for the CPU: {build_command(bundle.manifest, str(bundle.path), target='onnxruntime')}"
            )
        found = gpus[0].compute_capability
        if found not in engine.compute_capabilities:
            target = None
            if library == "tensorrt_rtx" and found not in RTX_TARGETS:
                target = "tensorrt"
            command = build_command(bundle.manifest, str(bundle.path), target=target, sm=found)
            raise BundleError(
                f"{where}: expected a GPU of compute capability {targets}, found {gpus[0].name} of {found}; "
                f"build it for this one: {command}"
            )


def _check_file(bundle: Bundle, engine: EngineFacts) -> None:
    """Raise BundleError where the file says another thing than the manifest."""
    if engine.library != "tensorrt_rtx":
        return
    header = read_rtx_header(bundle.file(engine.file))
    if header.version != engine.version or not set(engine.compute_capabilities) <= set(header.compute_capabilities):
        raise BundleError(
            f"{bundle.path}: {engine.file}: expected a plan of TensorRT-RTX {engine.version} for "
            f"{engine.compute_capabilities}, found one of {header.version} for {header.compute_capabilities}; "
            f"build it anew: {build_command(bundle.manifest, str(bundle.path))}"
        )
