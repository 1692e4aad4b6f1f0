"""Options of quantization, and the checks that reject a request before any work starts."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from sg_calibration.prompts import read_prompts
from sg_calibration.settings import METHODS, FeedSettings, Method
from sg_calibration.types import QUANTS
from sg_runtime.errors import UsageError
from sg_runtime.manifest import QualityGates, QuantizedType

GATE_IMAGES = 8
"""Number of images for the quality gates, for each guidance. The images are judged together."""


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """How to quantize.

    type: INT8 or FP8.
    method: rule that makes a range from observed values; None for the default of the type.
    table: table of ranges from `sg-export calibrate`; None to measure the ranges.
    data: folder of the user's calibration shards; None to measure on guided runs.
    feeds: settings of the guided runs that ranges are measured on.
    prompts: file of the prompts of those runs and of the gates, one in each line, for a build with
    a text encoder; None for those of `sg_calibration.prompts`.
    exclude: layers that stay in the base precision.
    text: quantize the projections of the text, too. They run once for a prompt.
    like: quantized bundle whose choice of layers is taken over; None to search for one.
    gates: quality gates; None for those in QUALITY_GATES.
    search_images: number of images in the search for layers, for each guidance.
    gate_images: number of images for the quality gates, for each guidance.
    allow_quality_loss: write the bundle even if it fails its gates.
    """

    type: QuantizedType = "int8"
    method: Method | None = None
    table: Path | None = None
    data: Path | None = None
    feeds: FeedSettings = field(default_factory=FeedSettings)
    prompts: Path | None = None
    exclude: tuple[str, ...] = ()
    text: bool = False
    like: Path | None = None
    gates: QualityGates | None = None
    search_images: int = 4
    gate_images: int = GATE_IMAGES
    allow_quality_loss: bool = False

    def __post_init__(self) -> None:
        if self.type not in QUANTS:
            raise UsageError(f"type: expected one of {', '.join(QUANTS)}, found {self.type!r}")
        if self.method is not None and self.method not in METHODS:
            raise UsageError(f"method: expected one of {', '.join(METHODS)}, found {self.method!r}")
        if self.gates is not None and not (0 <= self.gates.cosine <= 1 and 0 <= self.gates.guided < math.inf):
            raise UsageError(
                f"gates: expected a cosine from 0 to 1 and a finite distance, found {self.gates.cosine:g} and "
                f"{self.gates.guided:g}"
            )
        if self.table is not None and self.data is not None:
            raise UsageError("`table` and `data`: expected one of them: the ranges are already in the first")
        if self.like is not None and self.exclude:
            raise UsageError("`like` and `exclude`: expected one of them: the bundle states which layers are excluded")

    def check_files(self) -> None:
        """Raise UsageError if a requested file or folder does not exist."""
        if self.table is not None and not self.table.is_file():
            raise UsageError(f"`table` {self.table}: found no file: make it with sg-export calibrate")
        if self.prompts is not None:
            read_prompts(self.prompts)
        for option, folder in (("data", self.data), ("like", self.like)):
            if folder is not None and not folder.is_dir():
                raise UsageError(f"`{option}` {folder}: found no folder of this name")

    @property
    def files(self) -> tuple[Path | None, ...]:
        """Files and folders that are read."""
        return self.table, self.data, self.like, self.prompts

    @property
    def effective_method(self) -> Method:
        """Rule that makes a range from observed values, stated or default."""
        return self.method or QUANTS[self.type].method

    @property
    def effective_gates(self) -> QualityGates:
        """Quality gates, stated or default."""
        return self.gates or QUANTS[self.type].gates
