"""The manifest of a bundle: what was built, from what, and how to run it. Frozen data, read strictly.

Reading needs pydantic, imported on first use. `manifest.schema.json` beside this file is the same as JSON Schema;
after a change here it is written anew by

    python -c "import sg_runtime.manifest as m; print(m.json_schema())" > runtime/sg_runtime/manifest.schema.json
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from sg_runtime.errors import BundleError, UsageError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

SCHEMA_VERSION: Literal[3] = 3
MANIFEST_FILE = "manifest.json"

GraphKind = Literal["condition", "dense", "sparse", "guided"]
GuidanceMode = Literal["none", "cfg", "sg", "cfg+sg", "autoguidance"]
NetworkName = Literal["main", "weak"]
Prediction = Literal["flow", "edm"]
HalfPrecision = Literal["fp16", "bf16"]
Precision = Literal["fp32", "fp16", "bf16"]
QuantizedType = Literal["int8", "fp8"]
EngineLibrary = Literal["tensorrt", "tensorrt_rtx"]
SamplerName = Literal["euler", "heun"]

FLOAT32_MAX = 3.4028234663852886e38
FLOAT32_MIN = 2.0**-126
"""The smallest float32 number above 0 of full precision."""

_LEVELS: dict[GraphKind, int] = {"condition": 0, "dense": 1, "sparse": 1, "guided": 2}
"""Levels of a graph, by its kind."""


class Strict:
    """Unknown keys and values of another type are errors."""

    __slots__ = ()
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}


def _check_counts(owner: object, least: int, *names: str) -> None:
    for name in names:
        if (value := getattr(owner, name)) < least:
            raise UsageError(f"{name}: expected at least {least}, found {value}")


@dataclass(frozen=True, slots=True)
class Route(Strict):
    """Blocks `start` to `end`, both included, run on the kept tokens alone."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end:
            raise UsageError(f"route {self.start}-{self.end}: expected 0 <= start <= end, both blocks included")

    def __str__(self) -> str:
        return f"{self.start}-{self.end}"

    @classmethod
    def parse(cls, text: str) -> "Route":
        """A route from "START-END". Raises UsageError for anything else, several routes included."""
        if "," in text:
            raise UsageError(f"route {text!r}: expected one route, found several, which are not supported")
        match = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", text)
        if match is None:
            raise UsageError(f"route {text!r}: expected START-END, both blocks included, as 2-24")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True, slots=True)
class Level(Strict):
    """A sparsity as asked for, in [0, 1), and the number of tokens that the family's rounding keeps at it."""

    sparsity: float
    keep: int

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise UsageError(f"sparsity {self.sparsity:g}: expected at least 0 and less than 1")
        _check_counts(self, 1, "keep")


@dataclass(frozen=True, slots=True)
class ModelFacts(Strict):
    """What the runtime and its user need to know of the network.

    Class index `num_classes` means "no class". tokens is N; modulations is M, the values that a step needs of time and
    class; parameters counts all weights.
    """

    family: str
    prediction: Prediction
    space: Literal["pixel", "latent"]
    image_size: int
    channels: int
    patch: int
    tokens: int
    width: int
    depth: int
    heads: int
    num_classes: int
    modulations: int
    parameters: int
    route: Route | None
    class_names: tuple[str, ...] | None

    def __post_init__(self) -> None:
        sizes = ("image_size", "channels", "patch", "tokens", "width", "depth", "heads", "num_classes", "modulations")
        _check_counts(self, 1, *sizes)
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise UsageError(f"class_names: expected {self.num_classes} names, found {len(self.class_names)}")


@dataclass(frozen=True, slots=True)
class GuidancePlan(Strict):
    """Which two branches are combined, as weak + scale * (strong - weak); arXiv 2601.01608, eq. 7 and 8.

    none: the strong branch alone. cfg: the weak branch has no class, at the same sparsity. sg: the weak branch has
    the same class, at a higher sparsity. cfg+sg: no class and a higher sparsity. autoguidance: the weak branch is
    another, earlier checkpoint, with the same class, at any sparsity (Karras et al. 2024).

    A sparsity or scale that has a `_last` changes along a cosine from the one in the first step to that in the last,
    sparsities by way of those that were built. interval: lowest and highest time (t, or sigma of an edm model) between
    which guidance applies; outside, the strong branch runs alone (Kynkäänniemi et al. 2024).
    """

    mode: GuidanceMode
    strong: Level
    weak: Level
    scale: float
    strong_last: Level | None = None
    weak_last: Level | None = None
    scale_last: float | None = None
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(GuidanceMode):
            raise UsageError(f"guidance: expected one of {', '.join(get_args(GuidanceMode))}, found {self.mode!r}")
        for scale in (self.scale, self.scale_last):
            if scale is not None and not abs(scale) <= FLOAT32_MAX:
                raise UsageError(f"scale: expected a finite float32 number, found {scale}")
        if self.interval is not None and not 0 <= self.interval[0] <= self.interval[1] <= FLOAT32_MAX:
            raise UsageError(
                f"interval: expected 0 <= lowest time <= highest time, found {self.interval[0]:g} to "
                f"{self.interval[1]:g}"
            )
        strong, weak = self.strong.sparsity, self.weak.sparsity
        constant = self.strong_last is None and self.weak_last is None
        if self.mode in ("sg", "cfg+sg") and constant and self.weak.keep >= self.strong.keep:
            raise UsageError(
                f"{self.mode} guidance: expected a weak branch sparser than the strong one, found sparsity {weak:g} "
                f"(weak, {self.weak.keep} tokens) and {strong:g} (strong, {self.strong.keep} tokens); "
                f"raise --sparsity or lower --strong-sparsity"
            )
        if self.mode in ("none", "cfg") and (self.weak, self.weak_last) != (self.strong, self.strong_last):
            raise UsageError(
                f"{self.mode} guidance: expected equal sparsities, found {strong:g} (strong) and {weak:g} (weak)"
            )

    @property
    def null_weak(self) -> bool:
        """Whether the weak branch has no class."""
        return self.mode in ("cfg", "cfg+sg")

    @property
    def weak_network(self) -> NetworkName:
        """The network of the weak branch."""
        return "weak" if self.mode == "autoguidance" else "main"


@dataclass(frozen=True, slots=True)
class Karras(Strict):
    """Noise levels of an edm run: evenly spaced in sigma**(1 / rho), from the highest to the lowest, then 0."""

    sigma_min: float
    sigma_max: float
    rho: float

    def __post_init__(self) -> None:
        if not (FLOAT32_MIN <= self.sigma_min < self.sigma_max <= FLOAT32_MAX and 1 <= self.rho <= FLOAT32_MAX):
            raise UsageError(
                f"noise levels: expected 0 < sigma_min < sigma_max in float32 and rho of at least 1, found "
                f"{self.sigma_min:g}, {self.sigma_max:g} and {self.rho:g}"
            )


@dataclass(frozen=True, slots=True)
class Sampling(Strict):
    """Defaults of a run. `karras` is None for flow models, whose times go from 1 to 0 in even steps."""

    sampler: SamplerName
    steps: int
    karras: Karras | None

    def __post_init__(self) -> None:
        _check_counts(self, 1, "steps")


@dataclass(frozen=True, slots=True)
class TensorFacts(Strict):
    """An input or output of a graph; a symbolic dimension is its name."""

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Cost(Strict):
    """Counted from the graph, for one image (or one row of `condition`).

    linear_macs, attention_macs: multiply-adds. weight_bytes: weights as they are read, once for each operator that
    takes them. activation_bytes: an estimate of the peak, the most that must live at once when the graph runs in
    order without working in place.
    """

    linear_macs: int
    attention_macs: int
    weight_bytes: int
    activation_bytes: int


@dataclass(frozen=True, slots=True)
class GraphFacts(Strict):
    """One graph. `levels`: none for condition, one for dense and sparse, strong and weak for guided.

    file: its ONNX file, which graphs of other levels may share, or None where engines alone hold it.
    """

    name: str
    kind: GraphKind
    network: NetworkName
    levels: tuple[Level, ...]
    file: str | None
    inputs: tuple[TensorFacts, ...]
    outputs: tuple[TensorFacts, ...]
    cost: Cost
    parity: float | None
    """Relative L2 distance to PyTorch on one random input, measured at build; None where no backend could run it."""

    def __post_init__(self) -> None:
        if len(self.levels) != _LEVELS[self.kind]:
            raise UsageError(
                f"graph {self.name}: levels: expected {_LEVELS[self.kind]} for {self.kind}, found {len(self.levels)}"
            )
        if not self.outputs:
            raise UsageError(f"graph {self.name}: outputs: expected at least one, found none")

    @property
    def null_weak(self) -> bool:
        """Whether it is a guided graph whose weak branch has modulations, thus a condition, of its own."""
        return any(tensor.name == "modulations_weak" for tensor in self.inputs)


@dataclass(frozen=True, slots=True)
class Profile(Strict):
    """The shapes of one optimization profile, min = opt = max: images (or rows of condition), and kept tokens."""

    batch: int
    keep: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_counts(self, 1, "batch")

    def __str__(self) -> str:
        return f"batch {self.batch}" + (f" keeping {'/'.join(map(str, self.keep))} tokens" if self.keep else "")


@dataclass(frozen=True, slots=True)
class EngineFacts(Strict):
    """One engine: the graphs of a kind, network and weak condition, at the shapes of its profiles.

    version: of the library that built it and that alone reads it. compute_capabilities: of the GPUs that it was built
    for, 86 for 8.6. fused_attention: kernels found in it. build_seconds, build_memory_bytes (the peak of the process
    that built it): measured when it was built, by this build or the one that put it into the cache.
    """

    kind: GraphKind
    network: NetworkName
    null_weak: bool
    file: str
    library: EngineLibrary
    version: str
    compute_capabilities: tuple[int, ...]
    profiles: tuple[Profile, ...]
    fused_attention: int | None
    build_seconds: float
    build_memory_bytes: int

    def __post_init__(self) -> None:
        if not self.profiles or not self.compute_capabilities:
            raise UsageError(f"engine {self.file}: expected at least one profile and compute capability, found none")


@dataclass(frozen=True, slots=True)
class LayerChoice(Strict):
    """What became of a quantizable layer.

    quantized: whether it is; its activations too, unless weight_only. reason: why, as inspect shows it. sensitivity:
    relative L2 distance of the guided prediction to FP32 where it alone is quantized, None where that was not measured.
    bytes_saved: of its weight, where it is quantized. linear_macs: of one image and guided step.
    """

    name: str
    quantized: bool
    weight_only: bool
    reason: str
    sensitivity: float | None
    bytes_saved: int
    linear_macs: int


@dataclass(frozen=True, slots=True)
class StratumQuality(Strict):
    """How close the predictions at one time (t, or sigma) are to FP32: the worst over the guidances that are built.

    strong, weak: cosine of each branch. guided: relative L2 distance of the guided prediction.
    """

    time: float
    strong: float
    weak: float
    guided: float


@dataclass(frozen=True, slots=True)
class QualityGates(Strict):
    """What a quantized bundle must reach at every time: the least cosine of a branch, the most guided distance."""

    cosine: float
    guided: float


@dataclass(frozen=True, slots=True)
class Quantization(Strict):
    """How the graphs were quantized, and what it did to them, as measured when they were built.

    type: of the products' weights and activations. method: of the ranges; table_sha256: of the table that they are
    from. images, evaluations: that they were seen on. runs: relative L2 distance of whole runs to FP32, at equal seeds
    and subsets; mask_noise: that of two FP32 runs with different subsets. passed: whether the gates hold. time_ratio:
    of a guided step to FP32's on ONNX Runtime's CPU provider, where it was built; None where that does not run it as it
    is. remarks: what a user should know before taking it.
    """

    type: QuantizedType
    method: str
    table_sha256: str
    images: int
    evaluations: int
    layers: tuple[LayerChoice, ...]
    quality: tuple[StratumQuality, ...]
    runs: float
    mask_noise: float
    gates: QualityGates
    passed: bool
    time_ratio: float | None
    remarks: tuple[str, ...]


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

    schema_version: Literal[3]
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
        _check_counts(self, 1, "condition_rows")
        if self.batch is not None:
            _check_counts(self, 1, "batch")
        for network in ("main", "weak") if self.weak_source else ("main",):
            if self.graph("condition", network=network) is None:
                raise UsageError(f"graphs: expected one of kind condition for the {network} network, found none")
        if (self.sampling.karras is None) != (self.model.prediction == "flow"):
            raise UsageError("sampling: karras: expected noise levels for edm models alone, not for flow")
        if self.guidance.mode == "autoguidance" and self.weak_source is None:
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
    """Read a manifest strictly.

    Raises BundleError where the file is missing, is no JSON, is of another schema version, or does not fit the schema.
    """
    import json

    from pydantic import ValidationError

    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path}: expected the manifest of a bundle, found {_reason(error)}; rebuild it") from None
    version = content.get("schema_version") if isinstance(content, dict) else None
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
