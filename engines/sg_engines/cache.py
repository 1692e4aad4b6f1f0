"""Engines that were built before, found by what they were built from.

An entry is two files named by its key: the engine, and a JSON file with the parts of the key, the engine's SHA-256 and
what its build took. Both appear whole; two processes that build the same engine write the same entry.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sg_engines.child import BuildFigures
from sg_runtime.files import replacing, sha256_of

SCHEMA = 1
"""To be raised when the same parts come to mean another engine."""

_FACTS = {"key": dict, "sha256": str, "seconds": float, "memory_bytes": int}
"""Types of what an entry's JSON file holds."""


@dataclass(frozen=True, slots=True)
class EngineKey:
    """Everything that changes an engine's bytes, and nothing else.

    name: of the graph. graph, weights: SHA-256. profiles: shapes by input. compute_capabilities: empty for the
    library's choice; gpu: what that depends on with TensorRT, the GPU's name, else empty.
    """

    name: str
    graph: str
    weights: str
    library: str
    version: str
    profiles: tuple[Mapping[str, tuple[int, ...]], ...]
    compute_capabilities: tuple[int, ...]
    workspace: int | None
    gpu: str
    schema: int = SCHEMA

    @property
    def digest(self) -> str:
        """The entry's name."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


class EngineCache:
    """A folder of engines."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fetch(self, key: EngineKey, output: Path) -> BuildFigures | None:
        """Copy the engine of `key` to `output` and return what its build took; None where there is none.

        An entry that was altered is removed, and counts as none.
        """
        engine, facts = self._files(key)
        known = _read(facts)
        if known is None:
            return None
        try:
            with replacing(output) as temporary:
                shutil.copyfile(engine, temporary)
                if sha256_of(temporary) != known["sha256"]:
                    raise FileNotFoundError(f"{engine}: not the engine that was stored")
        except FileNotFoundError:
            self._remove(key)
            return None
        return BuildFigures(known["seconds"], known["memory_bytes"])

    def store(self, key: EngineKey, engine: Path, figures: BuildFigures) -> None:
        """Keep a copy of an engine."""
        target, facts = self._files(key)
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            shutil.copyfile(engine, temporary)
        content = asdict(figures) | {"sha256": sha256_of(engine), "key": asdict(key)}
        with replacing(facts) as temporary:
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")

    def explain(self, key: EngineKey) -> str:
        """Say "hit", or in which parts the most similar entry of the same graph's name differs."""
        wanted = json.loads(json.dumps(asdict(key)))
        differences: list[list[str]] = []
        for facts in self._entries():
            known = _read(facts)
            if known is not None and known["key"].get("name") == key.name:
                differences.append([part for part in wanted if known["key"].get(part) != wanted[part]])
                if not differences[-1]:
                    whole = _sha256(facts.with_suffix(".engine")) == known["sha256"]
                    return "hit" if whole else "miss: the entry was altered; it is built anew"
        if not differences:
            return f"miss: no engine of {key.name} in {self.folder}"
        return f"miss: another {', '.join(sorted(differences, key=len)[0])}"

    def _entries(self) -> Iterator[Path]:
        yield from sorted(self.folder.glob("*.json"))

    def _files(self, key: EngineKey) -> tuple[Path, Path]:
        return self.folder / f"{key.digest}.engine", self.folder / f"{key.digest}.json"

    def _remove(self, key: EngineKey) -> None:
        for path in self._files(key):
            path.unlink(missing_ok=True)


def _sha256(engine: Path) -> str | None:
    """The hash of an engine, None where it is not there, or no more."""
    try:
        return sha256_of(engine)
    except FileNotFoundError:
        return None


def _read(facts: Path) -> dict[str, Any] | None:
    """The facts of an entry, or None where they are not there or damaged."""
    try:
        content = json.loads(facts.read_text(encoding="utf-8"))
        fits = all(isinstance(content[name], kind) for name, kind in _FACTS.items())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return content if fits else None
