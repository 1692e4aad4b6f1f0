"""Fixtures shared by the tests of text encoders and decoders."""

from pathlib import Path

import pytest

from sg_export.loading import load_model
from sg_runtime.manifest import ModelFacts


@pytest.fixture(scope="session")
def folder(full_pipeline: Path) -> Path:
    return full_pipeline


@pytest.fixture(scope="session")
def facts(folder: Path) -> ModelFacts:
    """Return the facts of the folder's network."""
    return load_model(folder).facts
