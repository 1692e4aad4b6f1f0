"""Cache of built engines, keyed by everything that an engine was built from.

An entry is two files, both named by the digest of its key: the engine, and a JSON file with the
parts of the key, the engine's SHA-256, and the time and memory of its build. Both files are
replaced atomically. Two processes that build the same engine write the same entry.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sg_engines.child import BuildFigures
from sg_runtime.files import replacing, sha256_of, temporary_beside

SCHEMA = 1
"""Version of the key. Increase it when the same parts of a key come to mean another engine."""

STALE = 3600.0
"""Seconds without a write after which a partial copy belongs to a process that was killed."""

_FACTS = {"key": dict, "sha256": str, "seconds": float, "memory_bytes": int}
"""Fields of an entry's JSON file, with their types."""


@dataclass(frozen=True, slots=True)
class EngineKey:
    """Everything that changes an engine's bytes, and nothing else.

    name: name of the graph.
    graph: SHA-256 of the ONNX file.
    weights: SHA-256 of the weights file.
    library: "tensorrt" or "tensorrt_rtx".
    version: version of the library.
    profiles: for each profile, the shape of every input with symbolic sizes.
    compute_capabilities: GPUs that the engine is for, 86 for 8.6; empty for the library's choice.
    workspace: limit of scratch memory in bytes; None for the library's choice.
    flags: builder flags that are set (True) or cleared (False).
    gpu: name and compute capability of the GPU, on which TensorRT's choice depends; else empty.
    schema: version of this key.
    """

    name: str
    graph: str
    weights: str
    library: str
    version: str
    profiles: tuple[Mapping[str, tuple[int, ...]], ...]
    compute_capabilities: tuple[int, ...]
    workspace: int | None
    flags: Mapping[str, bool]
    gpu: str
    schema: int = SCHEMA

    @property
    def digest(self) -> str:
        """Name of the entry: SHA-256 of all parts of the key."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


class EngineCache:
    """A folder of cached engines."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fetch(self, key: EngineKey, output: Path) -> BuildFigures | None:
        """Copy the engine of `key` to `output` and return the figures of its build.

        Returns None if the cache has no such entry, or one that cannot be read. An entry that was
        altered is removed, and None is returned. Raises OSError if `output` cannot be written.
        """
        engine, facts = self._files(key)
        known = _read(facts)
        if known is None:
            return None
        try:
            source = engine.open("rb")
        except FileNotFoundError:
            self._remove(key)
            return None
        except OSError:
            return None
        temporary = temporary_beside(output)
        try:
            with source, temporary.open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
            if sha256_of(temporary) != known["sha256"]:
                self._remove(key)
                return None
            temporary.replace(output)
        finally:
            temporary.unlink(missing_ok=True)
        return BuildFigures(known["seconds"], known["memory_bytes"])

    def store(self, key: EngineKey, engine: Path, figures: BuildFigures) -> None:
        """Store a copy of the engine at `engine` under `key`.

        Partial copies that killed processes left are removed. Raises OSError if the cache cannot be
        written.
        """
        target, facts = self._files(key)
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".*.partial"):
            with suppress(OSError):  # another process removed it
                if time.time() - leftover.stat().st_mtime > STALE:
                    leftover.unlink()
        with replacing(target) as temporary:
            shutil.copyfile(engine, temporary)
        content = asdict(figures) | {"sha256": sha256_of(engine), "key": asdict(key)}
        with replacing(facts) as temporary:
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")

    def explain(self, key: EngineKey) -> str:
        """Return "hit", or "miss" with the reason.

        The reason names the parts of the key in which the most similar entry of the same graph name
        differs.
        """
        wanted = json.loads(json.dumps(asdict(key)))
        differences: list[list[str]] = []
        for facts in self._entries():
            known = _read(facts)
            if known is not None and known["key"].get("name") == key.name:
                differences.append([part for part in wanted if known["key"].get(part) != wanted[part]])
                if not differences[-1]:
                    intact = _sha256(facts.with_suffix(".engine")) == known["sha256"]
                    return "hit" if intact else "miss: the entry was altered; the engine is built again"
        if not differences:
            return f"miss: no engine of {key.name} in {self.folder}"
        return f"miss: different {', '.join(sorted(differences, key=len)[0])}"

    def _entries(self) -> Iterator[Path]:
        yield from sorted(self.folder.glob("*.json"))

    def _files(self, key: EngineKey) -> tuple[Path, Path]:
        return self.folder / f"{key.digest}.engine", self.folder / f"{key.digest}.json"

    def _remove(self, key: EngineKey) -> None:
        with suppress(OSError):  # the cache may be read-only
            for path in self._files(key):
                path.unlink(missing_ok=True)


def _sha256(engine: Path) -> str | None:
    """Return the SHA-256 of an engine; None if the file does not exist or cannot be read."""
    try:
        return sha256_of(engine)
    except OSError:
        return None


def _read(facts: Path) -> dict[str, Any] | None:
    """Return the content of an entry's JSON file; None if it does not exist or is damaged."""
    try:
        content = json.loads(facts.read_text(encoding="utf-8"))
        fits = all(isinstance(content[name], kind) for name, kind in _FACTS.items())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return content if fits else None
