"""From a checkpoint to a bundle: load, trace, check and pack, in a temporary folder that becomes the bundle."""

import itertools
import math
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
import torch

from sg_engines.ort import run_once
from sg_export import graphs
from sg_export.activations import first_overflow
from sg_export.cost import count_cost
from sg_export.emulate import emulated
from sg_export.engine_build import EngineOptions, EngineSource, build_engines, check_libraries
from sg_export.graphs import GraphSpec
from sg_export.loading import LoadedModel, load_model, load_weak
from sg_export.options import DEFAULT_ENGINE_BATCH, DEFAULT_SPARSITY, CompileOptions
from sg_export.output import check_output, new_folder
from sg_export.precision import check_types, fp32_layers, half_attentions, to_half
from sg_export.progress import Report, silent
from sg_export.trace import trace
from sg_export.weights import write_graphs
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
    Sampling,
    write_manifest,
)

CONDITION_ROWS = 40
"""Rows of `condition` in one run: fixed, so that a row is the same whatever is computed beside it, and as many as the
default run has steps, so that its weights are read once."""

MAX_BUILD_ERROR: Mapping[Precision, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 5e-2}
"""Relative L2 distance to PyTorch above which a graph is wrong: rounding stays below it, a fault far above."""

EDM_NOISE_LEVELS = Karras(0.002, 80.0, 7.0)
"""Defaults of NVlabs/edm (`generate.py`, `edm_sampler`), which both families' samplers share."""

WEIGHTS_FILES: Mapping[NetworkName, str] = {"main": "weights.bin", "weak": "weights-weak.bin"}


def compile(checkpoint: str | Path, options: CompileOptions, report: Report = silent) -> Bundle:
    """Compile a checkpoint, or a reference model by its name, into a bundle.

    report: called with a line at the start of each stage. Raises UsageError for a request that cannot be served,
    CheckpointError for an unusable checkpoint, ExportError where a graph cannot be made or does not agree with PyTorch.
    Nothing is left behind on failure, and an existing bundle stays until its successor is whole.
    """
    check_output(options.output, options.force)
    check_libraries(options.libraries)
    report(f"loading {checkpoint}", 0, None)
    loaded = load_model(checkpoint, weights=options.weights, overrides=options.overrides)
    weak = None
    if options.weak_checkpoint is not None:
        report(f"loading {options.weak_checkpoint}", 0, None)
        weak = load_weak(options.weak_checkpoint, loaded, options.weights, options.overrides)
    plan, specs = plan_build(loaded, weak, options)
    if not options.has_onnx and graphs.guided_alone(plan):
        specs = [spec for spec in specs if spec.kind in ("condition", "guided")]
    layers = fp32_layers(loaded.model, options.precision, whole=options.whole)
    with new_folder(options.output, options.force) as folder:
        facts, engines = _write({"main": loaded, "weak": weak}, plan, specs, layers, options, folder, report)
        manifest = Manifest(
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
            opset=options.opset,
            batch=options.graph_batch,
            condition_rows=CONDITION_ROWS,
            graphs=facts,
            engines=engines,
            source=loaded.source,
            weak_source=None if weak is None else weak.source,
            files={
                path.relative_to(folder).as_posix(): FileFacts(path.stat().st_size, sha256_of(path))
                for path in sorted((*(folder / "graphs").glob("*"), *(folder / "engines").glob("*")))
            },
        )
        write_manifest(manifest, folder / MANIFEST_FILE)
    return Bundle(options.output, manifest)


def plan_build(
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
    return plan, graphs.plan_graphs(mode, strong, weak)


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


def _write(
    loaded: Mapping[NetworkName, LoadedModel | None],
    plan: GuidancePlan,
    specs: Sequence[GraphSpec],
    layers: tuple[str, ...],
    options: CompileOptions,
    folder: Path,
    report: Report,
) -> tuple[tuple[GraphFacts, ...], tuple[EngineFacts, ...]]:
    """Trace, write and check all graphs in `folder`/graphs, and build engines of those that the plan uses.

    Graphs for engines have symbolic token counts, so that one file is the graphs of all levels.
    """
    symbolic, batch = bool(options.libraries), options.graph_batch
    files: dict[str, list[GraphSpec]] = {}
    for spec in specs:
        files.setdefault(spec.shared_name if symbolic else spec.name, []).append(spec)
    engine_files = {
        name: own
        for name, own in files.items()
        if symbolic and (own[0].kind in ("condition", "guided") or not graphs.guided_alone(plan))
    }
    stages = len(files) + 1 + len(specs) + len(engine_files) * len(options.libraries)
    traced: dict[NetworkName, list[ir.Model]] = {network: [] for network in WEIGHTS_FILES}
    costs: dict[GraphSpec, Cost] = {}
    attentions: dict[str, int] = {}
    for number, (name, own) in enumerate(files.items()):
        report(f"tracing {name}", number, stages)
        source = loaded[own[0].network]
        assert source is not None
        model = trace(source.model, own[0], source.facts, batch, options.opset, symbolic_keep=symbolic)
        if options.precision != "fp32":
            to_half(model.graph, options.precision, layers)
        traced[own[0].network].append(model)
        attentions[name] = half_attentions(model.graph)
        for spec in own:
            costs[spec] = count_cost(model.graph, graphs.keep_sizes(spec, [level.keep for level in spec.levels]))
    report("writing graphs and weights", len(files), stages)
    (folder / "graphs").mkdir()
    for network, models in traced.items():
        if models:
            write_graphs(models, folder / "graphs", WEIGHTS_FILES[network])
    facts: list[GraphFacts] = []
    for name, own in files.items():
        path = folder / "graphs" / f"{name}.onnx"
        for spec in own:
            report(f"checking {spec.name}", len(files) + 1 + len(facts), stages)
            source = loaded[spec.network]
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
                    inputs=graphs.inputs(spec, source.facts, batch),
                    outputs=graphs.outputs(spec, source.facts, batch),
                    cost=costs[spec],
                    parity=_parity(source, spec, path, batch, options.precision),
                )
            )
    sources = [
        EngineSource(
            path=folder / "graphs" / f"{name}.onnx",
            weights=folder / "graphs" / WEIGHTS_FILES[own[0].network],
            specs=tuple(own),
            half_attentions=attentions[name],
            weight_bytes=costs[own[0]].weight_bytes,
        )
        for name, own in engine_files.items()
    ]
    engines = _engines(loaded, sources, options, folder, report, stages)
    if not options.has_onnx:
        shutil.rmtree(folder / "graphs")
    return tuple(facts), engines


def _engines(
    loaded: Mapping[NetworkName, LoadedModel | None],
    sources: Sequence[EngineSource],
    options: CompileOptions,
    folder: Path,
    report: Report,
    stages: int,
) -> tuple[EngineFacts, ...]:
    """Engines in `folder`/engines."""
    if not options.libraries:
        return ()
    main = loaded["main"]
    assert main is not None
    engine_options = EngineOptions(
        libraries=options.libraries,
        batches=tuple(sorted(set(options.batch))) or (DEFAULT_ENGINE_BATCH,),
        compute_capabilities=tuple(sorted(set(options.compute_capabilities))),
        workspace=options.workspace,
        timing_cache=options.timing_cache,
        allow_unfused=options.allow_unfused,
        cache=options.cache,
    )
    first = stages - len(sources) * len(options.libraries)
    return build_engines(
        sources,
        main.facts,
        CONDITION_ROWS,
        engine_options,
        folder / "engines",
        lambda stage, done, total, share=None: report(stage, first + done, stages, share),
    )


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


def _parity(loaded: LoadedModel, spec: GraphSpec, path: Path, batch: int | None, precision: Precision) -> float | None:
    """Relative L2 distance of the graph to PyTorch on one random input; None where ONNX Runtime is not installed."""
    inputs = graphs.inputs(spec, loaded.facts, batch)
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
    if not distance <= MAX_BUILD_ERROR[precision]:
        raise ExportError(
            f"graph {path.name}: relative L2 distance to PyTorch: expected at most {MAX_BUILD_ERROR[precision]:g}, "
            f"found {distance:g}; please report this with the versions that sg-export doctor prints"
        )
    return distance
