"""Writer of a bundle's files and manifest from traced graphs."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from sg_export.cost.count import count_cost
from sg_export.graph.attention import lower_attention
from sg_export.graph.check import check_graph, check_parity, check_types
from sg_export.graph.cuda import lower_for_cuda
from sg_export.graph.half import half_attentions, to_half
from sg_export.graph.spec import GraphSpec, graph_inputs, graph_outputs, keep_sizes, typed
from sg_export.graph.trace import trace
from sg_export.graph.weights import write_graphs
from sg_export.loading import LoadedModel
from sg_export.options.compile import CompileOptions
from sg_export.packing.engines import EngineSource, build_engines
from sg_export.packing.sizes import SizeBuild
from sg_export.progress import Counted
from sg_runtime import __version__
from sg_runtime.bundle import FOLDERS
from sg_runtime.files import sha256_of
from sg_runtime.manifest import (
    SCHEMA_VERSION,
    Cost,
    Decoder,
    EngineFacts,
    FileFacts,
    GraphFacts,
    GraphKind,
    Manifest,
    ModelFacts,
    NetworkName,
    PassCost,
    Quantization,
    SizeFacts,
    TextEncoder,
    size_text,
)

HOISTED_ROWS: Mapping[GraphKind, int] = {"condition": 40, "prompt": 1}
"""Number of rows in one run of a hoisted graph, by kind.

It is fixed so that the result of a row does not depend on the other rows. A default run reads the
weights of `condition` once. A row of `prompt` is a whole prompt, so weights are read once for each.
"""


WEIGHTS_FILES: Mapping[NetworkName, str] = {
    "main": "weights.bin",
    "weak": "weights-weak.bin",
    "text_encoder": "weights-text-encoder.bin",
    "decoder": "weights-decoder.bin",
}


def manifest_of(
    builds: Sequence[SizeBuild],
    options: CompileOptions,
    layers: tuple[str, ...],
    quantization: Quantization | None,
    written: "Written",
    engines: Sequence[tuple[EngineFacts, ...]],
    folder: Path,
    text: TextEncoder | None = None,
    decoder: Decoder | None = None,
) -> Manifest:
    """Return the manifest of the bundle in `folder`.

    engines: the engines of each size. Of graphs that are neither kept nor in an engine the manifest
    has the costs alone.
    """
    loaded, weak = builds[0].loaded, builds[0].weak
    first, *others = (_size_facts(build, options, written, own) for build, own in zip(builds, engines, strict=True))
    return Manifest(
        schema_version=SCHEMA_VERSION,
        created_by=f"sg-export {__version__}",
        model=loaded.facts,
        guidance=first.guidance,
        sampling=loaded.sampling if options.steps is None else replace(loaded.sampling, steps=options.steps),
        precision=options.precision,
        fp32_layers=layers,
        quantization=quantization,
        onnx_target=options.onnx_target,
        opset=options.opset,
        batch=options.batch,
        hoisted_rows={kind: HOISTED_ROWS[kind] for kind in loaded.facts.conditions.hoisted},
        graphs=first.graphs,
        engines=first.engines,
        source=loaded.source,
        weak_source=None if weak is None else weak.source,
        files={
            path.relative_to(folder).as_posix(): FileFacts(path.stat().st_size, sha256_of(path))
            for path in sorted(path for own in FOLDERS for path in (folder / own).glob("*"))
        },
        passes=first.passes,
        sizes=tuple(others),
        text=text,
        decoder=decoder,
    )


def _size_facts(
    build: SizeBuild, options: CompileOptions, written: "Written", engines: tuple[EngineFacts, ...]
) -> SizeFacts:
    """Return what the bundle holds for one size."""
    graphs = [written.facts[spec] for spec in build.specs]
    built = {(engine.kind, engine.network, engine.null_weak) for engine in engines}
    left_out = [] if options.has_onnx else [g for g in graphs if (g.kind, g.network, g.null_weak) not in built]
    return SizeFacts(
        latent=build.loaded.facts.latent,
        tokens=build.loaded.facts.tokens,
        guidance=build.plan,
        graphs=tuple(graph for graph in graphs if graph not in left_out),
        engines=engines,
        passes=tuple(PassCost(graph.network, graph.levels[0], graph.cost) for graph in left_out),
    )


@dataclass(frozen=True, slots=True)
class Written:
    """Results of writing the graphs.

    facts: manifest entry of each graph.
    attentions: number of attentions in half precision, by file.
    """

    facts: Mapping[GraphSpec, GraphFacts]
    attentions: Mapping[str, int]


def files_of(specs: Sequence[GraphSpec], symbolic: bool) -> dict[str, list[GraphSpec]]:
    """Return the graphs of every file, by the file's name.

    symbolic: use symbolic numbers of kept tokens, so that one file covers the graphs of all levels.
    """
    files: dict[str, list[GraphSpec]] = {}
    for spec in specs:
        files.setdefault(spec.shared_name if symbolic else spec.name, []).append(spec)
    return files


def trace_all(
    sources: Mapping[GraphSpec, LoadedModel],
    files: Mapping[str, Sequence[GraphSpec]],
    options: CompileOptions,
    counted: Counted,
) -> dict[str, ir.Model]:
    """Trace all files and return their FP32 graphs by the file's name.

    sources: network of each graph.
    """
    traced: dict[str, ir.Model] = {}
    for source in dict.fromkeys(sources.values()):
        own = {name: specs[0] for name, specs in files.items() if sources[specs[0]] is source}
        counted(f"tracing {', '.join(own)}")
        models = trace(
            source.model,
            list(own.values()),
            source.facts,
            options.batch,
            options.opset,
            symbolic_keep=bool(options.libraries),
            lower=functools.partial(lower_for_cuda, precision=options.precision)
            if options.for_cuda
            else lower_attention,
        )
        for spec, model in zip(own.values(), models, strict=True):
            if spec.size is not None:
                _name_buffers(model.graph, source, size_text(spec.size))
        traced |= zip(own, models, strict=True)
    return {name: traced[name] for name in files}


def _name_buffers(graph: ir.Graph, source: LoadedModel, size: str) -> None:
    """Add the size to the names of buffers, which are computed and may differ between sizes."""
    computed = {name for name, _ in source.model.network.named_buffers()}  # type: ignore[attr-defined]  # a module
    for name, value in list(graph.initializers.items()):
        if name in computed:
            value.name = f"{name}.{size}"


def pack(
    sources: Mapping[GraphSpec, LoadedModel],
    files: Mapping[str, Sequence[GraphSpec]],
    models: Mapping[str, ir.Model],
    layers: tuple[str, ...],
    options: CompileOptions,
    folder: Path,
    counted: Counted,
) -> Written:
    """Set the types of all graphs, count their costs, write them to `folder`/graphs, check them.

    sources: network of each graph.
    """
    by_network: dict[NetworkName, list[ir.Model]] = {network: [] for network in WEIGHTS_FILES}
    costs: dict[GraphSpec, Cost] = {}
    attentions: dict[str, int] = {}
    for name, own in files.items():
        graph = models[name].graph
        if options.precision != "fp32":
            tokens_in_half = options.tokens_in_half and not own[0].hoisted
            to_half(graph, options.precision, layers, tokens_in_half=tokens_in_half)
        by_network[own[0].network].append(models[name])
        attentions[name] = half_attentions(graph)
        for spec in own:
            costs[spec] = count_cost(graph, keep_sizes(spec, [level.keep for level in spec.levels]))
    counted("writing graphs and weights")
    (folder / "graphs").mkdir(exist_ok=True)
    for network, own_models in by_network.items():
        if own_models:
            write_graphs(own_models, folder / "graphs", WEIGHTS_FILES[network])
    facts: dict[GraphSpec, GraphFacts] = {}
    for name, own in files.items():
        path = folder / "graphs" / f"{name}.onnx"
        for spec in own:
            counted(f"checking {spec.name}")
            source = sources[spec]
            if spec is own[0]:
                check_graph(path)
                check_types(path, options.precision, layers)
            facts[spec] = GraphFacts(
                name=spec.name,
                kind=spec.kind,
                network=spec.network,
                levels=spec.levels,
                file=f"graphs/{path.name}" if options.has_onnx else None,
                inputs=typed(graph_inputs(spec, source.facts, options.batch), models[name].graph.inputs),
                outputs=typed(graph_outputs(spec, source.facts, options.batch), models[name].graph.outputs),
                cost=costs[spec],
                parity=check_parity(source, spec, path, options),
            )
    return Written(facts, attentions)


def engine_source(folder: Path, name: str, own: Sequence[GraphSpec], written: Written) -> EngineSource:
    return EngineSource(
        path=folder / "graphs" / f"{name}.onnx",
        weights=folder / "graphs" / WEIGHTS_FILES[own[0].network],
        specs=tuple(own),
        half_attentions=written.attentions[name],
        weight_bytes=written.facts[own[0]].cost.weight_bytes,
    )


def add_engines(
    model: ModelFacts, sources: Sequence[EngineSource], options: CompileOptions, folder: Path, counted: Counted
) -> tuple[EngineFacts, ...]:
    """Build the engines of one size in `folder`/engines and return their facts."""
    if options.engines is None:
        return ()

    def report(stage: str, done: int, total: int | None, share: float | None = None) -> None:
        if share is None:
            counted(stage)
        else:
            counted.stage(stage, share)

    return build_engines(sources, model, HOISTED_ROWS, options.engines, folder / "engines", report)
