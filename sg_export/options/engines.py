"""What engines to build."""

from dataclasses import dataclass
from pathlib import Path

from sg_runtime.manifest import EngineLibrary


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What engines to build. See `CompileOptions`."""

    libraries: tuple[EngineLibrary, ...]
    batches: tuple[int, ...]
    compute_capabilities: tuple[int, ...]
    workspace: int | None
    timing_cache: Path | None
    allow_unfused: bool
    cache: Path | None
