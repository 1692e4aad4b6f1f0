"""Text encoder and decoder of a bundle: which are built, and the files that are written."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sg_calibration.prompts import Prompts, read_prompts
from sg_export.cost.count import count_cost
from sg_export.diffusers_folder import PIPELINE_FILE
from sg_export.graph.attention import lower_attention
from sg_export.graph.check import check_graph, check_part_parity, check_types
from sg_export.graph.half import half_attentions, to_half
from sg_export.graph.opset import CONV_IN_BF16
from sg_export.graph.spec import GraphSpec, graph_inputs, graph_outputs
from sg_export.graph.trace_part import trace_part
from sg_export.graph.weights import write_graphs
from sg_export.options.compile import CompileOptions
from sg_export.packing.pack import WEIGHTS_FILES, Written, add_engines, engine_source
from sg_export.packing.sizes import SizeBuild
from sg_export.parts.decode import LoadedDecoder, load_decoder
from sg_export.parts.encode import encode
from sg_export.parts.text import LoadedText, load_text
from sg_export.progress import Counted
from sg_export.reference import place_of
from sg_runtime.errors import MissingExtraError, UsageError
from sg_runtime.manifest import BuiltGraph, Decoder, GraphFacts, ModelFacts, Part, Precision, Text, TextEncoder

TOKENIZER = "text/tokenizer.json"
"""File of the tokenizer in a bundle."""


@dataclass(frozen=True, slots=True)
class PartBuild:
    """A part to build.

    loaded: its network.
    precision: precision of its products.
    graphs: its graphs, with the model at their size.
    """

    loaded: LoadedText | LoadedDecoder
    precision: Precision
    graphs: tuple[tuple[GraphSpec, ModelFacts], ...]

    def stages(self, options: CompileOptions) -> int:
        """Return the number of stages that `add_parts` reports."""
        return 1 + len(self.graphs) * (2 + len(options.libraries))


def choose_parts(checkpoint: str | Path, builds: Sequence[SizeBuild], options: CompileOptions) -> dict[Part, PartBuild]:
    """Load the parts that the options name, or that the folders have.

    Raises UsageError for a part that is asked for without a folder, MissingExtraError without the
    extra `diffusers`, and the errors of `load_text` and `load_decoder`.
    """
    try:
        return _chosen(checkpoint, builds, options)
    except MissingExtraError as error:
        if options.parts is None and options.vae is None:
            raise MissingExtraError(f"{error}; or leave out text encoder and decoder: give `parts` step") from None
        raise


def _chosen(checkpoint: str | Path, builds: Sequence[SizeBuild], options: CompileOptions) -> dict[Part, PartBuild]:
    model, folder, found = builds[0].loaded.facts, options.pipeline, dict[Part, PartBuild]()
    if folder is None and (place_of(checkpoint) / PIPELINE_FILE).is_file():
        folder = place_of(checkpoint)
    if folder is not None and _is_wanted("text", folder, options):
        if not isinstance(model.conditions, Text):
            raise UsageError(f"parts: text: expected a model of text, found {model.family}, a model of classes")
        graphs = ((GraphSpec("text", network="text_encoder"), model),)
        found["text"] = PartBuild(load_text(folder, model), options.precision_of_text, graphs)
        if options.engines is not None:
            options.engines.check_types(options.precision_of_text, None)
    folder = options.vae or folder
    if folder is not None and (options.vae is not None or _is_wanted("decode", folder, options)):
        decoder = load_decoder(folder, model)
        sized = len(builds) > 1
        found["decode"] = PartBuild(
            decoder,
            options.precision,
            tuple(
                (
                    GraphSpec("decode", network="decoder", size=build.loaded.facts.size if sized else None),
                    replace(build.loaded.facts, pixels_per_latent=decoder.pixels_per_latent),
                )
                for build in builds
            ),
        )
    for part, option in (("text", "`pipeline`"), ("decode", "`vae` or `pipeline`")):
        if part in (options.parts or ()) and part not in found:
            raise UsageError(f"parts: {part}: expected the folder of a pipeline, found none: give {option} FOLDER")
    return found


_COMPONENTS: Mapping[Part, str] = {"text": "text_encoder", "decode": "vae"}


def _is_wanted(part: Part, folder: Path, options: CompileOptions) -> bool:
    return (folder / _COMPONENTS[part]).is_dir() if options.parts is None else part in options.parts


def prompts_of(parts: Mapping[Part, PartBuild], path: Path | None) -> Prompts | None:
    """Return the prompts to calibrate on, encoded in PyTorch; None without a text encoder.

    path: file of the prompts; None for those of `sg_calibration.prompts`. Raises UsageError for a
    file that no text encoder reads.
    """
    if "text" not in parts:
        if path is not None:
            raise UsageError(f"`prompts` {path}: expected none for a build without a text encoder, found a file")
        return None
    loaded, ((_, model),) = parts["text"].loaded, parts["text"].graphs
    assert isinstance(loaded, LoadedText)
    assert isinstance(model.conditions, Text)
    return Prompts(read_prompts(path), functools.partial(encode, loaded, tokens=model.conditions.tokens))


def add_parts(
    builds: Mapping[Part, PartBuild], options: CompileOptions, folder: Path, counted: Counted
) -> tuple[TextEncoder | None, Decoder | None]:
    """Write graphs, engines and tokenizer of the parts to `folder`. Return their facts."""
    text, decoder = None, None
    for build in builds.values():
        loaded, written = build.loaded, _build(build, options, folder, counted)
        if isinstance(loaded, LoadedText):
            (folder / TOKENIZER).parent.mkdir()
            (folder / TOKENIZER).write_text(loaded.tokenizer, encoding="utf-8")
            text = TextEncoder(loaded.source, build.precision, written, TOKENIZER, loaded.cleaning, loaded.capped)
        else:
            decoder = Decoder(loaded.source, build.precision, written)
    return text, decoder


def _build(build: PartBuild, options: CompileOptions, folder: Path, counted: Counted) -> tuple[BuiltGraph, ...]:
    """Trace, write and check the graphs of a part, and build their engines."""
    specs, models, opset = [spec for spec, _ in build.graphs], {}, options.opset
    if build.precision == "bf16" and isinstance(build.loaded, LoadedDecoder):
        opset = max(opset, CONV_IN_BF16)
    for spec, model in build.graphs:
        counted(f"tracing {spec.name}")
        inputs, outputs = graph_inputs(spec, model, 1), graph_outputs(spec, model, 1)
        traced = trace_part(build.loaded.module, spec.name, inputs, outputs, opset, lower_attention)
        if build.precision != "fp32":
            to_half(traced.graph, build.precision, ())
        models[spec] = traced
    costs = {spec: count_cost(models[spec].graph) for spec in specs}
    # An autoencoder attends once, with a head of 512 values, for which no fused kernel was found.
    fusible = not isinstance(build.loaded, LoadedDecoder)
    attentions = {spec.name: half_attentions(models[spec].graph) if fusible else 0 for spec in specs}
    counted("writing graphs and weights")
    (folder / "graphs").mkdir(exist_ok=True)
    write_graphs(models.values(), folder / "graphs", WEIGHTS_FILES[specs[0].network])
    facts = {}
    for spec, model in build.graphs:
        counted(f"checking {spec.name}")
        path = folder / "graphs" / f"{spec.name}.onnx"
        check_graph(path)
        check_types(path, build.precision, ())
        facts[spec] = GraphFacts(
            name=spec.name,
            kind=spec.kind,
            network=spec.network,
            levels=(),
            file=f"graphs/{path.name}" if options.has_onnx else None,
            inputs=graph_inputs(spec, model, 1),
            outputs=graph_outputs(spec, model, 1),
            cost=costs[spec],
            parity=check_part_parity(
                build.loaded.source, build.loaded.module, graph_inputs(spec, model, 1), path, build.precision
            ),
        )
    written, built = Written(facts, attentions), []
    for spec, model in build.graphs:
        sources = [engine_source(folder, spec.name, [spec], written)] if options.libraries else []
        built.append(BuiltGraph(facts[spec], add_engines(model, sources, options, folder, counted)))
    return tuple(built)
