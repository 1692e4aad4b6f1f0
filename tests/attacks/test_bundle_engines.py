"""Bundles whose engines are missing, altered, moved or inconsistent with the manifest.

Each is refused, and no engine is opened.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sg_runtime.bundle import Bundle

Edit = Callable[[Callable[[Any], object]], None]
Refused = Callable[..., None]


@pytest.fixture
def bundle(engine_bundle: Path, tmp_path: Path) -> Path:
    """Return a copy of a complete bundle, which tests damage."""
    return Path(shutil.copytree(engine_bundle, tmp_path / "bundle"))


@pytest.fixture
def name(bundle: Path) -> str:
    """Return the name of the guided graph's engine in the bundle."""
    return Bundle.open(bundle).manifest.engines[-1].file


def test_load_of_a_truncated_engine_is_refused(bundle: Path, name: str, refused: Refused) -> None:
    size = (bundle / name).stat().st_size
    os.truncate(bundle / name, size - 1)
    refused(f"file {name}: expected {size} bytes, found {size - 1}; copy the bundle again or rebuild it")


def test_load_of_an_empty_engine_is_refused(bundle: Path, name: str, refused: Refused) -> None:
    (bundle / name).write_bytes(b"")
    refused(f"file {name}: expected ", " bytes, found 0;")


@pytest.mark.parametrize("place", [0, 24, 32, -1])
def test_load_of_an_altered_byte_is_refused(bundle: Path, name: str, refused: Refused, place: int) -> None:
    """The bytes are in the magic number, the version and the GPUs, and at the end."""
    content = bytearray((bundle / name).read_bytes())
    content[place] ^= 0x40
    (bundle / name).write_bytes(content)
    refused(f"file {name}: expected SHA-256", "it was altered after the build", "rebuild it")


def test_load_of_a_missing_engine_is_refused(bundle: Path, name: str, refused: Refused) -> None:
    (bundle / name).unlink()
    refused(f"file {name} is missing; copy the bundle again or rebuild it")


def test_load_of_engines_in_each_others_place_is_refused(bundle: Path, refused: Refused) -> None:
    first, second = sorted((bundle / "engines").iterdir())
    first.rename(bundle / "kept")
    second.rename(first)
    (bundle / "kept").rename(second)
    refused("file engines/", ": expected ", " bytes, found ")


@pytest.mark.parametrize("surplus", ["other.engine", "library.so", ".hidden"])
def test_load_of_a_file_that_is_not_listed_is_refused(bundle: Path, refused: Refused, surplus: str) -> None:
    """Otherwise nothing would check its bytes."""
    (bundle / "engines" / surplus).write_bytes(b"surplus")
    refused(f"file engines/{surplus} is not among the manifest's files: remove it, or copy the bundle again")


def test_load_of_a_folder_that_is_not_listed_is_refused(bundle: Path, refused: Refused) -> None:
    (bundle / "engines/more").mkdir()
    refused("file engines/more is not among the manifest's files: remove it, or copy the bundle again")


def test_load_of_an_engine_that_is_not_listed_is_refused(edit: Edit, name: str, refused: Refused) -> None:
    edit(lambda content: content["files"].pop(name))
    refused(f"{name} is not among the manifest's files; rebuild the bundle")


@pytest.mark.parametrize("path", ["../one.engine", "engines/../../one.engine", "/one.engine"])
def test_load_of_an_engine_outside_the_bundle_is_refused(
    bundle: Path, edit: Edit, name: str, refused: Refused, path: str
) -> None:
    shutil.copy(bundle / name, bundle.parent / "one.engine")
    edit(lambda content: content["engines"][-1].update(file=path))
    refused(f"{path} is not among the manifest's files")
    edit(lambda content: content["files"].update({path: content["files"][name]}))
    refused(f"file {path!r} points outside the bundle; do not use this bundle")


NOTHING = "expected at least one profile and compute capability, found none"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda engine: engine.update(profiles=[]), NOTHING),
        (lambda engine: engine.update(compute_capabilities=[]), NOTHING),
        (lambda engine: engine["profiles"][0].update(batch=0), "batch: expected at least 1, found 0"),
        (lambda engine: engine.pop("profiles"), "engines.1.profiles: "),
        (lambda engine: engine.update(library="openvino"), "engines.1.library: "),
        (lambda engine: engine.update(kind="decoder"), "engines.1.kind: "),
        (lambda engine: engine.update(network="third"), "engines.1.network: "),
        (lambda engine: engine.update(compute_capabilities=["86"]), "engines.1.compute_capabilities.0: "),
        (lambda engine: engine.update(version=1.7), "engines.1.version: "),
        (lambda engine: engine.update(file=None), "engines.1.file: "),
        (lambda engine: engine.update(plugin="evil.so"), "engines.1.plugin: "),
    ],
)
def test_load_of_an_engine_that_contradicts_itself_is_refused(
    edit: Edit, refused: Refused, change: Callable[[Any], object], message: str
) -> None:
    edit(lambda content: change(content["engines"][1]))
    refused("manifest.json: ", message, "; rebuild it")


def test_load_of_a_bundle_that_has_lost_its_engines_is_refused(bundle: Path, edit: Edit, refused: Refused) -> None:
    """The bundle has neither engines nor graphs, so there is nothing to run."""
    shutil.rmtree(bundle / "engines")
    edit(lambda content: content.update(engines=[], files={}))
    refused("expected ONNX graphs, found engines alone")
