"""From a checkpoint to a bundle: load, trace, check and pack, in a temporary folder that becomes the bundle."""

import itertools
import math
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import onnx_ir as ir
import torch

from sg_engines.ort import run_once
from sg_export.cost.count import count_cost
from sg_export.graph import spec as graphs
from sg_export.graph.emulate import emulated
from sg_export.graph.half import check_types, fp32_layers, half_attentions, to_half
from sg_export.graph.overflow import first_overflow
from sg_export.graph.spec import GraphSpec
from sg_export.graph.trace import trace
from sg_export.graph.weights import write_graphs
from sg_export.loading import LoadedModel, load_model, load_weak
from sg_export.options.compile import DEFAULT_ENGINE_BATCH, DEFAULT_SPARSITY, CompileOptions
from sg_export.packing.engines import EngineOptions, EngineSource, build_engines, check_libraries
from sg_export.packing.folder import check_output, new_folder
from sg_export.progress import Report, silent
from sg_runtime import __version__
from sg_runtime.bundle import Bundle
from sg_runtime.errors import ExportError, MissingExtraError, UsageError
from sg_runtime.files import sha256_of
from sg_runtime.guidance import scale_ends
from sg_runtime.manifest import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    Cost,
    EngineFacts,
    FileFacts,
    GraphFacts,
    GuidancePlan,
    Karras,
    Level,
    Manifest,
    NetworkName,
    Precision,
    Quantization,
    Sampling,
    write_manifest,
)

CONDITION_ROWS = 40
"""Rows of `condition` in one run: fixed, so that a row is the same whatever is computed beside it, and as many as the
default run has steps, so that its weights are read once."""

MAX_BUILD_ERROR: Mapping[Precision, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 5e-2}
"""Relative L2 distance to PyTorch above which a graph is wrong: rounding stays below it, a fault far above."""

MAX_QUANTIZED_ERROR = 0.5
"""The same for a quantized graph, whose quality its gates decide on real inputs."""

EDM_NOISE_LEVELS = Karras(0.002, 80.0, 7.0)
"""Defaults of NVlabs/edm (`generate.py`, `edm_sampler`), which both families' samplers share."""

Networks = Mapping[NetworkName, LoadedModel | None]

WEIGHTS_FILES: Mapping[NetworkName, str] = {"main": "weights.bin", "weak": "weights-weak.bin"}


def compile(checkpoint: str | Path, options: CompileOptions, report: Report = silent) -> Bundle:
    """Compile a checkpoint, or a reference model by its name, into a bundle.

    report: called with a line at the start of each stage. Raises UsageError for a request that cannot be served,
    CheckpointError for an unusable checkpoint, ExportError where a graph cannot be made or does not agree with PyTorch.
    Nothing is left behind on failure, and an existing bundle stays until its successor is whole.
    """
    check_output(options.output, options.force)
    check_libraries(options.libraries)
    if options.quantize is not None:
        options.quantize.check_files()
    report(f"loading {checkpoint}", 0, None)
    loaded = load_model(checkpoint, weights=options.weights, overrides=options.overrides)
    weak = None
    if options.weak_checkpoint is not None:
        report(f"loading {options.weak_checkpoint}", 0, None)
        weak = load_weak(options.weak_checkpoint, loaded, options.weights, options.overrides)
    plan, specs = choose_graphs(loaded, weak, options)
    if not options.has_onnx and graphs.guided_alone(plan):
        specs = [spec for spec in specs if spec.kind in ("condition", "guided")]
    layers = fp32_layers(loaded.model, options.precision, half_only=options.half_only)
    networks: Networks = {"main": loaded, "weak": weak}
    files = _files(specs, symbolic=bool(options.libraries))
    engine_files = {
        name: own
        for name, own in files.items()
        if options.libraries and (own[0].kind in ("condition", "guided") or not graphs.guided_alone(plan))
    }
    passes = 1 if options.quantize is None else 2
    tracings = len({spec.network for spec in specs})
    counted = _Counted(report, tracings + passes * (1 + len(specs)) + len(engine_files) * len(options.libraries))
    with new_folder(options.output, options.force) as folder:
        traced = _trace(networks, files, options, counted)
        quantization = None
        if options.quantize is not None:
            from sg_export.quantize.search import decide_quantization, quantized_models  # needs ONNX Runtime

            with tempfile.TemporaryDirectory(dir=folder, prefix=".fp32-") as scratch:
                exact = replace(options, precision="fp32", quantize=None, keep_onnx=bool(options.libraries))
                written = _pack(networks, files, traced, (), exact, Path(scratch), counted)
                manifest = _manifest(loaded, weak, plan, exact, (), None, written, (), Path(scratch))
                reference = Bundle(Path(scratch), manifest)
                quantization, ranges = decide_quantization(
                    reference, options.quantize, options.precision, layers, counted.stage
                )
                traced = quantized_models(reference, files, quantization, ranges)
        written = _pack(networks, files, traced, layers, options, folder, counted)
        sources = [_engine_source(folder, name, own, written) for name, own in engine_files.items()]
        engines = _engines(loaded, sources, options, folder, counted)
        if not options.has_onnx:
            shutil.rmtree(folder / "graphs")
        manifest = _manifest(loaded, weak, plan, options, layers, quantization, written, engines, folder)
        write_manifest(manifest, folder / MANIFEST_FILE)
    return Bundle(options.output, manifest)


def _manifest(
    loaded: LoadedModel,
    weak: LoadedModel | None,
    plan: GuidancePlan,
    options: CompileOptions,
    layers: tuple[str, ...],
    quantization: Quantization | None,
    written: "_Written",
    engines: tuple[EngineFacts, ...],
    folder: Path,
) -> Manifest:
    """What is in `folder`."""
    return Manifest(
        schema_version=SCHEMA_VERSION,
        created_by=f"sg-export {__version__}",
        model=loaded.facts,
        guidance=plan,
        sampling=(
            Sampling("euler", options.steps, None)
            if loaded.facts.prediction == "flow"
            else Sampling("heun", options.steps, EDM_NOISE_LEVELS)
        ),
        precision=options.precision,
        fp32_layers=layers,
        quantization=quantization,
        opset=options.opset,
        batch=options.graph_batch,
        condition_rows=CONDITION_ROWS,
        graphs=written.facts,
        engines=engines,
        source=loaded.source,
        weak_source=None if weak is None else weak.source,
        files={
            path.relative_to(folder).as_posix(): FileFacts(path.stat().st_size, sha256_of(path))
            for path in sorted((*(folder / "graphs").glob("*"), *(folder / "engines").glob("*")))
        },
    )


def choose_graphs(
    loaded: LoadedModel, weak_loaded: LoadedModel | None, options: CompileOptions
) -> tuple[GuidancePlan, list[GraphSpec]]:
    """The bundle's guidance plan and its graphs. Raises UsageError for what the model or this version cannot do."""
    mode = options.mode
    strong = _levels(loaded, options.strong_sparsity)
    weak = strong
    if mode not in ("none", "cfg"):
        weak = _levels(weak_loaded or loaded, options.sparsity or (DEFAULT_SPARSITY,))
    if weak_loaded is None:
        _check_distinct({*strong, *weak})
    if mode in ("sg", "cfg+sg") and options.schedule == "constant":
        for level in weak:
            if level.sparsity == 0:
                raise UsageError("sparsity 0: keeps all tokens: expected a weak branch that leaves some out")

    def last(levels: Sequence[Level]) -> Level | None:
        return levels[-1] if options.schedule == "cosine" and len(levels) > 1 else None

    scale, scale_last = scale_ends(options.scale)
    plan = GuidancePlan(mode, strong[0], weak[0], scale, last(strong), last(weak), scale_last, options.interval)
    return plan, graphs.graphs_for(mode, strong, weak)


def _levels(loaded: LoadedModel, sparsities: Sequence[float]) -> list[Level]:
    levels = [loaded.level(sparsity) for sparsity in sparsities]
    _check_distinct(levels)
    return levels


def _check_distinct(levels: Iterable[Level]) -> None:
    """A graph is known by the tokens that it keeps: each count may come from one sparsity alone."""
    for a, b in itertools.combinations(sorted(levels, key=lambda level: level.sparsity), 2):
        if a.keep == b.keep:
            raise UsageError(
                f"sparsities {a.sparsity:g} and {b.sparsity:g} both keep {a.keep} tokens: give one of them"
            )


class _Counted:
    """Reports stages by their number among all."""

    def __init__(self, report: Report, total: int) -> None:
        self._report, self._total, self._done = report, total, 0

    def __call__(self, stage: str) -> None:
        """A stage begins."""
        self._report(stage, self._done, self._total)
        self._done += 1

    def stage(self, stage: str, share: float | None = None) -> None:
        """What is done within the stage that began last."""
        self._report(stage, max(self._done - 1, 0), self._total, share)


@dataclass(frozen=True, slots=True)
class _Written:
    """What was written of the graphs. attentions: in half precision, by file. costs: by graph."""

    facts: tuple[GraphFacts, ...]
    attentions: Mapping[str, int]
    costs: Mapping[GraphSpec, Cost]


def _files(specs: Sequence[GraphSpec], symbolic: bool) -> dict[str, list[GraphSpec]]:
    """The graphs of every file; with symbolic token counts one file is the graphs of all levels."""
    files: dict[str, list[GraphSpec]] = {}
    for spec in specs:
        files.setdefault(spec.shared_name if symbolic else spec.name, []).append(spec)
    return files


def _trace(
    networks: Networks, files: Mapping[str, Sequence[GraphSpec]], options: CompileOptions, counted: _Counted
) -> dict[str, ir.Model]:
    """The FP32 graphs of all files."""
    traced: dict[str, ir.Model] = {}
    for network, source in networks.items():
        own = {name: specs[0] for name, specs in files.items() if specs[0].network == network}
        if source is None or not own:
            continue
        counted(f"tracing {', '.join(own)}")
        models = trace(
            source.model,
            list(own.values()),
            source.facts,
            options.graph_batch,
            options.opset,
            symbolic_keep=bool(options.libraries),
        )
        traced |= zip(own, models, strict=True)
    return traced


def _pack(
    networks: Networks,
    files: Mapping[str, Sequence[GraphSpec]],
    models: Mapping[str, ir.Model],
    layers: tuple[str, ...],
    options: CompileOptions,
    folder: Path,
    counted: _Counted,
) -> _Written:
    """Type, count, write and check all graphs in `folder`/graphs."""
    by_network: dict[NetworkName, list[ir.Model]] = {network: [] for network in WEIGHTS_FILES}
    costs: dict[GraphSpec, Cost] = {}
    attentions: dict[str, int] = {}
    for name, own in files.items():
        graph = models[name].graph
        if options.precision != "fp32":
            to_half(graph, options.precision, layers)
        by_network[own[0].network].append(models[name])
        attentions[name] = half_attentions(graph)
        for spec in own:
            costs[spec] = count_cost(graph, graphs.keep_sizes(spec, [level.keep for level in spec.levels]))
    counted("writing graphs and weights")
    (folder / "graphs").mkdir()
    for network, own_models in by_network.items():
        if own_models:
            write_graphs(own_models, folder / "graphs", WEIGHTS_FILES[network])
    facts: list[GraphFacts] = []
    for name, own in files.items():
        path = folder / "graphs" / f"{name}.onnx"
        for spec in own:
            counted(f"checking {spec.name}")
            source = networks[spec.network]
            assert source is not None
            if spec is own[0]:
                check_graph(path)
                check_types(path, options.precision, layers)
            facts.append(
                GraphFacts(
                    name=spec.name,
                    kind=spec.kind,
                    network=spec.network,
                    levels=spec.levels,
                    file=f"graphs/{path.name}" if options.has_onnx else None,
                    inputs=graphs.inputs(spec, source.facts, options.graph_batch),
                    outputs=graphs.outputs(spec, source.facts, options.graph_batch),
                    cost=costs[spec],
                    parity=_parity(source, spec, path, options),
                )
            )
    return _Written(tuple(facts), attentions, costs)


def _engine_source(folder: Path, name: str, own: Sequence[GraphSpec], written: _Written) -> EngineSource:
    return EngineSource(
        path=folder / "graphs" / f"{name}.onnx",
        weights=folder / "graphs" / WEIGHTS_FILES[own[0].network],
        specs=tuple(own),
        half_attentions=written.attentions[name],
        weight_bytes=written.costs[own[0]].weight_bytes,
    )


def _engines(
    loaded: LoadedModel, sources: Sequence[EngineSource], options: CompileOptions, folder: Path, counted: _Counted
) -> tuple[EngineFacts, ...]:
    """Engines in `folder`/engines."""
    if not options.libraries:
        return ()
    engine_options = EngineOptions(
        libraries=options.libraries,
        batches=tuple(sorted(set(options.batch))) or (DEFAULT_ENGINE_BATCH,),
        compute_capabilities=tuple(sorted(set(options.compute_capabilities))),
        workspace=options.workspace,
        timing_cache=options.timing_cache,
        allow_unfused=options.allow_unfused,
        cache=options.cache,
    )

    def told(stage: str, done: int, total: int | None, share: float | None = None) -> None:
        if share is None:
            counted(stage)
        else:
            counted.stage(stage, share)

    return build_engines(sources, loaded.facts, CONDITION_ROWS, engine_options, folder / "engines", told)


def check_graph(path: Path) -> None:
    """ONNX's checker and strict shape inference, by path, so that weights beyond 2 GB are no matter.

    Raises ExportError with ONNX's reason.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            onnx.checker.check_model(str(path), full_check=False)
            inferred = Path(scratch) / path.name
            onnx.shape_inference.infer_shapes_path(
                str(path), str(inferred), check_type=True, strict_mode=True, data_prop=True
            )
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"graph {path.name}: ONNX {onnx.__version__} refuses it: {error}") from error


def _parity(loaded: LoadedModel, spec: GraphSpec, path: Path, options: CompileOptions) -> float | None:
    """Relative L2 distance of the graph to PyTorch on one random input; None where ONNX Runtime is not installed."""
    precision = options.precision
    most = MAX_BUILD_ERROR[precision] if options.quantize is None else MAX_QUANTIZED_ERROR
    inputs = graphs.inputs(spec, loaded.facts, options.graph_batch)
    generator = torch.Generator().manual_seed(1)
    values = [graphs.example(t, loaded.facts.tokens, {"B": 2, "S": 2}, generator) for t in inputs]
    try:
        feeds = {t.name: v.numpy() for t, v in zip(inputs, values, strict=True)}
        found = run_once(path, feeds, None if precision == "fp32" else emulated(path))
    except MissingExtraError:
        return None
    with torch.no_grad():
        wanted = graphs.GraphModule(loaded.model, spec, [t.name for t in inputs])(*values)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    # An untrained network's output is zero.
    distance = max(
        float((torch.from_numpy(f) - w).norm() / w.norm().clamp(min=1e-12)) for f, w in zip(found, wanted, strict=True)
    )
    if not math.isfinite(distance) and precision != "fp32" and (operator := first_overflow(path, feeds)) is not None:
        raise ExportError(
            f"graph {path.name}: expected values that {precision} holds, found larger ones from {operator} on: build "
            f"with --precision bf16 or fp32"
        )
    if not distance <= most:
        raise ExportError(
            f"graph {path.name}: relative L2 distance to PyTorch: expected at most {most:g}, "
            f"found {distance:g}; please report this with the versions that sg-export doctor prints"
        )
    return distance
