"""Engines of a bundle's graphs: profiles, cache, build, and checks that do not run the engines."""

import errno
import functools
import logging
import mmap
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from sg_engines.cache import EngineCache, EngineKey
from sg_engines.child import BuildFigures, build_in_child
from sg_engines.targets import check_gpu
from sg_engines.trt import EngineRecipe, Shape, builder_flags, has_timing_cache
from sg_export.graph.spec import GraphSpec, graph_inputs, keep_sizes
from sg_export.options.engines import EngineOptions
from sg_export.progress import Report
from sg_runtime.backends.rtx_header import read_rtx_header
from sg_runtime.devices.gpus import Gpu, find_gpus
from sg_runtime.errors import EngineError, MissingExtraError, UsageError
from sg_runtime.extras import outdated, require
from sg_runtime.files import cache_folder, check_room, sha256_of
from sg_runtime.manifest import ENGINE_NAMES, EngineFacts, EngineLibrary, GraphKind, ModelFacts, Profile

LOG = logging.getLogger("sg_export")

FUSED_ATTENTION = rb"(?:#include <fmha_v2/\w+\.h>\s*)+"
"""Start of the source of a fused attention kernel in a TensorRT-RTX plan.

TensorRT-RTX compiles the source on the GPU. A plan has one source for each attention and profile
(observed in version 1.7).
"""

CODE_BYTES = 16 << 20
"""Upper limit of a profile's kernels and tables in a plan, in bytes.

They take 4 to 9 MB for glyphs, and 15 MB for XL/2 (TensorRT-RTX 1.7).
"""


@dataclass(frozen=True, slots=True)
class EngineSource:
    """An ONNX file with symbolic batch size and numbers of kept tokens.

    path: the ONNX file.
    weights: the file of its weights.
    specs: the graphs of the bundle that the file covers.
    half_attentions: number of attentions in half precision.
    weight_bytes: size of its weights, each counted once.
    """

    path: Path
    weights: Path
    specs: tuple[GraphSpec, ...]
    half_attentions: int
    weight_bytes: int


def check_libraries(libraries: Sequence[EngineLibrary], products: Iterable[str] = ()) -> None:
    """Raise an error if these libraries cannot build engines on this machine.

    products: types of the graphs' matrix products. The error is MissingExtraError if a library is
    not installed or too old, EngineError if TensorRT finds no GPU, and UsageError if
    TensorRT's GPU lacks one of these types.
    """
    for library in libraries:
        if library == "tensorrt":
            gpus = find_gpus()
            if not gpus:
                raise EngineError(
                    "`libraries` tensorrt: TensorRT builds on the GPU that the engine is for, found no GPU: build on "
                    "the machine with that GPU, or give `libraries` tensorrt_rtx, which needs no GPU, or build ONNX "
                    "graphs"
                )
            check_gpu(gpus[0].name, gpus[0].compute_capability, products)
        require(library)
        for message in outdated(library.replace("_", "-")):
            raise MissingExtraError(message)


def check_timing_cache(options: EngineOptions) -> None:
    """Raise UsageError if the timing cache cannot be read or written, unless no library uses it."""
    path = options.timing_cache
    if path is None or not any(has_timing_cache(import_module(library)) for library in options.libraries):
        return
    try:
        if path.exists():
            path.open("rb").close()
        if not path.absolute().parent.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        check_room(path.absolute().parent)
    except OSError as error:
        raise UsageError(
            f"`timing_cache` {path}: cannot be read and written ({error.strerror}): give another file"
        ) from None


def build_engines(
    sources: Sequence[EngineSource],
    model: ModelFacts,
    hoisted_rows: Mapping[GraphKind, int],
    options: EngineOptions,
    folder: Path,
    report: Report,
) -> tuple[EngineFacts, ...]:
    """Build an engine of every source with every library in `folder`, or take it from the cache.

    hoisted_rows: number of rows in one run of a hoisted graph, by kind.
    report: called with every phase of a build, and with the number of finished engines.

    Raises EngineError if an engine cannot be built or fails a check.
    """
    folder.mkdir(exist_ok=True)
    cache = _open_cache(options.cache)
    engines: list[EngineFacts] = []
    total = len(options.libraries) * len(sources)
    weights = {path: sha256_of(path) for path in {source.weights for source in sources}}
    for library in options.libraries:
        trt = import_module(library)
        if options.timing_cache is not None and not has_timing_cache(trt):
            LOG.warning("`timing_cache`: %s has no timing cache; the file is not used", ENGINE_NAMES[library])
        gpu = find_gpus()[0] if library == "tensorrt" else None
        for source in sources:
            profiles = _profiles(source, sorted(set(options.batch)), hoisted_rows)
            plan = EngineRecipe(
                tuple(profile_shapes(profile, source.specs[0], model) for profile in profiles),
                tuple(sorted(set(options.compute_capabilities))),
                options.workspace,
                options.timing_cache if has_timing_cache(trt) else None,
            )
            key = _key(source, weights[source.weights], library, trt, plan, gpu)
            path = folder / f"{source.path.stem}.{key.digest[:16]}.engine"
            if cache is not None and LOG.isEnabledFor(logging.INFO):  # `explain` reads the entire engine
                LOG.info("%s: %s", path.name, cache.explain(key))
            report(f"building {source.path.stem}", len(engines), total)
            figures = None if cache is None else cache.fetch(key, path)
            cached = figures is not None
            if figures is None:
                stage = f"building {source.path.stem}"
                phases = functools.partial(_report_phase, report, stage, len(engines), total)
                figures = build_in_child(library, source.path, plan, path, phases)
            engines.append(_facts(source, library, trt.__version__, profiles, plan, path, figures, gpu, options))
            if cache is not None and not cached:
                _store(cache, key, path, figures)
    return tuple(engines)


def _open_cache(folder: Path | None) -> EngineCache | None:
    """Return the cache in `folder`, by default the user's. A user without a home has none."""
    try:
        return EngineCache(folder or cache_folder())
    except OSError as error:
        LOG.warning("engine cache %s: not used (%s)", error.filename, error.strerror)
        return None


def _store(cache: EngineCache, key: EngineKey, engine: Path, figures: BuildFigures) -> None:
    """Store an engine. A cache is not worth a build, so an error is only a warning."""
    try:
        cache.store(key, engine, figures)
    except OSError as error:
        LOG.warning("engine cache %s: %s is not kept (%s)", cache.folder, key.name, error.strerror or error)


def _report_phase(report: Report, stage: str, number: int, total: int, phase: str, done: int, steps: int) -> None:
    report(f"{stage}: {phase}", number, total, done / steps)


def _profiles(
    source: EngineSource, batches: Sequence[int], hoisted_rows: Mapping[GraphKind, int]
) -> tuple[Profile, ...]:
    if not source.specs[0].levels:  # text encoder and decoder take one row
        return (Profile(hoisted_rows.get(source.specs[0].kind, 1), ()),)
    keeps = [tuple(level.keep for level in spec.levels) for spec in source.specs]
    return tuple(Profile(batch, keep) for batch in batches for keep in keeps)


def profile_shapes(profile: Profile, spec: GraphSpec, model: ModelFacts) -> dict[str, Shape]:
    """Return the shape in this profile of every input with symbolic sizes."""
    sizes = keep_sizes(spec, profile.keep) | {"B": profile.batch, "S": profile.batch}
    return {
        tensor.name: tuple(size if isinstance(size, int) else sizes[size] for size in tensor.shape)
        for tensor in graph_inputs(spec, model, None, symbolic_keep=True)
        if any(isinstance(size, str) for size in tensor.shape)
    }


def _key(
    source: EngineSource, weights: str, library: EngineLibrary, trt: Any, plan: EngineRecipe, gpu: Gpu | None
) -> EngineKey:
    return EngineKey(
        name=source.path.stem,
        graph=sha256_of(source.path),
        weights=weights,
        library=library,
        version=trt.__version__,
        profiles=plan.profiles,
        compute_capabilities=plan.compute_capabilities,
        workspace=plan.workspace,
        flags=builder_flags(trt),
        gpu="" if gpu is None else f"{gpu.name}, {gpu.compute_capability}",
    )


def _facts(
    source: EngineSource,
    library: EngineLibrary,
    version: str,
    profiles: tuple[Profile, ...],
    plan: EngineRecipe,
    path: Path,
    figures: BuildFigures,
    gpu: Gpu | None,
    options: EngineOptions,
) -> EngineFacts:
    """Check the engine as far as possible without running it, and return its facts.

    Raises EngineError if its size, version, GPUs or fused attention kernels are not as expected.
    """
    size = path.stat().st_size
    least, most = source.weight_bytes, 1.5 * source.weight_bytes + len(profiles) * CODE_BYTES
    if not least <= size <= most:
        raise EngineError(
            f"{path.name}: expected {least / 1e6:.1f} to {most / 1e6:.1f} MB for weights of {least / 1e6:.1f} MB, "
            f"found {size / 1e6:.1f} MB: weights are missing, or have another type; please report this"
        )
    targets, fused = (gpu.compute_capability,) if gpu else plan.compute_capabilities, None
    if library == "tensorrt_rtx":
        header = read_rtx_header(path)
        targets = plan.compute_capabilities or header.compute_capabilities
        if header.version != version or not set(targets) <= set(header.compute_capabilities):
            raise EngineError(
                f"{path.name}: expected a plan of TensorRT-RTX {version} for {targets}, found one of {header.version} "
                f"for {header.compute_capabilities}; please report this"
            )
        fused, wanted = count_fused_attention(path), source.half_attentions * len(profiles)
        if fused < wanted:
            message = f"{path.name}: expected {wanted} fused attention kernels in all profiles, found {fused}"
            if not options.allow_unfused:
                raise EngineError(f"{message}: attention would be slow; to build anyway, give `allow_unfused`")
            LOG.warning("%s", message)
    spec = source.specs[0]
    return EngineFacts(
        kind=spec.kind,
        network=spec.network,
        null_weak=spec.null_weak,
        file=f"engines/{path.name}",
        library=library,
        version=version,
        compute_capabilities=tuple(targets),
        profiles=profiles,
        fused_attention=fused,
        build_seconds=round(figures.seconds, 1),
        build_memory_bytes=figures.memory_bytes,
    )


def count_fused_attention(engine: Path) -> int:
    """Return the number of fused attention kernels in a TensorRT-RTX plan."""
    with engine.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return sum(1 for _ in re.finditer(FUSED_ATTENTION, content))
