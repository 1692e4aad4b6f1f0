"""What the first bytes of an engine say of it, readable without the library that built it, or a GPU."""

import struct
from dataclasses import dataclass
from pathlib import Path

from sg_runtime.errors import BundleError

_MAGIC = b"vtrt"
_VERSION, _TARGETS = slice(24, 28), slice(32, 36)
RTX_TARGETS = (75, 80, 86, 89, 120, 121)
"""GPUs that TensorRT-RTX builds for, in the order of their bits in a plan."""


@dataclass(frozen=True, slots=True)
class PlanHeader:
    """Version of the library and the GPUs, 86 for 8.6, that a TensorRT-RTX plan was built for.

    Not documented by NVIDIA: read off plans that TensorRT-RTX 1.7 built for one target each, which differ here alone
    (and in the target's name). A bit for a GPU that is not known is left out.
    """

    version: str
    compute_capabilities: tuple[int, ...]


def read_rtx_header(path: Path) -> PlanHeader:
    """The header of the TensorRT-RTX plan at `path`. Raises BundleError where it is none, or cut off."""
    with path.open("rb") as stream:
        start = stream.read(_TARGETS.stop)
    if len(start) < _TARGETS.stop or not start.startswith(_MAGIC):
        raise BundleError(
            f"{path}: expected a plan of TensorRT-RTX, found {len(start)} bytes that begin with {start[:4]!r}; "
            f"build it anew"
        )
    (bits,) = struct.unpack("<I", start[_TARGETS])
    targets = tuple(target for bit, target in enumerate(RTX_TARGETS) if bits >> bit & 1)
    return PlanHeader(".".join(map(str, start[_VERSION])), targets)
