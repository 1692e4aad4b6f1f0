"""Shared by all manifest records: literal types, strict parsing, and checks of numbers."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from operator import index as as_index
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from sg_runtime.errors import UsageError

GraphKind = Literal["condition", "prompt", "dense", "sparse", "guided", "text", "decode"]


GuidanceMode = Literal["none", "cfg", "sg", "cfg+sg", "autoguidance"]


NetworkName = Literal["main", "weak", "text_encoder", "decoder"]


Part = Literal["text", "step", "decode"]
"""Parts of a bundle: the text encoder, the denoiser, and the decoder of latents."""
PARTS: tuple[Part, ...] = get_args(Part)


Cleaning = Literal["none", "light", "full"]
"""Rules by which prompts are cleaned before they are tokenized; see `sg_runtime.text`."""


Prediction = Literal["flow", "edm", "x0"]


HalfPrecision = Literal["fp16", "bf16"]


Precision = Literal["fp32", "fp16", "bf16"]


QuantizedType = Literal["int8", "fp8"]


OnnxTarget = Literal["onnxruntime", "onnxruntime-cuda"]
"""What ONNX graphs are for: any provider, or ONNX Runtime's CUDA provider."""


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


@dataclass(frozen=True, slots=True)
class TensorFacts(Strict):
    """An input or output of a graph. A symbolic dimension is given by its name."""

    name: str
    dtype: Literal["float32", "float16", "bfloat16", "int64"]
    shape: tuple[int | str, ...]

    @property
    def storage(self) -> np.dtype[Any]:
        """NumPy's type for arrays of this tensor. NumPy has no bfloat16: its bits are uint16."""
        return np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype)


def whole_number(what: str, value: Any) -> int:
    """Return an integer of any library as an int. Raises UsageError for other types."""
    try:
        return as_index(_not_bool(value))
    except TypeError:
        raise UsageError(f"{what}: expected a whole number, found {value!r}") from None


def number(what: str, value: Any) -> float:
    """Return a real number of any library as a float. Raises UsageError for other types."""
    try:
        if not isinstance(value, (str, bytes)) and not getattr(value, "ndim", 0):
            return float(_not_bool(value))
    except (TypeError, ValueError, OverflowError):
        pass
    raise UsageError(f"{what}: expected a number, found {value!r}")


def pair(what: str, value: Any, of: str) -> tuple[float, float]:
    """Return a sequence of two numbers as a tuple. Raises UsageError for anything else.

    of: the pair in words, for the message.
    """
    values = items(what, value, of)
    if len(values) != 2:
        raise UsageError(f"{what}: expected {of}, found {len(values)} values: {value!r}")
    return number(what, values[0]), number(what, values[1])


def items(what: str, value: Any, of: str) -> list[Any]:
    """Return the items of a sequence of any library. Raises UsageError for anything else.

    of: the sequence in words, for the message. Text, sets and mappings are no sequences.
    """
    try:
        if not isinstance(value, (str, bytes, Mapping, Set)) and len(value) >= 0:
            return list(value)
    except TypeError:
        pass
    raise UsageError(f"{what}: expected {of}, found {value!r}")


def flag(what: str, value: Any) -> bool:
    """Return a truth value as a bool. Raises UsageError for other types, such as the text "no"."""
    if not isinstance(value, (bool, np.bool_)):
        raise UsageError(f"{what}: expected True or False, found {value!r}")
    return bool(value)


def choice(what: str, value: Any, known: Sequence[str]) -> Any:
    """Return `value` if it is one of the names `known`. Raises UsageError if it is not."""
    if not isinstance(value, str) or value not in known:
        raise UsageError(f"{what}: expected one of {', '.join(known)}, found {value!r}")
    return value


def _not_bool(value: Any) -> Any:
    if isinstance(value, (bool, np.bool_)):
        raise TypeError("a truth value is no number")
    return value


def check_counts(owner: object, least: int, *names: str) -> None:
    """Raise UsageError if a named attribute of `owner` is below `least`."""
    for name in names:
        if (value := getattr(owner, name)) < least:
            raise UsageError(f"{name}: expected at least {least}, found {value}")
