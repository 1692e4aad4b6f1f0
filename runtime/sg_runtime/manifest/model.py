"""Facts about a network."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from sg_runtime.errors import UsageError
from sg_runtime.manifest.base import GraphKind, Prediction, Strict, TensorFacts, check_counts, number, whole_number
from sg_runtime.vocabulary import HOISTED

KEPT: Mapping[str, Callable[[int, float], int]] = {
    "tread": lambda tokens, sparsity: tokens - int(tokens * sparsity),
    "maskdit": lambda tokens, sparsity: int(tokens * (1 - sparsity)),
    "prx": lambda tokens, sparsity: tokens - min(max(round(tokens * sparsity), sparsity > 0), tokens - 1),
}
"""Number of tokens that a branch keeps, from all tokens and the sparsity, by family."""


SubsetRule = Literal["fresh", "fixed"]
SUBSET_RULES: tuple[SubsetRule, ...] = get_args(SubsetRule)

UPSTREAM_SUBSET: Mapping[str, SubsetRule] = {"tread": "fresh", "maskdit": "fresh", "prx": "fixed"}
"""When upstream's sampling draws kept tokens, by family: in every evaluation, or once for all.

Photoroom/PRX seeds the draw once (`algorithm/tread.py`, commit 44ce5c4).
"""


DASHES = "-\N{HYPHEN}\N{NON-BREAKING HYPHEN}\N{EN DASH}\N{EM DASH}\N{MINUS SIGN}"
"""Characters that texts have in place of "-"."""


@dataclass(frozen=True, slots=True)
class Route(Strict):
    """Blocks `start` to `end` (inclusive) that run only on the kept tokens."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end:
            raise UsageError(f"route {self.start}-{self.end}: expected 0 <= start <= end, both blocks included")

    def __str__(self) -> str:
        return f"{self.start}-{self.end}"

    @classmethod
    def parse(cls, text: str) -> "Route":
        """Parse a route "START-END", with any dash.

        Raises UsageError for other text, including several routes.
        """
        if "," in text:
            raise UsageError(f"route {text!r}: expected one route, found several, which are not supported")
        match = re.fullmatch(rf"\s*(\d+)\s*[{DASHES}]\s*(\d+)\s*", text)
        if match is None:
            raise UsageError(f"route {text!r}: expected START-END, both blocks included, such as 2-24")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True, slots=True)
class Level(Strict):
    """A sparsity and its number of kept tokens.

    sparsity: requested sparsity, in [0, 1).
    keep: number of kept tokens after the rounding rule of the model family.
    """

    sparsity: float
    keep: int

    def __post_init__(self) -> None:
        whole_number("keep", self.keep)
        if not 0 <= number("sparsity", self.sparsity) < 1:
            raise UsageError(f"sparsity {self.sparsity:g}: expected at least 0 and less than 1")
        check_counts(self, 1, "keep")


_TIME = TensorFacts("t", "float32", ("S",))


@dataclass(frozen=True, slots=True)
class Labels(Strict):
    """Conditioning by a class.

    count: number of classes. The class index `count` means "no class".
    names: names of the classes, in order; None if the checkpoint has no names.
    """

    count: int
    names: tuple[str, ...] | None

    def __post_init__(self) -> None:
        check_counts(self, 1, "count")
        if self.names is not None and len(self.names) != self.count:
            raise UsageError(f"class_names: expected {self.count} names, found {len(self.names)}")

    def __str__(self) -> str:
        return f"{self.count} classes" + (f", {self.names[0]} to {self.names[-1]}" if self.names else "")

    @property
    def hoisted(self) -> dict[GraphKind, tuple[TensorFacts, ...]]:
        """Inputs of the graphs that run before the sampling loop, with S rows, by kind."""
        return {"condition": (_TIME, TensorFacts("class", "int64", ("S",)))}


@dataclass(frozen=True, slots=True)
class Text(Strict):
    """Conditioning by a prompt, given as the embeddings of its tokens.

    tokens: L, number of tokens of a prompt, with padding.
    width: size of an embedding.
    """

    tokens: int
    width: int

    def __post_init__(self) -> None:
        check_counts(self, 1, "tokens", "width")

    def __str__(self) -> str:
        return f"text of {self.tokens} tokens, {self.width} values each"

    @property
    def hoisted(self) -> dict[GraphKind, tuple[TensorFacts, ...]]:
        """Inputs of the graphs that run before the sampling loop, with S rows, by kind."""
        embeddings = TensorFacts("embeddings", "float32", ("S", self.tokens, self.width))
        return {"condition": (_TIME,), "prompt": (embeddings, TensorFacts("mask", "int64", ("S", self.tokens)))}


@dataclass(frozen=True, slots=True)
class ModelFacts(Strict):
    """The network, as far as the runtime and its user need to know it.

    family: adapter that read the checkpoint.
    prediction: quantity that the network predicts.
    space: "pixel", or "latent" if samples need a decoder, which is not part of the bundle.
    latent: shape (C, H, W) of one sample.
    pixels_per_latent: height and width of the square of the picture that one latent decodes to; 1
    for pixels, None if it is unknown.
    patch: side of the square that one token covers.
    tokens: N, number of tokens of one sample.
    width: width of the transformer.
    depth: number of transformer blocks.
    heads: number of attention heads.
    conditions: what an image is conditioned on, besides time.
    held: shape, for one image, of each input of a step that does not change within it, by name; see
    `sg_runtime.vocabulary.HELD`.
    parameters: number of all weights.
    route: blocks that run on the kept tokens; None if unknown.
    ends: modules at both ends of the network. They stay in FP32 in a half-precision or quantized
    bundle.
    masked: whether a mask token replaces dropped tokens after the route. Otherwise they bypass it.
    """

    family: str
    prediction: Prediction
    space: Literal["pixel", "latent"]
    latent: tuple[int, int, int]
    pixels_per_latent: int | None
    patch: int
    tokens: int
    width: int
    depth: int
    heads: int
    conditions: Labels | Text
    held: dict[str, tuple[int, ...]]
    parameters: int
    route: Route | None
    ends: tuple[str, ...]
    masked: bool

    def __post_init__(self) -> None:
        check_counts(self, 1, "patch", "tokens", "width", "depth", "heads")
        names = [name for kind in self.conditions.hoisted for name in HOISTED[kind]]
        if list(self.held) != names or min((size for shape in self.held.values() for size in shape), default=0) < 1:
            raise UsageError(f"held: expected shapes of at least 1 of {', '.join(names)}, found {self.held}")
        if self.pixels_per_latent is not None:
            check_counts(self, 1, "pixels_per_latent")
        if min(self.latent) < 1:
            raise UsageError(f"latent: expected sizes of at least 1, found {self.latent}")

    @property
    def picture(self) -> tuple[int, int] | None:
        """Height and width of the picture in pixels; None if they are unknown."""
        per = self.pixels_per_latent
        return None if per is None else (self.latent[1] * per, self.latent[2] * per)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width by which users name the size: of the picture, or else of a sample."""
        return self.picture or self.latent[1:]

    @property
    def labels(self) -> Labels:
        """The classes of a class-conditional model. Raises UsageError for another model."""
        if not isinstance(self.conditions, Labels):
            raise UsageError(
                f"expected a model of classes, found {self.family}, which is conditioned on text: sample it from "
                f"Python, with prompt_embeds"
            )
        return self.conditions
