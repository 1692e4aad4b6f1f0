"""Which parts run, and what a machine lacks for them."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import bundles
from benchmarks.gpu.machine import MODULES, ROOT, Found
from benchmarks.gpu.parts import LIMIT, PARTS, chosen, missing, needs

DOCS = ROOT / "docs/gpu.md"


def complete(folder: Path) -> Path:
    """Make a folder look as after `build_xl`."""
    for name in (*bundles.XL_BATCHES, "random.pt"):
        (folder / name).mkdir(parents=True)
    (folder / bundles.STAMP).write_text(json.dumps(bundles.stamp(bundles.MODEL)))
    return folder


def names(given: list[str], xl: Path) -> list[str]:
    return [part.name for part in chosen(given, xl)]


def test_chosen_default_parts_build_the_bundles_if_they_are_missing(tmp_path: Path) -> None:
    assert names([], tmp_path) == ["driver", "correctness", "build-xl", "speed", "eager"]
    assert names(["eager", "driver"], tmp_path) == ["driver", "build-xl", "eager"]
    assert names(["forms"], tmp_path) == ["forms"]
    complete(tmp_path)
    assert names([], tmp_path) == ["driver", "correctness", "speed", "eager"]
    assert names(["build-xl"], tmp_path) == ["build-xl"]


def test_xl_missing_names_what_is_missing_or_old(tmp_path: Path) -> None:
    assert "no bundles of DiT-XL/2" in bundles.xl_missing(tmp_path / "none")
    xl = complete(tmp_path / "xl")
    assert bundles.xl_missing(xl) == ""
    assert "other code or with other options" in bundles.xl_missing(xl, "S/2")
    (xl / "random.pt").rmdir()
    assert bundles.xl_missing(xl).endswith("without random.pt")
    (xl / bundles.STAMP).write_text("{")
    assert "no bundles" in bundles.xl_missing(xl)


def test_every_part_has_checks_that_can_be_imported() -> None:
    for part in PARTS.values():
        module, _, name = part.checks.partition(":")
        checks = getattr(import_module(module), name)
        assert checks
        assert all(check.__doc__ for check in checks)
        assert set(part.modules) <= set(MODULES)
        assert part.default <= (part.seconds < LIMIT)


def test_missing_on_a_complete_machine_is_nothing(found: Found) -> None:
    assert [missing(part, found) for part in PARTS.values()] == [[]] * len(PARTS)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"card": "", "cuda": ""}, "torch with CUDA: found torch 2.11.0+cu130, which is built without CUDA"),
        ({"card": "", "driver": "470"}, "finds none (NVIDIA's driver: 470)"),
        ({"providers": ("CPUExecutionProvider",)}, "found onnxruntime 1.31.1 without the CUDA provider"),
    ],
)
def test_missing_names_what_was_found(found: Found, changes: dict[str, Any], said: str) -> None:
    (lack,) = missing(PARTS["speed"], replace(found, **changes))
    assert said in lack


@pytest.mark.parametrize(
    ("version", "enough"),
    [("1.31.1", True), ("1.32.0", True), ("2.0", True), ("1.31.0", False), ("1.30.2", False), ("1.4.10", False)],
)
def test_missing_compares_releases_of_onnxruntime_as_numbers(found: Found, version: str, enough: bool) -> None:
    lacks = missing(PARTS["speed"], replace(found, versions={**found.versions, "onnxruntime": version}))
    assert (lacks == []) is enough
    assert enough or lacks == [f"onnxruntime-gpu >= 1.31.1: found {version}"]


def without(versions: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: version for name, version in versions.items() if name not in names}


def test_missing_modules_come_with_the_command_that_installs_them(found: Found) -> None:
    bare = replace(found, versions=without(found.versions, "pydantic", "polygraphy"))
    assert missing(PARTS["driver"], bare) == []
    assert missing(PARTS["speed"], bare) == ["pydantic: pip install pydantic"]
    assert missing(PARTS["correctness"], bare) == ["pydantic, polygraphy: pip install pydantic polygraphy"]


def test_build_xl_needs_torch_but_no_gpu(found: Found) -> None:
    cpu = replace(found, card="", cuda="", providers=(), versions=without(found.versions, "onnxruntime"))
    assert missing(PARTS["build-xl"], cpu) == []
    assert "GPU" not in needs(PARTS["build-xl"])
    assert missing(PARTS["build-xl"], replace(cpu, versions=without(cpu.versions, "torch"))) == [
        "torch: pip install torch"
    ]


def test_docs_list_every_part_with_its_limit() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| (yes|no|if missing) \| (\d+) \|$", DOCS.read_text("utf-8"), re.MULTILINE)
    listed = [(name, {"yes": True}.get(default, False), int(seconds)) for name, default, seconds in rows]
    assert listed == [(part.name, part.default, part.seconds) for part in PARTS.values()]
