"""Fixtures of the runtime's tests: an open pipeline, graphs of a fixed batch, and bundles with an altered manifest."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sg_export.compiler import CompileOptions, compile
from sg_runtime.pipeline import Pipeline


@pytest.fixture(scope="session")
def pipe(glyphs_bundle: Path) -> Pipeline:
    """The reference model, with up to five images in one run of a graph."""
    return Pipeline.load(glyphs_bundle, batch=5)


@pytest.fixture(scope="session")
def fixed_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model of latents, without class names, whose graphs are fixed to three images."""
    output = tmp_path_factory.mktemp("bundles") / "tiny-3"
    return compile(tiny_checkpoint, CompileOptions(output, sparsity=(0.5,), batch=3)).path


@pytest.fixture
def edited(tmp_path: Path, tiny_bundle: Path) -> Callable[[Callable[[Any], object]], Path]:
    """Makes a copy of the tiny bundle whose manifest, as parsed JSON, went through a function."""

    def edit(change: Callable[[Any], object]) -> Path:
        copy = tmp_path / "edited"
        shutil.copytree(tiny_bundle, copy)
        content = json.loads((copy / "manifest.json").read_bytes())
        change(content)
        (copy / "manifest.json").write_text(json.dumps(content))
        return copy

    return edit
