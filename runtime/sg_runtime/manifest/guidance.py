"""Which branches guide a run, and how it is sampled."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from sg_runtime.errors import UsageError

if TYPE_CHECKING:
    pass
from sg_runtime.manifest.base import (
    FLOAT32_MAX,
    FLOAT32_MIN,
    GuidanceMode,
    NetworkName,
    SamplerName,
    Strict,
    check_counts,
)
from sg_runtime.manifest.model import Level


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
        check_counts(self, 1, "steps")
