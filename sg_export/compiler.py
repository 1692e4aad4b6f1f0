"""Compilation of a checkpoint to a bundle: load, trace, check, pack.

The work is done in a temporary folder, which is renamed to the bundle at the end.
"""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from sg_export.checkpoint import checkpoint_files, sidecar_of
from sg_export.graph.half import fp32_layers
from sg_export.graph.spec import GraphSpec, guided_alone
from sg_export.loading import load_model, load_weak
from sg_export.options.compile import CompileOptions
from sg_export.packing.engines import check_libraries, check_timing_cache
from sg_export.packing.folder import check_output, check_place, new_folder
from sg_export.packing.pack import add_engines, engine_source, files_of, manifest_of, pack, trace_all
from sg_export.packing.parts import add_parts, choose_parts, prompts_of
from sg_export.packing.sizes import SizeBuild, choose_sizes
from sg_export.progress import Counted, Report, silent
from sg_export.reference import REFERENCES
from sg_runtime.bundle import Bundle
from sg_runtime.errors import CheckpointError, UsageError
from sg_runtime.manifest import MANIFEST_FILE, write_manifest


def compile(checkpoint: str | Path, options: CompileOptions, report: Report = silent) -> Bundle:
    """Compile a checkpoint into a bundle.

    checkpoint: path of a checkpoint, see `read_checkpoint`, or name of a reference model.
    report: called with a line at the start of each stage.

    Raises UsageError for a request that is not supported, CheckpointError for an unusable
    checkpoint, ExportError if a graph cannot be made or does not agree with PyTorch. A failed
    compilation leaves no files behind. An existing bundle stays until its successor is complete.
    """
    inputs = [*inputs_of(checkpoint, options.weak_checkpoint, weights=options.weights)]
    inputs += filter(None, (options.pipeline, options.vae))
    if options.quantize is not None:
        inputs += filter(None, options.quantize.files)
    check_output(options.output, options.force, inputs)
    check_place(options.output)
    check_libraries(options.libraries, options.products)
    if options.engines is not None:
        check_timing_cache(options.engines)
    if options.quantize is not None:
        options.quantize.check_files()
    report(f"loading {checkpoint}", 0, None)
    loaded = load_model(checkpoint, weights=options.weights, overrides=options.overrides)
    weak = None
    if options.weak_checkpoint is not None:
        report(f"loading {options.weak_checkpoint}", 0, None)
        weak = load_weak(options.weak_checkpoint, loaded, options.weights, options.overrides)
    builds = choose_sizes(loaded, weak, options)
    parts = choose_parts(checkpoint, builds, options)
    prompts = None if options.quantize is None else prompts_of(parts, options.quantize.prompts)
    layers = fp32_layers(loaded.model, options.precision, half_only=options.half_only)
    sources = {spec: build.source(spec) for build in builds for spec in build.specs}
    files = files_of(list(sources), symbolic=bool(options.libraries))
    engine_files = {
        name: graphs
        for name, graphs in files.items()
        if options.libraries and (graphs[0].hoisted or graphs[0].kind == "guided" or not guided_alone(builds[0].plan))
    }
    passes = 1 if options.quantize is None else 2
    tracings = len({*sources.values()})
    stages = tracings + passes * (1 + len(sources)) + len(engine_files) * len(options.libraries)
    counted = Counted(report, stages + sum(part.stages(options) for part in parts.values()))
    with new_folder(options.output, options.force, inputs) as folder:
        traced = trace_all(sources, files, options, counted)
        quantization = None
        if options.quantize is not None:
            from sg_export.quantize.rewrite import quantized_models
            from sg_export.quantize.search import decide_quantization  # needs ONNX Runtime

            with tempfile.TemporaryDirectory(dir=folder, prefix=".fp32-") as scratch:
                reference = _reference_bundle(builds, files, traced, options, Path(scratch), counted)
                quantization, ranges = decide_quantization(
                    reference, options.quantize, options.precision, layers, counted.stage, prompts
                )
                traced = quantized_models(reference, files, quantization, ranges)
        written = pack(sources, files, traced, layers, options, folder, counted)
        engines = []
        for build in builds:
            own = [(name, graphs) for name, graphs in engine_files.items() if graphs[0] in build.specs]
            holders = [engine_source(folder, name, graphs, written) for name, graphs in own]
            engines.append(add_engines(build.loaded.facts, holders, options, folder, counted))
        text, decoder = add_parts(parts, options, folder, counted)
        if not options.has_onnx:
            shutil.rmtree(folder / "graphs")
        manifest = manifest_of(builds, options, layers, quantization, written, engines, folder, text, decoder)
        write_manifest(manifest, folder / MANIFEST_FILE)
    return Bundle(options.output, manifest)


def inputs_of(*checkpoints: str | Path | None, weights: str | None = None) -> list[Path]:
    """Return the files that are read for these checkpoints, whether or not they exist."""
    files = [Path(name) for name in checkpoints if name is not None and str(name) not in REFERENCES]
    shards: list[Path] = []
    for path in files:
        with suppress(CheckpointError, UsageError, OSError):  # of what cannot be read, which is reported later
            shards += checkpoint_files(path, weights).all
    return files + shards + [sidecar_of(path) for path in files]


def _reference_bundle(
    builds: Sequence[SizeBuild],
    files: Mapping[str, Sequence[GraphSpec]],
    traced: Mapping[str, ir.Model],
    options: CompileOptions,
    folder: Path,
    counted: Counted,
) -> Bundle:
    """Write the FP32 graphs as a bundle in `folder`, the reference of the quantization."""
    engines = None if options.engines is None else replace(options.engines, keep_onnx=True)
    exact = replace(options, precision="fp32", quantize=None, engines=engines)
    sources = {spec: build.source(spec) for build in builds for spec in build.specs}
    written = pack(sources, files, traced, (), exact, folder, counted)
    return Bundle(folder, manifest_of(builds, exact, (), None, written, [()] * len(builds), folder))
