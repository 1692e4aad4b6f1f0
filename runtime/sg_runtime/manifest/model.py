"""Facts of a network."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sg_runtime.errors import UsageError

if TYPE_CHECKING:
    pass
from sg_runtime.manifest.base import Prediction, Strict, check_counts


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
        check_counts(self, 1, "keep")


@dataclass(frozen=True, slots=True)
class ModelFacts(Strict):
    """What the runtime and its user need to know of the network.

    family: the adapter that read the checkpoint.
    prediction: what the network predicts.
    space: whether it samples pixels or the latents of a decoder that is not part of the bundle.
    latent: (C, H, W) of one sample.
    patch: side of the square that one token covers.
    tokens: N, tokens of one sample.
    width, depth, heads: of the transformer.
    num_classes: classes; the class index `num_classes` means "no class".
    modulations: M, values that a step needs of time and class.
    parameters: number of all weights.
    route: blocks that run on the kept tokens; None if unknown.
    class_names: names of the classes in order, if the checkpoint has them.
    ends: modules at both ends of the network, which stay in FP32 in a half-precision or quantized bundle.
    """

    family: str
    prediction: Prediction
    space: Literal["pixel", "latent"]
    latent: tuple[int, int, int]
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
    ends: tuple[str, ...]

    def __post_init__(self) -> None:
        check_counts(self, 1, "patch", "tokens", "width", "depth", "heads", "num_classes", "modulations")
        if min(self.latent) < 1:
            raise UsageError(f"latent: expected sizes of at least 1, found {self.latent}")
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise UsageError(f"class_names: expected {self.num_classes} names, found {len(self.class_names)}")
