"""How to quantize, and which requests are refused before any work."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sg_calibration.settings import METHODS, FeedSettings, Method
from sg_runtime.errors import UsageError
from sg_runtime.manifest import Gates, QuantizedType

GATES: Mapping[QuantizedType, Gates] = {"int8": Gates(0.99, 0.10), "fp8": Gates(0.995, 0.06)}
"""By default."""

GATE_IMAGES = 8
"""Images that gates are judged on, all together, for every guidance."""

DEFAULT_METHODS: Mapping[QuantizedType, Method] = {"int8": "percentile", "fp8": "min-max"}
"""What `benchmarks/quantization.py` found best: INT8 gains from cutting off outliers, FP8 has room for them."""


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """How to quantize.

    table: ranges from `sg-export calibrate`; without one they are measured, on `data`, a user's shards, or on guided
    runs by `feeds`. method: see `rule`. exclude: layers that stay in high precision. plan: a quantized bundle whose
    choice of layers holds, in place of a search. gates: in place of GATES. search_images, gate_images: for every
    guidance. allow_quality_loss: write the bundle though it fails its gates.
    """

    type: QuantizedType = "int8"
    method: Method | None = None
    table: Path | None = None
    data: Path | None = None
    feeds: FeedSettings = field(default_factory=FeedSettings)
    exclude: tuple[str, ...] = ()
    plan: Path | None = None
    gates: Gates | None = None
    search_images: int = 4
    gate_images: int = GATE_IMAGES
    allow_quality_loss: bool = False

    def __post_init__(self) -> None:
        if self.type not in GATES:
            raise UsageError(f"type: expected one of {', '.join(GATES)}, found {self.type!r}")
        if self.method is not None and self.method not in METHODS:
            raise UsageError(f"method: expected one of {', '.join(METHODS)}, found {self.method!r}")
        if self.gates is not None and not (0 <= self.gates.cosine <= 1 and 0 <= self.gates.guided < math.inf):
            raise UsageError(
                f"gates: expected a cosine from 0 to 1 and a finite distance, found {self.gates.cosine:g} and "
                f"{self.gates.guided:g}"
            )
        if self.table is not None and self.data is not None:
            raise UsageError("--calibration and --calib-data: expected one of them: the table has the ranges already")
        if self.plan is not None and self.exclude:
            raise UsageError("--plan and --exclude: expected one of them: the plan says which layers are left out")

    def check_files(self) -> None:
        """Raise UsageError where a file or folder that is asked for is not there."""
        if self.table is not None and not self.table.is_file():
            raise UsageError(f"--calibration {self.table}: found no file: make it with sg-export calibrate")
        for option, folder in (("--calib-data", self.data), ("--plan", self.plan)):
            if folder is not None and not folder.is_dir():
                raise UsageError(f"{option} {folder}: found no folder of this name")

    @property
    def rule(self) -> Method:
        """How a range follows from what was seen."""
        return self.method or DEFAULT_METHODS[self.type]

    @property
    def limits(self) -> Gates:
        """The gates that hold."""
        return self.gates or GATES[self.type]
