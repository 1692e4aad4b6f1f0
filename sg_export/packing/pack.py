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
from sg_export.progress import Counted
from sg_runtime import __version__
from sg_runtime.files import sha256_of
from sg_runtime.manifest import (
    SCHEMA_VERSION,
    Cost,
    EngineFacts,
    FileFacts,
    GraphFacts,
    GraphKind,
    GuidancePlan,
    Manifest,
    NetworkName,
    PassCost,
    Quantization,
)

HOISTED_ROWS: Mapping[GraphKind, int] = {"condition": 40, "prompt": 1}
"""Number of rows in one run of a hoisted graph, by kind.

It is fixed so that the result of a row does not depend on the other rows. A default run reads the
weights of `condition` once. A row of `prompt` is a whole prompt, so weights are read once for each.
"""


Networks = Mapping[NetworkName, LoadedModel | None]


WEIGHTS_FILES: Mapping[NetworkName, str] = {"main": "weights.bin", "weak": "weights-weak.bin"}


def manifest_of(
    loaded: LoadedModel,
    weak: LoadedModel | None,
    plan: GuidancePlan,
    options: CompileOptions,
    layers: tuple[str, ...],
    quantization: Quantization | None,
    written: "Written",
    engines: tuple[EngineFacts, ...],
    folder: Path,
) -> Manifest:
    """Return the manifest of the bundle in `folder`.

    Of graphs that are neither kept nor in an engine it has the costs alone.
    """
    built = {(engine.kind, engine.network, engine.null_weak) for engine in engines}
    left_out = [] if options.has_onnx else [g for g in written.facts if (g.kind, g.network, g.null_weak) not in built]
    return Manifest(
        schema_version=SCHEMA_VERSION,
        created_by=f"sg-export {__version__}",
        model=loaded.facts,
        guidance=plan,
        sampling=loaded.sampling if options.steps is None else replace(loaded.sampling, steps=options.steps),
        precision=options.precision,
        fp32_layers=layers,
        quantization=quantization,
        onnx_target=options.onnx_target,
        opset=options.opset,
        batch=options.batch,
        hoisted_rows={kind: HOISTED_ROWS[kind] for kind in loaded.facts.conditions.hoisted},
        graphs=tuple(graph for graph in written.facts if graph not in left_out),
        engines=engines,
        source=loaded.source,
        weak_source=None if weak is None else weak.source,
        files={
            path.relative_to(folder).as_posix(): FileFacts(path.stat().st_size, sha256_of(path))
            for path in sorted((*(folder / "graphs").glob("*"), *(folder / "engines").glob("*")))
        },
        passes=tuple(PassCost(graph.network, graph.levels[0], graph.cost) for graph in left_out),
    )


@dataclass(frozen=True, slots=True)
class Written:
    """Results of writing the graphs.

    facts: manifest entries of the graphs.
    attentions: number of attentions in half precision, by file.
    costs: cost of each graph.
    """

    facts: tuple[GraphFacts, ...]
    attentions: Mapping[str, int]
    costs: Mapping[GraphSpec, Cost]


def files_of(specs: Sequence[GraphSpec], symbolic: bool) -> dict[str, list[GraphSpec]]:
    """Return the graphs of every file, by the file's name.

    symbolic: use symbolic numbers of kept tokens, so that one file covers the graphs of all levels.
    """
    files: dict[str, list[GraphSpec]] = {}
    for spec in specs:
        files.setdefault(spec.shared_name if symbolic else spec.name, []).append(spec)
    return files


def trace_all(
    networks: Networks, files: Mapping[str, Sequence[GraphSpec]], options: CompileOptions, counted: Counted
) -> dict[str, ir.Model]:
    """Trace all files and return their FP32 graphs by the file's name."""
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
            options.batch,
            options.opset,
            symbolic_keep=bool(options.libraries),
            lower=functools.partial(lower_for_cuda, precision=options.precision)
            if options.for_cuda
            else lower_attention,
        )
        traced |= zip(own, models, strict=True)
    return traced


def pack(
    networks: Networks,
    files: Mapping[str, Sequence[GraphSpec]],
    models: Mapping[str, ir.Model],
    layers: tuple[str, ...],
    options: CompileOptions,
    folder: Path,
    counted: Counted,
) -> Written:
    """Set the types of all graphs, count their costs, write them to `folder`/graphs, check them."""
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
                    inputs=typed(graph_inputs(spec, source.facts, options.batch), models[name].graph.inputs),
                    outputs=typed(graph_outputs(spec, source.facts, options.batch), models[name].graph.outputs),
                    cost=costs[spec],
                    parity=check_parity(source, spec, path, options),
                )
            )
    return Written(tuple(facts), attentions, costs)


def engine_source(folder: Path, name: str, own: Sequence[GraphSpec], written: Written) -> EngineSource:
    return EngineSource(
        path=folder / "graphs" / f"{name}.onnx",
        weights=folder / "graphs" / WEIGHTS_FILES[own[0].network],
        specs=tuple(own),
        half_attentions=written.attentions[name],
        weight_bytes=written.costs[own[0]].weight_bytes,
    )


def add_engines(
    loaded: LoadedModel, sources: Sequence[EngineSource], options: CompileOptions, folder: Path, counted: Counted
) -> tuple[EngineFacts, ...]:
    """Build the requested engines in `folder`/engines and return their facts."""
    if options.engines is None:
        return ()

    def report(stage: str, done: int, total: int | None, share: float | None = None) -> None:
        if share is None:
            counted(stage)
        else:
            counted.stage(stage, share)

    return build_engines(sources, loaded.facts, HOISTED_ROWS, options.engines, folder / "engines", report)
