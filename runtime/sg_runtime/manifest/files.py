"""The manifest record, and functions that read and write it. Pydantic is imported on first use.

`schema.json` next to this file is the JSON Schema of the manifest. After a change, regenerate
it in this folder:

    python -c "import sg_runtime.manifest as m; print(m.json_schema())" > schema.json
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sg_runtime.errors import BundleError, UsageError

if TYPE_CHECKING:
    from pydantic import TypeAdapter
from sg_runtime.manifest.base import (
    EngineLibrary,
    GraphKind,
    NetworkName,
    OnnxTarget,
    Part,
    Precision,
    Strict,
    check_counts,
    whole_number,
)
from sg_runtime.manifest.graphs import EngineFacts, GraphFacts, PassCost, find_engine
from sg_runtime.manifest.guidance import GuidancePlan, Karras, Sampling
from sg_runtime.manifest.model import ModelFacts, Text
from sg_runtime.manifest.parts import Decoder, PartFacts, TextEncoder, decode_inputs, text_inputs
from sg_runtime.manifest.quantization import Quantization
from sg_runtime.manifest.sizes import SizeFacts
from sg_runtime.manifest.source import Source
from sg_runtime.manifest.upgrade import upgraded
from sg_runtime.vocabulary import HOISTED, INPUTS

SCHEMA_VERSION: Literal[7] = 7


MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True, slots=True)
class FileFacts(Strict):
    """Size of a file in bytes, and its SHA-256 in lower-case hex."""

    size: int
    sha256: str


class _Views:
    """Place for the views of a manifest, which are no fields of it. Empty until the first use."""

    __slots__ = ("_views",)
    _views: "tuple[Manifest, ...]"


@dataclass(frozen=True, slots=True)
class Manifest(Strict, _Views):
    """The manifest of a bundle. It describes one size of the samples, by default the first.

    schema_version: version of the manifest schema.
    created_by: name and version of the program that built the bundle.
    model: facts of the network.
    guidance: default guidance plan.
    sampling: default sampler and steps, and the model's times and noise.
    precision: precision of all matmuls, except in `fp32_layers` and in layers under `quantization`.
    fp32_layers: modules that stay in FP32, by their names in the checkpoint.
    quantization: how the graphs were quantized; None if they were not.
    onnx_target: what the ONNX graphs are for.
    opset: ONNX opset of the graphs.
    batch: number of images to which the ONNX graphs are fixed; None if the batch size is symbolic.
    hoisted_rows: number of rows in one launch of each hoisted graph, by kind.
    graphs: the denoiser's graphs.
    engines: the denoiser's engines.
    source: checkpoint of the main network.
    weak_source: checkpoint of the weak network; None if there is no weak network.
    files: size and hash of each file, by its path in the bundle.
    passes: costs of single branches of which a bundle of engines holds no graph.
    sizes: the other sizes that the bundle was built for; see `at`.
    text: the text encoder; None if the bundle has none.
    decoder: the decoder of latents; None if the bundle has none.
    """

    schema_version: Literal[7]
    created_by: str
    model: ModelFacts
    guidance: GuidancePlan
    sampling: Sampling
    precision: Precision
    fp32_layers: tuple[str, ...]
    quantization: Quantization | None
    onnx_target: OnnxTarget
    opset: int
    batch: int | None
    hoisted_rows: dict[GraphKind, int]
    graphs: tuple[GraphFacts, ...]
    engines: tuple[EngineFacts, ...]
    source: Source
    weak_source: Source | None
    files: dict[str, FileFacts]
    passes: tuple[PassCost, ...] = ()
    sizes: tuple[SizeFacts, ...] = ()
    text: TextEncoder | None = None
    decoder: Decoder | None = None

    def __post_init__(self) -> None:
        latents = [self.model.latent, *(size.latent for size in self.sizes)]
        if len(set(latents)) < len(latents):
            raise UsageError(f"sizes: expected different latents, found {', '.join(map(str, latents))}")
        for number in range(len(self.sizes)):
            self._view(number, ())  # raises what the checks below find in another size
        kinds = list(self.model.conditions.hoisted)
        if list(self.hoisted_rows) != kinds or min(self.hoisted_rows.values()) < 1:
            raise UsageError(f"hoisted_rows: expected at least 1 for {', '.join(kinds)}, found {self.hoisted_rows}")
        if self.batch is not None:
            check_counts(self, 1, "batch")
        for network in ("main", "weak") if self.weak_source else ("main",):
            for kind in kinds:
                if self.graph(kind, network=network) is None:
                    raise UsageError(f"graphs: expected a {kind} graph for the {network} network, found none")
        if isinstance(self.sampling.times, Karras) != (self.model.prediction == "edm"):
            raise UsageError(
                "sampling: times: expected noise levels for an edm model, and times from 1 to 0 for other models"
            )
        if self.sampling.time_floor and self.model.prediction != "x0":
            raise UsageError(f"sampling: time_floor: expected 0 for a model of {self.model.prediction}")
        if self.guidance.row.weak_network == "weak" and self.weak_source is None:
            raise UsageError("weak_source: expected a checkpoint for autoguidance, found none")
        plan = self.guidance
        ends = [end for end in (plan.strong_last, plan.weak_last) if end is not None]
        for level in (plan.strong, plan.weak, *ends, *(lv for graph in self.graphs for lv in graph.levels)):
            if level.keep > self.model.tokens:
                raise UsageError(f"keep: expected at most the model's {self.model.tokens} tokens, found {level.keep}")
        for graph in self.graphs:
            for tensor in graph.inputs:
                facts = INPUTS.get(tensor.name)
                if facts is None or facts.branch is None or facts.role == "held":
                    continue
                wanted = self.model.tokens if facts.role == "restore" else graph.levels[facts.branch].keep
                if tensor.shape[1:] != (wanted,):
                    raise UsageError(
                        f"graph {graph.name}: input {tensor.name}: expected {wanted} tokens, found {tensor.shape}"
                    )

        if self.text is not None and self.text_graph is None:
            raise UsageError(f"text: expected a graph for prompts of {self.model.conditions}, found none")
        if self.decoder is not None and (self.model.space == "pixel" or self.decode_graph is None):
            raise UsageError(f"decoder: expected a graph for latents of {self.model.latent}, found none")

    @property
    def parts(self) -> dict[Part, PartFacts]:
        """The parts next to the denoiser that the bundle has, by name."""
        found: dict[Part, PartFacts | None] = {"text": self.text, "decode": self.decoder}
        return {name: part for name, part in found.items() if part is not None}

    @property
    def text_graph(self) -> GraphFacts | None:
        """The graph of the text encoder, or None."""
        conditions = self.model.conditions
        if self.text is None or not isinstance(conditions, Text):
            return None
        return self.text.find(text_inputs(conditions.tokens))

    @property
    def decode_graph(self) -> GraphFacts | None:
        """The graph of the decoder for this size, or None."""
        return None if self.decoder is None else self.decoder.find(decode_inputs(self.model.latent))

    def part_graph(self, part: Part) -> GraphFacts | None:
        """Return the graph of the text encoder or of the decoder at this size, or None."""
        return {"text": self.text_graph, "decode": self.decode_graph}.get(part)

    @property
    def precision_name(self) -> str:
        """Name of the precision in messages, such as "int8 over fp16"."""
        return self.precision if self.quantization is None else f"{self.quantization.type} over {self.precision}"

    @property
    def views(self) -> "tuple[Manifest, ...]":
        """The manifest as a description of each size, this one first. They are made once."""
        if not hasattr(self, "_views"):
            this = self._this
            others = [(*self.sizes[:number], *self.sizes[number + 1 :]) for number in range(len(self.sizes))]
            views = (self, *(self._view(number, (this, *rest)) for number, rest in enumerate(others)))
            object.__setattr__(self, "_views", views)
        return self._views

    def at(self, height: int, width: int) -> "Manifest":
        """Return the manifest as a description of another size; see `ModelFacts.size`.

        Its `model`, `guidance`, `graphs`, `engines` and `passes` are those of this size. Raises
        UsageError for a size that was not built; the message names the build command that adds it.
        """
        wanted = whole_number("height", height), whole_number("width", width)
        views = self.views
        for view in views:
            if view.model.size == wanted:
                return view
        named, built = size_text(wanted), ", ".join(size_text(view.model.size) for view in views)
        if not isinstance(self.model.conditions, Text):
            raise UsageError(f"size {named}: expected {built}, the size of all samples of this model")
        side = self.model.patch * (self.model.pixels_per_latent or 1)
        if min(wanted) < side or any(length % side for length in wanted):
            raise UsageError(f"size {named}: expected multiples of {side}, the side of a token; the bundle has {built}")
        from sg_runtime.build_command import model_command

        raise UsageError(
            f"size {named} is not in this bundle, which has {built}; "
            f"build it with: {model_command(self, '--size', named)}"
        )

    @property
    def _sized(self) -> set[tuple[GraphKind, NetworkName]]:
        """Kind and network of the hoisted graphs that depend on the size."""
        return {(graph.kind, graph.network) for size in self.sizes[:1] for graph in size.graphs if graph.hoisted}

    def _is_shared(self, part: GraphFacts | EngineFacts) -> bool:
        """Return whether all sizes have this graph or engine."""
        return part.kind in HOISTED and (part.kind, part.network) not in self._sized

    @property
    def _this(self) -> SizeFacts:
        """What the manifest holds for the size that it describes."""
        return SizeFacts(
            self.model.latent,
            self.model.tokens,
            self.guidance,
            tuple(graph for graph in self.graphs if not self._is_shared(graph)),
            tuple(engine for engine in self.engines if not self._is_shared(engine)),
            self.passes,
        )

    def _view(self, number: int, others: tuple[SizeFacts, ...]) -> "Manifest":
        """Return the manifest as a description of `sizes[number]`, and of `others`."""
        size = self.sizes[number]
        return replace(
            self,
            model=replace(self.model, latent=size.latent, tokens=size.tokens),
            guidance=size.guidance,
            graphs=(*filter(self._is_shared, self.graphs), *size.graphs),
            engines=(*filter(self._is_shared, self.engines), *size.engines),
            passes=size.passes,
            sizes=others,
        )

    @property
    def all_graphs(self) -> tuple[GraphFacts, ...]:
        """The denoiser's graphs of all sizes."""
        return (*self.graphs, *(graph for size in self.sizes for graph in size.graphs))

    @property
    def all_engines(self) -> tuple[EngineFacts, ...]:
        """The denoiser's engines of all sizes."""
        return (*self.engines, *(engine for size in self.sizes for engine in size.engines))

    @property
    def graphs_of_parts(self) -> tuple[GraphFacts, ...]:
        """The graphs of all parts and sizes."""
        return (*self.all_graphs, *(graph for part in self.parts.values() for graph in part.all_graphs))

    @property
    def engines_of_parts(self) -> tuple[EngineFacts, ...]:
        """The engines of all parts and sizes."""
        return (*self.all_engines, *(engine for part in self.parts.values() for engine in part.all_engines))

    def graph(
        self, kind: GraphKind, *keep: int, network: NetworkName = "main", null_weak: bool = False
    ) -> GraphFacts | None:
        """Return the graph of `kind` with these numbers of kept tokens per level, or None."""
        wanted = (kind, keep, network, null_weak)
        for graph in self.graphs:
            kept = tuple(level.keep for level in graph.levels)
            if (graph.kind, kept, graph.network, graph.null_weak) == wanted:
                return graph
        return None

    def engine(
        self, graph: GraphFacts, batch: int, library: EngineLibrary | None = None
    ) -> tuple[EngineFacts, int] | None:
        """Return the engine for `graph` on `batch` images and the index of its profile, or None.

        library: library of the engine; None for any.
        """
        return find_engine(self.engines, graph, batch, library)

    def engine_batches(self, library: EngineLibrary | None = None) -> tuple[int, ...]:
        """Return the batch sizes in the profiles of all engines, or of one library's engines."""
        engines = [engine for engine in self.engines if library in (None, engine.library)]
        steps = [engine for engine in engines if engine.kind not in HOISTED]
        return tuple(sorted({profile.batch for engine in steps for profile in engine.profiles}))

    def hoisted(self, network: NetworkName) -> tuple[GraphFacts, ...]:
        """Return the hoisted graphs of a network. Raises UsageError if the bundle has none."""
        graphs = tuple(graph for graph in self.graphs if graph.hoisted and graph.network == network)
        if not graphs:
            from sg_runtime.build_command import model_command

            raise UsageError(
                f"autoguidance: this bundle has no weak checkpoint; "
                f"build it with: {model_command(self, '--weak-checkpoint', 'PATH')}"
            )
        return graphs


def size_text(size: tuple[int, int]) -> str:
    """Return a height and a width as users write them, HEIGHTxWIDTH."""
    return f"{size[0]}x{size[1]}"


def adapter() -> "TypeAdapter[Manifest]":
    """Return the pydantic adapter that reads and writes manifests and gives their JSON Schema."""
    from pydantic import TypeAdapter

    return TypeAdapter(Manifest)


def json_schema() -> str:
    """Return the JSON Schema of manifests as indented JSON."""
    import json

    return json.dumps(adapter().json_schema(), indent=1, sort_keys=True)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest strictly. A manifest of an earlier schema is upgraded.

    Raises BundleError if the file is missing, is not JSON, has another schema version, or does not
    fit the schema.
    """
    import json

    from pydantic import ValidationError

    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path}: expected the manifest of a bundle, found {_reason(error)}; rebuild it") from None
    version = None
    if isinstance(content, dict):
        newest = upgraded(content)
        text = text if newest is content else json.dumps(newest)
        version = newest.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:  # True == 1
        raise BundleError(
            f"{path}: expected schema version {SCHEMA_VERSION}, found {version!r}; "
            f"rebuild the bundle with this sg-export, or run it with the sg-export that built it"
        )
    try:
        return adapter().validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise BundleError(f"{path}: {where}: {first['msg']} (errors: {error.error_count()}); rebuild it") from None
    except UsageError as error:
        raise BundleError(f"{path}: {error}; rebuild it") from None


def schema_of(path: Path) -> int:
    """Return the schema version of a manifest that `read_manifest` can read, before any upgrade."""
    import json

    version: int = json.loads(path.read_bytes())["schema_version"]
    return version


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Write a manifest as indented JSON."""
    path.write_bytes(adapter().dump_json(manifest, indent=1) + b"\n")


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else f"invalid JSON ({error})"
