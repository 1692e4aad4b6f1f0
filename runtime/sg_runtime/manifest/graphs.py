"""Facts about graphs and engines."""

from collections.abc import Iterable
from dataclasses import dataclass

from sg_runtime.errors import UsageError
from sg_runtime.manifest.base import EngineLibrary, GraphKind, NetworkName, Strict, TensorFacts, check_counts
from sg_runtime.manifest.model import Level
from sg_runtime.vocabulary import HOISTED, is_separate

_LEVELS: dict[GraphKind, int] = {"dense": 1, "sparse": 1, "guided": 2}
"""Number of levels of a step graph, by its kind. Other graphs have none."""


@dataclass(frozen=True, slots=True)
class Cost(Strict):
    """Cost of a graph for one image (or one row of a hoisted graph), counted from the graph.

    linear_macs: multiply-adds of linear layers.
    attention_macs: multiply-adds of attention.
    weight_bytes: bytes of weights that are read. Weights count once per operator that takes them.
    activation_bytes: estimated peak of live activations if operators run in order and not in place.
    """

    linear_macs: int
    attention_macs: int
    weight_bytes: int
    activation_bytes: int


@dataclass(frozen=True, slots=True)
class GraphFacts(Strict):
    """A graph of the bundle.

    name: name of the graph.
    kind: what the graph computes.
    network: network that the graph belongs to.
    levels: one for dense and sparse; strong and weak for guided; none for the others.
    file: ONNX file, possibly shared by graphs of other levels; None if only engines hold the graph.
    inputs: inputs of the graph, in order.
    outputs: outputs of the graph, in order.
    cost: cost of the graph.
    parity: relative L2 distance to PyTorch on one random input, measured at build; None if no
    backend could run the graph.
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

    def __post_init__(self) -> None:
        if len(self.levels) != (wanted := _LEVELS.get(self.kind, 0)):
            raise UsageError(f"graph {self.name}: levels: expected {wanted} for {self.kind}, found {len(self.levels)}")
        if not self.outputs:
            raise UsageError(f"graph {self.name}: outputs: expected at least one, found none")

    @property
    def hoisted(self) -> bool:
        """Whether the graph runs before the sampling loop."""
        return self.kind in HOISTED

    @property
    def null_weak(self) -> bool:
        """Whether this is a guided graph whose weak branch has a separate condition."""
        return is_separate({tensor.name for tensor in self.inputs})


@dataclass(frozen=True, slots=True)
class PassCost(Strict):
    """Cost of a single branch of which the bundle holds no graph, for comparison.

    network: network of the branch.
    level: level of the branch.
    cost: cost of its graph, which the build traced and did not keep.
    """

    network: NetworkName
    level: Level
    cost: Cost


@dataclass(frozen=True, slots=True)
class Profile(Strict):
    """The shapes of one optimization profile; min = opt = max.

    batch: number of images (rows in an engine for hoisted graphs).
    keep: number of kept tokens of each branch.
    """

    batch: int
    keep: tuple[int, ...]

    def __post_init__(self) -> None:
        check_counts(self, 1, "batch")

    def __str__(self) -> str:
        return f"batch {self.batch}" + (f" keeping {'/'.join(map(str, self.keep))} tokens" if self.keep else "")


@dataclass(frozen=True, slots=True)
class EngineFacts(Strict):
    """An engine: the graphs of one kind, network and weak condition, at the shapes of its profiles.

    kind: kind of its graphs.
    network: network of its graphs.
    null_weak: whether the weak branch of its graphs has a separate condition.
    file: path of the engine in the bundle.
    library: library that built the engine.
    version: version of the library that built the engine. No other version reads it.
    compute_capabilities: compute capabilities of the GPUs it was built for, 86 for 8.6.
    profiles: optimization profiles, in order.
    fused_attention: number of fused attention kernels found in the engine; None if not countable.
    build_seconds: build time, measured by this build or by the build that filled the cache.
    build_memory_bytes: peak memory of the process that built the engine, measured likewise.
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


def find_engine(
    engines: Iterable[EngineFacts], graph: GraphFacts, batch: int, library: EngineLibrary | None = None
) -> tuple[EngineFacts, int] | None:
    """Return the engine for `graph` on `batch` images and the index of its profile, or None.

    library: library of the engine; None for any.
    """
    wanted = Profile(batch, tuple(level.keep for level in graph.levels))
    for engine in engines:
        if library not in (None, engine.library):
            continue
        same = (engine.kind, engine.network, engine.null_weak) == (graph.kind, graph.network, graph.null_weak)
        if same and wanted in engine.profiles:
            return engine, engine.profiles.index(wanted)
    return None
