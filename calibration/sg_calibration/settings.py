"""How much to calibrate on, and how ranges are found."""

from dataclasses import dataclass
from typing import Literal, get_args

from sg_runtime.errors import UsageError

Method = Literal["min-max", "percentile", "entropy"]
METHODS: tuple[Method, ...] = get_args(Method)

LEAST_STRATA = 25
"""Times at which ranges must have been seen: activations of a diffusion transformer change along a run."""


SEEDS = 1 << 40
"""Of calibration; those of search and gates lie beyond."""


@dataclass(frozen=True, slots=True)
class FeedSettings:
    """How much to collect: `samples` images for each guidance, along Heun runs of `steps` steps, a stratum each."""

    samples: int = 16
    steps: int = LEAST_STRATA
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UsageError(f"--calib-samples: expected at least 1, found {self.samples}")
        if self.steps < LEAST_STRATA:
            raise UsageError(f"--calib-steps: expected at least {LEAST_STRATA}, found {self.steps}")
        if not 0 <= self.seed < SEEDS:
            raise UsageError(f"--calib-seed: expected 0 to {SEEDS - 1}, found {self.seed}")
