"""The manifest itself: read strictly, and written. Reading needs pydantic, imported on first use.

`schema.json` next to this file is the same as JSON Schema. After a change here write it again:

    python -c "import sg_runtime.manifest as m; print(m.json_schema())" > runtime/sg_runtime/manifest/schema.json
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sg_runtime.errors import BundleError, UsageError

if TYPE_CHECKING:
    from pydantic import TypeAdapter
from sg_runtime.manifest.base import EngineLibrary, GraphKind, NetworkName, Precision, Strict, check_counts
from sg_runtime.manifest.graphs import EngineFacts, GraphFacts, Profile
from sg_runtime.manifest.guidance import GuidancePlan, Sampling
from sg_runtime.manifest.model import ModelFacts
from sg_runtime.manifest.quantization import Quantization
from sg_runtime.manifest.upgrade import upgraded

SCHEMA_VERSION: Literal[4] = 4


MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True, slots=True)
class Source(Strict):
    """The checkpoint a bundle was built from.

    weights: which set of the file, "bare" where it has only one. reference: the name of a model that ships with
    sg-export, else None.
    """

    file: str
    sha256: str
    weights: Literal["ema", "model", "bare"]
    reference: str | None

    @property
    def name(self) -> str:
        """What a user calls it on the command line."""
        return self.reference or self.file


@dataclass(frozen=True, slots=True)
class FileFacts(Strict):
    """Size in bytes and SHA-256 in lower-case hex."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest(Strict):
    """A bundle. `batch` is the image count that the ONNX graphs are fixed to, None where it is symbolic.

    precision: of the products of all graphs, but for those of `fp32_layers`, modules by their names in the checkpoint,
    and for what `quantization` says.
    weak_source: the checkpoint of the weak network, where there is one.
    """

    schema_version: Literal[4]
    created_by: str
    model: ModelFacts
    guidance: GuidancePlan
    sampling: Sampling
    precision: Precision
    fp32_layers: tuple[str, ...]
    quantization: Quantization | None
    opset: int
    batch: int | None
    condition_rows: int
    graphs: tuple[GraphFacts, ...]
    engines: tuple[EngineFacts, ...]
    source: Source
    weak_source: Source | None
    files: dict[str, FileFacts]

    def __post_init__(self) -> None:
        check_counts(self, 1, "condition_rows")
        if self.batch is not None:
            check_counts(self, 1, "batch")
        for network in ("main", "weak") if self.weak_source else ("main",):
            if self.graph("condition", network=network) is None:
                raise UsageError(f"graphs: expected one of kind condition for the {network} network, found none")
        if (self.sampling.karras is None) != (self.model.prediction == "flow"):
            raise UsageError("sampling: karras: expected noise levels for edm models alone, not for flow")
        if self.guidance.row.weak_network == "weak" and self.weak_source is None:
            raise UsageError("weak_source: expected a checkpoint for autoguidance, found none")
        plan = self.guidance
        ends = [end for end in (plan.strong_last, plan.weak_last) if end is not None]
        for level in (plan.strong, plan.weak, *ends, *(lv for graph in self.graphs for lv in graph.levels)):
            if level.keep > self.model.tokens:
                raise UsageError(f"keep: expected at most the model's {self.model.tokens} tokens, found {level.keep}")

    @property
    def precision_name(self) -> str:
        """What a user calls the precision, as "int8 over fp16"."""
        return self.precision if self.quantization is None else f"{self.quantization.type} over {self.precision}"

    def graph(
        self, kind: GraphKind, *keep: int, network: NetworkName = "main", null_weak: bool = False
    ) -> GraphFacts | None:
        """The graph of `kind` whose levels keep these token counts, or None."""
        wanted = (kind, keep, network, null_weak)
        for graph in self.graphs:
            kept = tuple(level.keep for level in graph.levels)
            if (graph.kind, kept, graph.network, graph.null_weak) == wanted:
                return graph
        return None

    def engine(
        self, graph: GraphFacts, batch: int, library: EngineLibrary | None = None
    ) -> tuple[EngineFacts, int] | None:
        """The engine that runs `graph` on `batch` images, and the number of its profile for that; or None.

        library: that it is to be of, None for any.
        """
        wanted = Profile(batch, tuple(level.keep for level in graph.levels))
        for engine in self.engines:
            if library not in (None, engine.library):
                continue
            same = (engine.kind, engine.network, engine.null_weak) == (graph.kind, graph.network, graph.null_weak)
            if same and wanted in engine.profiles:
                return engine, engine.profiles.index(wanted)
        return None

    def engine_batches(self, library: EngineLibrary | None = None) -> tuple[int, ...]:
        """Image counts that the engines, all or those of a library, have profiles for."""
        own = [engine for engine in self.engines if library in (None, engine.library)]
        steps = [engine for engine in own if engine.kind != "condition"]
        return tuple(sorted({profile.batch for engine in steps for profile in engine.profiles}))

    def condition(self, network: NetworkName) -> GraphFacts:
        """The condition graph of a network. Raises UsageError where the bundle does not have it."""
        graph = self.graph("condition", network=network)
        if graph is None:
            raise UsageError(
                f"autoguidance: this bundle has no weak checkpoint; build it with: sg-export build {self.source.name} "
                f"--weak-checkpoint PATH"
            )
        return graph


def adapter() -> "TypeAdapter[Manifest]":
    """Pydantic's reader and writer of manifests, which also gives the JSON Schema."""
    from pydantic import TypeAdapter

    return TypeAdapter(Manifest)


def json_schema() -> str:
    """The JSON Schema of manifests, as indented JSON."""
    import json

    return json.dumps(adapter().json_schema(), indent=1, sort_keys=True)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest strictly; one of an earlier schema is upgraded as it is read.

    Raises BundleError where the file is missing, is no JSON, is of another schema version, or does not fit the schema.
    """
    import json

    from pydantic import ValidationError

    try:
        text = path.read_text(encoding="utf-8")
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
        raise BundleError(f"{path}: {where}: {first['msg']} ({error.error_count()} faults); rebuild it") from None
    except UsageError as error:
        raise BundleError(f"{path}: {error}; rebuild it") from None


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Write a manifest as indented JSON."""
    path.write_bytes(adapter().dump_json(manifest, indent=1) + b"\n")


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else f"no JSON ({error})"
