"""Settings of guidance, the grids that a search tries, and what they cost."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from sg_export.cost.step import step_costs
from sg_runtime import Pipeline
from sg_runtime.guidance import Ramp
from sg_runtime.manifest import GuidanceMode, GuidancePlan

Rates = float | tuple[float, ...]
"""A sparsity, or the levels of a cosine schedule from the first step to the last."""

LABELS: Mapping[GuidanceMode, str] = {
    "none": "unguided",
    "cfg": "CFG",
    "sg": "SG",
    "cfg+sg": "CFG + SG",
    "autoguidance": "AutoGuidance",
}


@dataclass(frozen=True, slots=True)
class Setting:
    """Sampling settings of one row.

    guidance: guidance mode.
    scale: guidance scale; 1 if unguided.
    strong_sparsity: sparsity of the strong branch.
    sparsity: sparsity of the weak branch; None if the mode does not set one.
    """

    guidance: GuidanceMode
    scale: float = 1.0
    strong_sparsity: Rates = 0.0
    sparsity: Rates | None = None

    @property
    def name(self) -> str:
        """Name of the setting in a table."""
        rates = shown(self.strong_sparsity)
        if self.sparsity is not None:
            rates = f" {rates}/{shown(self.sparsity)}"
        else:
            rates = "" if self.strong_sparsity == 0 else f" at γ {rates}"
        scale = "" if self.guidance == "none" else f", ω = {self.scale:g}"
        return f"{self.label}{rates}{scale}"

    @property
    def label(self) -> str:
        """Name of the kind of guidance."""
        sparse = self.guidance == "autoguidance" and self.sparsity != self.strong_sparsity
        return LABELS[self.guidance] + " + SG" * sparse

    def plan(self, pipe: Pipeline) -> GuidancePlan:
        """Return the guidance of a run on a bundle of this mode."""
        return pipe.guidance(
            self.guidance,
            scale=self.scale,
            strong_sparsity=_ramp(self.strong_sparsity),
            sparsity=None if self.sparsity is None else _ramp(self.sparsity),
        )


def levels(rates: Rates) -> tuple[float, ...]:
    """Return the sparsities that a run uses."""
    return rates if isinstance(rates, tuple) else (rates,)


def _ramp(rates: Rates) -> Ramp:
    return (rates[0], rates[-1]) if isinstance(rates, tuple) else rates


def shown(rates: Rates) -> str:
    """Return sparsities as they stand in a table."""
    return f"{rates[0]:g}→{rates[-1]:g}" if isinstance(rates, tuple) else f"{rates:g}"


@dataclass(frozen=True, slots=True)
class Search:
    """Grid of one mode: every pair of (strong, weak) sparsities at every scale."""

    guidance: GuidanceMode
    scales: tuple[float, ...]
    pairs: tuple[tuple[Rates, Rates | None], ...] = ((0.0, None),)

    @property
    def settings(self) -> tuple[Setting, ...]:
        """All settings of the grid."""
        return tuple(Setting(self.guidance, scale, *pair) for pair in self.pairs for scale in self.scales)

    @property
    def strong_levels(self) -> tuple[float, ...]:
        """Sparsities of the strong branch that a bundle needs."""
        return tuple(dict.fromkeys(level for rates, _ in self.pairs for level in levels(rates)))

    @property
    def weak_levels(self) -> tuple[float, ...]:
        """Sparsities of the weak branch that a bundle needs."""
        return tuple(dict.fromkeys(level for _, rates in self.pairs if rates is not None for level in levels(rates)))


def step_gmac(pipe: Pipeline, setting: Setting, steps: int) -> float:
    """Return the linear multiply-adds, in 1e9, of the graphs that run in a step for one image.

    The result is the mean over `steps` Euler steps.
    """
    manifest = pipe.bundle.manifest
    run = replace(manifest, guidance=setting.plan(pipe), sampling=replace(manifest.sampling, steps=steps))
    return step_costs(run)[-1].linear_macs / 1e9


@contextmanager
def timed(part: str, seconds: dict[str, float]) -> Iterator[None]:
    """Print how long the block took, and keep it in `seconds`."""
    began = time.perf_counter()
    yield
    seconds[part] = round(time.perf_counter() - began, 1)
    print(f"{part}: {seconds[part]:.1f} s", flush=True)
