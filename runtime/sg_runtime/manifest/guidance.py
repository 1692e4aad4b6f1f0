"""Guidance plans and sampling defaults."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sg_runtime.errors import UsageError
from sg_runtime.manifest.base import (
    FLOAT32_MAX,
    FLOAT32_MIN,
    GuidanceMode,
    NetworkName,
    SamplerName,
    Strict,
    check_counts,
    choice,
    number,
    pair,
)
from sg_runtime.manifest.model import SUBSET_RULES, Level, SubsetRule


@dataclass(frozen=True, slots=True)
class Mode:
    """The difference between the branches of a guidance mode.

    branches: 1 if the strong branch runs alone, else 2.
    null_weak: whether the weak branch has no class.
    weak_network: network of the weak branch.
    weak_level: sparsity of the weak branch: same as the strong branch, sparser, or any.
    """

    branches: int
    null_weak: bool
    weak_network: NetworkName
    weak_level: Literal["same", "sparser", "any"]

    @property
    def separate(self) -> bool:
        """Whether the weak branch has separate modulations."""
        return self.null_weak or self.weak_network == "weak"

    @property
    def fusible(self) -> bool:
        """Whether one graph can contain both branches."""
        return self.branches == 2 and self.weak_network == "main"


MODES: Mapping[GuidanceMode, Mode] = {
    "none": Mode(1, False, "main", "same"),
    "cfg": Mode(2, True, "main", "same"),
    "sg": Mode(2, False, "main", "sparser"),
    "cfg+sg": Mode(2, True, "main", "sparser"),
    "autoguidance": Mode(2, False, "weak", "any"),
}
"""All guidance modes.

none: the strong branch alone.
cfg: classifier-free guidance.
sg: Sparse Guidance (arXiv 2601.01608).
cfg+sg: both.
autoguidance: an earlier checkpoint as the weak branch (Karras et al. 2024).
"""


@dataclass(frozen=True, slots=True)
class GuidancePlan(Strict):
    """The two branches of a run and their combination, weak + scale * (strong - weak).

    Source: arXiv 2601.01608, eq. 7 and 8. A sparsity or scale with a `_last` value changes along a
    cosine from the first step to the last step. Sparsities take only levels that were built.

    mode: guidance mode, a key of `MODES`.
    strong: level of the strong branch in the first step.
    weak: level of the weak branch in the first step.
    scale: guidance scale in the first step.
    strong_last: level of the strong branch in the last step; None if it does not change.
    weak_last: level of the weak branch in the last step; None if it does not change.
    scale_last: guidance scale in the last step; None if it does not change.
    interval: lowest and highest time (t, or sigma of an edm model) at which guidance applies; None
    for all times. Outside it the strong branch runs alone (Kynkäänniemi et al. 2024).
    subset: "fresh" to draw kept tokens in every evaluation, "fixed" to draw them once per run.
    """

    mode: GuidanceMode
    strong: Level
    weak: Level
    scale: float
    strong_last: Level | None = None
    weak_last: Level | None = None
    scale_last: float | None = None
    interval: tuple[float, float] | None = None
    subset: SubsetRule = "fresh"

    def __post_init__(self) -> None:
        choice("guidance", self.mode, tuple(MODES))
        choice("subset", self.subset, SUBSET_RULES)
        for scale in (self.scale, self.scale_last):
            if scale is not None and not abs(number("scale", scale)) <= FLOAT32_MAX:
                raise UsageError(f"scale: expected a finite float32 number, found {scale}")
        if self.interval is not None:
            low, high = pair("interval", self.interval, "the lowest and the highest time")
            if not 0 <= low <= high <= FLOAT32_MAX:
                raise UsageError(f"interval: expected 0 <= lowest time <= highest time, found {low:g} to {high:g}")
        for level in (self.strong, self.weak, self.strong_last, self.weak_last):
            if level is not None and not isinstance(level, Level):
                raise UsageError(f"sparsity: expected a Level of the bundle's graphs, found {level!r}")
        strong, weak = self.strong.sparsity, self.weak.sparsity
        constant = self.strong_last is None and self.weak_last is None
        if self.row.weak_level == "sparser" and constant and self.weak.keep >= self.strong.keep:
            raise UsageError(
                f"{self.mode} guidance: expected a weak branch sparser than the strong one, found sparsity {weak:g} "
                f"(weak, {self.weak.keep} tokens) and {strong:g} (strong, {self.strong.keep} tokens); "
                f"raise `sparsity` or lower `strong_sparsity`"
            )
        if self.row.weak_level == "same" and (self.weak, self.weak_last) != (self.strong, self.strong_last):
            raise UsageError(
                f"{self.mode} guidance: expected equal sparsities, found {strong:g} (strong) and {weak:g} (weak)"
            )

    def __str__(self) -> str:
        parts: list[str] = [self.mode]
        if self.row.weak_level != "same":
            strong, weak = _rate(self.strong, self.strong_last), _rate(self.weak, self.weak_last)
            parts.append(f"sparsity {strong} strong and {weak} weak")
        if self.row.branches == 2:
            parts.append(f"scale {_ramp(self.scale, self.scale_last)}")
        if self.interval is not None:
            parts.append(f"between times {self.interval[0]:g} and {self.interval[1]:g}")
        if self.subset == "fixed":
            parts.append("one subset for all steps")
        return ", ".join(parts)

    def draw(self, step: int, evaluation: int) -> tuple[int, int]:
        """Return the counters, step and evaluation, with which kept tokens are drawn."""
        return (step, evaluation) if self.subset == "fresh" else (0, 0)

    @property
    def row(self) -> Mode:
        """The row of the plan's mode in `MODES`."""
        return MODES[self.mode]


def _ramp(first: float, last: float | None) -> str:
    return f"{first:g}" if last is None else f"{first:g} to {last:g}"


def _rate(first: Level, last: Level | None) -> str:
    return _ramp(first.sparsity, None if last is None else last.sparsity)


@dataclass(frozen=True, slots=True)
class Karras(Strict):
    """Noise levels of an edm run: evenly spaced in sigma**(1 / rho), highest to lowest, then 0."""

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
class Shifted(Strict):
    """Times of a flow run: shift * u / (shift * u + 1 - u), with u evenly spaced from 1, then 0.

    Source: Esser et al. 2024 (arXiv 2403.03206), eq. 23, where the shift is sqrt(m / n).

    shift: above 1 there are more steps near the noise.
    last: u of the last step; None for 1 / steps, so that u falls evenly to 0.
    """

    shift: float
    last: float | None

    def __post_init__(self) -> None:
        if not FLOAT32_MIN <= self.shift <= FLOAT32_MAX:
            raise UsageError(f"times: shift: expected a float32 number above 0, found {self.shift:g}")
        if self.last is not None and not FLOAT32_MIN <= self.last < 1:
            raise UsageError(f"times: last: expected a float32 number above 0 and below 1, found {self.last:g}")


EVEN = Shifted(1.0, None)
"""Times that fall evenly from 1 to 0."""


@dataclass(frozen=True, slots=True)
class Sampling(Strict):
    """Defaults of a sampling run, and the conventions of the model that a run keeps to.

    sampler: name of the sampler.
    steps: number of steps.
    times: noise levels of an edm model; times from 1 to 0 of the other models.
    noise_scale: standard deviation of the noise that the model was trained with.
    time_floor: c in the velocity (x - x0) / max(t, c) of an x0 model; 0 for other models.
    """

    sampler: SamplerName
    steps: int
    times: Karras | Shifted
    noise_scale: float = 1.0
    time_floor: float = 0.0

    def __post_init__(self) -> None:
        check_counts(self, 1, "steps")
        if not FLOAT32_MIN <= self.noise_scale <= FLOAT32_MAX:
            raise UsageError(f"noise_scale: expected a float32 number above 0, found {self.noise_scale:g}")
        if not 0 <= self.time_floor <= 1:
            raise UsageError(f"time_floor: expected 0 to 1, found {self.time_floor:g}")
