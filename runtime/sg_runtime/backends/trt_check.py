"""Check that a bundle's TensorRT or TensorRT-RTX engines can run here, before one is opened."""

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
    """Return the installed version of the library, None if it is missing or cannot be loaded."""
    try:
        version: str = import_module(library).__version__
    except (ImportError, OSError):
        return None
    return version


def check_engines(bundle: Bundle, library: EngineLibrary, batch: int | None = None, number: int = 0) -> None:
    """Raise unless GPU `number` can run the bundle's engines of `library`.

    batch: number of images at a time, None for any. Raises UsageError if no profile has that
    number. Raises MissingExtraError if the library is not installed. Raises BundleError if the
    library has another version, if there is no GPU, if the engines were built for another GPU, or
    if a file is not an engine.
    """
    sizes = bundle.manifest.engine_batches(library)
    if batch is not None and batch not in sizes:
        raise UsageError(
            f"{bundle.path}: batch: expected {', '.join(map(str, sizes))} (the engines' profiles), found {batch}; "
            f"build it again: {build_command(bundle.manifest, str(bundle.path), batch=batch)}"
        )
    version = installed_version(library)
    if version is None:
        raise MissingExtraError(
            f"{bundle.path}: its engines need {ENGINE_NAMES[library]}, which is not installed: "
            f"{install_command(library)}"
        )
    check_library(bundle, library, version, find_gpus()[number:])


def check_library(bundle: Bundle, library: EngineLibrary, version: str, gpus: Sequence[Gpu]) -> None:
    """Raise BundleError unless version `version` of `library` can run its engines on `gpus[0]`."""
    for engine in bundle.manifest.engines_of_parts:
        if engine.library != library:
            continue
        _check_file(bundle, engine)
        name, where = ENGINE_NAMES[library], f"{bundle.path}: {engine.file}"
        targets = ", ".join(map(str, engine.compute_capabilities))
        if engine.version != version:
            raise BundleError(
                f"{where}: expected {name} {engine.version}, which built it, found {version}; "
                f"build it again: {build_command(bundle.manifest, str(bundle.path))}"
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
    """Raise BundleError if the header of the file contradicts the manifest."""
    if engine.library != "tensorrt_rtx":
        return
    header = read_rtx_header(bundle.file(engine.file))
    if header.version != engine.version or not set(engine.compute_capabilities) <= set(header.compute_capabilities):
        raise BundleError(
            f"{bundle.path}: {engine.file}: expected a plan of TensorRT-RTX {engine.version} for "
            f"{engine.compute_capabilities}, found one of {header.version} for {header.compute_capabilities}; "
            f"build it again: {build_command(bundle.manifest, str(bundle.path))}"
        )
