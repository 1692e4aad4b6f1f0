"""Settings of calibration: the amount of data, and the methods that determine ranges."""

from dataclasses import dataclass
from typing import Literal, get_args

from sg_runtime.errors import UsageError

Method = Literal["min-max", "percentile", "entropy"]
METHODS: tuple[Method, ...] = get_args(Method)

LEAST_STRATA = 25
"""Least number of times at which ranges are measured, as activations change along a run."""


SEEDS = 1 << 40
"""Number of seeds of the calibration runs. Seeds of search and gates start above it."""


@dataclass(frozen=True, slots=True)
class FeedSettings:
    """Amount of calibration data.

    samples: images for each guidance. steps: steps of each run (Heun); every step is a stratum.
    seed: first seed of the runs.
    """

    samples: int = 16
    steps: int = LEAST_STRATA
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UsageError(f"`samples`: expected at least 1, found {self.samples}")
        if self.steps < LEAST_STRATA:
            raise UsageError(f"`steps`: expected at least {LEAST_STRATA}, found {self.steps}")
        if not 0 <= self.seed < SEEDS:
            raise UsageError(f"`seed`: expected 0 to {SEEDS - 1}, found {self.seed}")
