"""Shared by all manifest records: literal types, strict parsing, and checks of numbers."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from sg_runtime.errors import UsageError

GraphKind = Literal["condition", "dense", "sparse", "guided"]


GuidanceMode = Literal["none", "cfg", "sg", "cfg+sg", "autoguidance"]


NetworkName = Literal["main", "weak"]


Prediction = Literal["flow", "edm"]


HalfPrecision = Literal["fp16", "bf16"]


Precision = Literal["fp32", "fp16", "bf16"]


QuantizedType = Literal["int8", "fp8"]


EngineLibrary = Literal["tensorrt", "tensorrt_rtx"]
ENGINE_NAMES: Mapping[EngineLibrary, str] = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
"""Name of each library in messages."""
ENGINE_TARGETS: Mapping[EngineLibrary, str] = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
"""Name of each library as a build target and as a backend."""


SamplerName = Literal["euler", "heun"]


FLOAT32_MAX = 3.4028234663852886e38


FLOAT32_MIN = 2.0**-126
"""Smallest positive float32 number with full precision."""


class Strict:
    """Base of records that reject unknown keys and values of another type."""

    __slots__ = ()
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}


def check_counts(owner: object, least: int, *names: str) -> None:
    """Raise UsageError if a named attribute of `owner` is below `least`."""
    for name in names:
        if (value := getattr(owner, name)) < least:
            raise UsageError(f"{name}: expected at least {least}, found {value}")
