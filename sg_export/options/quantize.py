"""How to quantize, and which requests are refused before any work."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sg_calibration.settings import METHODS, FeedSettings, Method
from sg_runtime.errors import UsageError
from sg_runtime.manifest import QualityGates, QuantizedType

QUALITY_GATES: Mapping[QuantizedType, QualityGates] = {
    "int8": QualityGates(0.99, 0.10),
    "fp8": QualityGates(0.995, 0.06),
}
"""By default."""

GATE_IMAGES = 8
"""Images that gates are judged on, all together, for every guidance."""

DEFAULT_METHODS: Mapping[QuantizedType, Method] = {"int8": "percentile", "fp8": "min-max"}
"""What `benchmarks/quantization.py` found best: INT8 gains from cutting off outliers, FP8 has room for them."""


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """How to quantize.

    table: ranges from `sg-export calibrate`; without one they are measured, on `data`, a user's shards, or on guided
    runs by `feeds`. method: see `effective_method`. exclude: layers that stay in high precision. like: a quantized
    bundle whose choice of layers to take over, in place of a search. gates: in place of QUALITY_GATES. search_images,
    gate_images: for every guidance. allow_quality_loss: write the bundle though it fails its gates.
    """

    type: QuantizedType = "int8"
    method: Method | None = None
    table: Path | None = None
    data: Path | None = None
    feeds: FeedSettings = field(default_factory=FeedSettings)
    exclude: tuple[str, ...] = ()
    like: Path | None = None
    gates: QualityGates | None = None
    search_images: int = 4
    gate_images: int = GATE_IMAGES
    allow_quality_loss: bool = False

    def __post_init__(self) -> None:
        if self.type not in QUALITY_GATES:
            raise UsageError(f"type: expected one of {', '.join(QUALITY_GATES)}, found {self.type!r}")
        if self.method is not None and self.method not in METHODS:
            raise UsageError(f"method: expected one of {', '.join(METHODS)}, found {self.method!r}")
        if self.gates is not None and not (0 <= self.gates.cosine <= 1 and 0 <= self.gates.guided < math.inf):
            raise UsageError(
                f"gates: expected a cosine from 0 to 1 and a finite distance, found {self.gates.cosine:g} and "
                f"{self.gates.guided:g}"
            )
        if self.table is not None and self.data is not None:
            raise UsageError("--calibration and --calib-data: expected one of them: the table has the ranges already")
        if self.like is not None and self.exclude:
            raise UsageError("--like and --exclude: expected one of them: the bundle says which layers are left out")

    def check_files(self) -> None:
        """Raise UsageError where a file or folder that is asked for is not there."""
        if self.table is not None and not self.table.is_file():
            raise UsageError(f"--calibration {self.table}: found no file: make it with sg-export calibrate")
        for option, folder in (("--calib-data", self.data), ("--like", self.like)):
            if folder is not None and not folder.is_dir():
                raise UsageError(f"{option} {folder}: found no folder of this name")

    @property
    def effective_method(self) -> Method:
        """How a range follows from what was seen."""
        return self.method or DEFAULT_METHODS[self.type]

    @property
    def effective_gates(self) -> QualityGates:
        """The gates that hold."""
        return self.gates or QUALITY_GATES[self.type]
