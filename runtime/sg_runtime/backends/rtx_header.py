"""Header of a TensorRT-RTX engine, read without the library that built it and without a GPU."""

import struct
from dataclasses import dataclass
from pathlib import Path

from sg_runtime.errors import BundleError

_MAGIC = b"vtrt"
_VERSION, _TARGETS = slice(24, 28), slice(32, 36)
RTX_TARGETS = (75, 80, 86, 89, 120, 121)
"""Compute capabilities that TensorRT-RTX can target, in the order of their bits in a plan."""


@dataclass(frozen=True, slots=True)
class PlanHeader:
    """Library version and target GPUs of a TensorRT-RTX plan.

    version: version of the library that built the plan.
    compute_capabilities: target GPUs, 86 for 8.6.

    NVIDIA does not document this header. It was inferred from plans that TensorRT-RTX 1.7 built for
    one target each. They differ only here and in the target's name. Bits of unknown GPUs are
    ignored.
    """

    version: str
    compute_capabilities: tuple[int, ...]


def read_rtx_header(path: Path) -> PlanHeader:
    """Return the header of the TensorRT-RTX plan at `path`.

    Raises BundleError if the file is not a plan or is truncated.
    """
    with path.open("rb") as stream:
        start = stream.read(_TARGETS.stop)
    if len(start) < _TARGETS.stop or not start.startswith(_MAGIC):
        raise BundleError(
            f"{path}: expected a plan of TensorRT-RTX, found {len(start)} bytes that begin with {start[:4]!r}; "
            f"build it again"
        )
    (bits,) = struct.unpack("<I", start[_TARGETS])
    targets = tuple(target for bit, target in enumerate(RTX_TARGETS) if bits >> bit & 1)
    return PlanHeader(".".join(map(str, start[_VERSION])), targets)
