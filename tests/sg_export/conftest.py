"""Fixtures of the compiler's tests."""

from pathlib import Path

import pytest

from sg_export.compiler import CompileOptions, compile


@pytest.fixture(scope="session")
def fixed_bundle(tiny_checkpoint: Path) -> Path:
    """The tiny model for SG at sparsities 0.25 and 0.5, its checkpoint beside it; graphs of three images."""
    options = CompileOptions(tiny_checkpoint.parent / "fixed-bundle", (0.5,), (0.25,), batch=3)
    return compile(tiny_checkpoint, options).path


@pytest.fixture(scope="session")
def cfg_bundle(tiny_checkpoint: Path) -> Path:
    """The tiny model for CFG at sparsity 0.25, its checkpoint beside it; graphs of three images."""
    options = CompileOptions(
        tiny_checkpoint.parent / "cfg-bundle", guidance="cfg", strong_sparsity=(0.25,), batch=3, scale=1.5, steps=7
    )
    return compile(tiny_checkpoint, options).path
