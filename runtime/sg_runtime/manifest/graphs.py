"""Facts of graphs and engines."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sg_runtime.errors import UsageError

if TYPE_CHECKING:
    pass
from sg_runtime.manifest.base import EngineLibrary, GraphKind, NetworkName, Strict, check_counts
from sg_runtime.manifest.model import Level
from sg_runtime.vocabulary import is_separate

_LEVELS: dict[GraphKind, int] = {"condition": 0, "dense": 1, "sparse": 1, "guided": 2}
"""Levels of a graph, by its kind."""


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
        return is_separate({tensor.name for tensor in self.inputs})


@dataclass(frozen=True, slots=True)
class Profile(Strict):
    """The shapes of one optimization profile, min = opt = max: images (or rows of condition), and kept tokens."""

    batch: int
    keep: tuple[int, ...]

    def __post_init__(self) -> None:
        check_counts(self, 1, "batch")

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
